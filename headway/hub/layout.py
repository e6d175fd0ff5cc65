"""How the tensors of a Hugging Face folder lie in those of a model: one description per tensor,
read in both directions.

A `Row` names one of their tensors, one of ours and the dims of both, as in einops:

    Row("model.layers.1.mlp.experts.7.down_proj.weight", "layers.1.ffn.experts.w_out_HEFL",
        "D F = 0 7 F D")

so their `[D, F]` is the transpose of our `[0, 7]`. A number on our side is an index, `(1/2 F)` the
second half of a dim, and `(F G)` on their side two of our dims in one. What several rows describe
is each a part of ours."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

Shape = tuple[int, ...]
Region = tuple[slice, ...]


@dataclass(frozen=True)
class Row:
    """One of their tensors, and its place in one of ours."""

    theirs: str
    ours: str
    dims: str = ""
    """Their dims = our dims; empty: the whole tensor as it is."""

    def region(self, shape: Shape) -> Region:
        """Return the part of our tensor of `shape` that theirs is."""
        if not self.dims:
            return tuple(slice(0, n) for n in shape)
        region = []
        for token, n in zip(self._ours, shape, strict=True):
            match token:
                case int(index):
                    region.append(slice(index, index + 1))
                case (index, parts, _):
                    region.append(slice(index * n // parts, (index + 1) * n // parts))
                case _:
                    region.append(slice(0, n))
        return tuple(region)

    def pieces(self, shape: Shape) -> Iterator[tuple[Region, Region, Shape]]:
        """Cut their tensor by experts, where its first dim counts them, so that not all need be in
        memory: yield the part of theirs, that of ours, and the shape of ours with that one expert
        alone, for `read`."""
        region, theirs = self.region(shape), self.shape(shape)
        if not self.dims or self._theirs[0] != ["E"]:
            yield tuple(slice(0, n) for n in theirs), region, shape
            return
        dim = self._ours.index("E")
        for e in range(theirs[0]):
            part = (slice(e, e + 1), *(slice(0, n) for n in theirs[1:]))
            yield (
                part,
                (*region[:dim], slice(e, e + 1), *region[dim + 1 :]),
                (*shape[:dim], 1, *shape[dim + 1 :]),
            )

    def shape(self, shape: Shape) -> Shape:
        """Return the shape of their tensor where ours has `shape`."""
        if not self.dims:
            return shape
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[letter] for letter in group) for group in self._theirs)

    def read(self, theirs: Tensor, shape: Shape) -> Tensor:
        """Return their tensor as the `region` of ours, a view where that is possible."""
        if not self.dims:
            return theirs
        sizes = self._sizes(shape)
        letters = [letter for group in self._theirs for letter in group]
        split = theirs.reshape([sizes[letter] for letter in letters])
        part = split.permute([letters.index(letter) for letter in self._letters])
        return part.reshape([s.stop - s.start for s in self.region(shape)])

    def write(self, part: Tensor, shape: Shape) -> Tensor:
        """Return their tensor, made of the `region` of ours: the inverse of `read`."""
        if not self.dims:
            return part
        sizes = self._sizes(shape)
        letters = [letter for group in self._theirs for letter in group]
        split = part.reshape([sizes[letter] for letter in self._letters])
        turned = split.permute([self._letters.index(letter) for letter in letters])
        return turned.reshape(self.shape(shape))

    @cached_property
    def _theirs(self) -> list[list[str]]:
        """The letters of each of their dims."""
        return [token.strip("()").split() for token in _tokens(self.dims.split("=")[0])]

    @cached_property
    def _ours(self) -> list[int | str | tuple[int, int, str]]:
        """Each of our dims: an index, a letter, or (index, parts, letter of one part)."""
        dims = []
        for token in _tokens(self.dims.split("=")[1]):
            if part := re.fullmatch(r"\((\d+)/(\d+) (\w)\)", token):
                dims.append((int(part[1]), int(part[2]), part[3]))
            else:
                dims.append(int(token) if token.isdigit() else token)
        return dims

    @cached_property
    def _letters(self) -> list[str]:
        """The letters of our dims, in order."""
        letters = [token[2] if isinstance(token, tuple) else token for token in self._ours]
        return [letter for letter in letters if isinstance(letter, str)]

    def _sizes(self, shape: Shape) -> dict[str, int]:
        sizes = {}
        for token, n in zip(self._ours, shape, strict=True):
            match token:
                case str(letter):
                    sizes[letter] = n
                case (_, parts, letter):
                    assert n % parts == 0, f"{self.ours}: {parts} equal parts of {n}"
                    sizes[letter] = n // parts
        return sizes


def _tokens(dims: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", dims)


def dense_rows(theirs: str, ours: str, bias: bool = False) -> Iterator[Row]:
    """Yield gate, up and down projection of a dense SwiGLU network."""
    for part, name in enumerate(("gate_proj", "up_proj")):
        yield Row(f"{theirs}.{name}.weight", f"{ours}.w_in.weight", f"F D = ({part}/2 F) D")
        if bias:
            yield Row(f"{theirs}.{name}.bias", f"{ours}.w_in.bias", f"F = ({part}/2 F)")
    yield Row(f"{theirs}.down_proj.weight", f"{ours}.w_out.weight")
    if bias:
        yield Row(f"{theirs}.down_proj.bias", f"{ours}.w_out.bias")


def expert_rows(
    theirs: str,
    ours: str,
    n_experts: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Row]:
    """Yield the three matrices of each expert, as checkpoints are published and Transformers saves
    them by default."""
    *inputs, out = names
    for e in range(n_experts):
        for part, name in enumerate(inputs):
            dims = f"F D = 0 {e} {part} F D"
            yield Row(f"{theirs}.{e}.{name}.weight", f"{ours}.w_in_HEGFL", dims)
        yield Row(f"{theirs}.{e}.{out}.weight", f"{ours}.w_out_HEFL", f"D F = 0 {e} F D")


def fused_expert_rows(theirs: str, ours: str) -> Iterator[Row]:
    """Yield the two stacks of all experts, as Transformers 5 holds them in memory and saves them
    with `save_original_format=False`."""
    yield Row(f"{theirs}.gate_up_proj", f"{ours}.w_in_HEGFL", "E (G F) D = 0 E G F D")
    yield Row(f"{theirs}.down_proj", f"{ours}.w_out_HEFL", "E D F = 0 E F D")


def interleaved_expert_rows(theirs: str, ours: str) -> Iterator[Row]:
    """Yield the stacks of GPT-OSS with their biases: inputs first, gate and up alternating."""
    yield Row(f"{theirs}.gate_up_proj", f"{ours}.w_in_HEGFL", "E D (F G) = 0 E G F D")
    yield Row(f"{theirs}.gate_up_proj_bias", f"{ours}.b_in_HEGF", "E (F G) = 0 E G F")
    yield Row(f"{theirs}.down_proj", f"{ours}.w_out_HEFL", "E F D = 0 E F D")
    yield Row(f"{theirs}.down_proj_bias", f"{ours}.b_out_HEL", "E D = 0 E D")
