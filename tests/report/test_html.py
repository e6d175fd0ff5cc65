"""From a run folder to one safe, small, offline file."""

import json
import re

import pytest

from headway.config import UsageError
from headway.report.html import render, write_report
from headway.report.runs import (
    MAX_CELLS,
    MAX_FRAMES,
    MAX_POINTS,
    decimate,
    evenly_spaced,
    load_run,
    short,
)
from headway.report.sinks import JsonlSink
from tests.report.fake_run import make_run

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>%%DATA%%<!--\u2028&amp;"


def embedded(page):
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data
    return json.loads(data.group(1))


def test_decimate_keeps_ends_peaks_and_gaps():
    values: list[float | None] = [float(i % 97) for i in range(50_000)]
    values[12_345], values[23_456], values[34_567] = 1e6, -1e6, None
    keep = decimate(values, 1000)
    assert len(keep) <= 1001 and keep == sorted(set(keep))
    assert {0, 12_345, 23_456, 34_567, 49_999} <= set(keep)
    assert max(v for i in keep if (v := values[i]) is not None) == 1e6


@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000, 1001, 1003, 5000])
def test_decimate_never_exceeds_its_limit(n):
    keep = decimate([float((i * 7919) % 1009) for i in range(n)], 1000)
    assert len(keep) == n if n <= 1000 else 500 < len(keep) <= 1000
    assert not n or (keep[0], keep[-1]) == (0, n - 1)


def test_decimated_curve_has_the_extremes_of_every_interval():
    values = [float((i * 7919) % 1009) for i in range(9002)]
    keep = set(decimate(values, 902))
    for b in range(450):
        inside = range(1 + b * 20, 1 + (b + 1) * 20)
        drawn = [values[i] for i in inside if i in keep]
        assert (min(drawn), max(drawn)) == (
            min(values[i] for i in inside),
            max(values[i] for i in inside),
        )


def test_spread_and_short():
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(100, 4) == [0, 33, 66, 99]
    assert short(0.1 + 0.2) == 0.3
    assert short(3.0) == 3 and isinstance(short(3.0), int)
    assert short(0.00031234, 4) == 0.0003123
    assert short(None) is None


def test_load_run_holds_what_was_recorded(tmp_path):
    run = load_run(make_run(tmp_path / "run", steps=600, every=5, layers=3, heads=2, experts=8))
    assert run["intervals"] == 120
    assert len(run["series"]["loss"]["y"]) == 120 and run["series"]["loss"]["y"].count(None) == 1
    assert len(run["series"]["val_bits_per_byte"]["y"]) == 10
    assert run["load"]["cells"] == 48 and len(run["load"]["frames"]) == 120
    assert len(run["entropy"]) == 3
    assert [e["event"] for e in run["events"]] == ["skipped", "interrupted", "resumed"]
    head = run["headline"]
    assert (head["step"], head["steps"], head["tokens"]) == (600, 600, 600 * 4096)
    assert head["parameters_total"] == 9_482_240
    assert head["val_first"] == run["series"]["val_bits_per_byte"]["y"][0]
    assert head["val_last"] == run["series"]["val_bits_per_byte"]["y"][-1]
    assert run["config"]["model.moe.n_experts"] == 8


def test_a_repeated_step_counts_once_and_the_later_wins(tmp_path):
    folder = make_run(tmp_path / "run", steps=50, events=False)
    with JsonlSink(folder / "metrics.jsonl") as sink:
        sink.write({"step": 25, "tokens": 1, "seconds": 1.0, "loss": 9.0})
    loss = load_run(folder)["series"]["loss"]
    assert loss["step"] == list(range(5, 51, 5))
    assert loss["y"][4] == 9


def test_long_runs_of_many_experts_stay_small(tmp_path):
    folder = make_run(tmp_path / "run", steps=30_000, every=10, layers=2, heads=2, experts=4)
    run = load_run(folder)
    for name, series in run["series"].items():
        assert len(series["y"]) <= MAX_POINTS + 2, name
    assert run["series"]["loss"]["recorded"] == 3000
    assert len(run["load"]["frames"]) == MAX_FRAMES and run["load"]["recorded"] == 3000
    assert len(write_report([folder], tmp_path / "r.html").read_bytes()) < 1_500_000
    big = load_run(make_run(tmp_path / "big", steps=60, every=1, layers=8, heads=8, experts=128))
    assert len(big["load"]["frames"]) == MAX_CELLS // (8 * 8 * 128)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step": 5, "event": "stopped"}\n',
        '{"step": 5, "tokens": 9, "seconds": 1, "loss": null}\n',
    ],
)
def test_a_run_with_nothing_to_draw_yet_still_has_a_report(tmp_path, text):
    folder = make_run(tmp_path / "run", steps=10)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "run.json").write_text("{}")
    page = write_report([folder], tmp_path / "r.html").read_text()
    assert embedded(page)["runs"][0]["series"] == {}


def test_hostile_text_comes_back_as_text_only(tmp_path):
    folder = make_run(tmp_path / "</title><b>", steps=50, sample=HOSTILE)
    page = write_report([folder], tmp_path / "r.html").read_text()
    assert embedded(page)["runs"][0]["samples"][0]["sample"] == HOSTILE
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img" not in page and "<b>" not in page


def test_the_page_names_no_address_to_load(tmp_path):
    page = write_report([make_run(tmp_path / "run", steps=50)], tmp_path / "r.html").read_text()
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,|#)""", page)


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / p / "demo", steps=20) for p in ("a", "b")]
    page = write_report([*folders, folders[1]], tmp_path / "r.html").read_text()
    assert [r["name"] for r in embedded(page)["runs"]] == ["a/demo", "b/demo", "b/demo (2)"]


def test_render_fills_each_marker(tmp_path):
    page = render([load_run(make_run(tmp_path / "run", steps=20))])
    assert "%%" not in page.split("<script", 1)[0]
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="no run to report"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(UsageError, match=r"no run at .*none \(it has no run.json\)"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    folder = make_run(tmp_path / "run", steps=20)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*; choose another file"):
        write_report([folder], tmp_path / "file" / "r.html")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match="no metrics at"):
        write_report([folder], tmp_path / "r.html")
    (folder / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json is no JSON"):
        write_report([folder], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_an_old_report_survives_a_failure(tmp_path):
    out = tmp_path / "r.html"
    folder = make_run(tmp_path / "run", steps=20)
    write_report([folder], out)
    before = out.read_bytes()
    (folder / "metrics.jsonl").write_text("broken\n")
    with pytest.raises(UsageError, match="line 1"):
        write_report([folder], out)
    assert out.read_bytes() == before
    assert not (tmp_path / "r.html.tmp").exists()
