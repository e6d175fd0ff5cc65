"""Checks of a whole config before step 0: every message names both values and the fix.

What belongs to one room is checked by that room and called from here; what lies between rooms
(heads and mesh, batch and replicas, widths and heads) is checked here. Nothing is dropped silently:
an option that would have no effect is an error.
"""

import math
from collections.abc import Iterable

from headway.config import Config, ModelConfig, MoEConfig, OptimConfig, UsageError
from headway.data.shards import validate as check_data
from headway.model.router import check_router
from headway.train.schedule import check_schedule


def validate(config: Config) -> dict[str, str]:
    """Field → a sentence on where its derived value comes from, for values that need neither data
    nor device.

    Raises UsageError, one line, for the first thing that cannot work.
    """
    derived = check_model(config.model)
    check_data(config.data)
    _check_micro_batch(config)
    check_schedule(config.optim)
    _check_optim(config.optim)
    _check_run(config)
    _check_mesh(config)
    return derived


def check_model(model: ModelConfig) -> dict[str, str]:
    """The part of `validate` that concerns the architecture; what `Transformer` takes for
    granted."""
    _at_least(
        ("model.n_layers", model.n_layers, 1),
        ("model.d_model", model.d_model, 1),
        ("model.n_heads", model.n_heads, 1),
        ("model.vocab_size", model.vocab_size, 0),
        ("model.n_kv_heads", model.n_kv_heads, 0),
        ("model.d_head", model.d_head, 0),
        ("model.logit_softcap", model.logit_softcap, 0),
    )
    _above_zero(
        ("model.rope_theta", model.rope_theta),
        ("model.norm_eps", model.norm_eps),
        ("model.init_std", model.init_std),
    )
    derived = _check_attention(model)
    if any(entry < 0 for entry in model.window):
        raise UsageError(
            f"model.window={' '.join(map(str, model.window))} has an entry below 0; "
            "use tokens, or 0 for full attention"
        )
    if len(model.window) > model.n_layers:
        raise UsageError(
            f"model.window has {len(model.window)} entries and model.n_layers={model.n_layers}; "
            f"use at most {model.n_layers} entries"
        )
    if model.moe.kind == "dense" or model.moe.n_dense_layers:
        _at_least(("model.d_ff", model.d_ff, 1))
    if model.moe.kind != "dense":
        derived |= _check_moe(model, model.moe)
    return derived


def remarks(config: Config) -> list[str]:
    """What works, and yet is probably not meant; one sentence each. With `run.strict` these are
    errors."""
    found = []
    balance = config.model.moe.balance
    if config.model.moe.kind != "dense" and balance.bias != "none" and balance.aux > 0:
        found.append(
            f"model.moe.balance.bias={balance.bias} and aux={balance.aux} both even out the load; "
            "the bias rule wants --model.moe.balance.aux 0"
        )
    if config.run.strict and found:
        raise UsageError(f"run.strict: {found[0]}")
    return found


def _check_attention(model: ModelConfig) -> dict[str, str]:
    derived = {}
    d_head = model.d_head
    if not d_head:
        if model.d_model % model.n_heads:
            raise UsageError(
                f"model.n_heads={model.n_heads} must divide model.d_model={model.d_model}; "
                f"use n_heads={_near(model.d_model, model.n_heads)}, or set model.d_head"
            )
        d_head = model.d_model // model.n_heads
        derived["model.d_head"] = f"{d_head}: d_model {model.d_model} / n_heads {model.n_heads}"
    if d_head % 2:
        raise UsageError(
            f"an attention head of width {d_head} (d_model={model.d_model}, "
            f"n_heads={model.n_heads}, d_head={model.d_head}) is odd, and RoPE rotates pairs; "
            f"set model.d_head to {d_head + 1}"
        )
    if not model.n_kv_heads:
        derived["model.n_kv_heads"] = f"{model.n_heads}: as many as n_heads"
    elif model.n_heads % model.n_kv_heads:
        raise UsageError(
            f"model.n_kv_heads={model.n_kv_heads} must divide model.n_heads={model.n_heads}; "
            f"use n_kv_heads={_near(model.n_heads, model.n_kv_heads)}"
        )
    return derived


def _check_moe(model: ModelConfig, moe: MoEConfig) -> dict[str, str]:
    _at_least(
        ("model.moe.n_experts", moe.n_experts, 1),
        ("model.moe.d_expert", moe.d_expert, 1),
        ("model.moe.n_heads", moe.n_heads, 1),
        ("model.moe.d_latent", moe.d_latent, 0),
        ("model.moe.d_shared", moe.d_shared, 0),
        ("model.moe.capacity_factor", moe.capacity_factor, 0),
        ("model.moe.n_dense_layers", moe.n_dense_layers, 0),
        ("model.moe.balance.aux", moe.balance.aux, 0),
        ("model.moe.balance.z", moe.balance.z, 0),
    )
    _above_zero(("model.moe.balance.bias_rate", moe.balance.bias_rate))
    if moe.balance.aux_scope not in ("sequence", "global_batch"):
        raise UsageError(
            f"model.moe.balance.aux_scope={moe.balance.aux_scope} is not known (the load of a "
            "micro-batch depends on how a step is cut); use sequence or global_batch"
        )
    check_router(moe.n_experts, moe.top_k, moe.router)
    if moe.n_dense_layers > model.n_layers:
        raise UsageError(
            f"model.moe.n_dense_layers={moe.n_dense_layers} exceeds "
            f"model.n_layers={model.n_layers}; use {model.n_layers} or fewer, or kind=dense"
        )
    if moe.n_heads > 1 and moe.kind != "multi_head_latent":
        raise UsageError(
            f"model.moe.n_heads={moe.n_heads} needs kind=multi_head_latent, and kind={moe.kind}; "
            "use n_heads=1 or that kind"
        )
    if moe.kind == "moe":
        if moe.d_latent:
            raise UsageError(
                f"model.moe.d_latent={moe.d_latent} has no effect with kind=moe; "
                "use d_latent=0, or kind=latent"
            )
        return {}
    d_latent = moe.d_latent or model.d_model
    if d_latent % moe.n_heads:
        raise UsageError(
            f"model.moe.n_heads={moe.n_heads} must divide the latent width {d_latent}; "
            f"use n_heads={_near(d_latent, moe.n_heads)}"
        )
    derived = {}
    if not moe.d_latent:
        derived["model.moe.d_latent"] = f"{d_latent}: as wide as d_model"
    if moe.n_heads > 1:
        derived["width of a latent head"] = (
            f"{d_latent // moe.n_heads}: d_latent {d_latent} / n_heads {moe.n_heads}"
        )
    return derived


def _check_micro_batch(config: Config) -> None:
    batch, micro = config.data.batch_size, config.data.micro_batch_size
    if micro < 0 or (micro and batch % micro):
        raise UsageError(
            f"data.micro_batch_size={micro} must divide data.batch_size={batch}; "
            f"use {_list(_divisors(batch))}"
        )


def _check_optim(optim: OptimConfig) -> None:
    _above_zero(
        ("optim.lr", optim.lr),
        ("optim.muon_lr", optim.muon_lr),
        ("optim.eps", optim.eps),
    )
    _at_least(
        ("optim.embed_lr_scale", optim.embed_lr_scale, 0),
        ("optim.router_lr_scale", optim.router_lr_scale, 0),
        ("optim.expert_lr_scale", optim.expert_lr_scale, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.clip", optim.clip, 0),
        ("optim.spike", optim.spike, 0),
        ("optim.max_skipped", optim.max_skipped, 1),
    )
    for name, value in (
        ("beta1", optim.beta1),
        ("beta2", optim.beta2),
        ("momentum", optim.momentum),
    ):
        if not 0 <= value < 1:
            raise UsageError(f"optim.{name}={value} is outside 0 ≤ {name} < 1; try 0.9")
    if optim.state_dtype == "bfloat16" and optim.beta2 > 0.99:
        raise UsageError(
            f"optim.state_dtype=bfloat16 loses an average as slow as optim.beta2={optim.beta2} "
            "in rounding; use beta2 ≤ 0.99 or state_dtype=float32"
        )


def _check_run(config: Config) -> None:
    run = config.run
    _at_least(
        ("run.seed", run.seed, 0),
        ("run.threads", run.threads, 0),
        ("run.log_every", run.log_every, 1),
        ("run.eval_every", run.eval_every, 0),
        ("run.eval_tokens", run.eval_tokens, 0),
        ("run.sample_every", run.sample_every, 0),
        ("run.sample_tokens", run.sample_tokens, 0),
        ("run.checkpoint_every", run.checkpoint_every, 0),
        ("run.keep_checkpoints", run.keep_checkpoints, 1),
        ("run.stop_bits_per_byte", run.stop_bits_per_byte, 0),
        ("run.max_seconds", run.max_seconds, 0),
    )


def _check_mesh(config: Config) -> None:
    mesh, moe, data = config.mesh, config.model.moe, config.data
    _at_least(("mesh.dp", mesh.dp, 1), ("mesh.hp", mesh.hp, 1), ("mesh.ep", mesh.ep, 1))
    _above_zero(("mesh.timeout", mesh.timeout))
    if not 0 <= mesh.chunks <= 4:
        raise UsageError(f"mesh.chunks={mesh.chunks} is outside 0 to 4; use 0 (auto) or 1 to 4")
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
                f"use {axis}={_list(_divisors(parts))}{more}"
            )
    world = mesh.dp * mesh.hp * mesh.ep
    if mesh.shard == "fsdp" and world == 1:
        raise UsageError(
            "mesh.shard=fsdp shares parameters among ranks, and there is 1; "
            "use mesh.shard=replicate or more ranks"
        )
    if mesh.shard == "hsdp" and (mesh.dp == 1 or world == mesh.dp):
        other, why = ("dp", "replicas") if mesh.dp == 1 else ("hp × ep", "ranks to share among")
        raise UsageError(
            f"mesh.shard=hsdp needs {why}, and {other}=1; use mesh.shard=fsdp or {other} ≥ 2"
        )
    at_once = world * (data.micro_batch_size or 1)
    if data.batch_size % at_once:
        fit = -(-data.batch_size // at_once) * at_once
        micro = f" × micro_batch_size={data.micro_batch_size}" if data.micro_batch_size else ""
        raise UsageError(
            f"a mesh of {world} ranks{micro} must divide batch_size={data.batch_size}, so that "
            f"every rank has as many rows; use batch_size {fit}"
        )
    rows = data.micro_batch_size or data.batch_size // world
    if mesh.chunks > rows and (counting := by_sequence(moe)):
        raise UsageError(
            f"mesh.chunks={mesh.chunks} cuts sequences, of which a micro-batch has {rows}, and "
            f"{counting} counts by sequence; use mesh.chunks={rows} or "
            f"data.micro_batch_size={mesh.chunks}"
        )
    if world > 1 and config.run.compile:
        raise UsageError(
            f"run.compile=True and a mesh of {world} ranks: the collectives are not traced yet; "
            "use run.compile=False"
        )


def by_sequence(moe: MoEConfig) -> str:
    """What needs whole sequences in every pass of a sparse layer; empty where nothing does."""
    if moe.kind == "dense":
        return ""
    if moe.capacity_factor:
        return f"model.moe.capacity_factor={moe.capacity_factor}"
    balance = moe.balance
    counts = balance.aux and balance.aux_scope == "sequence"
    return "model.moe.balance.aux_scope=sequence" if counts else ""


def _at_least(*fields: tuple[str, float, float]) -> None:
    for name, value, least in fields:
        if not least <= value < math.inf:  # also false for NaN
            raise UsageError(f"{name}={value} is below {least}; use a finite number ≥ {least}")


def _above_zero(*fields: tuple[str, float]) -> None:
    for name, value in fields:
        if not 0 < value < math.inf:
            raise UsageError(f"{name}={value} is not above 0; use a finite number > 0")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _near(width: int, n: int) -> str:
    """The divisors of `width` nearest to `n`."""
    return _list(sorted(sorted(_divisors(width), key=lambda d: abs(d - n))[:2]))


def _list(numbers: Iterable[int], most: int = 8) -> str:
    """`1, 2, 4 or 8`."""
    names = [str(n) for n in numbers]
    if len(names) > most:
        return f"{', '.join(names[:most])}, …"
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
