"""Options: shorthands, overrides of every leaf, and messages in one line."""

from dataclasses import replace

import pytest

from headway.cli import main as cli
from headway.cli import options
from headway.cli.options import override, take
from headway.config import Config, leaves


def test_shorthands_name_leaves_that_exist():
    known = leaves(Config().to_dict())
    for leaf in options.SHORTHANDS.values():
        assert leaf.strip("-").replace("-", "_") in known


def test_overrides_reach_their_leaves():
    made = override(
        Config(recipe="x"),
        "--model.moe.top-k 7 --model.moe.router.gate sigmoid --model.window 3 0 --data a b --steps 9 --seed=4 "
        "--checkpoint-every 2 --run here --mesh hp=2,ep=4 --model.no-qk-norm --run.compile --model.d_model 64".split(
            " "
        ),
        "headway train x",
    )
    assert made.model.moe.top_k == 7 and made.model.moe.router.gate == "sigmoid"
    assert made.model.window == (3, 0) and made.data.source == ("a", "b")
    assert (made.optim.steps, made.run.seed, made.run.checkpoint_every, made.run.dir) == (
        9,
        4,
        2,
        "here",
    )
    assert (made.mesh.dp, made.mesh.hp, made.mesh.ep) == (1, 2, 4)
    assert not made.model.qk_norm and made.run.compile and made.model.d_model == 64
    untouched = replace(
        Config(recipe="x"), model=made.model, data=made.data, optim=made.optim, run=made.run
    )
    assert replace(untouched, mesh=made.mesh) == made


def test_every_leaf_is_an_option(capsys):
    assert cli.main(["train", "demo", "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in leaves(Config().to_dict()):
        head, _, tail = leaf.replace("_", "-").rpartition(".")
        assert f"--{head}.{tail}" in text if head else f"--{tail}" in text


def test_take():
    assert take(["a", "--resume", "x", "b"], "--resume") == ("x", ["a", "b"])
    assert take(["--resume=x"], "--resume") == ("x", [])
    assert take(["a"], "--resume") == (None, ["a"])


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
