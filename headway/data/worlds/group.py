"""Word problems of groups: the product of a sequence of permutations (Merrill et al. 2024, arXiv
2404.08819; all elements of the group are tokens, as there)."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from headway.data.worlds.draws import Draws
from headway.data.worlds.world import Items, State, check_least, hash_of


@dataclass(frozen=True)
class Group:
    """Random elements; the target at each is the product up to it, acc ← acc[e]: first e, then what
    came before. S5 is the smallest group whose word problem is NC¹-complete; A5, its half, too; S3
    is easy."""

    group: Literal["s5", "a5", "s3"] = "s5"
    """All permutations of five or three points, or the even ones."""
    length: int = 32
    """Elements of an item."""
    bos: int = 1
    """1: an item begins with `<s>`."""

    @property
    def name(self) -> str:
        """Return the group."""
        return self.group

    @cached_property
    def elements_GP(self) -> np.ndarray:
        """The images of each element, in lexicographic order, int64 [|G|, points]."""
        points = 3 if self.group == "s3" else 5
        permutations = np.array(list(itertools.permutations(range(points))))
        pairs = list(itertools.combinations(range(points), 2))
        inversions_G = sum(permutations[:, i] > permutations[:, j] for i, j in pairs)
        return permutations[inversions_G % 2 == 0] if self.group == "a5" else permutations

    @cached_property
    def table_GG(self) -> np.ndarray:
        """table[a, b] is the element a∘b, whose image of i is a[b[i]]."""
        product_GGP = self.elements_GP[:, self.elements_GP]
        place = self.elements_GP.shape[1] ** np.arange(self.elements_GP.shape[1])
        code_G = self.elements_GP @ place
        order_G = np.argsort(code_G)
        return order_G[np.searchsorted(code_G[order_G], product_GGP @ place)]

    @property
    def words(self) -> tuple[str, ...]:
        """Return the elements, each written as its images, and `<s>`."""
        return (*("".join(map(str, images)) for images in self.elements_GP.tolist()), "<s>")

    @property
    def n_tokens(self) -> int:
        """Return the elements, and `<s>`."""
        return self.bos + self.length

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit."""
        check_least(self, 1, "length")
        check_least(self, 0, "bos", most=1)

    def draw(self, draws: Draws) -> State:
        """Return `elements` [B, length], numbers of elements."""
        return {"elements": draws.integers(len(self.elements_GP), self.length)}

    def content(self, state: State) -> np.ndarray:
        """Return a hash of the elements."""
        return hash_of(state["elements"])

    def oracle(self, state: State) -> np.ndarray:
        """Return the product up to each element, [B, length]."""
        product_BT = state["elements"].copy()
        for t in range(1, self.length):
            product_BT[:, t] = self.table_GG[product_BT[:, t - 1], product_BT[:, t]]
        return product_BT

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write the elements."""
        tokens_BT, targets_BT = state["elements"], answer
        if self.bos:
            first_B1 = np.full((len(tokens_BT), 1), len(self.elements_GP))
            tokens_BT = np.concatenate([first_B1, tokens_BT], axis=1)
            targets_BT = np.concatenate([np.full_like(first_B1, -1), answer], axis=1)
        prompt_B = np.full(len(tokens_BT), self.n_tokens)
        return Items(tokens_BT, targets_BT, prompt_B, answer[:, -1:])

    def meta(self, state: State, row: int) -> dict:
        """Return whether there is an `<s>`, and the images of the elements, one after another."""
        return {"bos": self.bos, "elements": self.elements_GP[state["elements"][row]].tolist()}
