"""Options of the network around the sparse layer."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from headway.config.bounds import above_zero, at_least, nearest_divisors
from headway.config.errors import UsageError
from headway.config.mla import MLAConfig
from headway.config.moe import Activation, MoEConfig
from headway.config.rope import RopeConfig

MixerName = Literal["attention", "mla"]
QKNorm = Literal["none", "head", "all"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, dense or sparse
    feed-forward."""

    vocab_size: int = 0
    """V; 0 means: the tokenizer's size rounded up to a multiple of 64."""
    n_layers: int = 6
    """Blocks."""
    d_model: int = 384
    """D, width of the residual stream."""
    mixer: MixerName = "attention"
    """How tokens see each other: grouped-query `attention`, or `mla`, multi-head latent attention,
    with n_heads heads of the widths in `model.mla`."""
    mla: MLAConfig = field(default_factory=MLAConfig)
    """Latent attention."""
    n_heads: int = 6
    """Query heads of attention; divides d_model unless d_head is given."""
    n_kv_heads: int = 0
    """Key/value heads; divides n_heads; 0 means n_heads."""
    d_head: int = 0
    """Width of an attention head, even; 0 means d_model / n_heads."""
    qk_norm: QKNorm = "head"
    """RMSNorm on queries and keys: `head`, of each head by itself (Qwen3); `all`, of all heads of a
    token together (OLMoE); `none`."""
    clip_qkv: float = 0.0
    """Clamps queries, keys and values to ±clip_qkv, after QK-norm and before RoPE (OLMoE); 0 is
    off."""
    qkv_bias: bool = False
    """Biases on the projections to queries, keys and values (Qwen2); in latent attention, on those
    to latent vectors."""
    o_bias: bool = False
    """A bias on the output projection of attention (GPT-OSS)."""
    attn_gate: bool = False
    """A sigmoid gate per head on the attention output, read from the block's input (arXiv
    2505.06708)."""
    window: tuple[int, ...] = ()
    """Sliding attention window in tokens, one entry per layer, repeated over the layers; 0 is full
    attention; empty is full attention everywhere."""
    sinks: bool = False
    """One learned score per attention head that takes weight and gives nothing (GPT-OSS)."""
    max_len: int = 0
    """Longest context in tokens that the model is used with; 0 means data.seq_len. Bounds what is
    served and changes no number."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Which dims it rotates, and how it is scaled."""
    d_ff: int = 1024
    """Hidden width of the dense feed-forward network (dense layers only)."""
    activation: Activation = "swiglu"
    """Activation of the dense feed-forward network."""
    tied: bool = False
    """Share the embedding with the output head."""
    logit_softcap: float = 0.0
    """Bounds the logits softly, cap·tanh(logits/cap); 0 is off."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the embedding; the scale of all other weights is derived in
    model/init.py."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The sparse layer."""

    @property
    def kv_heads(self) -> int:
        """Return M, the number of key/value heads of attention."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Return d, the width of an attention head's queries and keys."""
        if self.mixer == "mla":
            return self.mla.qk_width
        return self.d_head or self.d_model // self.n_heads

    @property
    def rotary_width(self) -> int:
        """Return r, how many dims of an attention head are rotated."""
        if self.mixer == "mla":
            return self.mla.qk_rope_head_dim
        return self.rope.rotary_dim or self.head_width

    def window_of(self, layer: int) -> int:
        """Return the attention window of block `layer` in tokens; 0 is full attention."""
        return self.window[layer % len(self.window)] if self.window else 0

    @property
    def n_sparse(self) -> int:
        """Return the number of sparse layers."""
        return sum(map(self.is_sparse, range(self.n_layers)))

    def is_sparse(self, layer: int) -> bool:
        """Return whether block `layer` has a sparse feed-forward layer."""
        moe = self.moe
        dense = moe.kind == "dense" or layer < moe.n_dense_layers or layer in moe.dense_layers
        return not dense and (layer + 1) % moe.sparse_step == 0

    def check(self) -> dict[str, str]:
        """Return derived value → the sentence that says where it comes from. Raise UsageError, one
        line, for the first thing that cannot work."""
        at_least(1, "model", vars(self), "n_layers d_model n_heads")
        at_least(0, "model", vars(self), "vocab_size n_kv_heads d_head logit_softcap clip_qkv")
        at_least(0, "model", vars(self), "max_len")
        above_zero("model", vars(self), "rope_theta norm_eps init_std")
        if self.qk_norm not in get_args(QKNorm):
            raise UsageError(f"model.qk_norm={self.qk_norm} is not known; use none, head or all")
        if self.mixer not in get_args(MixerName):
            raise UsageError(f"model.mixer={self.mixer} is not known; use attention or mla")
        derived = self._check_mla() if self.mixer == "mla" else self._check_attention()
        self.rope.check(self.head_width, self.rope_theta)
        if any(entry < 0 for entry in self.window):
            raise UsageError(
                f"model.window={' '.join(map(str, self.window))} has an entry below 0; "
                "use tokens, or 0 for full attention"
            )
        if len(self.window) > self.n_layers:
            raise UsageError(
                f"model.window has {len(self.window)} entries and model.n_layers={self.n_layers}; "
                f"use at most {self.n_layers} entries"
            )
        if self.moe.kind != "dense":
            derived |= self.moe.check(self.d_model, self.n_layers)
        if self.n_sparse < self.n_layers:
            at_least(1, "model", vars(self), "d_ff")
        return derived

    def _check_mla(self) -> dict[str, str]:
        self.mla.check()
        plain, usual = ModelConfig(), {"n_kv_heads": self.n_heads, "d_head": self.mla.qk_width}
        for name in "n_kv_heads d_head qk_norm clip_qkv sinks attn_gate".split():
            value, default = vars(self)[name], vars(plain)[name]
            if value not in (default, usual.get(name, default)):
                raise UsageError(
                    f"model.{name}={value} has no effect with model.mixer=mla; use {default}"
                )
        if self.rope.rotary_dim:
            raise UsageError(
                f"model.rope.rotary_dim={self.rope.rotary_dim} has no effect with model.mixer=mla, "
                "which rotates model.mla.qk_rope_head_dim; use 0"
            )
        return {}

    def _check_attention(self) -> dict[str, str]:
        if self.mla != MLAConfig():
            raise UsageError(
                f"model.mla is set and model.mixer={self.mixer} does not read it; use mixer=mla"
            )
        derived, d_head = {}, self.head_width
        if not self.d_head:
            if self.d_model % self.n_heads:
                raise UsageError(
                    f"model.n_heads={self.n_heads} must divide model.d_model={self.d_model}; "
                    f"use n_heads={nearest_divisors(self.d_model, self.n_heads)}, "
                    "or set model.d_head"
                )
            derived["model.d_head"] = f"{d_head}: d_model {self.d_model} / n_heads {self.n_heads}"
        if d_head % 2:
            raise UsageError(
                f"an attention head of width {d_head} (d_model={self.d_model}, "
                f"n_heads={self.n_heads}, d_head={self.d_head}) is odd, and RoPE rotates pairs; "
                f"set model.d_head to {d_head + 1}"
            )
        if not self.n_kv_heads:
            derived["model.n_kv_heads"] = f"{self.n_heads}: as many as n_heads"
        elif self.n_heads % self.n_kv_heads:
            raise UsageError(
                f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}; "
                f"use n_kv_heads={nearest_divisors(self.n_heads, self.n_kv_heads)}"
            )
        return derived
