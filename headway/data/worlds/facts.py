"""Who has what: agents with attributes hand objects on (after FactWorld, github.com/ianbarber).

Recall is a question for an attribute that was stated; binding, one for the holder of an object,
which the last of its events decides; composition, both in one. A fact may also lie in the weights:
then it is stated nowhere, and the same in all items."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from headway.config import UsageError
from headway.data.counter_based import u64
from headway.data.worlds.draws import Draws, key_of
from headway.data.worlds.world import Items, State, check_least, hash_of, to_the_left

GRAMMAR = ("has", "is", "gives", "to", "who", "what", "of", "and", ".", "?")
HAS, IS, GIVES, TO, WHO, WHAT, OF, AND, STOP, ASK = range(len(GRAMMAR))
KINDS = ("holder", "attribute", "composition")


@dataclass(frozen=True)
class Facts:
    """`g1 has o0 .`, `g7 a0 is v56 .`, then events `g1 gives o0 to g4 .` and a question: `who has
    o0 ?`, `what is a0 of g7 ?` or `who has o0 and a0 ?`, which asks for holder and attribute."""

    length: int = 8
    """Events of an item."""
    agents: int = 8
    """Agents, each of which has all attributes; ≥ 2."""
    objects: int = 4
    """Objects."""
    attributes: int = 1
    """Attributes of an agent."""
    values: int = 32
    """Values that an attribute may have."""
    kind: Literal["mixed", "holder", "attribute", "composition"] = "mixed"
    """What is asked; mixed: a third each."""
    weights: Literal["none", "recall", "conflict"] = "none"
    """Facts that are the same in all items. none: each item states its own. recall: no item states
    them. conflict: an item states others for half of the attributes, which then count."""

    name = "facts"

    @property
    def words(self) -> tuple[str, ...]:
        """Return grammar, agents, objects, attributes and values."""
        symbols = zip("goav", self._sizes, strict=True)
        return (*GRAMMAR, *(f"{letter}{i}" for letter, n in symbols for i in range(n)))

    @property
    def n_tokens(self) -> int:
        """Return the tokens of the longest item."""
        n_facts = 0 if self.weights == "recall" else self.agents * self.attributes
        both = self.kind in ("mixed", "composition")
        return (
            4 * self.objects
            + 5 * n_facts
            + 6 * self.length
            + (4 if self.kind == "holder" else 6)
            + both
        )

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit."""
        check_least(self, 0, "length")
        check_least(self, 1, "objects", "attributes", "values")
        check_least(self, 2, "agents")
        options = (("kind", ("mixed", *KINDS)), ("weights", ("none", "recall", "conflict")))
        for name, known in options:
            if vars(self)[name] not in known:
                value = vars(self)[name]
                raise UsageError(f"world:facts has {name}={value!r}; use {' or '.join(known)}")

    def draw(self, draws: Draws) -> State:
        """Return `start` [B, M] (the holder of each object), `values` [B, A, N] and whether they
        are `stated`, `events` [B, L, 3] (giver, object, receiver), the question as `kind`, `agent`,
        `object`, `attribute` [B], and the order in which starts and facts are written."""
        A, M, N, V = self._sizes
        L = self.length
        start_BM = draws.integers(A, M)
        asked_B = draws.integers(M)
        # the asked object changes hands for the last time anywhere but in the first tenth
        last_B = L // 10 + draws.integers(max(L - L // 10, 1))
        early_BL, late_BL = draws.integers(M, L), draws.integers(max(M - 1, 1), L)
        after_BL = (asked_B[:, None] + 1 + late_BL) % M
        place_L = np.arange(L)
        object_BL = np.where(place_L < last_B[:, None], early_BL, after_BL)
        object_BL = np.where(place_L == last_B[:, None], asked_B[:, None], object_BL)
        further_BL = 1 + draws.integers(A - 1, L)
        events_BL3 = np.empty((*object_BL.shape, 3), dtype=np.int64)
        holder_BM, row_B = start_BM.copy(), np.arange(len(start_BM))
        for i in range(L):
            giver_B = holder_BM[row_B, object_BL[:, i]]
            receiver_B = (giver_B + further_BL[:, i]) % A
            holder_BM[row_B, object_BL[:, i]] = receiver_B
            events_BL3[:, i] = np.stack([giver_B, object_BL[:, i], receiver_B], axis=1)
        value_BAN = draws.integers(V, A, N)
        stated_BAN = np.full_like(value_BAN, self.weights != "recall")
        if self.weights == "conflict":
            stated_BAN = draws.integers(2, A, N)
        if self.weights != "none":
            value_BAN = np.where(stated_BAN, value_BAN, self.known_AN)
        kind_B = draws.integers(3)
        if self.kind != "mixed":
            kind_B[:] = KINDS.index(self.kind)
        return {
            "start": start_BM,
            "values": value_BAN,
            "stated": stated_BAN,
            "events": events_BL3,
            "kind": kind_B,
            # what is not asked for is 0: it is no part of the content
            "agent": np.where(kind_B == 1, draws.integers(A), 0),
            "object": np.where(kind_B == 1, 0, asked_B),
            "attribute": np.where(kind_B == 0, 0, draws.integers(N)),
            "start_order": draws.distinct(M, M),
            "fact_order": draws.distinct(A * N, A * N),
        }

    @cached_property
    def known_AN(self) -> np.ndarray:
        """The facts in the weights, the same for these sizes whatever the seed."""
        A, _, N, V = self._sizes
        draws = Draws(key_of(f"facts|{A}|{N}|{V}"), u64(0), u64(0))
        return draws.integers(V, A, N)[0]

    def content(self, state: State) -> np.ndarray:
        """Return a hash of all but the order of writing."""
        return hash_of(*(values for name, values in state.items() if "order" not in name))

    def oracle(self, state: State) -> np.ndarray:
        """Return [B, 2]: the holder, −1 where it is not asked for, and the value, likewise; the
        last event of the object counts."""
        row_B, kind_B = np.arange(len(state["kind"])), state["kind"]
        holder_BM = state["start"].copy()
        for i in range(self.length):
            _, object_B, receiver_B = state["events"][:, i].T
            holder_BM[row_B, object_B] = receiver_B
        holder_B = holder_BM[row_B, state["object"]]
        agent_B = np.where(kind_B == 2, holder_B, state["agent"])
        value_B = state["values"][row_B, agent_B, state["attribute"]]
        return np.stack(
            [np.where(kind_B == 1, -1, holder_B), np.where(kind_B == 0, -1, value_B)], axis=1
        )

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write starts, facts, events, question and answer."""
        g, o, a, v = self._first
        start = state["start_order"]
        holder_BM = np.take_along_axis(state["start"], start, axis=1)
        B, N = len(start), self.attributes
        starts = _sentences(B, g + holder_BM, HAS, o + start, STOP)
        fact = state["fact_order"]
        value_BF = np.take_along_axis(state["values"].reshape(B, -1), fact, axis=1)
        stated_BF = np.take_along_axis(state["stated"].reshape(B, -1), fact, axis=1)
        facts = _sentences(B, g + fact // N, a + fact % N, IS, v + value_BF, STOP)
        facts[np.repeat(stated_BF, 5, axis=1) == 0] = -1
        giver_BL, object_BL, receiver_BL = np.moveaxis(state["events"], 2, 0)
        events = _sentences(B, g + giver_BL, GIVES, o + object_BL, TO, g + receiver_BL, STOP)
        kind_B = state["kind"]
        asked = o + state["object"], a + state["attribute"], g + state["agent"]
        forms = (
            (WHO, HAS, asked[0], ASK, -1, -1),
            (WHAT, IS, asked[1], OF, asked[2], ASK),
            (WHO, HAS, asked[0], AND, asked[1], ASK),
        )
        question = np.stack([_row(B, *form) for form in forms])[kind_B, np.arange(B)]
        words_B2 = np.where(answer < 0, -1, answer + np.array([g, v]))
        prompt = np.concatenate([starts, facts, events, question], axis=1)
        prompt_B = (prompt >= 0).sum(1)
        whole_BT = to_the_left(np.concatenate([prompt, words_B2], axis=1))[:, : self.n_tokens + 1]
        targets_BT = whole_BT[:, 1:].copy()
        targets_BT[np.arange(targets_BT.shape[1]) < prompt_B[:, None] - 1] = -1
        tokens_BT = whole_BT[:, :-1].copy()
        n_answer_B = (words_B2 >= 0).sum(1)
        tokens_BT[np.arange(tokens_BT.shape[1]) >= (prompt_B + n_answer_B - 1)[:, None]] = -1
        return Items(tokens_BT, targets_BT, prompt_B, to_the_left(words_B2))

    def meta(self, state: State, row: int) -> dict:
        """Return starts, stated facts, events, question and answer as words; `weights` has the
        facts that are not stated."""
        one = {name: values[row] for name, values in state.items()}
        order = [divmod(int(i), self.attributes) for i in one["fact_order"]]
        facts = {
            is_stated: [
                [[f"g{i}", f"a{j}"], f"v{one['values'][i, j]}"]
                for i, j in order
                if bool(one["stated"][i, j]) == is_stated
            ]
            for is_stated in (True, False)
        }
        kind = KINDS[one["kind"]]
        holder, value = self.oracle({name: x[None] for name, x in one.items()})[0]
        answer = {"holder": f"g{holder}", "attribute": f"v{value}"}.get(
            kind, [f"g{holder}", f"v{value}"]
        )
        return {
            "start": [[f"o{i}", f"g{one['start'][i]}"] for i in one["start_order"]],
            "facts": facts[True],
            "weights": facts[False],
            "events": [[f"g{x}", f"o{y}", f"g{z}"] for x, y, z in one["events"].tolist()],
            "question": {
                "kind": kind,
                "agent": f"g{one['agent']}" if kind == "attribute" else None,
                "object": None if kind == "attribute" else f"o{one['object']}",
                "attribute": None if kind == "holder" else f"a{one['attribute']}",
            },
            "answer": answer,
        }

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.agents, self.objects, self.attributes, self.values

    @property
    def _first(self) -> tuple[int, int, int, int]:
        """Return the number of the first agent, object, attribute and value among the words."""
        ends = np.cumsum([len(GRAMMAR), *self._sizes]).tolist()
        return ends[0], ends[1], ends[2], ends[3]


def _sentences(B: int, *parts: np.ndarray | int) -> np.ndarray:
    """Return N sentences in a row, int64 [B, N · words], whose words are arrays [B, N], or the same
    in each sentence."""
    N = next(part.shape[1] for part in parts if isinstance(part, np.ndarray))
    words = [np.broadcast_to(np.asarray(part), (B, N)) for part in parts]
    return np.stack(words, axis=2).reshape(B, -1)


def _row(B: int, *parts: np.ndarray | int) -> np.ndarray:
    """Return one sentence, int64 [B, words], whose words are arrays [B], or the same in each."""
    return np.stack([np.broadcast_to(np.asarray(part), B) for part in parts], axis=1)
