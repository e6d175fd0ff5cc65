"""The control of bench/shakespeare.py: the small dense GPT of nanoGPT's CPU recipe, in plain
PyTorch.

Written from the recipe (github.com/karpathy/nanoGPT, README, "I only have a macbook",
train_shakespeare_char.py):
learned positions, LayerNorm without bias, causal attention, GELU of width 4·D, tied head, N(0,
0.02²) weights, the last matrix of each branch divided by √(2·layers), no dropout.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import OptimConfig, UsageError
from headway.model.linear import Embedding
from headway.model.roles import Group, Role
from headway.optim.groups import build_optimizers, clip_factor
from headway.optim.schedule import lr_factor
from headway.parallel.reduce import total_norm

RECIPE = OptimConfig(
    lr=1e-3,
    beta2=0.99,
    schedule="cosine",
    warmup=0.05,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    clip=1.0,
)
SHAPE = (12, 64)
"""Windows of a step, and their length."""
EVALUATIONS = 5


class Linear(nn.Linear):
    """A matrix, to the optimiser."""

    def roles(self):
        return {"weight": Role(Group.MATRIX)}


class LayerNorm(nn.LayerNorm):
    """A vector, to the optimiser: no weight decay."""

    def roles(self):
        return {"weight": Role(Group.VECTOR)}


class Positions(nn.Embedding):
    """A matrix, to the optimiser."""

    def roles(self):
        return {"weight": Role(Group.MATRIX)}


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = LayerNorm(width, bias=False), LayerNorm(width, bias=False)
        self.qkv, self.o = (Linear(width, 3 * width, bias=False), Linear(width, width, bias=False))
        self.up = Linear(width, 4 * width, bias=False)
        self.down = Linear(4 * width, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        heads = (
            t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x_BSD)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
        x_BSD = x_BSD + self.o(y)
        return x_BSD + self.down(F.gelu(self.up(self.norm2(x_BSD))))


class NanoGPT(nn.Module):
    """tokens `[B, S]`, targets `[B, S]` → sum of nats."""

    def __init__(
        self,
        vocab_size: int,
        seq_len: int = 64,
        width: int = 128,
        n_layers: int = 4,
        n_heads: int = 4,
        seed: int = 0,
    ):
        super().__init__()
        self.embed, self.position = Embedding(vocab_size, width), Positions(seq_len, width)
        self.layers = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.norm = LayerNorm(width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "norm" in name:
                    continue
                last = name.endswith(("o.weight", "down.weight"))
                p.normal_(0, 0.02 / math.sqrt(2 * n_layers) if last else 0.02, generator=generator)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        x = self.embed(tokens_BS) + self.position.weight[: tokens_BS.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), reduction="sum")


class Characters:
    """A text file as characters, as nanoGPT's shakespeare_char: the first 90% train, random
    windows.

    Validation is the rest, in windows of `seq_len`.
    """

    def __init__(self, path: str | Path, batch_size: int, seq_len: int, seed: int = 0):
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
        n = (len(self._rest) - 1) // seq_len
        if n < 1 or len(self._train) <= seq_len:
            raise UsageError(
                f"{str(path)!r} has {len(ids)} characters, too few for windows of {seq_len}"
            )
        x, y = (self._rest[i : i + n * seq_len].view(n, seq_len) for i in (0, 1))
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


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    step: int
    cpu_seconds: float
    """Of training; evaluation is left out."""
    wall_seconds: float
    nats: float
    """Validation loss per character."""


def train(path: str, seed: int, steps: int, width: int = 128) -> list[Point]:
    """Train the recipe for `steps` steps and return its learning curve."""
    text = Characters(path, *SHAPE, seed=seed)
    model = NanoGPT(text.vocab_size, seq_len=SHAPE[1], width=width, seed=seed)
    optim = OptimConfig(**{**vars(RECIPE), "steps": steps})
    optimizers = build_optimizers(model, optim, newton_schulz_dtype=torch.float32)
    cpu = wall = 0.0
    curve: list[Point] = []
    for step in range(steps):
        tokens_BS, targets_BS = text.train(step)
        c0, w0 = time.process_time(), time.perf_counter()
        optimizers.set_lr(lr_factor(step, optim))
        (model(tokens_BS, targets_BS) / targets_BS.numel()).backward()
        norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
        optimizers.step(clip_factor(float(norm), optim.clip))
        optimizers.zero_grad()
        cpu, wall = cpu + time.process_time() - c0, wall + time.perf_counter() - w0
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            curve.append(Point(step + 1, cpu, wall, evaluate(model, text)))
    return curve


@torch.no_grad()
def evaluate(model: NanoGPT, text: Characters) -> float:
    """Return the nats per character of the validation text."""
    nats = sum(float(model(x, y)) for x, y in text.val())
    return nats / sum(y.numel() for _, y in text.val())
