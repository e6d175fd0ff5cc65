"""A user's mistake costs one line and exit code 2."""

import pytest

from tests.command import mistake


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("trian", "unknown verb 'trian'; did you mean train?"),
        ("train", "needs a recipe or --resume RUN"),
        ("train dmo", "unknown recipe 'dmo'; did you mean demo?"),
        (
            "train demo --model.moe.topk 4",
            "unknown option --model.moe.topk; did you mean --model.moe.top-k?",
        ),
        ("train demo --top-k 4", "unknown option --top-k; did you mean --model.moe.top-k?"),
        ("train demo --stesp 4", "did you mean --steps?"),
        ("train demo --zzz", "unknown option --zzz; --help lists all options"),
        ("train demo --model.moe.top-k four", "--model.moe.top-k four is no whole number"),
        ("train demo --model.moe.kind foo", "invalid choice 'foo' for argument '--model.moe.kind'"),
        ("train demo --model.moe.top-k", "missing value for argument '--model.moe.top-k'"),
        ("train demo extra", "unrecognized options: extra"),
        ("train demo --model.moe.top-k 33", "top_k=33 must lie between 1 and n_experts=32"),
        ("train demo --mesh hp=3", "mesh needs hp=3 to divide n_heads=4; use hp=1, 2 or 4"),
        ("train demo --mesh hp=2", "needs 2 processes and there is 1; start it with: torchrun"),
        ("train demo --mesh xp=2", "no AXIS=N[,AXIS=N]"),
        ("train demo --resume", "missing value for argument '--resume'"),
        ("train demo --resume /nowhere/run", "/nowhere/run"),
        ("train --resume /nowhere --overwrite", "use one"),
        ("train /nowhere/file.py:f", "there is no file /nowhere/file.py"),
        ("train demo --data /nowhere/text", "/nowhere/text"),
        ("eval /nowhere", "/nowhere does not exist; give a run folder, a checkpoint or"),
        ("eval", "missing from headway eval: RUN"),
        ("sample /nowhere --temperature -1", "temperature=-1"),
        ("sample /nowhere --top-p 2", "top_p=2"),
        ("sample /nowhere --tokens 0", "--tokens 0 is below 1"),
        ("serve /nowhere --mesh dp=2", "start 2 servers instead of dp=2"),
        ("serve /nowhere --mesh hp=2", "needs 2 processes and there is 1; start it with: torchrun"),
        ("tokenize --vocab-size 12", "vocab_size 12 is too small"),
        ("tokenize --data /nowhere", "/nowhere"),
        ("tokenize --vocab-size twelve", "--vocab-size"),
        ("tokenize --tokenizer x.json", "--tokenizer x.json is for tokenising; add --shards"),
        ("tokenize --shards --vocab-size 300", "leave out --vocab-size 300 or --shards"),
        ("tokenize --shards --workers -1", "data.workers is -1"),
        ("train demo --data.workers -1", "data.workers is -1"),
        ("report /nowhere", "/nowhere"),
        ("describe", "describe needs a recipe"),
        ("describe demo --P one", "--P one is no whole number"),
        ("describe demo --P 1", "--P 1 ranks"),
        ("doctor --jsn", "unknown option --jsn; did you mean --json?"),
        ("doctor --measure /nowhere/m.json", "there is no folder /nowhere"),
        ("study list --studies /nowhere", "/nowhere has no studies; call this in the repository"),
        ("plan", "plan needs a recipe"),
        ("plan demo", "plan needs --gpus N"),
        ("plan demo --gpus 0", "--gpus 0 is no whole number"),
        ("plan demo --gpus 3", "batch_size=8 does not divide among --gpus 3"),
        ("plan demo --gpus 2 --gpu v100", "--gpu v100 is unknown; use h100"),
        ("plan demo --gpus 2 --network slow", "--network slow is neither Gbit/s"),
        ("plan demo --gpus 2 --machine /nowhere", "--machine /nowhere: there is no such file"),
        ("plan demo --gpus 2 --scheme best", "--scheme best is unknown; use auto, all_to_all"),
        ("plan demo --gpus two", "--gpus two is no whole number"),
        ("plan demo --gpus 2 --imbalance much", "--imbalance much is no number"),
        ("plan demo --gpus 2 --gpus-per-node 0", "--gpus-per-node 0 is no whole number"),
        ("plan demo --gpuss 2", "unknown option --gpuss; did you mean --gpus?"),
        ("train demo --reusme x", "unknown option --reusme; did you mean --resume?"),
        ("plan demo --gpus 2 --imbalance 0.5", "--imbalance 0.5 is no number ≥ 1"),
        ("plan demo --gpus 2 --mesh hp=2", "leave --mesh out"),
        ("plan demo --gpus 2 --mesh.shard=fsdp", "leave --mesh.shard=fsdp out"),
        ("plan demo --gpus 2 --chunks 9", "mesh.chunks=9 is outside 0 to 4"),
        ("plan demo --gpus 2 --modle.d-model 4", "did you mean --model.d-model?"),
    ],
)
def test_mistakes_cost_one_line(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in mistake(*args.split())
    assert not list(tmp_path.rglob("metrics.jsonl"))  # nothing was started


def test_recipe_file_mistakes(place):
    assert "names no function" in mistake("train", f"{place}/tiny.py")
    assert "has no function big" in mistake("train", f"{place}/tiny.py:big")
    assert "it has" in mistake("train", f"{place}/tiny.py:NOT_A_CONFIG")


def test_read_only_run_folder(place):
    file = place / "a_file"
    file.write_text("")
    assert "a_file" in mistake("train", f"{place}/tiny.py:tiny", "--run", file / "run")
