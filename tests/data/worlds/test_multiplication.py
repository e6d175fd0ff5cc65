import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data.worlds.multiplication import Multiplication
from tests.data.worlds.rows import rows


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    order=st.sampled_from(["msb", "lsb"]),
    form=st.sampled_from(["direct", "scratch"]),
    seed=st.integers(0, 99),
)
def test_the_product_in_its_order(m, n, order, form, seed):
    world = Multiplication(m=m, n=n, order=order, form=form)
    for row in rows(world, "train", 5, seed):
        a, b = row["meta"]["factors"]
        assert len(str(a)) == m and len(str(b)) == n and row["meta"]["order"] == order
        assert row["prompt"] == " ".join([*str(a), "×", *str(b), "="])

        def written(text):
            return list(text if order == "msb" else text[::-1])

        product = written(str(a * b))
        assert row["answer"].split() == product
        scratch = []
        if form == "scratch":
            for digit in str(b)[::-1]:
                scratch += [*written(f"{a * int(digit):0{m + 1}d}"), "+"]
            scratch[-1] = "="
        whole = [*row["prompt"].split(), *scratch, *product, "."]
        assert [world.words[i] for i in row["tokens"]] == whole[:-1]
        at = len(row["prompt"].split()) - 1
        assert row["targets"][:at] == [-1] * at
        assert [world.words[i] for i in row["targets"][at:]] == whole[at + 1 :]
        assert len(row["tokens"]) <= world.n_tokens


def test_splits_do_not_mind_the_order_of_the_factors():
    pairs = [
        {tuple(sorted(row["meta"]["factors"])) for row in rows(Multiplication(2), split, 400)}
        for split in ("train", "test")
    ]
    assert not pairs[0] & pairs[1] and min(map(len, pairs)) > 200


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (Multiplication(10), "length=10; use 1 … 9"),
        (Multiplication(2, n=12), "n=12; use 0 … 9"),
        (Multiplication(order="big"), "order='big'; use msb or lsb"),  # type: ignore[arg-type]
    ],
)
def test_sizes_that_do_not_fit(world, words):
    with pytest.raises(UsageError, match=words):
        world.check()
