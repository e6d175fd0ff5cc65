"""Checks of a whole config before step 0: every message names both values and the fix.

Each section checks its own values; the rules between sections (heads and mesh, batch and replicas)
are here. Nothing is dropped silently: an option that would have no effect is an error."""

from headway.config.bounds import alternatives, divisors
from headway.config.errors import UsageError
from headway.config.mesh import MeshConfig
from headway.config.moe import MoEConfig
from headway.config.tree import Config


def validate(config: Config) -> dict[str, str]:
    """Check every section and the rules between them. Returns, for each derived value that needs
    neither data nor device, a sentence on where it comes from. Raises UsageError, one line, for the
    first thing that cannot work."""
    derived = config.model.check()
    config.data.check()
    config.optim.check()
    config.run.check()
    config.mesh.check()
    check_axes(config.model.moe, config.mesh)
    _check_batch(config)
    if config.optim.transfer == "width" and config.model.tied:
        raise UsageError(
            "optim.transfer=width gives embedding and output head different rates, and model.tied="
            "True makes them one; use model.tied=False"
        )
    if config.mesh.size > 1 and config.run.compile:
        raise UsageError(
            f"run.compile=True and a mesh of {config.mesh.size} ranks: the collectives are not "
            "traced yet; use run.compile=False"
        )
    return derived


def remarks(config: Config) -> tuple[str, ...]:
    """Return one sentence for each thing that works, and yet is probably not meant."""
    balance = config.model.moe.balance
    if config.model.moe.kind != "dense" and balance.bias != "none" and balance.aux > 0:
        return (
            f"model.moe.balance.bias={balance.bias} and aux={balance.aux} both even out the load; "
            "the bias rule wants --model.moe.balance.aux 0",
        )
    return ()


def check_axes(moe: MoEConfig, mesh: MeshConfig) -> None:
    """Check that heads and experts divide among the ranks of their axes."""
    if mesh.hp > 1 and moe.kind != "multi_head_latent":
        raise UsageError(
            f"mesh hp={mesh.hp} shares the heads of a Multi-Head LatentMoE, and kind={moe.kind}; "
            "use hp=1"
        )
    if mesh.ep > 1 and moe.kind == "dense":
        raise UsageError(f"mesh ep={mesh.ep} shares experts, and kind=dense has none; use dp")
    for axis, size, name, parts in (
        ("hp", mesh.hp, "n_heads", moe.n_heads),
        ("ep", mesh.ep, "n_experts", moe.n_experts),
    ):
        if parts % size:
            more = "; more ranks go to ep or dp" if axis == "hp" and size > parts else ""
            raise UsageError(
                f"mesh needs {axis}={size} to divide {name}={parts}; "
                f"use {axis}={alternatives(divisors(parts))}{more}"
            )


def _check_batch(config: Config) -> None:
    """Check that ranks and micro-batches divide the batch, and that chunks hold whole sequences."""
    mesh, moe, data = config.mesh, config.model.moe, config.data
    at_once = mesh.size * (data.micro_batch_size or 1)
    if data.batch_size % at_once:
        fit = -(-data.batch_size // at_once) * at_once
        micro = f" × micro_batch_size={data.micro_batch_size}" if data.micro_batch_size else ""
        raise UsageError(
            f"a mesh of {mesh.size} ranks{micro} must divide batch_size={data.batch_size}, so that "
            f"every rank has as many rows; use batch_size {fit}"
        )
    last = data.last_batch_size
    if last % mesh.size or (last > at_once and last % at_once):
        fit = -(-last // at_once) * at_once
        raise UsageError(
            f"a mesh of {mesh.size} ranks with micro_batch_size={data.micro_batch_size} does not "
            f"divide data.last_batch_size={last}; use {fit}"
        )
    rows = data.micro_batch_size or data.batch_size // mesh.size
    if mesh.chunks > rows and moe.counts_by_sequence:
        raise UsageError(
            f"mesh.chunks={mesh.chunks} cuts sequences, of which a micro-batch has {rows}, and "
            f"{moe.counts_by_sequence} counts by sequence; use mesh.chunks={rows} or "
            f"data.micro_batch_size={mesh.chunks}"
        )
