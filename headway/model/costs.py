"""What modules cost: parameters, FLOPs per token, bytes saved for backward, each with its formula.

A module has a method `costs` beside its `forward`; a model's cost is the sum over its modules. One
FLOP is a multiplication or an addition, so a product `[m, k] × [k, n]` takes 2·m·k·n; norms,
activations and look-ups are left out. FLOPs are those of the forward pass; backward takes twice as
many, since the backward pass of a product is two products of its size (arXiv 2602.04870 §3).

Kept bytes are those of the default CPU path, tensor by tensor; short-lived buffers (one expert's
permuted tokens, one chunk of logits) come on top and do not grow with depth."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn

from headway.config import UsageError


class CostGroup(Enum):
    """What a cost is for; the value is its label."""

    EMBEDDING = "embedding and output head"
    RESIDUAL = "residual stream and norms"
    MIXER = "attention"
    PROJECTIONS = "attention projections"
    SCORES = "attention scores"
    MASKS = "masks"
    NORMS = "norms"
    DENSE = "dense networks"
    ROUTERS = "routers"
    LATENT = "latent projections"
    SUB_TOKENS = "sub-tokens and expert outputs"
    PERMUTATION = "sorted rows"
    EXPERTS = "experts"
    SHARED = "shared experts"
    HEAD = "output head"
    LOSS = "gradients of the loss"
    CASTS = "weights cast to the matmul's dtype"


class Term(NamedTuple):
    """A value and the formula that gave it."""

    value: float
    formula: str = ""


NOTHING = Term(0)


@dataclass(frozen=True)
class Workload:
    """A forward pass in training, on which costs depend beside the sizes of the model."""

    seq_len: int
    """S."""
    batch: int = 1
    """B, sequences."""
    bytes_per_value: int = 4
    """b, of the matmuls' dtype."""
    doc_mask: bool = False
    """Whether documents are kept apart."""
    dense_masks: bool = False
    """Whether windows and documents take masks of S × S, as on GPUs; the CPU kernel takes none."""

    @property
    def n_tokens(self) -> int:
        """T = B·S."""
        return self.batch * self.seq_len


@dataclass(frozen=True)
class Cost:
    """What one module adds to one group."""

    group: CostGroup
    parameters: Term = NOTHING
    flops: Term = NOTHING
    """FLOPs of the forward pass per token."""
    saved: Term = NOTHING
    """Bytes saved for backward in the whole workload."""
    active: Term | None = None
    """Parameters that one token visits; None: all."""


@runtime_checkable
class DeclaresCosts(Protocol):
    """A module that says what it costs, its submodules included."""

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Return the costs of this module in a forward pass."""
        ...


def costs_of(module: object, work: Workload) -> tuple[Cost, ...]:
    """Return what a module declares. Raises UsageError where it declares nothing, or other
    parameters than it has."""
    name = type(module).__name__
    if not isinstance(module, DeclaresCosts):
        raise UsageError(
            f"{name} does not say what it costs; give it a method "
            "costs(work: Workload) -> Sequence[Cost] (headway/model/costs.py)"
        )
    costs = tuple(module.costs(work))
    declared = sum(cost.parameters.value for cost in costs)
    held = sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
    if declared != held:
        raise UsageError(f"costs() of {name} names {declared:,} parameters and it has {held:,}")
    return costs


def casts(n_parameters: int, work: Workload) -> Cost:
    """Return the saved copies of `n_parameters` weights in the dtype of the matmuls."""
    b = work.bytes_per_value
    return Cost(CostGroup.CASTS, saved=NOTHING if b == 4 else Term(b * n_parameters, "b·n"))


parameters, flops, saved_bytes = map(attrgetter, ("parameters", "flops", "saved"))
"""Quantities of a `Cost`, for the sums below."""


def active_parameters(cost: Cost) -> Term:
    """Return the parameters that one token visits."""
    return cost.parameters if cost.active is None else cost.active


def total(costs: Iterable[Cost], quantity: Callable[[Cost], Term]) -> float:
    """Return the sum of one quantity over all costs."""
    return sum(quantity(cost).value for cost in costs)


def by_group(costs: Iterable[Cost], quantity: Callable[[Cost], Term]) -> dict[CostGroup, Term]:
    """Return the sum of one quantity in each group where it is not 0, in the order of `CostGroup`.

    Formulas that several modules share are written once, after `layers·`."""
    values: dict[CostGroup, float] = {}
    formulas: dict[CostGroup, dict[str, int]] = {}
    for cost in costs:
        value, formula = quantity(cost)
        if value:
            values[cost.group] = values.get(cost.group, 0) + value
            counts = formulas.setdefault(cost.group, {})
            counts[formula] = counts.get(formula, 0) + 1
    texts = {
        group: " + ".join(f if n == 1 else f"layers·{f}" for f, n in counts.items())
        for group, counts in formulas.items()
    }
    return {group: Term(values[group], texts[group]) for group in CostGroup if group in values}
