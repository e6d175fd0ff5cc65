"""Headway: Mixture-of-Experts language models in PyTorch, Multi-Head LatentMoE at the centre."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway.config import BalanceConfig, MoEConfig, RouterConfig, latent_acc, latent_eff
    from headway.model.context import Context
    from headway.model.layers import LatentMoE, MoE, MultiHeadLatentMoE

__version__ = "0.1.0"
__all__ = [
    "BalanceConfig",
    "Context",
    "LatentMoE",
    "MoE",
    "MoEConfig",
    "MultiHeadLatentMoE",
    "RouterConfig",
    "latent_acc",
    "latent_eff",
]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is first asked for (PEP 562): `headway --help` then starts
    without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    from headway import config

    if name in vars(config):
        return vars(config)[name]
    from headway.model import context, layers

    return {**vars(layers), **vars(context)}[name]
