"""`headway tokenize`."""

from tests.command import call


def test_tokenize_makes_a_tokenizer_that_trains(place):
    out = place / "bpe.json"
    done = call(
        "tokenize", "--data", place / "text.txt", "--vocab-size", 300, "--out", out, "--json"
    )
    assert done.code == 0 and done.json["vocab_size"] <= 300 and done.json["bytes_per_token"] > 1.2
    run = place / "runs" / "bpe"
    args = ("--data.tokenizer", out, "--run", run, "--steps", 2, "--json")
    trained = call("train", f"{place}/tiny.py:tiny", *args)
    assert (
        trained.code == 0 and trained.json["val_bits_per_byte"] < trained.json["val_loss"] / 0.6931
    )


def test_shards_made_ahead_are_those_of_training(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    shards = call("tokenize", "--shards", "--data", place / "text.txt", "--json")
    assert shards.code == 0 and len(shards.json["shards"]) == 1
    run = place / "runs" / "ahead"
    trained = call("train", f"{place}/tiny.py:tiny", "--run", run, "--steps", 1)
    assert trained.code == 0 and "tokenised" not in trained.out
    total = shards.json["train_tokens"] + shards.json["val_tokens"]
    assert total == (place / "text.txt").stat().st_size + 2
