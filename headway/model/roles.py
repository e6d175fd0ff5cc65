"""What each parameter is for. Its initialisation, optimiser group, weight decay and sharding follow
from the role that its module declares, never from its name.

A module with parameters or buffers of its own has a method `roles` that maps their local names to
`Role`s. `Linear`, `RMSNorm` and `Embedding` of `model.linear` have one, so that a module made of
these declares nothing. With `StoresByRole` as its base, `.bfloat16()` and `.half()` leave its
routers, norms and biases in float32."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from headway.config import UsageError


class Group(Enum):
    """Which learning rate, weight decay and optimiser a parameter gets."""

    EMBEDDING = "embed"
    HEAD = "head"
    MATRIX = "matrices"
    """`[outputs, inputs]`, or stacks of such matrices in the leading dims."""
    VECTOR = "vectors"
    """Norm weights and biases: no weight decay, AdamW, used in float32."""
    ROUTER = "routers"
    EXPERT_IN = "experts"
    EXPERT_OUT = "experts_out"
    """Stored `[inputs, outputs]`, unlike every other matrix: Muon's shape factor needs to know."""


class Init(Enum):
    """The distribution of the initial values."""

    ONES = "1"
    ZEROS = "0"
    FAN_IN = "N(0, 1/fan_in)"
    HEAD = "N(0, 0.01/fan_in)"
    EMBEDDING = "N(0, init_std²)"


class SplitOver(Enum):
    """Over which axes of a mesh the leading dims of a parameter are split."""

    NONE = ()
    HEADS = ("hp",)
    EXPERTS = ("hp", "ep")


@dataclass(frozen=True)
class Role:
    """The role of one parameter or buffer.

    `fan_in` is the number of inputs of a product with it. `ends_branch` marks the last matrix of a
    residual branch, which is scaled down by √(2·layers)."""

    group: Group = Group.MATRIX
    init: Init = Init.FAN_IN
    fan_in: int = 1
    ends_branch: bool = False
    shard: SplitOver = SplitOver.NONE

    def std(self, n_layers: int, embed_std: float) -> float | None:
        """Return the standard deviation of the initial values; 0 for zeros, None for ones. With
        `n_layers` = 0, a layer on its own, branches are not scaled."""
        match self.init:
            case Init.ONES:
                return None
            case Init.ZEROS:
                return 0.0
            case Init.EMBEDDING:
                return embed_std
            case Init.HEAD:
                return 0.1 / math.sqrt(self.fan_in)
            case Init.FAN_IN:
                scale = 1 / math.sqrt(2 * n_layers) if self.ends_branch and n_layers else 1.0
                return scale / math.sqrt(self.fan_in)

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """Return in which dtype a model that multiplies in `dtype`, and is not trained, keeps the
        values: routers, norms and biases in float32. Rounded to bfloat16 a router chooses other
        experts for many tokens."""
        if self.group in (Group.VECTOR, Group.ROUTER):
            return torch.promote_types(dtype, torch.float32)
        return dtype


@runtime_checkable
class DeclaresRoles(Protocol):
    """A module that says what its own parameters and buffers are for."""

    def roles(self) -> Mapping[str, Role]:
        """Return local name → role for the parameters and buffers that this module holds."""
        ...


class StoresByRole(nn.Module):
    """A module whose own parameters and buffers follow their roles when it is cast: `.bfloat16()`,
    `.half()` and `.to(dtype)` narrow its matrices, and leave the rest in float32."""

    def roles(self) -> Mapping[str, Role]:
        """Return local name → role for the parameters and buffers that this module holds."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        if recurse:
            for module in self.children():
                module._apply(fn)
        roles = self.roles()
        # by identity, since `fn` is told no names; gradients have the dtype of their parameter
        role_of = {
            id(x): (x, roles[name])
            for name, tensor in {**self._parameters, **self._buffers}.items()
            if name in roles and tensor is not None
            for x in (tensor, tensor.grad)
            if x is not None
        }

        def stored(x: Tensor) -> Tensor:
            y, (_, role) = fn(x), role_of.get(id(x), (x, Role()))
            dtype = role.stored(y.dtype)
            return y if y.dtype == dtype else x.to(y.device, dtype)

        return super()._apply(stored, recurse=False)


def roles_of(model: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter and buffer, parameters first, by its full name.

    Raises UsageError for one whose module declares none."""
    roles: dict[str, Role] = {}
    for named in (model.named_parameters(), model.named_buffers()):
        for name, _ in named:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            declared = module.roles() if isinstance(module, DeclaresRoles) else {}
            if leaf not in declared:
                raise UsageError(
                    f"{name} has no role, so that nothing says how to initialise, update and shard "
                    f"it; add it to `roles()` of {type(module).__name__}"
                )
            roles[name] = declared[leaf]
    return roles


def stored_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return name → `Role.stored` of every parameter and buffer."""
    return {name: role.stored(dtype) for name, role in roles_of(model).items()}


def matrix_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of all weights that a cast narrows; None where they have several."""
    roles = roles_of(model)
    narrows = {name for name, role in roles.items() if role.stored(torch.bfloat16).itemsize == 2}
    dtypes = {x.dtype for name, x in model.named_parameters() if name in narrows}
    return dtypes.pop() if len(dtypes) == 1 else None
