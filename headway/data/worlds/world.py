"""What a world is, and how its items are drawn into splits that share none.

An item is a state, arrays of symbols, which is drawn. An oracle computes the answer from the state;
tokens are written from both, and nothing reads them back."""

from typing import Literal, NamedTuple, Protocol

import numpy as np

from headway.config import UsageError
from headway.data.document import GOLDEN, scramble
from headway.data.worlds.draws import Draws, key_of

WorldSplit = Literal["train", "val", "test"]

State = dict[str, np.ndarray]
"""What was drawn for B items: arrays whose first dim is B."""

ATTEMPTS = 400
"""An item is drawn anew until it falls into its split, which takes 2 or 4 draws on average; one in
10⁵⁰ would need more than so many where there are enough different items."""

ROWS, MOST_AT_ONCE = 512, 16
"""Of fewer items than so many several draws each are tried at once: a call costs as much for one
row as for hundreds."""

_U64 = np.uint64


class Items(NamedTuple):
    """B items of a world, as numbers of its words."""

    tokens_BT: np.ndarray
    """int64; short items end in −1."""
    targets_BT: np.ndarray
    """int64, what is to be said after each token; −1 is ignored."""
    prompt_B: np.ndarray
    """int64, how many of the tokens are the prompt."""
    answer_BA: np.ndarray
    """int64, the words of the answer; short ones end in −1."""


class World(Protocol):
    """A task with its sizes: a frozen dataclass, whose fields are the options of `world:TASK`."""

    @property
    def name(self) -> str:
        """Return the task, as in `world:TASK`."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """Return the vocabulary. It does not depend on the length."""
        ...

    @property
    def n_tokens(self) -> int:
        """Return the tokens of the longest item."""
        ...

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit together."""
        ...

    def draw(self, draws: Draws) -> State:
        """Return the states of items."""
        ...

    def content(self, state: State) -> np.ndarray:
        """Return uint64 [B], a hash of what the answer follows from: equal for equal items."""
        ...

    def oracle(self, state: State) -> np.ndarray:
        """Return the answers as words, int64 [B, …], from the state alone."""
        ...

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write items out as tokens and targets."""
        ...

    def meta(self, state: State, row: int) -> dict:
        """Return what one item was drawn as, JSON-ready."""
        ...


def generate(world: World, split: WorldSplit, index_B: np.ndarray, seed: int = 0) -> State:
    """Return the states of items by number (uint64 [B]), the same ones whichever are asked for
    together, in any process. Raises UsageError where a split has hardly any items.

    Splits are disjoint: the split of an item is a function of its content (`split_of`), whatever
    its number, seed or length, and an item that falls into another split is drawn anew."""
    key = key_of(f"world|{world.name}|{split}|{seed}")
    state, todo, attempt = State(), np.arange(len(index_B)), 0
    while not attempt or (len(todo) and attempt < ATTEMPTS):
        n = min(max(ROWS // max(len(todo), 1), 1), MOST_AT_ONCE, ATTEMPTS - attempt)
        attempt_BN = np.tile(np.arange(attempt, attempt + n, dtype=_U64), len(todo))
        drawn = world.draw(Draws(key, np.repeat(index_B[todo], n), attempt_BN))
        fits_BN = is_in(split, world.content(drawn)).reshape(len(todo), n)
        fits = np.flatnonzero(fits_BN.any(1))
        rows = fits * n + fits_BN[fits].argmax(1)
        for name, values in drawn.items():
            if not attempt:
                state[name] = np.empty((len(index_B), *values.shape[1:]), values.dtype)
            state[name][todo[fits]] = values[rows]
        todo, attempt = np.delete(todo, fits), attempt + n
    if len(todo):
        raise UsageError(
            f"world:{world.name} has no items for the {split} split at this size, as there are too "
            "few different ones; use a larger length"
        )
    return state


def written(world: World, split: WorldSplit, index_B: np.ndarray, seed: int = 0) -> Items:
    """Return items by number (uint64 [B]) as tokens and targets. Raises what `generate` does."""
    state = generate(world, split, index_B, seed)
    return world.render(state, world.oracle(state))


def is_in(split: WorldSplit, content_B: np.ndarray) -> np.ndarray:
    """Return whether contents belong to a split, bool [B]: half of all to training, a quarter each
    to validation and test."""
    part_B = scramble(content_B + _U64(GOLDEN)) >> _U64(62)
    match split:
        case "train":
            return part_B < 2
        case "val":
            return part_B == 2
        case "test":
            return part_B == 3


def hash_of(*columns: np.ndarray) -> np.ndarray:
    """Return a hash, uint64 [B], of integer arrays [B, …], of every value at its place."""
    total_B = np.zeros(len(columns[0]), dtype=_U64)
    for number, values in enumerate(columns):
        flat = values.reshape(len(values), values[:1].size).astype(_U64)
        place = np.arange(flat.shape[1], dtype=_U64) + _U64(number << 32)
        salted = scramble((flat + _U64(1)) * _U64(0xD1342543DE82EF95) ^ scramble(place + _U64(1)))
        total_B = scramble(total_B + _U64(GOLDEN)) + salted.sum(1, dtype=_U64)
    return total_B


def to_the_left(words_BT: np.ndarray) -> np.ndarray:
    """Return each row with its −1 after all else, whose order stays."""
    order_BT = np.argsort(words_BT < 0, axis=1, kind="stable")
    return np.take_along_axis(words_BT, order_BT, axis=1)


def check_least(world: World, least: int, *names: str, most: int | None = None) -> None:
    """Raise UsageError for an option of a world below `least` or above `most`."""
    for name in names:
        value = vars(world)[name]
        if value < least or (most is not None and value > most):
            wanted = f"{least} or more" if most is None else f"{least} … {most}"
            raise UsageError(f"world:{world.name} has {name}={value}; use {wanted}")
