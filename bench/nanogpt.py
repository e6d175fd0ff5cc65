"""The control of bench/shakespeare.py: the small dense GPT of nanoGPT's CPU recipe, in plain
PyTorch.

Written from the recipe (github.com/karpathy/nanoGPT, README, "I only have a macbook",
train_shakespeare_char.py):
learned positions, LayerNorm without bias, causal attention, GELU of width 4·D, tied head, N(0,
0.02²) weights, the last matrix of each branch divided by √(2·layers), no dropout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.model.linear import Embedding
from headway.model.roles import Group, Role


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
