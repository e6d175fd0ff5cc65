"""Options of multi-head latent attention."""

from dataclasses import dataclass

from headway.config.bounds import at_least
from headway.config.errors import UsageError


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1), read with
    `model.mixer=mla`: keys and values of all heads come from one latent vector per token, and the
    cache holds that vector. The fields are those of Transformers."""

    q_lora_rank: int = 0
    """Width of the latent vector that queries come from; 0 projects them from the token itself."""
    kv_lora_rank: int = 128
    """Width of the latent vector of keys and values."""
    qk_nope_head_dim: int = 64
    """Dims of a query's and a key's head that are not rotated."""
    qk_rope_head_dim: int = 32
    """Dims that are rotated, an even number; those of the keys are shared by all heads."""
    v_head_dim: int = 64
    """Dims of a value's head; at most qk_nope_head_dim + qk_rope_head_dim."""

    @property
    def qk_width(self) -> int:
        """Return d, the width of a head of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Return how many values the cache holds per token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def check(self) -> None:
        """Raise UsageError for a width that cannot work."""
        at_least(0, "model.mla", vars(self), "q_lora_rank")
        at_least(1, "model.mla", vars(self), "kv_lora_rank qk_nope_head_dim v_head_dim")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise UsageError(
                f"model.mla.qk_rope_head_dim={self.qk_rope_head_dim} must be even and above 0, "
                "since RoPE rotates pairs; use 64"
            )
        if self.v_head_dim > self.qk_width:
            raise UsageError(
                f"model.mla.v_head_dim={self.v_head_dim} exceeds the {self.qk_width} dims of a "
                f"key's head; use {self.qk_width} or fewer"
            )
