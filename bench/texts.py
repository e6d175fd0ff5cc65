"""The texts of the quality benches, as batches."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headway.config import DataConfig, UsageError
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer


class StreamText:
    """A Headway data set: bytes (or tokens), validation by file."""

    def __init__(self, config: DataConfig, seed: int = 0, val_batches: int = 48):
        tokenizer = load_tokenizer(config.tokenizer)
        dataset = prepare(config, tokenizer, log=lambda _: None)
        self.vocab_size = dataset.vocab_size
        self.stream = Stream(dataset, config, seed)
        self.bytes_V = torch.from_numpy(np.asarray(tokenizer.token_bytes, dtype=np.int64))
        size = config.batch_size
        n = min(val_batches, -(-self.stream.n_val_windows // size))
        ends = [min((i + 1) * size, self.stream.n_val_windows) for i in range(n)]
        self._val = [self._pair(self.stream.val_windows(i * size, e)) for i, e in enumerate(ends)]

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        return self._pair(self.stream.batch(step))

    def val(self) -> list[tuple[Tensor, Tensor]]:
        return self._val

    def units(self, targets_BS: Tensor) -> float:
        return float(self.bytes_V[targets_BS].sum())

    @staticmethod
    def _pair(batch) -> tuple[Tensor, Tensor]:
        full_B = (batch.targets_BS >= 0).all(1)  # rivals know no target to leave out
        return batch.tokens_BS[full_B], batch.targets_BS[full_B]


class Characters:
    """A text file as characters, as nanoGPT's shakespeare_char: the first 90% train, random
    windows.

    Validation is every `val_every`-th block of 128 characters of the rest, the same characters for
    every `seq_len` that divides 128 or that 128 divides.
    """

    def __init__(
        self, path: str | Path, batch_size: int, seq_len: int, seed: int = 0, val_every: int = 4
    ):
        path = Path(path)
        if not path.is_file():
            raise UsageError(
                f"--data {str(path)!r} is no file; give a text, for instance tinyshakespeare.txt"
            )
        text = path.read_text("utf-8")
        characters = sorted(set(text))
        number = {c: i for i, c in enumerate(characters)}
        ids = torch.tensor([number[c] for c in text], dtype=torch.int64)
        cut = int(len(ids) * 0.9)
        self.vocab_size = len(characters)
        self._train, self._rest = ids[:cut], ids[cut:]
        self._shape, self._seed = (batch_size, seq_len), seed
        block = max(128, seq_len)
        n = (len(self._rest) - 1) // block
        if n < 1 or len(self._train) <= seq_len:
            raise UsageError(
                f"{str(path)!r} has {len(ids)} characters, too few for windows of {seq_len}"
            )
        x = self._rest[: n * block].view(n, block)[::val_every].reshape(-1, seq_len)
        y = self._rest[1 : n * block + 1].view(n, block)[::val_every].reshape(-1, seq_len)
        rows = max(1, 2048 // seq_len)
        self._val = list(zip(x.split(rows), y.split(rows), strict=True))

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        B, S = self._shape
        rng = np.random.default_rng((self._seed, step))
        start = torch.from_numpy(rng.integers(0, len(self._train) - S, size=B))
        window = self._train[start.unsqueeze(1) + torch.arange(S + 1)]
        return window[:, :-1], window[:, 1:]

    def val(self) -> list[tuple[Tensor, Tensor]]:
        return self._val

    def units(self, targets_BS: Tensor) -> float:
        return float(targets_BS.numel())
