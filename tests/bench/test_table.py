import json
from argparse import Namespace

import pytest

from bench import common
from bench.table import (
    BEGIN,
    END,
    HIGHLIGHTS,
    NUMBERS,
    PAGES,
    QUALITY,
    QUALITY_WHAT,
    ROOT,
    against_flat,
    at_equal_bytes,
    block,
    highlights,
    judged,
    rewrite,
    serving,
    sizes,
)
from headway.report import provenance


def test_the_documents_state_what_the_benches_measured():
    for path, numbers in PAGES.items():
        page = path.read_text()
        assert rewrite(page, numbers()) == page, f"{path.name}: run python bench/table.py"


@pytest.mark.parametrize("highlight", HIGHLIGHTS, ids=lambda h: h.what)
def test_a_highlight_is_a_measured_target(highlight):
    measured = json.loads((NUMBERS / f"{highlight.bench}.json").read_text())
    (value,) = [t["value"] for t in measured["targets"] if t["name"] == highlight.target]
    row = f"| {highlight.what} | {highlight.format.format(value)} |"
    assert row in highlights() and row in (ROOT / "README.md").read_text()


def test_quality_is_that_of_a_judged_claim(tmp_path):
    """README.md states a claim of a study with all its seeds, and none that is open."""
    bits = {"dense": 1.60, "2x64": 1.54}
    rows = [
        {
            "stage": "confirm", "corpus": "python", "arm": arm, "seed": seed, "budget": 2000,
            "bits_per_byte": value + seed / 1e4, "validation": "v", "cpu_seconds": 60.0,
        }
        for arm, value in bits.items() for seed in (101, 102, 103, 104)
    ]  # fmt: skip
    path = tmp_path / "studies" / "sparse_vs_dense.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"rows": rows}))
    assert judged(*QUALITY, tmp_path).estimate == pytest.approx(-0.06)
    path.write_text(json.dumps({"rows": rows[1:]}))
    assert judged(*QUALITY, tmp_path).estimate is None
    assert (judged(*QUALITY).estimate is None) == (QUALITY_WHAT not in highlights())


@pytest.mark.parametrize(
    "gap, words",
    [
        (0.02, "is worse by more than 0.005"),
        (-0.02, "is not worse by 0.005"),
        (0.005, "data cannot tell whether"),
    ],
)
def test_the_sentence_on_the_centre_is_that_of_its_claim(tmp_path, gap, words):
    """README.md says what the registered claim says, also where it is against us."""
    rows = [
        {
            "stage": "confirm", "corpus": "python", "arm": arm, "seed": seed, "budget": 2000,
            "bits_per_byte": 1.5 + value * seed % 7 / 1e4, "validation": "v", "cpu_seconds": 60.0,
        }
        for arm, value in (("flat", 3), ("2x64", 5)) for seed in range(101, 109)
    ]  # fmt: skip
    for row in rows:
        row["bits_per_byte"] += gap * (row["arm"] == "2x64")
    path = tmp_path / "studies" / "latent_vs_flat.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"rows": rows}))
    sentence = against_flat(tmp_path)
    assert words in sentence and "8 seeds" in sentence
    estimate = judged("latent_vs_flat", "C1-2000", tmp_path).estimate
    assert estimate == pytest.approx(gap, abs=1e-3) and f"{estimate:+.4f} bits/byte" in sentence
    path.write_text(json.dumps({"rows": rows[1:]}))
    assert against_flat(tmp_path) == ""


def test_the_sentence_on_equal_bytes_is_of_the_longest_budget_that_is_judged(tmp_path):
    gaps = {250: {"latent, k 2": 0.03, "flat, k 1, shared expert": 0.01}}
    gaps[2000] = {name: 2 * gap for name, gap in gaps[250].items()}
    rows = [
        {
            "stage": "confirm", "corpus": "python", "arm": arm, "seed": seed, "budget": steps,
            "bits_per_byte": 1.5 + gap * (1 + seed % 7 / 1e4), "validation": "v",
            "cpu_seconds": 60.0,
        }
        for steps, above in gaps.items()
        for arm, gap in {"two heads, routed before": 0.0, **above}.items()
        for seed in range(101, 109)
    ]  # fmt: skip
    path = tmp_path / "studies" / "frontiers.json"
    path.parent.mkdir()
    for known, steps, latent, flat in (
        (rows, "2,000", -0.06, -0.02),
        (rows[:-1], "250", -0.03, -0.01),
    ):
        path.write_text(json.dumps({"rows": known}))
        sentence = at_equal_bytes(tmp_path)
        assert f"8 seeds, {steps} steps" in sentence
        assert f"at {latent:+.3f} (" in sentence and f"at {flat:+.3f} (" in sentence
    path.write_text(json.dumps({"rows": rows[:20]}))
    assert at_equal_bytes(tmp_path) == ""


def test_a_row_says_value_bound_and_whether_it_is_met(tmp_path):
    found = {
        "bench": "x",
        "machine": {"cpu": "CPU", "cores": 2, "cpu_capability": "AVX2", "gpu": None},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "rows": [{"ms": 1.0}],
        "targets": [
            {"name": "speed", "value": 1.2345678, "bound": 2, "at_least": True, "pass": False},
            {"name": "memory", "value": 0.4, "bound": 0.5, "at_least": False, "pass": True},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps(found))
    text = block(tmp_path)
    assert "| speed | 1.235 | ≥ 2 | **no** |" in text
    assert "| memory | 0.4 | ≤ 0.5 | yes |" in text
    assert "`bench/x.py` on CPU, 2 cores (AVX2), torch 2.13.0, commit 0123456789:" in text
    found["machine"] |= {"gpu": "NVIDIA H100"}
    (tmp_path / "x.json").write_text(json.dumps(found))
    assert "`bench/x.py` on NVIDIA H100, torch 2.13.0" in block(tmp_path)


def test_rows_keep_the_machine_that_measured_them(tmp_path, monkeypatch):
    """Two calls on two machines that share a file: the numbers page names both."""
    monkeypatch.setattr(common, "NUMBERS", tmp_path)
    target = common.target("speed", 2.0, 1.0, True)
    saved = Namespace(save=True, json=False)
    common.report("x", [{"part": "a"}, {"part": "old", "commit": "c0"}], [target], saved)
    here = common.place(provenance.machine(), provenance.versions())
    rows = common.load_rows("x")
    assert [row.get("on") for row in rows] == [here, None]  # of the second nothing is known
    assert "some rows" not in block(tmp_path)
    monkeypatch.setattr(provenance, "_cpu_model", lambda: "another CPU")
    common.report("x", [*rows, {"part": "b"}], [target], saved)
    there = common.place(provenance.machine(), provenance.versions())
    assert "another CPU" in there and "torch" in there
    assert [row.get("on") for row in common.load_rows("x")] == [here, None, there]
    said = block(tmp_path)
    assert f"`bench/x.py` on {there}, commit" in said and f"; some rows on {here}:" in said


def test_serving_shows_the_best_variant_of_a_rival_and_what_is_missed(tmp_path):
    times = {"headway": 0.001, "vllm eager": 0.004, "vllm compiled": 0.003}
    row = {"shape": "S", "task": "decode batch 1", "floor": 0.0005}
    rows = [row | {"side": side, "median": median} for side, median in times.items()]
    rows.append(row | {"task": "prefill", "side": "headway", "median": 1.5, "floor": None})
    target = {"name": "a", "value": 3.0, "bound": 2, "at_least": True, "pass": True}
    missed = target | {"name": "b", "value": 1.0, "pass": False}
    found = {"bench": "serve", "rows": rows, "targets": [target, missed]}
    (tmp_path / "serve.json").write_text(json.dumps(found))
    text = serving(tmp_path)
    assert "| 46M, decode batch 1 | 1.00 | – | 3.00 | – | 0.50 |" in text
    assert "| 46M, prefill | 1,500.00 | – | – | – | – |" in text
    assert "1 of 2 targets are met" in text and "| b | 1 | ≥ 2 | **no** |" in text
    assert "| a |" not in text
    # by their configs: eight heads have two projections per layer more than flat
    assert sizes() == {"S": "46M", "Q": "258M", "M": "722M", "H": "747M, 8 heads"}


def test_the_limits_state_the_files(tmp_path):
    """Every figure and machine of the sentence is that of a file, and none is typed."""
    for path in NUMBERS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    assert "measured on NVIDIA H100 80GB HBM3" in highlights(tmp_path).rpartition("Limits")[2]
    measured = json.loads((NUMBERS / "gpu_day.json").read_text())
    measured["machine"]["gpu"] = "another GPU"
    (tmp_path / "gpu_day.json").write_text(json.dumps(measured))
    limits = highlights(tmp_path).rpartition("Limits")[2]
    assert "measured on another GPU" in limits and "billion" not in limits


def test_only_the_block_is_replaced():
    page = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert rewrite(page, "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
