"""`headway plan`: the meshes of a cluster, by predicted step time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from tyro.conf import arg

from headway.cli.options import RecipeOptions, load_recipe, parse_with_config, print_json
from headway.config import MeshConfig, UsageError
from headway.plan import machine as machines
from headway.plan.machine import Machine


@dataclass(frozen=True)
class Plan(RecipeOptions):
    """Every mesh of a cluster for a recipe, by predicted step time.

    Leaves of the config are options too, but for the mesh, which is the question. `--json` ends
    with one object that has every mesh and every formula."""

    gpus: Annotated[str, arg(metavar="N", help_behavior_hint="(required)")] = ""
    """Ranks; every dp × hp × ep of them is tried."""
    gpu: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: h100)")] = ""
    """h100, h200, b200, a100 or cpu."""
    network: Annotated[str, arg(metavar="GBIT", help_behavior_hint="")] = ""
    """Network between nodes, per rank: Gbit/s, or 10gbe, 25gbe, 100gbe, edr, hdr, ndr, xdr; empty
    means what machines with this GPU usually have."""
    machine: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = ""
    """Numbers measured by `headway doctor --measure FILE`, in place of the table's."""
    gpus_per_node: int = 8
    """Ranks that share a node."""
    scheme: Annotated[str, arg(metavar="NAME")] = "auto"
    """Scheme of the ep axis: auto, all_to_all, all_to_all_per_slot or all_gather."""
    chunks: Annotated[str, arg(metavar="N")] = "auto"
    """Chunks of a micro-batch, for overlap; auto as mesh.chunks=0 has it."""
    imbalance: float = 1.0
    """Tokens of the most loaded rank of an ep axis over the mean; 1 for even loads."""


_ANSWERED = (
    "--mesh --mesh.dp --mesh.hp --mesh.ep --mesh.shard --mesh.ep-scheme --mesh.chunks".split()
)
"""Options of the config that a plan compares or chooses by itself."""


def plan(args: Sequence[str]) -> int:
    """Run `headway plan RECIPE --gpus N` and return its exit code: 1 where no mesh fits."""
    options, words = parse_with_config(Plan, args, "headway plan")
    if asked := next((word for word in words if word.partition("=")[0] in _ANSWERED), None):
        raise UsageError(f"plan tries every mesh of --gpus ranks; leave {asked} out")
    config = load_recipe("plan", options.recipe, words)
    if not options.gpus:
        raise UsageError("plan needs --gpus N, as in `headway plan large --gpus 64 --gpu h100`")

    from headway.config.check import validate
    from headway.config.power import powered
    from headway.data.tokenizer import load_tokenizer
    from headway.plan.choose import rank_meshes
    from headway.plan.describe import with_vocab
    from headway.plan.setting import Setting
    from headway.plan.table import format_plan
    from headway.plan.traffic import SCHEMES

    if options.scheme not in ("auto", *SCHEMES):
        raise UsageError(f"--scheme {options.scheme} is unknown; use auto, {', '.join(SCHEMES)}")
    if not 1 <= options.imbalance < float("inf"):
        fix = "use 1 for even loads, 1.3 for 30 % more"
        raise UsageError(f"--imbalance {options.imbalance:g} is no number ≥ 1; {fix}")
    machine = _machine(options)
    chunks = 0 if options.chunks == "auto" else _count("--chunks", options.chunks)
    config = replace(config, mesh=MeshConfig(payload=config.mesh.payload, chunks=chunks))
    validate(config)
    gpus = _count("--gpus", options.gpus)
    # as `train` on any mesh of as many ranks, which divide the batch that the rule gives
    on_ranks = powered(replace(config, mesh=MeshConfig(dp=gpus)))[0]
    config = replace(on_ranks, mesh=config.mesh)
    config = with_vocab(config, load_tokenizer(config.data.vocabulary).vocab_size)
    setting = Setting(
        config,
        machine,
        _count("--gpus-per-node", str(options.gpus_per_node)),
        2 if _dtype(config.run.dtype, machine, options.machine) == "bfloat16" else 4,
        chunks,
        options.imbalance,
    )
    ranking = rank_meshes(setting, gpus, options.scheme)
    print(format_plan(ranking))
    print_json(options.json, ranking)
    return 0 if ranking["best"] else 1


def _machine(options: Plan) -> Machine:
    if options.machine:
        machine = machines.read_machine(options.machine, options.gpu)
    else:
        machine = machines.machine_named(options.gpu or "h100")
    return machines.with_network(machine, options.network) if options.network else machine


def _dtype(wanted: str, machine: Machine, file: str) -> str:
    """Return the dtype of the matmuls: measured, or of the config, or fast on the machine."""
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
