"""One frozen tree of options. A recipe is a function that returns a `Config`; the command line
overrides leaves.

Every field has a docstring: meaning, unit, legal range, when to change it. `headway train RECIPE
--help` is made from these texts. Each section checks itself (`check()`); rules across sections are
in `config.check`. `EngineConfig` and `ServerConfig`, for who uses a trained model, are no part of
the tree. This package imports the standard library only, so layers and kernels can read it
anywhere."""

from headway.config.data import DataConfig, cache_root
from headway.config.engine import EngineConfig
from headway.config.errors import PeerError, RankError, RunError, UsageError, cannot_write
from headway.config.mesh import MeshConfig
from headway.config.mla import MLAConfig
from headway.config.model import ModelConfig
from headway.config.moe import (
    Activation,
    BalanceConfig,
    MoEConfig,
    Precision,
    Projection,
    latent_acc,
    latent_eff,
    n_inputs,
)
from headway.config.optim import OptimConfig
from headway.config.rope import RopeConfig
from headway.config.router import RouterConfig, RouterGate
from headway.config.run import RunConfig, TrackerName
from headway.config.server import ServerConfig
from headway.config.tree import Config, from_dict, leaves, with_leaf
