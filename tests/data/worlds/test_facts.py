from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data.worlds.facts import Facts
from headway.data.worlds.spec import parse_world
from tests.data.worlds.rows import rows


@st.composite
def worlds(draw):
    world = Facts(
        length=draw(st.integers(0, 12)),
        agents=draw(st.integers(2, 9)),
        objects=draw(st.integers(1, 5)),
        attributes=draw(st.integers(1, 3)),
        values=draw(st.integers(4, 20)),
        kind=draw(st.sampled_from(["mixed", "holder", "attribute", "composition"])),
        weights=draw(st.sampled_from(["none", "conflict", "recall"])),
    )
    # with a handful of different items a split may have none
    assume(world.agents**world.objects * (world.agents - 1) ** world.length >= 64)
    return world


def read(text):
    """What a text says, sentence by sentence: an oracle of its own."""
    *sentences, question = text.replace("?", ".").rstrip(" .").split(" . ")
    holder, value = {}, {}
    for sentence in sentences:
        match sentence.split():
            case [agent, "has", thing]:
                holder[thing] = agent
            case [agent, attribute, "is", word]:
                value[agent, attribute] = word
            case [giver, "gives", thing, "to", agent]:
                assert holder[thing] == giver
                holder[thing] = agent
            case other:
                raise AssertionError(other)
    return holder, value, question.split()


@settings(deadline=None, max_examples=25)
@given(world=worlds(), seed=st.integers(0, 99))
def test_text_meta_and_answer_agree(world, seed):
    for row in rows(world, "train", 4, seed):
        meta = row["meta"]
        holder, value, question = read(row["prompt"])
        assert len(meta["events"]) == world.length and len(holder) == world.objects
        assert {tuple(k): v for k, v in meta["facts"]} == value
        unstated = {tuple(k): v for k, v in meta["weights"]}
        assert not set(unstated) & set(value)
        assert len(unstated) + len(value) == world.agents * world.attributes
        if world.weights != "conflict":
            assert bool(value) == (world.weights == "none")
        value |= unstated
        # the same from meta
        by_meta = dict(map(tuple, meta["start"]))
        for giver, thing, receiver in meta["events"]:
            assert by_meta[thing] == giver != receiver
            by_meta[thing] = receiver
        assert by_meta == holder
        asked = meta["question"]
        match question:
            case ["who", "has", thing]:
                wanted, kind = holder[thing], "holder"
            case ["what", "is", attribute, "of", agent]:
                wanted, kind = value[agent, attribute], "attribute"
                assert (asked["agent"], asked["attribute"]) == (agent, attribute)
            case ["who", "has", thing, "and", attribute]:
                wanted = [holder[thing], value[holder[thing], attribute]]
                kind = "composition"
                assert (asked["object"], asked["attribute"]) == (thing, attribute)
        assert asked["kind"] == kind and meta["answer"] == wanted
        assert row["answer"].split() == ([wanted] if isinstance(wanted, str) else wanted)
        whole = [*row["prompt"].split(), *row["answer"].split()]
        assert [world.words[i] for i in row["tokens"]] == whole[:-1]
        at = len(row["prompt"].split()) - 1
        assert row["targets"][:at] == [-1] * at
        assert [world.words[i] for i in row["targets"][at:]] == whole[at + 1 :]
        assert len(row["tokens"]) <= world.n_tokens


def test_kinds_and_distances_are_spread():
    world = Facts(length=20, kind="mixed")
    items = rows(world, "train", 1500)
    kinds = Counter(row["meta"]["question"]["kind"] for row in items)
    assert all(abs(kinds[k] / 1500 - 1 / 3) < 0.05 for k in ("holder", "attribute", "composition"))
    last = [
        max(i for i, event in enumerate(row["meta"]["events"]) if event[1] == thing)
        for row in items
        if (thing := row["meta"]["question"]["object"])
    ]
    # the last event of the asked object lies anywhere but in the first tenth
    assert min(last) == 2 and max(last) == 19
    assert np.abs(np.bincount(last)[2:] / len(last) * 18 - 1).max() < 0.5


def test_facts_in_the_weights_are_the_same_in_every_item_split_and_seed():
    stated, known = set(), set()
    for split, seed in (("train", 0), ("test", 5)):
        for row in rows(Facts(length=1, weights="conflict"), split, 200, seed):
            known |= {(*k, v) for k, v in row["meta"]["weights"]}
            stated |= {(*k, v) for k, v in row["meta"]["facts"]}
    assert len(known) == 8 and len(stated) > 200
    recall = rows(Facts(length=1, weights="recall"), "val", 1)[0]["meta"]
    assert {(*k, v) for k, v in recall["weights"]} == known and not recall["facts"]


def test_mistakes():
    for spec, words in (
        ("facts,agents=1", "agents=1; use 2 or more"),
        ("facts,kind=who", "kind='who'; use mixed or holder or attribute or composition"),
        ("facts,weights=some", "weights='some'; use none or recall or conflict"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_world(spec)
