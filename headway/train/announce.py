"""What is known before step 0: run.json, and the lines for people."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.checkpoint.run_folder import torchrun_job
from headway.parallel.mesh import Mesh
from headway.report.provenance import provenance
from headway.train.records import Log
from headway.train.resolve import Resolved, Sizes


def run_info(
    resolved: Resolved, sizes: Sizes, data: dict[str, Any], recipe_source: str
) -> dict[str, Any]:
    """Return the contents of run.json; `data` is what the data add to it."""
    return {
        "config": resolved.config.to_dict(),
        "job": torchrun_job(),
        "recipe_source": recipe_source,
        "derived": resolved.derived,
        **provenance(),
        "parameters": {"total": sizes.total, "active": sizes.active},
        **data,
    }


def announce(resolved: Resolved, mesh: Mesh, sizes: Sizes, run_dir: Path, log: Log) -> None:
    """Log what will run: derived values, slow paths, parameters, kernels and mesh."""
    for name, sentence in resolved.derived.items():
        log(f"{name} = {sentence}")
    for note in resolved.notes:
        log(f"note: {note}")
    for remark in resolved.remarks:
        log(f"slow: {remark}")
    if resolved.device.type == "cpu":
        threads, policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "")
        if note := oversubscribed(os.getloadavg()[0], os.cpu_count() or 1, threads, policy):
            log(f"note: {note}")
    run = resolved.config.run
    activations = "recomputed in backward" if run.recompute else "kept for backward"
    parameters = f"parameters {sizes.total:,} total, {sizes.active:,} active per token"
    log(f"{parameters}; run folder {run_dir}")
    log(
        f"path: {resolved.device.type}, {torch.get_num_threads()} threads, matmuls in "
        f"{str(resolved.dtype).removeprefix('torch.')}, expert activations {activations}, "
        f"{'compiled' if run.compile else 'not compiled'}"
    )
    if mesh.size > 1:
        shard = mesh.config.shard
        sharded = "" if shard == "replicate" else f", parameters sharded ({shard})"
        log(f"mesh: {mesh.size} ranks, {mesh}, over {dist.get_backend()}{sharded}")


def oversubscribed(load: float, cores: int, threads: int, wait_policy: str) -> str:
    """Return advice for CPUs that are busy with other work; empty where there is none to give.

    Args:
        load: processes that want to run, mean over a minute (`os.getloadavg`), before training.
        wait_policy: OMP_WAIT_POLICY. OpenMP's threads spin while they wait for each other; where
            the other one is not running, that takes the time it needs (docs/kernels.md).
    """
    if threads == 1 or load < cores or wait_policy.lower() == "passive":
        return ""
    return (
        f"{load:.1f} processes want this machine's {cores} cores, and {threads} threads that wait "
        "for each other are slow beside them; --run.threads 1 or OMP_WAIT_POLICY=passive may be "
        "faster"
    )
