"""`headway plan`: from the words of the command line to the meshes of a cluster."""

import dataclasses

from headway.cli.options import override, print_json, take, take_switch
from headway.cli.train import recipe_names, recipe_word
from headway.config import MeshConfig, UsageError
from headway.plan.machine import Machine

HELP = """usage: headway plan RECIPE --gpus N [options of the config]

  --gpus N            ranks; every dp × hp × ep of them is tried
  --gpu NAME          {gpus}; default h100
  --network GBIT      between nodes, per rank: Gbit/s, or {networks}
  --machine FILE      numbers measured by `headway doctor --measure FILE`, in place of the table's
  --gpus-per-node N   default 8
  --scheme NAME       of the ep axis: auto, {schemes}; default auto
  --chunks N          pieces of a micro-batch, for overlap; default auto, as mesh.chunks=0 has it
  --imbalance X       rows of the busiest rank of an ep axis over the mean; default 1.0
  --json              end with one JSON object that has every mesh and every formula
"""
_OWN = tuple(
    "--gpus --gpu --network --machine --gpus-per-node --scheme --chunks --imbalance".split()
)
_ANSWERED = (
    "--mesh --mesh.dp --mesh.hp --mesh.ep --mesh.shard --mesh.ep-scheme --mesh.chunks".split()
)
"""Options of the config that a plan compares or chooses by itself."""


def plan(args: list[str]) -> int:
    """`headway plan RECIPE --gpus N --gpu h100`; other options are those of the config."""
    from headway.plan import machine as machines
    from headway.plan.choose import plan as choose
    from headway.plan.table import render
    from headway.plan.time import Setting
    from headway.plan.traffic import SCHEMES

    if {"--help", "-h"} & set(args):
        names = {"gpus": machines.MACHINES, "networks": machines.NETWORKS, "schemes": SCHEMES}
        print(HELP.format(**{key: ", ".join(value) for key, value in names.items()}))
        return 0
    as_json, args = take_switch(args, "--json")
    words: dict[str, str | None] = {}
    for flag in _OWN:
        words[flag], args = take(args, flag)
    recipe, args = recipe_word(args)
    if recipe is None:
        raise UsageError(f"plan needs a recipe; use {recipe_names()}")
    if words["--gpus"] is None:
        raise UsageError("plan needs --gpus N, as in `headway plan large --gpus 64 --gpu h100`")
    if asked := next((word for word in args if word.partition("=")[0] in _ANSWERED), None):
        raise UsageError(f"plan tries every mesh of --gpus ranks; leave {asked} out")
    n_ranks = _count("--gpus", words["--gpus"])
    scheme = words["--scheme"] or "auto"
    if scheme != "auto" and scheme not in SCHEMES:
        raise UsageError(f"--scheme {scheme} is unknown; use auto, {', '.join(SCHEMES)}")
    if words["--machine"]:
        machine = machines.read(words["--machine"], words["--gpu"] or "")
    else:
        machine = machines.named(words["--gpu"] or "h100")
    if words["--network"]:
        machine = machines.with_network(machine, words["--network"])

    from headway import recipes
    from headway.config.check import validate
    from headway.data.tokenizer import load_tokenizer
    from headway.plan.describe import with_vocab

    config = override(recipes.load(recipe), args, f"headway plan {recipe}")
    chunks = 0 if words["--chunks"] in (None, "auto") else _count("--chunks", words["--chunks"])
    # the axes are the question
    config = dataclasses.replace(
        config, mesh=MeshConfig(payload=config.mesh.payload, chunks=chunks)
    )
    validate(config)
    config = with_vocab(config, load_tokenizer(config.data.tokenizer).vocab_size)
    dtype = _dtype(config.run.dtype, machine, words["--machine"])
    setting = Setting(
        config,
        machine,
        _count("--gpus-per-node", words["--gpus-per-node"] or "8"),
        2 if dtype == "bfloat16" else 4,
        chunks,
        _imbalance(words["--imbalance"] or "1"),
    )
    found = choose(setting, n_ranks, scheme)
    print(render(found))
    print_json(as_json, found)
    return 0 if found["best"] else 1


def _dtype(wanted: str, machine: Machine, file: str | None) -> str:
    """Of the matmuls: what was measured, what the config says, or what the machine is fast in."""
    if machine.dtype and wanted not in ("auto", machine.dtype):
        raise UsageError(
            f"run.dtype={wanted} and {file} was measured in {machine.dtype}; "
            f"use --run.dtype {machine.dtype}, or measure again"
        )
    if wanted != "auto":
        return wanted
    return machine.dtype or ("float32" if machine.peak <= machine.peak_float32 else "bfloat16")


def _count(flag: str, word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise UsageError(f"{flag} {word} is no whole number ≥ 1; use {flag} 8")
    return int(word)


def _imbalance(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise UsageError(
            f"--imbalance {word} is no number ≥ 1; use 1 for even loads, 1.3 for 30 % more"
        )
    return value
