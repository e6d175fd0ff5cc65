"""`headway diversity`: rows of texts, with and without a model, and mistakes."""

import json
import random

import pytest

from headway.cli.diversity import _drawn
from tests.command import call, mistake


def texts(path, make, n=60):
    path.write_text("".join(json.dumps({"text": make(i)}) + "\n" for i in range(n)))
    return path


def test_a_template_and_copies_are_less_diverse(tmp_path, run):
    draw = random.Random(0)
    words = [f"word{i}" for i in range(900)]
    varied = texts(tmp_path / "varied.jsonl", lambda i: " ".join(draw.choices(words, k=40)), n=70)
    once = "def f(x): return x * 3 + 2 and then some more words so that there are runs of five"
    copies = texts(
        tmp_path / "copies.jsonl",
        lambda i: once if i % 2 else f"{i} " + " ".join(draw.choices(words, k=40)),
    )
    done = call("diversity", varied, copies, "--model", run, "--json")
    assert done.code == 0, done.err
    first, second = done.json["rows"]
    assert done.json["n"] == 60 and done.json["centred"] is True
    assert (first["near_duplicates"], second["near_duplicates"]) == (0.0, 0.5)
    for name in ("vendi", "g_vendi"):
        assert first[name] > 1.3 * second[name] > 1.3
        for row in (first, second):
            assert row[f"{name}_ci95"][0] < row[name] < row[f"{name}_ci95"][1]
    assert first["mean_cosine"] < second["mean_cosine"]
    strict = call("diversity", copies, varied, "--n", 30, "--order", "inf", "--json")
    assert '"order": null' in strict.out  # JSON has no Infinity
    again = strict.json
    assert again["n"] == 30 and "g_vendi" not in again["rows"][0]
    assert again["rows"][0]["vendi"] < again["rows"][1]["vendi"] < first["vendi"]


def test_every_document_is_as_likely_to_be_drawn(tmp_path):
    path = texts(tmp_path / "t.jsonl", str, n=20)
    drawn = [text for seed in range(600) for text in _drawn(str(path), 5, seed)]
    assert set(drawn) == {str(i) for i in range(20)}
    counts = [drawn.count(str(i)) for i in range(20)]  # 150 each, standard deviation 10.6
    assert min(counts) > 105 and max(counts) < 195


def test_a_document_is_whole_however_large(tmp_path):
    path = texts(tmp_path / "t.jsonl", lambda i: f"{i} " + "word " * 300_000 + "end", n=2)
    assert sorted(map(len, _drawn(str(path), 9, 0))) == [1_500_005] * 2


def test_documents_of_one_token_have_gradients_too(tmp_path, run):
    path = texts(tmp_path / "t.jsonl", lambda i: "abcdefgh"[i % 8], n=8)
    row = call("diversity", path, "--model", run, "--json").json["rows"][0]
    assert 1 < row["g_vendi"] <= 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "has 1 documents; a diversity needs two or more"),
        ("--n 1", "--n 1 is below 2"),
        ("--order 0", "--order 0 is not above 0"),
        ("--model /nowhere", "/nowhere does not exist"),
    ],
)
def test_mistakes(tmp_path, options, words):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "one document"}\n' * (1 if not options else 3))
    assert words in mistake("diversity", path, *options.split())
    assert "/nowhere.txt" in mistake("diversity", "/nowhere.txt")
