"""Arms of equal cost: sizes that give an arm the FLOPs, parameters, memory or traffic of another.

What an arm costs is read from its modules on the meta device (`plan.cost`); the free fields of its
config are solved for the baseline's value."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from headway.config import Config, UsageError, leaves, with_leaf
from headway.config.check import validate
from headway.plan.choose import rank_meshes
from headway.plan.cost import model_costs, total
from headway.plan.layout import MeshLayout
from headway.plan.machine import machine_named, with_network
from headway.plan.memory import memory
from headway.plan.setting import Setting
from headway.plan.traffic import TokenExchange, expected_bytes
from headway.train.open_session import Edit

Quantity = Literal[
    "active-flops", "active-parameters", "total-parameters", "memory", "traffic", "step-time"
]
TOLERANCE = 0.01
"""Largest relative difference from the target."""
_SEARCH = ("model.moe.top_k", "model.moe.d_latent", "model.moe.n_experts", "model.moe.d_expert")


@dataclass(frozen=True)
class Place:
    """Where traffic and step time are counted."""

    ranks: int = 8
    """P, ranks that share the experts."""
    gpu: str = "h100"
    network: str = "ndr"
    """Between nodes of eight GPUs (`plan.machine.NETWORKS`)."""

    def __post_init__(self) -> None:
        """Raise UsageError for no ranks."""
        if self.ranks < 1:
            raise UsageError(f"--ranks {self.ranks} is below 1; use the ranks that share experts")


@dataclass(frozen=True)
class Matched:
    """An arm whose free fields are solved."""

    config: Config
    solved: dict[str, int]
    """Field → its value."""
    values: dict[Quantity, float]
    """What the arm has of each quantity that was matched."""
    mismatch: dict[Quantity, float]
    """Value over target, minus 1."""

    @property
    def worst(self) -> float:
        """The largest absolute mismatch."""
        return max(map(abs, self.mismatch.values()), default=0.0)


@functools.lru_cache(maxsize=4096)
def measure(
    config: Config, quantity: Quantity, edit: Edit | None = None, place: Place = Place()
) -> float:
    """Return what a config whose vocabulary is resolved costs.

    `active-flops`: FLOPs of training per token, executed; `active-parameters` and
    `total-parameters`: numbers of weights; `memory`: bytes of a training step in one process;
    `traffic`: bytes that a rank sends per token, of all sparse layers, forward and backward, by
    Head Parallel where the layer has heads, else by Expert Parallel with one copy per rank;
    `step-time`: seconds of a step on the best mesh that `headway plan` knows."""
    match quantity:
        case "active-flops":
            return _costs(config, edit).training_flops
        case "active-parameters":
            return total(_costs(config, edit).active)
        case "total-parameters":
            return total(_costs(config, edit).parameters)
        case "memory":
            micro = config.data.micro_batch_size or config.data.batch_size
            items = memory(config, _costs(config, edit), MeshLayout(), micro, 4)
            return total(items)
        case "traffic":
            return bytes_per_token(config, place.ranks)
        case "step-time":
            machine = with_network(machine_named(place.gpu), place.network)
            best = rank_meshes(Setting(config, machine), place.ranks)["best"]
            if best is None:
                raise UsageError(f"{config.recipe} fits no mesh of {place.ranks} {place.gpu}")
            return best["step_seconds"]


def bytes_per_token(config: Config, ranks: int) -> float:
    """Return the bytes that a rank of P sends per token in forward and backward, all sparse layers
    together, bfloat16."""
    model = config.model
    if not model.n_sparse:
        return 0.0
    heads = TokenExchange.HEADS if model.moe.n_heads > 1 else TokenExchange.PER_RANK
    return model.n_sparse * expected_bytes(model, heads, 1, ranks, 2).total


def _costs(config: Config, edit: Edit | None):
    return model_costs(config, config.data.micro_batch_size or config.data.batch_size, edit=edit)


def match(
    config: Config,
    targets: dict[Quantity, float],
    free: Sequence[str] = (),
    edit: Edit | None = None,
    place: Place = Place(),
) -> Matched:
    """Solve the free fields of `config` for targets, the first field for the first target.

    Args:
        config: with its vocabulary resolved.
        free: paths of integer fields; more fields than targets are tried around their values. By
            default `d_expert`, and `n_experts` for a second target; `d_ff` of a dense model.
    Raises: UsageError, which names the nearest that can be reached, where one of them stays more
        than 1% off, or the fields are fewer than the targets."""
    fields = _fields(config, targets, free)
    names = list(targets)

    def of(candidate: Config, quantity: Quantity) -> float:
        return measure(candidate, quantity, edit, place)

    best: Matched | None = None
    for start in _neighbours(config, fields[len(names) :]):
        for candidate in _solve(start, fields[: len(names)], targets, of):
            values: dict[Quantity, float] = {q: of(candidate, q) for q in names}
            off: dict[Quantity, float] = {
                q: values[q] / targets[q] - 1 if targets[q] else values[q] for q in names
            }
            solved = {f: leaves(candidate.to_dict())[f] for f in fields}
            matched = Matched(candidate, solved, values, off)
            if best is None or matched.worst < best.worst:
                best = matched
        if best is not None and best.worst <= TOLERANCE / 4:
            break
    assert best is not None
    if best.worst > TOLERANCE:
        raise UsageError(_unreachable(best, targets, fields, of))
    return best


def _fields(config: Config, targets: dict[Quantity, float], free: Sequence[str]) -> list[str]:
    """Return the full paths of the free fields, one per target or more."""
    known = leaves(config.to_dict())
    if not free:
        dense = config.model.moe.kind == "dense"
        free = ("d_ff",) if dense else ("d_expert", "n_experts")[: len(targets)]
    fields = [
        next((p for p in (f"model.moe.{f}", f"model.{f}", f) if p in known), "") for f in free
    ]
    if config.model.moe.kind == "dense":
        fields = ["model.d_ff" if f.startswith("model.moe.") else f for f in dict.fromkeys(fields)]
    for name, field in zip(free, fields, strict=False):
        if type(known.get(field)) is not int:
            raise UsageError(f"--free {name} is no integer field of the model; use d_expert")
    if len(fields) < len(targets):
        raise UsageError(
            f"{config.recipe or 'arm'}: {len(targets)} budgets ({', '.join(targets)}) and "
            f"{len(fields)} free field ({', '.join(fields)}); match one of them with --match, or "
            "free another field with --free"
        )
    return fields


def _neighbours(config: Config, extra: Sequence[str]) -> Iterator[Config]:
    """Yield the config with other values of the extra fields, nearest first."""
    yield config
    for field in extra:
        value = leaves(config.to_dict())[field]
        for step in (1, -1, 2, -2, 3, -3, 4, -4):
            if value + step >= 1:
                yield with_leaf(config, field, value + step)


def _solve(
    config: Config,
    fields: Sequence[str],
    targets: dict[Quantity, float],
    of: Callable[[Config, Quantity], float],
) -> Iterator[Config]:
    """Yield valid configs near the solution: fields in turn until they rest, for they depend on
    each other a little, then the neighbours of the first field."""
    pairs = list(zip(fields, targets, strict=True))
    for _ in range(6):
        before = config
        for field, quantity in pairs:
            config = _nearest(config, field, lambda c, q=quantity: of(c, q) - targets[q])
        if config == before:
            break
    yield config
    (first, _), rest = pairs[0], pairs[1:]
    value = leaves(config.to_dict())[first]
    for step in (1, -1, 2, -2) if rest else ():
        if value + step < 1:
            continue
        other = with_leaf(config, first, value + step)
        for field, quantity in rest:
            other = _nearest(other, field, lambda c, q=quantity: of(c, q) - targets[q])
        yield other


def _nearest(config: Config, field: str, excess: Callable[[Config], float]) -> Config:
    """Return the config whose `excess`, which rises with the field, is nearest to 0."""

    def at(n: int) -> float:
        return excess(with_leaf(config, field, n))

    if excess(config) == 0:  # as it is, also where the field changes nothing
        return config
    low = _least(config, field)
    step = config.model.moe.n_heads if field.endswith("d_latent") else 1
    if at(low) >= 0:
        return with_leaf(config, field, low)
    high = max(2 * low, leaves(config.to_dict())[field])
    while at(high) < 0:
        low, high = high, 2 * high
        if high > 1 << 24:  # it does not rise: another field has to be freed
            return config
    while high - low > step:
        middle = low + (high - low) // (2 * step) * step
        low, high = (middle, high) if at(middle) < 0 else (low, middle)
    return with_leaf(config, field, min((high, low), key=lambda n: abs(at(n))))


def _least(config: Config, field: str) -> int:
    """Return the smallest value of a field that the other fields allow."""
    moe = config.model.moe
    if field == "model.moe.n_experts":
        return moe.top_k
    return moe.n_heads if field == "model.moe.d_latent" else 1


def _unreachable(
    best: Matched,
    targets: dict[Quantity, float],
    fields: Sequence[str],
    of: Callable[[Config, Quantity], float],
) -> str:
    """Say which target cannot be met, what is nearest, and which field changes it."""
    quantity = max(best.mismatch, key=lambda q: abs(best.mismatch[q]))
    moves = []
    for field in _SEARCH:
        changed = with_leaf(best.config, field, 2 * leaves(best.config.to_dict())[field] or 64)
        try:
            validate(changed)
        except UsageError:
            continue
        if field not in fields and of(changed, quantity) != of(best.config, quantity):
            moves.append(field.rpartition(".")[2])
    fix = f"free {' or '.join(moves)} with --free" if moves else "match another quantity"
    nearest = ", ".join(f"{f.rpartition('.')[2]} {v}" for f, v in best.solved.items())
    return (
        f"{best.config.recipe or 'arm'}: {quantity} {targets[quantity]:,.6g} is not reached within "
        f"{TOLERANCE:.0%}; the nearest is {best.values[quantity]:,.6g} ({nearest}); {fix}"
    )


def quantities(text: str) -> tuple[Quantity, ...]:
    """Return the quantities of `active-flops,total-parameters`. Raise UsageError for others."""
    known = get_args(Quantity)
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            use = ", ".join([*known, "cpu-time"])  # which is no quantity of a config
            raise UsageError(f"--match {name} is unknown; use {use}")
    if not 1 <= len(set(names)) == len(names) <= 2:
        raise UsageError(f"--match {text} names {len(names)} quantities; use one, or two others")
    return tuple(q for name in names for q in known if q == name)
