"""`headway law`: Marin's published ladder, isoFLOP curves, registrations, and mistakes."""

import json
import re
import resource
import shutil

import numpy as np
import pytest

from bench.laws import MARIN
from headway.lab.forecast import Fit, fit_runs
from headway.lab.isoflop import minima
from headway.lab.laws import Irreducible
from headway.lab.rungs import read_runs
from tests.cli.law_tables import csv, fitted
from tests.command import call, mistake


@pytest.fixture
def marin(tmp_path):
    return csv(tmp_path / "marin.csv", "flops,loss", MARIN)


def test_marins_ladder_pinned(marin, tmp_path):
    fit, done = fitted(marin, "--irreducible", "1.6")
    law = done.json["parameters"]
    assert law["A"] == pytest.approx(95.18, rel=0.02) and law["alpha"] == pytest.approx(
        0.0941, rel=0.005
    )
    forecast = call("law", "predict", fit, "--flops", "1e23", "--json")
    assert forecast.json["loss"] == pytest.approx(2.252, abs=0.003)
    assert "exactly 1.6 for granted" in forecast.out
    assert set(forecast.json["if_irreducible"]) == {"1.4", "1.8", "free"}
    assert forecast.json["if_irreducible"]["1.4"] == pytest.approx(2.217, abs=0.002)
    kept = tmp_path / "kept.json"
    assert call("law", "register", fit, "--flops", "1e23", "--out", kept).code == 0
    score = call("law", "score", kept, "--loss", "2.234", "--json")
    assert score.json["error"] == pytest.approx(-0.008, abs=0.001) and score.json["inside"] is False
    assert "outside" in score.out and "exactly 1.6 for granted" in score.out
    # the two top rungs, which the published refit predicts as 2.733 (measured 2.722)
    two = done.json["backtest"][1]
    assert two["predicted"][1] == pytest.approx(2.733, abs=0.002) and two["inside"] == 2


@pytest.mark.parametrize("irreducible", ["free", "1.6±0.2"])
def test_an_honest_interval_of_it_holds_what_was_measured(marin, tmp_path, irreducible):
    fit, _ = fitted(marin, "--irreducible", irreducible)
    forecast = call("law", "predict", fit, "--flops", "1e23", "--json")
    assert "for granted" not in forecast.out
    assert forecast.json["low"] < 2.234 < forecast.json["high"]
    kept = tmp_path / "kept.json"
    call("law", "register", fit, "--flops", "1e23", "--out", kept)
    assert call("law", "score", kept, "--loss", "2.234", "--json").json["inside"] is True


def test_a_registration_is_whole_and_is_never_overwritten_or_edited(marin, tmp_path):
    fit, _ = fitted(marin)
    kept = tmp_path / "kept.json"
    words = (
        "law",
        "register",
        fit,
        "--flops",
        "1e21",
        "--tokens",
        "2e10",
        "--metric",
        "macro",
        "--out",
        kept,
    )
    value = call(*words, "--stop-rule", "step 9", "--json").json
    assert value == json.loads(kept.read_text())
    low, high = value["interval"]
    assert low < value["prediction"] < high
    assert (value["metric"], value["tokens"], value["stop_rule"]) == ("macro", 2e10, "step 9")
    assert re.fullmatch("[0-9a-f]{40}|unknown", value["commit"]) and len(value["sha256"]) == 64
    before = kept.read_bytes()
    assert "never overwritten" in mistake(*words)
    assert kept.read_bytes() == before
    value["interval"][0] -= 0.1
    kept.write_text(json.dumps(value))
    assert "was changed after it was written" in mistake("law", "score", kept, "--loss", "2")
    edited = json.loads(fit.read_text().splitlines()[-1])
    edited["law"]["theta"][0] += 0.1
    fit.write_text(json.dumps(edited))
    assert "was changed after it was written" in mistake("law", "predict", fit, "--flops", "1e21")


def test_a_part_of_a_registration_is_not_left_behind(marin, tmp_path):
    fit, _ = fitted(marin)
    words, out = ("law", "register", fit, "--flops", "1e21", "--out"), tmp_path / "out.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk: a part is written
    try:
        assert "cannot write" in mistake(*words, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists() and call(*words, out).code == 0


@pytest.fixture(scope="module")
def counted(run):
    """What `headway describe` counts of the run: executed FLOPs, active parameters, tokens."""
    model = call("describe", run, "--json").json
    flops = 384 * model["flops_per_token_training"]
    return {"flops": flops, "params": model["active_parameters"], "tokens": 384}


def test_a_run_is_scored_at_its_end_and_only_the_registered_one(marin, tmp_path, run, counted):
    fit, _ = fitted(marin)
    files = [tmp_path / f"{n}.json" for n in (384, 900)]
    for file in files:
        at = ("--flops", counted["flops"], "--tokens", file.stem)
        call("law", "register", fit, *at, "--out", file)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [r["val_loss"] for r in records if "val_loss" in r][-1]
    assert call("law", "score", files[0], "--run", run, "--json").json["loss"] == last
    bits = tmp_path / "bits.json"
    metric = ("--metric", "val_bits_per_byte")
    call("law", "register", fit, "--flops", counted["flops"] * 1.009, *metric, "--out", bits)
    last = [r["val_bits_per_byte"] for r in records if "val_bits_per_byte" in r][-1]
    assert call("law", "score", bits, "--run", run, "--json").json["loss"] == last
    words = mistake("law", "score", files[1], "--run", run)
    assert "has 384 tokens and" in words and "registers 900: it is another run" in words
    larger = tmp_path / "larger.json"
    call("law", "register", fit, "--flops", counted["flops"] * 1.02, "--out", larger)
    words = mistake("law", "score", larger, "--run", run)
    assert f"has {counted['flops']:,.6g} flops and" in words and "is scored with --loss" in words
    assert call("law", "score", larger, "--loss", last).code == 0
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = [line for line in lines if json.loads(line)["step"] < 6]
    (cut / "metrics.jsonl").write_text("".join(early))
    assert "of 6; a forecast is scored at the end of the run" in mistake(
        "law", "score", files[0], "--run", cut
    )


@pytest.mark.parametrize("form", ["chinchilla", "granularity", "joint"])
def test_the_parameters_and_experts_of_a_run_are_those_that_were_forecast(
    tmp_path, run, counted, form
):
    """The run has 4 experts, 2 of a token; laws in parameters count no FLOPs."""
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(3, 5, 40), 10 ** rng.uniform(2, 4, 40)
    shape = 2.0 ** rng.integers(0, 4, 40)
    loss = 1.7 + 40 * N**-0.3 + 40 * D**-0.3 * shape**-0.05
    extra = {"granularity": ("granularity", 2), "joint": ("experts", 4)}.get(form)
    head = "params,tokens,loss" + (f",{extra[0]}" if extra else "")
    rows = zip(N, D, loss, *([shape] if extra else []), strict=True)
    fit, _ = fitted(csv(tmp_path / "runs.csv", head, rows), "--form", form)
    right = {"params": counted["params"], "tokens": counted["tokens"]}
    right |= dict([extra]) if extra else {}
    for i, (name, factor) in enumerate([("", 1), *((name, 1.5) for name in right)]):
        at = {**right, **({name: right[name] * factor} if name else {})}
        options = [word for n, value in at.items() for word in (f"--{n}", value)]
        file = tmp_path / f"{i}.json"
        assert call("law", "register", fit, *options, "--out", file).code == 0
        if name:
            assert f" {name} and" in mistake("law", "score", file, "--run", run)
        else:
            assert call("law", "score", file, "--run", run).code == 0


def isoflop(path, noise=0.0, opens_down=False, best=lambda C: 16.0 * C**0.464):
    """Parabolas whose minima lie on Marin's law, five numbers of tokens at each budget."""
    rng, rows = np.random.default_rng(0), []
    for C in (1e18, 3e18, 1e19, 3e19, 1e20):
        least = 1.6 + 95.18 * C**-0.0941
        for x in (-0.6, -0.2, 0.1, 0.5, 0.9):
            bend = -0.05 if opens_down and C == 3e18 else 0.05
            rows.append((C, best(C) * 10**x, least + bend * x**2 + noise * rng.standard_normal()))
    return csv(path, "budget,tokens,loss", rows)


def test_isoflop_curves_give_law_and_best_tokens(tmp_path):
    fit, done = fitted(isoflop(tmp_path / "iso.csv"), "--form", "isoflop", "--irreducible", "1.6")
    assert done.json["parameters"]["A"] == pytest.approx(95.18, rel=1e-4)
    forecast = call("law", "predict", fit, "--flops", "1e21", "--json").json
    assert forecast["loss"] == pytest.approx(1.6 + 95.18 * 1e21**-0.0941, rel=1e-6)
    assert forecast["tokens"]["best"] == pytest.approx(16.0 * 1e21**0.464, rel=1e-4)
    kept = tmp_path / "kept.json"
    value = call("law", "register", fit, "--flops", "1e21", "--out", kept, "--json").json
    assert value["tokens"] == forecast["tokens"]["best"]
    noisy, done = fitted(
        isoflop(tmp_path / "noisy.csv", 0.004), "--form", "isoflop", "--irreducible", "1.6"
    )
    assert done.json["seed_noise"] == pytest.approx(0.004, rel=0.4)
    wide = call("law", "predict", noisy, "--flops", "1e21", "--json").json
    assert wide["high"] - wide["low"] > 2 * 1.645 * 0.8 * done.json["seed_noise"]
    assert wide["tokens"]["low"] < 16.0 * 1e21**0.464 < wide["tokens"]["high"]


def test_the_best_split_of_flops(tmp_path):
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7, 9, 30), 10 ** rng.uniform(9, 11, 30)
    rows = zip(N, D, 1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28, strict=True)
    fit, _ = fitted(csv(tmp_path / "c.csv", "params,tokens,loss", rows), "--form", "chinchilla")
    at = call("law", "predict", fit, "--flops", "1e22", "--json").json["at"]
    ratio = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)  # Hoffmann et al. 2022, equation 4
    assert at["params"] == pytest.approx(ratio * (1e22 / 6) ** (0.28 / 0.62), rel=1e-3)
    assert 6 * at["params"] * at["tokens"] == pytest.approx(1e22)
    both = ("--flops", "1e22", "--params", "1e9", "--tokens", "1e10")
    assert "does not read --flops; leave it out" in mistake("law", "predict", fit, *both)


def test_a_parabola_goes_through_its_runs_and_its_minimum(tmp_path):
    runs = read_runs(isoflop(tmp_path / "iso.csv"), "isoflop")
    vertices = minima(runs.x["flops"], runs.x["tokens"], runs.loss_N)
    for i, budget in enumerate(vertices.budget_B):
        at, parabola = runs.x["flops"] == budget, vertices.parabola_B3[i]
        np.testing.assert_allclose(
            np.polyval(parabola, np.log(runs.x["tokens"][at])), runs.loss_N[at], rtol=1e-9
        )
        assert np.polyval(parabola, np.log(vertices.tokens_B[i])) == pytest.approx(
            vertices.loss_B[i], rel=1e-9
        )


def test_forecasts_beside_an_uncertain_irreducible_loss_are_one_standard_deviation_away(marin):
    fit, _ = fitted(marin, "--irreducible", "1.6±0.1")
    forecast = call("law", "predict", fit, "--flops", "1e21", "--json").json
    assert set(forecast["if_irreducible"]) == {"1.5", "1.7", "free"}


def test_seed_noise_widens_the_interval_of_a_forecast(marin):
    widths = []
    for noise in ("0", "0.02"):
        fit, _ = fitted(marin, "--irreducible", "1.6", "--seed-noise", noise)
        forecast = call("law", "predict", fit, "--flops", "1e21", "--json").json
        widths.append(forecast["high"] - forecast["low"])
    assert widths[1] == pytest.approx(np.hypot(widths[0], 2 * 1.645 * 0.02), rel=0.1)


def test_a_rung_is_what_lies_within_a_factor_of_two(tmp_path):
    flops = [1e18, 1.1e18, 1e19, 1.01e19, 1.2e19, 2e19]
    runs = read_runs(csv(tmp_path / "r.csv", "flops,loss", [(C, 3) for C in flops]), "power")
    assert runs.rung_N.tolist() == [2, 2, 1, 1, 0, 0]


def test_a_fit_in_json_has_all_of_it(marin):
    """Facts and back-test of the read fit are those that were computed."""
    whole = fit_runs(read_runs(marin, "power"), Irreducible(1.6), bootstraps=200)
    read = Fit.from_dict(json.loads(json.dumps(whole.to_dict())))
    assert read.facts == whole.facts and len(read.facts.backtest) == 2
    assert (read.facts.runs, read.facts.rungs, read.facts.source) == (6, 6, "marin.csv")
    assert read.sentences() == whole.sentences()


def test_the_page_shows_curve_runs_and_band(marin):
    _, done = fitted(marin, "--irreducible", "1.6")
    page = marin.with_suffix(".html").read_text()
    assert str(marin.with_suffix(".html")) in done.out
    assert page.count('<circle class="dot c1"') == len(MARIN) and page.count("<polygon") == 1
    assert ">1e20<" in page and "irreducible 1.4" in page and "<script" not in page


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (MARIN[:3], "", "has 3 parameters and needs 4 rungs or more; there are 3 in 3 runs"),
        (MARIN[:2], "--irreducible 1.6", "has 2 parameters and needs 3 rungs or more; there are 2"),
        ([*MARIN[:2], (1e19, -3)], "", "line 4: loss '-3' is no number above 0"),
        ([*MARIN[:2], ("x", 3)], "", "line 4: flops 'x' is no number above 0"),
        ([(c, 5 - loss) for c, loss in MARIN], "", "the losses do not fall with flops"),
        (
            MARIN,
            "--irreducible 2.9",
            "the irreducible loss 2.9 is not below the least loss, 2.7222",
        ),
        (MARIN, "--irreducible some", "--irreducible some is neither free nor X nor X±Y"),
        (MARIN, "--form chinchilla", "has no column params, tokens; it has flops, loss"),
        (MARIN, "--level 95", "--level 95 is no probability"),
        (MARIN, "--bootstraps 3", "--bootstraps 3 gives no intervals"),
    ],
)
def test_a_table_that_gives_no_law(tmp_path, rows, options, words):
    path = csv(tmp_path / "runs.csv", "flops,loss", rows)
    assert words in mistake("law", "fit", path, *options.split())


def test_mistakes_of_the_other_forms_and_parts(marin, tmp_path):
    down = isoflop(tmp_path / "down.csv", opens_down=True)
    words = mistake("law", "fit", down, "--form", "isoflop")
    assert "budget 3e+18: its losses have a maximum over tokens" in words
    aside = isoflop(tmp_path / "aside.csv", best=lambda C: 16.0 * C**0.464)
    rows = [line for line in aside.read_text().splitlines()[1:] if not line.startswith("1e+19")]
    low = [(1e19, t, 3 + 0.1 * np.log(t / 1e8) ** 2) for t in (1e9, 2e9, 4e9)]
    aside = csv(aside, "budget,tokens,loss", [*(row.split(",") for row in rows), *low])
    assert (
        "budget 1e+19: its least loss lies at 1e+08 tokens, outside its runs; add runs with fewer"
        in mistake("law", "fit", aside, "--form", "isoflop")
    )
    N = np.geomspace(1e7, 1e9, 9)
    tied = csv(
        tmp_path / "t.csv",
        "params,tokens,loss",
        zip(N, 20 * N, 3 - 0.1 * np.log(N / 1e7), strict=True),
    )
    assert "params and tokens must vary, and independently" in mistake(
        "law", "fit", tied, "--form", "chinchilla"
    )
    fit, _ = fitted(marin)
    assert "also needs --flops" in mistake("law", "predict", fit, "--params", "1e9")
    words = mistake("law", "predict", fit, "--flops", "1e20", "--tokens", "9", "--experts", "8")
    assert "at --flops does not read --tokens and --experts; leave it out" in words
    assert "--flops -1 is no number above 0" in mistake("law", "predict", fit, "--flops", "-1")
    assert "is no headway law fit; make one with" in mistake(
        "law", "predict", marin, "--flops", "1e20"
    )
    assert "is no headway law registration" in mistake("law", "score", fit, "--loss", "2")
    assert "needs --loss L or --run DIR, one of them" in mistake("law", "score", fit)
    assert "needs --out FILE" in mistake("law", "register", fit, "--flops", "1e20")
    assert "unknown part 'guess' of headway law; use fit, predict" in mistake("law", "guess")
    one = csv(tmp_path / "one.csv", "flops,loss", MARIN[:1])
    assert "has one rung; whether a gain holds takes two or more" in mistake(
        "law", "gain", fit, one
    )
    below = csv(tmp_path / "below.csv", "flops,loss", [(1e18, 3.0), (3e18, 0.5)])
    assert "is not above the baseline's irreducible loss" in mistake("law", "gain", fit, below)
    half = csv(tmp_path / "half.csv", "flops,loss,tokens_per_second", [(1e18, 3, 9), (3e18, 3, 9)])
    assert "has tokens_per_second alone; a speed-up needs" in mistake("law", "gain", fit, half)
    assert "cannot read" in mistake("law", "fit", "/nowhere.csv")
    empty = csv(tmp_path / "empty.csv", "budget,tokens,loss", [])
    assert "has no rows below its header" in mistake("law", "fit", empty, "--form", "isoflop")
    assert "--seed-noise nan is no number of nats" in mistake(
        "law", "fit", marin, "--seed-noise", "nan"
    )
