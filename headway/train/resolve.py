"""Resolving what a config leaves open; each derived value has a sentence that explains it."""

import dataclasses
import os
from dataclasses import dataclass

import torch

from headway.config import Config, MeshConfig, ModelConfig, MoEConfig, RunConfig, UsageError
from headway.config.check import remarks as config_remarks
from headway.config.check import validate
from headway.config.fill import filled
from headway.kernels.attention import reads_first
from headway.kernels.cpp import cpp_kernels
from headway.kernels.paths import check_float8, choose_path, explain
from headway.kernels.precision import native_bfloat16
from headway.model.costs import Workload, active_parameters, costs_of, flops, parameters, total
from headway.model.router import capacity
from headway.model.transformer import Transformer
from headway.parallel.dispatcher import ep_scheme
from headway.plan.layout import MeshLayout, auto_chunks
from headway.report.track import check_installed


@dataclass(frozen=True)
class Resolved:
    """A config without open values, and what follows from it and this machine."""

    config: Config
    """The config with vocabulary, micro-batch, intervals and chunks filled in."""
    device: torch.device
    dtype: torch.dtype
    """Dtype of the matmuls."""
    newton_schulz_dtype: torch.dtype
    """Dtype of Muon's iteration: that of the matmuls, but never emulated bfloat16."""
    derived: dict[str, str]
    """Field → its sentence, which is printed and written to run.json."""
    notes: tuple[str, ...]
    """Settings that work and are probably not intended; with `run.strict` they are errors."""
    remarks: tuple[str, ...]
    """Slow or skipped paths; with `run.strict` they are errors."""


def resolve(config: Config, vocab_size: int) -> Resolved:
    """Fill in what `config` leaves open; `vocab_size` is that of the tokenizer.

    Raises `UsageError` for values that cannot work, before anything is written."""
    derived = validate(config)
    notes = config_remarks(config)
    by_tokens = config.optim.transfer == "power"
    config, more = filled(config, vocab_size)
    derived |= more
    if by_tokens:  # another batch: the mesh and its chunks must divide that one
        validate(config)
    model, data, run = config.model, config.data, config.run
    mesh = config.mesh
    if not mesh.chunks and mesh.size > 1:
        mesh = _chunks(mesh, model.moe, data.micro_batch_size, derived)
    moe = model.moe
    if moe.kind != "dense" and moe.capacity_factor:
        rows = capacity(moe.capacity_factor, data.seq_len, moe.top_k, moe.n_experts)
        derived["model.moe.capacity_factor"] = (
            f"{moe.capacity_factor}: an expert takes at most {rows} rows of a sequence of "
            f"{data.seq_len} tokens; samples drop none"
        )
    device = _device(run, derived)
    dtype, remarks = _dtype(run, device, derived)
    remarks += _kernels(device, derived)
    remarks += _attention(config, device, dtype)
    remarks += _router(model, device)
    remarks += _experts(model, mesh, device, dtype, derived)
    check_installed(run.track)
    if run.strict and (notes or remarks):
        raise UsageError(f"run.strict: {[*notes, *remarks][0]}")
    config = dataclasses.replace(config, model=model, data=data, mesh=mesh, run=run)
    iteration = dtype if native_bfloat16(device) else torch.float32
    return Resolved(config, device, dtype, iteration, derived, notes, remarks)


def _chunks(mesh: MeshConfig, moe: MoEConfig, rows: int, derived: dict[str, str]) -> MeshConfig:
    """Choose mesh.chunks by the rule of `headway plan`. Ranks compare their configs before step 0:
    nodes of different sizes, which might choose differently, are an error that names it."""
    scheme = ep_scheme(mesh, moe.top_k)
    sharded = mesh.shard == "fsdp"
    sharding = MeshLayout(mesh.dp, mesh.hp, mesh.ep, scheme if mesh.ep > 1 else None, sharded)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size))  # torchrun sets it
    chunks, why = auto_chunks(sharding, per_node)
    if chunks > rows and (counting := moe.counts_by_sequence):
        chunks, why = rows, f"{counting} counts by sequence, and a micro-batch has {rows}"
    derived["mesh.chunks"] = f"{chunks}: {why}"
    return dataclasses.replace(mesh, chunks=chunks)


def _device(run: RunConfig, derived: dict[str, str]) -> torch.device:
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise UsageError("run.device=cuda and this torch sees no CUDA device; use run.device=cpu")
    if run.device == "auto":
        derived["run.device"] = "cuda: there is one" if cuda else "cpu: there is no CUDA device"
    return torch.device("cuda" if cuda and run.device != "cpu" else "cpu")


def _dtype(
    run: RunConfig, device: torch.device, derived: dict[str, str]
) -> tuple[torch.dtype, tuple[str, ...]]:
    native = native_bfloat16(device)
    narrow = run.dtype == "bfloat16" or (run.dtype == "auto" and native)
    if run.dtype == "auto":
        derived["run.dtype"] = f"{'bfloat16' if native else 'float32'}: this {device.type} " + (
            "multiplies bfloat16 natively" if native else "has no bfloat16 instructions"
        )
    slow = (
        f"run.dtype=bfloat16 is emulated on this {device.type}, many times slower than float32; "
        "use float32 or auto"
    )
    return torch.bfloat16 if narrow else torch.float32, (slow,) if narrow and not native else ()


def _kernels(device: torch.device, derived: dict[str, str]) -> tuple[str, ...]:
    """Build the C++ kernels now, not in the middle of the first step."""
    if device.type != "cpu":
        return ()
    kernels = cpp_kernels()
    if kernels.library is None:
        return (f"the C++ kernels will not run, the slower PyTorch paths do: {kernels.why}",)
    derived["kernels"] = f"C++, {kernels.why}"
    return ()


def _attention(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Say where windows and documents leave the fast attention."""
    S, documents = config.data.seq_len, config.data.doc_mask
    windowed = any(0 < window < S for window in config.model.window)
    if not (documents or windowed) or reads_first(device, dtype):
        return ()
    option = "data.doc_mask" if documents else f"model.window={config.model.window}"
    return (
        f"{option}: attention on this {device.type} takes a mask of {S} × {S}, which is slower",
    )


def _router(model: ModelConfig, device: torch.device) -> tuple[str, ...]:
    """Say where routers leave the kernels."""
    router = model.moe.router
    if model.n_sparse and router.n_groups > 1:
        what = "groups are selected by PyTorch's operators, slower than the kernel"
        return (f"model.moe.router.n_groups={router.n_groups}: {what}",)
    if model.n_sparse and router.logit_bias and device.type == "cuda":
        what = "scores of all tokens and experts are written, which the kernel avoids"
        return (f"model.moe.router.logit_bias=True: {what}",)
    return ()


def _experts(
    model: ModelConfig,
    mesh: MeshConfig,
    device: torch.device,
    dtype: torch.dtype,
    derived: dict[str, str],
) -> tuple[str, ...]:
    """Explain which path the experts take on a GPU; on a CPU `_kernels` has said it for all."""
    moe, width = model.moe, model.moe.head_width(model.d_model)
    if moe.kind != "dense" and moe.precision == "float8":
        check_float8(device.type, dtype, width, moe.d_expert, moe.activation)
        derived["model.moe.precision"] = "float8: e4m3 in forward, bfloat16 in backward"
    if device.type != "cuda" or moe.kind == "dense":
        return ()
    n_groups = moe.n_heads * moe.n_experts // (mesh.hp * mesh.ep)
    sizes = (width, moe.d_expert, n_groups, moe.activation)
    derived["experts"] = why = explain("cuda", dtype, *sizes)
    slow = choose_path("cuda", dtype, *sizes) == "loop"
    return (f"experts of width {width}: {why}",) if slow else ()


@dataclass(frozen=True)
class Sizes:
    """The size of a full model, on whatever mesh it is sharded."""

    total: int
    """Parameters."""
    active: int
    """Parameters that one token uses."""
    flops_per_token: float
    """FLOPs of training: three times the forward pass."""

    @classmethod
    def of(cls, model: Transformer, seq_len: int) -> "Sizes":
        """Sum what the modules declare, before the model is sharded."""
        costs = costs_of(model, Workload(seq_len))
        n, active = (int(total(costs, quantity)) for quantity in (parameters, active_parameters))
        return cls(n, active, 3 * total(costs, flops))
