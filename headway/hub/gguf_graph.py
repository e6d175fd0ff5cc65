"""The graphs of llama.cpp that compute our models: names of tensors, and what each cannot express.

llama.cpp builds a graph from the architecture's name alone: what a file says beyond it is ignored,
so a model that a graph does not compute exactly is refused here (llama.cpp b11434, src/models)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from headway.config import ModelConfig, UsageError
from headway.hub.family import Family, canonical
from headway.hub.layout import Row

FLOAT32 = r"norm|router|bias|shared_gate"
"""Pattern of our tensors that llama.cpp wants in float32."""


@dataclass(frozen=True)
class Graph:
    """One architecture of llama.cpp."""

    name: str
    """Its `general.architecture`."""
    renormalizes: bool | None = None
    """Whether it divides the gates by their sum, always; None: it has no experts."""
    permutes: bool = False
    """Whether it rotates neighbours, so that rows of q and k are reordered."""
    qkv_bias: bool = False
    o_bias: bool = False
    square: bool = False
    """Whether heads together are as wide as the model."""
    equal_heads: bool = False
    """Whether it has as many key as query heads."""
    llama3: bool = False
    """Whether it reads a factor per frequency."""
    head: bool = False
    """Whether it needs an output matrix where that is tied to the embedding."""

    def refusal(self, config: ModelConfig) -> str:
        """Return what of a model of its family the graph would compute wrongly; "" for nothing."""
        c = canonical(config)
        router, heads = c.moe.router, c.n_heads * c.head_width
        sparse = c.moe.kind != "dense"
        if any(map(c.window_of, range(c.n_layers))):
            return "attends to everything, and model.window is set"
        if c.clip_qkv:
            return f"clamps nothing, and model.clip_qkv={c.clip_qkv}"
        if (c.qkv_bias and not self.qkv_bias) or (c.o_bias and not self.o_bias):
            return f"has no biases for model.qkv_bias={c.qkv_bias}, o_bias={c.o_bias}"
        if sparse and c.n_sparse < c.n_layers:
            return f"has experts in all layers, and {c.n_layers - c.n_sparse} here have none"
        if sparse and router.renormalize is not self.renormalizes:
            how = "always" if self.renormalizes else "never"
            return f"{how} renormalises gates, unlike renormalize={router.renormalize} here"
        if self.equal_heads and c.kv_heads != c.n_heads:
            return f"has as many key heads as model.n_heads={c.n_heads}, and here are {c.kv_heads}"
        if self.square and heads != c.d_model:
            return f"has heads of width {c.d_model} together, that of the model, and not {heads}"
        if c.rope.scaling not in ("none", "linear") and not (
            c.rope.scaling == "llama3" and self.llama3
        ):
            return f"is not written with model.rope.scaling={c.rope.scaling}"
        return ""

    def rows(self, config: ModelConfig, fused: bool = True) -> Iterator[Row]:
        """Yield the tensors of a file; the stacks of experts lie as `[E, …]`."""
        yield Row("token_embd.weight", "embed.weight")
        yield Row("output_norm.weight", "norm.weight")
        if not config.tied or self.head:
            yield Row("output.weight", "embed.weight" if config.tied else "head.weight")
        for i in range(config.n_layers):
            theirs, ours = f"blk.{i}", f"layers.{i}"
            yield Row(f"{theirs}.attn_norm.weight", f"{ours}.norm1.weight")
            yield from _attention_rows(config, theirs, f"{ours}.mixer")
            yield Row(f"{theirs}.ffn_norm.weight", f"{ours}.norm2.weight")
            if config.is_sparse(i):
                yield from _sparse_rows(config, theirs, f"{ours}.ffn")
            else:
                yield from _dense_rows(theirs, "", f"{ours}.ffn")

    def converter(self, name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
        """Return what is done to a tensor after it has its shape."""
        heads = {"attn_q": config.n_heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
        if heads is None or not self.permutes:
            return lambda w: w
        # halves (0, d/2), (1, d/2 + 1), … become neighbours
        return lambda w: w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _attention_rows(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    for name, target in zip("qkvo", ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
        yield Row(f"{theirs}.{target}.weight", f"{ours}.{name}.weight")
        if config.o_bias if name == "o" else config.qkv_bias:
            yield Row(f"{theirs}.{target}.bias", f"{ours}.{name}.bias")
    if config.qk_norm != "none":
        for name in "qk":
            yield Row(f"{theirs}.attn_{name}_norm.weight", f"{ours}.{name}_norm.weight")


def _dense_rows(theirs: str, suffix: str, ours: str) -> Iterator[Row]:
    for part, name in enumerate(("gate", "up")):
        yield Row(
            f"{theirs}.ffn_{name}{suffix}.weight", f"{ours}.w_in.weight", f"F D = ({part}/2 F) D"
        )
    yield Row(f"{theirs}.ffn_down{suffix}.weight", f"{ours}.w_out.weight")


def _sparse_rows(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    yield Row(f"{theirs}.ffn_gate_inp.weight", f"{ours}.router.w_HEL", "E D = 0 E D")
    for part, name in enumerate(("gate", "up")):
        dims = f"E F D = 0 E {part} F D"
        yield Row(f"{theirs}.ffn_{name}_exps.weight", f"{ours}.experts.w_in_HEGFL", dims)
    w_out = f"{ours}.experts.w_out_HEFL"
    yield Row(f"{theirs}.ffn_down_exps.weight", w_out, "E D F = 0 E F D")
    if config.moe.d_shared:
        yield from _dense_rows(theirs, "_shexp", f"{ours}.shared")
        yield Row(f"{theirs}.ffn_gate_inp_shexp.weight", f"{ours}.shared_gate.weight", "D = 0 D")


def graph_of(family: Family, config: ModelConfig) -> Graph:
    """Return the graph that computes a model of a family. Raises UsageError with the reason where
    llama.cpp has none, or would compute something else."""
    match family.name:
        case "llama" | "mixtral":
            graph = Graph("llama", True, permutes=True, qkv_bias=True, o_bias=True, llama3=True)
        case "qwen3":
            graph = Graph("qwen3")
        case "qwen3_moe":
            graph = Graph("qwen3moe", True)
        case "qwen2_moe":
            graph = Graph("qwen2moe", False, qkv_bias=True, square=True, head=True)
        case "olmoe":
            graph = Graph("olmoe", False, square=True, equal_heads=True, head=True)
        case name:
            raise UsageError(f"no GGUF is written of {name} models; use --format hf")
    if reason := graph.refusal(config):
        raise UsageError(f"llama.cpp's {graph.name} {reason}; use --format hf")
    return graph
