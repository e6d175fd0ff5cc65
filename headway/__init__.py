"""Headway: Mixture-of-Experts language models in PyTorch, Multi-Head LatentMoE at the centre."""

from typing import TYPE_CHECKING

from headway.config import BalanceConfig, RouterConfig, latent_acc, latent_eff

if TYPE_CHECKING:
    from headway.model.layers import LatentMoE, MoE, MultiHeadLatentMoE

__version__ = "0.1.0"
__all__ = [
    "BalanceConfig",
    "LatentMoE",
    "MoE",
    "MultiHeadLatentMoE",
    "RouterConfig",
    "latent_acc",
    "latent_eff",
]


def __getattr__(name: str) -> object:
    """The layers, when they are first asked for: `headway --help` then starts without PyTorch (PEP
    562).
    """
    if name not in __all__:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    from headway.model import layers

    return vars(layers)[name]
