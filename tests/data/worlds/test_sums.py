import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data.worlds.sums import Sums
from tests.data.worlds.rows import rows


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 18),
    base=st.integers(2, 10),
    languages=st.integers(1, 26),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_sum_in_words_and_order_of_a_language(length, base, languages, seed, data):
    language = data.draw(st.integers(0, languages - 1))
    world = Sums(length, base, language, languages)
    letter = "abcdefghijklmnopqrstuvwxyz"[language]
    plain = rows(Sums(length, base), "test", 6, seed)
    orders = []
    for row, other in zip(rows(world, "test", 6, seed), plain, strict=True):
        first, second = row["meta"]["summands"]
        assert len(first) == len(second) == length and row["meta"]["language"] == language
        said = [str((int(a) + int(b)) % base) for a, b in zip(first, second, strict=True)]
        # the same items in every language; language 0 writes them as arithmetic does
        assert other["meta"]["summands"] == [first, second]
        assert other["prompt"] == " ".join(f"a{x}" for x in [*first, "+", *second, "="])
        assert other["answer"] == " ".join(f"a{x}" for x in said)
        prompt, answer = row["prompt"].split(), row["answer"].split()
        assert prompt[-1] == f"{letter}=" and all(w[0] == letter for w in prompt + answer)
        orders.append((prompt[:-1], [f"{letter}{x}" for x in [*first, "+", *second]]))
        assert sorted(answer) == sorted(f"{letter}{x}" for x in said)
        whole = prompt + answer
        assert [world.words[i] for i in row["tokens"]] == whole[:-1]
        assert len(row["tokens"]) == world.n_tokens
        assert row["targets"][: 2 * length + 1] == [-1] * (2 * length + 1)
        assert [world.words[i] for i in row["targets"][2 * length + 1 :]] == answer
    # one order for all items: some place of the arithmetic fits each place of the text
    for place in range(2 * length + 1):
        assert any(
            all(text[place] == words[source] for text, words in orders)
            for source in range(2 * length + 1)
        )


def test_languages_differ_in_their_order():
    prompts = {
        tuple(word[1:] for word in rows(Sums(4, 10, i, 6), n=1)[0]["prompt"].split())
        for i in range(6)
    }
    assert len(prompts) == 6
    same = rows(Sums(4, 10, 5, 6, "same"), n=1)[0]
    assert tuple(word[1:] for word in same["prompt"].split()) in prompts
    assert [w[1:] for w in same["answer"].split()] == [
        w[1:] for w in rows(Sums(4), n=1)[0]["answer"].split()
    ]


def test_splits_do_not_mind_the_order_of_the_summands_nor_the_language():
    parts = [
        {tuple(sorted(row["meta"]["summands"])) for row in rows(Sums(2, 10, i, 3), split, 400)}
        for i, split in ((0, "train"), (2, "test"))
    ]
    assert not parts[0] & parts[1] and min(map(len, parts)) > 200


def test_a_vocabulary_of_more_languages_begins_with_that_of_fewer():
    few, many = Sums(languages=2).words, Sums(5, languages=7).words
    assert many[: len(few)] == few and len(set(many)) == 84
    assert np.array_equal(
        rows(Sums(2, 10, 1, 2), n=1)[0]["tokens"], rows(Sums(2, 10, 1, 9), n=1)[0]["tokens"]
    )


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (Sums(0), "length=0; use 1 … 18"),
        (Sums(19), "length=19; use 1 … 18"),
        (Sums(order="mine"), "order='mine'; use own or same"),  # type: ignore[arg-type]
        (Sums(base=11), "base=11; use 2 … 10"),
        (Sums(languages=27), "languages=27; use 1 … 26"),
        (Sums(language=3, languages=3), "language=3 of languages=3; use languages=4 or more"),
    ],
)
def test_sizes_that_do_not_fit(world, words):
    with pytest.raises(UsageError, match=words):
        world.check()
