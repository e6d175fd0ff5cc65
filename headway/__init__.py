"""Headway: Mixture-of-Experts language models in PyTorch, with Multi-Head LatentMoE at the centre."""

from headway.config import BalanceConfig, RouterConfig
from headway.model.moe import LatentMoE, MoE, MultiHeadLatentMoE, latent_acc, latent_eff

__version__ = "0.1.0"
__all__ = [
    "BalanceConfig", "LatentMoE", "MoE", "MultiHeadLatentMoE", "RouterConfig", "latent_acc", "latent_eff",
]
