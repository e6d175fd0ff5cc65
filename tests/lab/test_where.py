import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.lab.where import OPERATORS, condition, field_named

FIELDS = [
    "model.moe.top_k",
    "model.moe.kind",
    "model.tied",
    "run.seed",
    "bits_per_byte",
    "data.source",
]
ROW = {
    "model.moe.top_k": 4,
    "model.moe.kind": "latent",
    "model.tied": True,
    "run.seed": 1,
    "bits_per_byte": None,
    "data.source": ["stdlib"],
}


@pytest.mark.parametrize(
    "text, holds",
    [
        ("model.moe.top_k=4", True),
        ("top_k = 4 and moe.kind=latent", True),
        ("top-k>=4.5 or kind='latent'", True),
        ('top_k<4 or not (kind == "latent" and seed != 2)', False),
        ("top_k in 1, 2,4 and seed=1", True),
        ("not top_k in 1,2", True),
        ("top_k in (1, 4) and seed in (1)", True),
        ("not (top_k in (1,2) or seed in (2))", True),
        ("tied=true and not tied = 1", True),
        ("seed=true", False),
        ("seed in true, 2", False),
        ("bits_per_byte<2 or bits_per_byte>=2", False),
        ("bits_per_byte = none", True),
        ("source=stdlib", True),
        ("top_k='4'", False),
        ("top_k<latent", False),
        ("top_k=1 and seed=1 or kind=latent", True),
        ("top_k=1 and (seed=1 or kind=latent)", False),
    ],
)
def test_conditions(text, holds):
    assert condition(text, FIELDS)(ROW) is holds


@pytest.mark.parametrize(
    "text, said",
    [
        ("top_k", "an operator is missing at the end"),
        ("top_k=", "a value is missing at the end"),
        ("top_k ~ 4", "'~' is no operator; use = == != <= >= < > or in"),
        ("topk=4", "there is no field topk; did you mean model.moe.top_k?"),
        ("(top_k=4", "a ) is missing"),
        ("top_k in (4, 2 and seed=1", "a ) is missing"),
        ("top_k=4 seed=1", "'seed' follows a whole condition; use and, or"),
        ("kind='latent", 'cannot read "\'latent"'),
        ("depth=4", "there is no field depth"),
        ("__import__('os').system('x')=1", "there is no field __import__"),
    ],
)
def test_what_cannot_be_read_is_one_line(text, said):
    with pytest.raises(UsageError) as error:
        condition(text, FIELDS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tail_must_be_unique():
    fields = ["data.seed", "run.seed", "d_ff"]
    assert field_named("d_ff", fields) == "d_ff"
    assert field_named("kind", ["run.kind", "model.moe.kind"]) == "model.moe.kind"
    with pytest.raises(UsageError, match=r"may be data\.seed or run\.seed"):
        field_named("seed", fields)


def trees() -> st.SearchStrategy[tuple[str, object]]:
    """A text and a Python function of the row that means the same."""
    leaf = st.tuples(
        st.sampled_from(["a", "b"]), st.sampled_from([*OPERATORS]), st.integers(-3, 3)
    ).map(lambda t: (f"{t[0]}{t[1]}{t[2]}", lambda row, t=t: OPERATORS[t[1]](row[t[0]], t[2])))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            inner.map(lambda x: (f"not ({x[0]})", lambda row: not x[1](row))),
            st.tuples(inner, inner).map(
                lambda p: (
                    f"({p[0][0]}) and ({p[1][0]})",
                    lambda row: p[0][1](row) and p[1][1](row),
                )
            ),
            st.tuples(inner, inner).map(
                lambda p: (f"({p[0][0]} or {p[1][0]})", lambda row: p[0][1](row) or p[1][1](row))
            ),
        ),
    )


@settings(max_examples=100, deadline=None)
@given(trees(), st.integers(-3, 3), st.integers(-3, 3))
def test_nested_conditions_are_those_of_python(tree, a, b):
    text, function = tree
    assert condition(text, ["a", "b"])({"a": a, "b": b}) == function({"a": a, "b": b})
