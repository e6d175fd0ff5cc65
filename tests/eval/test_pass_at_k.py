"""pass@k, Cover@τ and their intervals, through `headway eval --samples`."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.eval.pass_at_k import Samples, over_problems, pass_at_k
from tests.command import call, mistake


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
    )
)
def test_it_is_the_combinatorial_formula(case):
    n, c, k = case
    estimate = pass_at_k(Samples(np.array([n]), np.array([c])), k)[0]
    assert estimate == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_it_is_unbiased_where_the_plug_in_is_not():
    """p = 0.03, 200 samples, k = 64: truth 0.8576; 1 − (1 − c/n)^k is near 0.811."""
    solved = np.random.default_rng(0).binomial(200, 0.03, 40_000)
    many = Samples(np.full(40_000, 200), solved)
    assert pass_at_k(many, 64).mean() == pytest.approx(1 - 0.97**64, abs=2e-3)
    assert (1 - (1 - solved / 200) ** 64).mean() < 0.82


def test_intervals_over_problems_hold_the_mean():
    rng, held = np.random.default_rng(0), []
    for seed in range(120):
        p = rng.beta(0.5, 1.5, 80)
        samples = Samples(np.full(80, 16), rng.binomial(16, p))
        low, high = over_problems([pass_at_k(samples, 4)], seed)[0].ci95
        held.append(low <= TRUE_PASS_4 <= high)
    assert 0.89 <= np.mean(held) <= 0.99


TRUE_PASS_4 = 1 - math.prod((1.5 + i) / (2.0 + i) for i in range(4))
"""E[1 − (1 − p)^4] of p ~ Beta(0.5, 1.5)."""


def lines(path, *rows):
    path.write_text("\n".join(json.dumps({"problem": p, "correct": c}) for p, c in rows) + "\n")
    return path


def test_the_command(tmp_path):
    file = lines(
        tmp_path / "s.jsonl", ("a", [1, 0, 0, 0]), ("b", [0, 0, 0, 0]), ("c", [1, 1]), ("c", [1, 0])
    )
    done = call("eval", "--samples", file, "--k", "1,2", "--tau", "0.25,0.5", "--json")
    result = done.json
    assert result["problems"] == 3
    assert result["pass_at_k"] == pytest.approx(
        {"1": (1 / 4 + 0 + 3 / 4) / 3, "2": (1 / 2 + 0 + 1) / 3}
    )
    assert result["cover"] == pytest.approx({"0.25": 2 / 3, "0.5": 1 / 3})
    assert set(result["ci95"]) == {"pass@1", "pass@2", "cover@0.25", "cover@0.5"}
    for name, (low, high) in result["ci95"].items():
        assert 0 <= low < high <= 1 and name in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--k 5", "--k 5 cannot be estimated: 1 problems have fewer samples, one 4; use 1 … 4"),
        ("--k 0", "--k 0 cannot be estimated: it is below 1; use 1 … 4"),
        ("--k one", "--k one is no list of whole numbers"),
        ("--tau 2", "--tau 2 is no share of samples"),
        ("--tau x", "--tau x is no list of numbers"),
        ("--k= --tau=", "--samples needs --k or --tau"),
    ],
)
def test_mistakes(tmp_path, options, words):
    file = lines(tmp_path / "s.jsonl", ("a", [1, 0, 0, 0]), ("b", [0] * 9))
    assert words in mistake("eval", "--samples", file, *options.split())


@pytest.mark.parametrize("line", ["{", "3", '{"problem": 1}', '{"problem": 1, "correct": []}', '{"problem": 1, "correct": [2]}', '{"problem": 1, "correct": ["1"]}'])  # fmt: skip
def test_lines_of_another_form(tmp_path, line):
    file = tmp_path / "s.jsonl"
    file.write_text('{"problem": 0, "correct": [1]}\n' + line + "\n")
    assert "line 2 is not of the form" in mistake("eval", "--samples", file)
    file.write_text("\n")
    assert "has no problem" in mistake("eval", "--samples", file)
    assert "cannot read" in mistake("eval", "--samples", tmp_path / "none.jsonl")


def test_samples_that_nearly_repeat_each_other(tmp_path):
    pytest.importorskip("datasketch", reason="the extra [data]")
    words = [f"w{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 30)) for _ in range(4)]
    lines = [
        {"problem": 1, "correct": [0, 1, 1, 0], "texts": texts},
        {"problem": 2, "correct": [0, 1, 1, 1], "texts": [texts[0], texts[0], *texts[2:]]},
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call("eval", "--samples", file, "--json")
    assert done.json["near_repeats"] == 0.25 and "near-repeats 0.2500" in done.out
    assert done.json["ci95"]["near-repeats"][0] == 0
    file.write_text(json.dumps({**lines[0], "texts": texts[:3]}) + "\n")
    assert "line 1 has 3 texts and 4 marks" in mistake("eval", "--samples", file)
    del lines[1]["texts"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "`texts` in some lines alone" in mistake("eval", "--samples", file)
