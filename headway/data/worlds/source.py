"""A world as a source of data: an item is a window, and its targets are the world's own."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from headway.config import UsageError
from headway.data.tokenizer import Tokenizer
from headway.data.windows import Rows
from headway.data.worlds.spec import parse_world
from headway.data.worlds.world import World, WorldSplit, generate, written

VAL_ITEMS = 512
"""Items of the validation split."""
TRAIN_TOKENS = 1 << 48
"""Tokens that training is taken to have, where it has no end."""
_DIGEST_ITEMS = 64


@dataclass(frozen=True)
class WorldSource:
    """A world, and the ids of its words."""

    spec: str
    """As the user named it."""
    world: World
    id_V: np.ndarray
    """int64, the id of each word of the world in the tokenizer."""
    eos: int
    """Follows an item that is shorter than its window."""
    bytes_V: np.ndarray
    """float64, bytes of text that an id stands for."""
    approximate: str = ""
    """Why its bits per byte are approximate: never."""

    @classmethod
    def open(cls, spec: str, tokenizer: Tokenizer) -> "WorldSource":
        """Raise UsageError for a spec that is none, and for a tokenizer that has not each of its
        words as a token."""
        world = parse_world(spec)
        ids = tokenizer.encode(" ".join(world.words))
        if tuple(tokenizer.decode([i]) for i in ids.tolist()) != world.words:
            fix = "use a model that was trained on such a world"
            raise UsageError(f"the tokenizer lacks words of {spec}; {fix}")
        bytes_V = tokenizer.token_bytes.astype(np.float64)
        return cls(spec, world, ids.astype(np.int64), tokenizer.eos, bytes_V)

    @property
    def train_tokens(self) -> int:
        """Return as many for each world, so that they share a batch evenly without weights."""
        return TRAIN_TOKENS

    @property
    def val_tokens(self) -> int:
        """Return the tokens of validation."""
        return VAL_ITEMS * self.world.n_tokens

    @cached_property
    def digests(self) -> list[str]:
        """Hashes of training and of validation: of the first items, which another version of the
        world would draw otherwise."""
        return [self._digest("train", _DIGEST_ITEMS), self._digest("val", VAL_ITEMS)]

    @property
    def val_text(self) -> str:
        """Return a hash of the validation items."""
        return self.digests[1]

    def rows(self, split: WorldSplit, index_B: np.ndarray, seq_len: int, seed: int = 0) -> Rows:
        """Return items by number (uint64 [B]) in windows of `seq_len`."""
        items = written(self.world, split, index_B, seed)
        tokens_BS = np.full((len(index_B), seq_len), self.eos, dtype=np.int64)
        targets_BS = np.full_like(tokens_BS, -1)
        T = items.tokens_BT.shape[1]
        tokens_BS[:, :T] = np.where(items.tokens_BT < 0, self.eos, self.id_V[items.tokens_BT])
        targets_BS[:, :T] = np.where(items.targets_BT < 0, -1, self.id_V[items.targets_BT])
        return Rows(tokens_BS, targets_BS, self.bytes_V[targets_BS] * (targets_BS >= 0))

    def _digest(self, split: WorldSplit, n: int) -> str:
        rows = self.rows(split, np.arange(n, dtype=np.uint64), self.world.n_tokens)
        digest = hashlib.sha256(repr(self.world).encode())
        for values in rows[:2]:
            digest.update(values.tobytes())
        return digest.hexdigest()


class WorldWindows:
    """The windows of a world, a `Windows`: one item in each, from its first token on."""

    def __init__(self, source: WorldSource, seq_len: int, seed: int):
        """Raise UsageError where an item is longer than a window."""
        self.source, self.seq_len, self.seed = source, seq_len, seed
        self.n_val = VAL_ITEMS
        """Validation items."""
        if source.world.n_tokens > seq_len:
            n = source.world.n_tokens
            raise UsageError(
                f"an item of {source.spec} has up to {n} tokens, and a window seq_len={seq_len}; "
                f"use --data.seq-len {n}"
            )
        state = generate(source.world, "val", np.arange(VAL_ITEMS, dtype=np.uint64))
        self.val_hashes = source.world.content(state)
        """Hashes (uint64) of the contents of the validation items, in order."""

    def train(self, number_B: np.ndarray) -> Rows:
        """Return training items by number (uint64 [B]); each seed has others."""
        return self.source.rows("train", number_B, self.seq_len, self.seed)

    def val(self, window_B: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Return validation items, the same ones for every seed, each of which is a document."""
        rows = self.source.rows("val", window_B.astype(np.uint64), self.seq_len)
        return rows, np.repeat(window_B[:, None], self.seq_len, axis=1)
