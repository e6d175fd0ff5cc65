"""Options: shorthands, overrides of every leaf, and messages in one line."""

import subprocess
import sys
from dataclasses import replace

import pytest

from headway.cli import main as cli
from headway.cli import options
from headway.cli.options import override, parse_with_config
from headway.cli.plan import Plan
from headway.cli.train import Train
from headway.config import Config, UsageError, leaves
from headway.plan.machine import MACHINES, NETWORKS
from headway.plan.traffic import SCHEMES
from headway.recipes import RECIPES


def test_shorthands_name_leaves_that_exist():
    known = leaves(Config().to_dict())
    for leaf in options.SHORTHANDS.values():
        assert leaf.strip("-").replace("-", "_") in known


def test_overrides_reach_their_leaves():
    config = override(
        Config(recipe="x"),
        "--model.moe.top-k 7 --model.moe.router.gate sigmoid --model.window 3 0 --data a b --steps 9 --seed=4 "
        "--checkpoint-every 2 --run here --mesh hp=2,ep=4 --model.qk-norm none --run.compile --model.d_model 64".split(
            " "
        ),
        "headway train x",
    )
    assert config.model.moe.top_k == 7 and config.model.moe.router.gate == "sigmoid"
    assert config.model.window == (3, 0) and config.data.source == ("a", "b")
    assert (config.optim.steps, config.run.seed, config.run.checkpoint_every, config.run.dir) == (
        9,
        4,
        2,
        "here",
    )
    assert (config.mesh.dp, config.mesh.hp, config.mesh.ep) == (1, 2, 4)
    assert config.model.qk_norm == "none" and config.run.compile and config.model.d_model == 64
    untouched = replace(
        Config(recipe="x"), model=config.model, data=config.data, optim=config.optim, run=config.run
    )
    assert replace(untouched, mesh=config.mesh) == config


def test_every_leaf_is_an_option(capsys):
    assert cli.main(["train", "demo", "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in leaves(Config().to_dict()):
        head, _, tail = leaf.replace("_", "-").rpartition(".")
        assert f"--{head}.{tail}" in text if head else f"--{tail}" in text


def test_words_of_a_verb_are_told_from_those_of_the_config():
    words = "x --json --data a b --resume=r --steps 9 --overwrite".split()
    options, rest = parse_with_config(Train, words, "headway train")
    assert options == Train(recipe="x", json=True, resume="r", overwrite=True)
    assert rest == ["--data", "a", "b", "--steps", "9"]
    options, rest = parse_with_config(Plan, "--gpus 4 x --gpus_per_node 2".split(), "headway plan")
    assert (options.recipe, options.gpus, options.gpus_per_node, rest) == ("x", "4", 2, [])
    with pytest.raises(UsageError, match="unknown option --gpus; --help"):
        parse_with_config(Train, ["x", "--gpus", "4"], "headway train")


def test_help_names_what_can_be_given(capsys):
    """Machines, networks and schemes of `plan`, recipes and short names of all three verbs."""
    for verb in ("train", "plan", "describe"):
        assert cli.main([verb, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        named = [*RECIPES, *options.SHORTHANDS, "--json"]
        if verb == "plan":
            named += [*MACHINES, *NETWORKS, *SCHEMES]
        assert [name for name in named if name not in text] == []
        assert cli.main([verb, "demo", "--help"]) == 0  # the leaves with the recipe's values
        assert "--model.moe.n-experts INT" in capsys.readouterr().out


@pytest.mark.parametrize("args", ["--help", "train --help", "plan --help", "train dmo", "report"])
def test_what_needs_no_pytorch_does_not_import_it(args):
    program = f"""
import sys
from headway.cli import main as cli
cli.main({args.split()!r})
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Missing argument ───╮\n│ Missing value for    │\n│ argument '--a'.      │\n│ ──────────── │\n│ see --help │\n╰──╯\n",
        " Missing argument  \n ----------------- \n  Missing value for\n  argument '--a'. \n  -------\n  see --help  \n\n",
    ],
)
def test_boxes_become_one_line(box):
    """Drawn with lines on a terminal in UTF-8, with dashes elsewhere."""
    assert options._unboxed(box) == "missing value for argument '--a'"
