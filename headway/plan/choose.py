"""`headway plan`: every mesh of N ranks for a recipe and a machine, ranked by predicted step time.

A mesh that cannot run the model gets a reason; one that does not fit in memory is listed last, with
the bytes it needs and the bytes there are."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from headway.config import UsageError
from headway.plan.cost import ModelCosts, total
from headway.plan.describe import summary
from headway.plan.layout import (
    AxisName,
    MeshLayout,
    auto_chunks,
    illegal,
    meshes,
    micro_batch,
    stored,
    used,
)
from headway.plan.machine import NUMBERS
from headway.plan.memory import memory
from headway.plan.setting import Setting
from headway.plan.time import step_flops, step_seconds
from headway.plan.traffic import Scheme
from headway.plan.volume import comm_volumes, ep_totals

SchemeChoice = Literal["auto", "all_to_all", "all_to_all_per_slot", "all_gather"]
_AXES: tuple[AxisName, ...] = ("hp", "ep", "dp", "routers", "world")


def rank_meshes(setting: Setting, n_ranks: int, scheme: SchemeChoice = "auto") -> dict[str, Any]:
    """Return everything that `headway plan` shows, JSON-ready; the fastest mesh comes first.

    `scheme` of the ep axis: `auto` lists both the all-gather and the all-to-all that sends fewer
    bytes. Raises UsageError where no mesh of N ranks can run, whatever its axes."""
    config = setting.config
    if n_ranks < 1:
        raise UsageError(f"--gpus {n_ranks} is below 1; use 1 or more")
    (micro, passes), seq_len = micro_batch(config, n_ranks), config.data.seq_len
    rows, refused = [], []
    costs = setting.costs(micro)
    formulas: dict[str, dict[str, str]] = {}
    for mesh in meshes(n_ranks):
        reason = illegal(config.model, mesh)
        if reason:
            refused.append({"dp": mesh.dp, "hp": mesh.hp, "ep": mesh.ep, "reason": reason})
            continue
        for layout in _variants(setting, mesh, micro * passes * seq_len, passes, scheme):
            rows.append(_row(setting, costs, layout, micro, passes, formulas))
    rows.sort(key=lambda row: (not row["fits"], row["step_seconds"]))
    machine = setting.machine
    return {
        "recipe": config.recipe,
        "model": summary(config),
        "gpus": n_ranks,
        "gpus_per_node": setting.per_node,
        "dtype": {2: "bfloat16", 4: "float32"}[setting.bytes_per_value],
        "chunks": setting.chunks or "auto",
        "payload": config.mesh.payload,
        "imbalance": setting.imbalance,
        "machine": {
            "name": machine.name,
            **{n: {"value": vars(machine)[n], "origin": machine.origin_of(n)} for n in NUMBERS},
        },
        "batch_size": config.data.batch_size,
        "tokens_per_step": config.data.batch_size * seq_len,
        "tokens_per_rank": micro * passes * seq_len,
        "micro_batch_size": micro,
        "passes": passes,
        "best": next((row for row in rows if row["fits"]), None),
        "best_replicated": next(
            (row for row in rows if row["fits"] and row["replicas"] == "replicate"), None
        ),
        "meshes": rows,
        "illegal": refused,
        "formulas": _SINGLE | formulas,
    }


def _variants(
    setting: Setting, mesh: MeshLayout, n_tokens: int, passes: int, wanted: SchemeChoice
) -> Iterator[MeshLayout]:
    """Yield the mesh with each scheme of its ep axis, replicated and sharded."""
    schemes: list[Scheme | None] = [None]
    if mesh.ep > 1 and wanted == "auto":
        calls = passes * setting.chunks_on(mesh)
        sizes = ep_totals(setting.config.model, mesh, n_tokens, calls, setting.payload)
        dedup, slots = sizes["all_to_all"], sizes["all_to_all_per_slot"]
        schemes = ["all_to_all" if dedup <= slots else "all_to_all_per_slot", "all_gather"]
    elif mesh.ep > 1 and wanted != "auto":
        schemes = [wanted]
    for scheme in schemes:
        for shard in (False, True) if mesh.ranks > 1 else (False,):
            yield replace(mesh, scheme=scheme, shard=shard)


def _row(
    setting: Setting,
    costs: ModelCosts,
    layout: MeshLayout,
    micro: int,
    passes: int,
    formulas: dict[str, dict[str, str]],
) -> dict[str, Any]:
    config, b, chunks = setting.config, setting.bytes_per_value, setting.chunks_on(layout)
    n_tokens = micro * passes * config.data.seq_len
    held = memory(config, costs, layout, micro, b, setting.imbalance_on(layout))
    volumes = comm_volumes(setting, costs, layout, n_tokens, passes)
    parts = step_seconds(setting, costs, layout, n_tokens, passes, held, volumes)
    flops = step_flops(config, costs, n_tokens)
    groups = {"memory": held, "bytes_sent": volumes, "seconds": parts, "flops": flops}
    for group, items in groups.items():
        formulas.setdefault(group, {}).update({i.name: i.formula for i in items})
    bytes_held, step = round(total(held)), total(parts)
    fits = bytes_held <= setting.machine.memory
    there_are = f"{setting.machine.name} has {round(setting.machine.memory):,}"
    by_scheme: dict[Scheme, float] = {}
    if layout.ep > 1:
        by_scheme = ep_totals(config.model, layout, n_tokens, passes * chunks, setting.payload)
    return {
        "mesh": str(layout),
        "dp": layout.dp,
        "hp": layout.hp,
        "ep": layout.ep,
        "scheme": layout.scheme,
        "chunks": chunks,
        "chunks_because": f"--chunks {setting.chunks}"
        if setting.chunks
        else auto_chunks(layout, setting.per_node)[1],
        "fewest_bytes": layout.scheme is None
        or by_scheme[layout.scheme] == min(by_scheme.values()),
        "replicas": "fsdp" if layout.shard else "replicate",
        "fits": fits,
        "reason": "" if fits else f"needs {bytes_held:,} bytes and {there_are}",
        "parameters": sum(used(costs, layout).values()),
        "parameters_held": round(sum(stored(weights, layout) for weights in costs.weights)),
        "flops": {i.name: round(i.value) for i in flops},
        "flops_total": round(total(flops)),
        "bytes_sent": {w.name: round(w.bytes) for w in volumes},
        "bytes_sent_total": round(sum(w.bytes for w in volumes)),
        "messages": {w.name: w.messages for w in volumes},
        "ep_bytes_by_scheme": {name: round(value) for name, value in by_scheme.items()},
        "links": {
            axis: "within a node" if layout.in_one_node(axis, setting.per_node) else "between nodes"
            for axis in _AXES
            if layout.size(axis) > 1
        },
        "memory": {i.name: round(i.value) for i in held},
        "memory_bytes": bytes_held,
        "seconds": {i.name: i.value for i in parts},
        "step_seconds": step,
        "tokens_per_second": n_tokens * layout.ranks / step,
        "mfu": costs.training_flops * n_tokens / (step * setting.machine.peak_of(b)),
    }


_SINGLE: dict[str, Any] = {
    "parameters": "replicated + routers (/ hp where they read sub-tokens) + experts / (hp·ep)",
    "parameters_held": "the same; with fsdp replicated / N, routers / (dp·ep), experts / dp",
    "flops_total": "Σ flops",
    "bytes_sent_total": "Σ bytes_sent",
    "memory_bytes": "Σ memory",
    "step_seconds": "Σ seconds",
    "tokens_per_second": "T·N / step_seconds",
    "mfu": "3·T·FLOPs forward / (step_seconds·peak)",
}
