"""The files of a tokenizer, read by Transformers, give the ids and texts of ours."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from headway.hub.export_tokenizer import token_names, write_tokenizer

transformers = pytest.importorskip("transformers", reason="the extra [hf] reads what was written")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, ByteTokenizer(), 64, run_dir=folder / "none")
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_is_its_bytes(byte_level, text):
    assert byte_level(text)["input_ids"] == ByteTokenizer().encode(text).tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 256)))
def test_all_ids_decode_alike(byte_level, ids):
    """Bytes that are no UTF-8 become the same U+FFFD; 256 vanishes."""
    assert byte_level.decode(ids, skip_special_tokens=True) == ByteTokenizer().decode(ids)


def test_no_text_becomes_a_special_token(byte_level):
    for text in ("<|endoftext|>", "a<|endoftext|>", "<|endoftext|"):
        assert byte_level(text)["input_ids"] == [*text.encode()]
    assert byte_level.eos_token_id == byte_level.pad_token_id == 256
    assert (len(byte_level), byte_level.model_max_length) == (257, 64)


def test_the_same_tokenizer_json_comes_back(byte_level, tmp_path):
    """A folder with it is read by `load_tokenizer` too, with the same ids."""
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    back = load_tokenizer(str(tmp_path))
    assert (back.vocab_size, back.eos) == (257, 256)
    assert list(back.token_texts) == list(ByteTokenizer().token_texts)
    assert back.encode("né<|endoftext|>").tolist() == [*"né<|endoftext|>".encode()]


def test_a_trained_tokenizer_is_written_as_it_is(tmp_path):
    train_bpe(["the cat sat on the mat. " * 50], 300, tmp_path / "trained.json")
    ours = JsonTokenizer(tmp_path / "trained.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ours, 99, run_dir=tmp_path / "run")
    written = (tmp_path / "out" / "tokenizer.json").read_text()
    assert written == (tmp_path / "trained.json").read_text()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the mat on the cat, naïve"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == (
        "<|endoftext|>",
        0,
        99,
    )
    assert theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def test_the_plain_template(byte_level):
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    text = byte_level.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "User: Hi.\n\nAssistant: Yes?\n\nAssistant:"


def test_a_template_inside_the_config_is_not_covered_by_the_plain_one(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ByteTokenizer(), 64, run_dir=tmp_path)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "{{ 1 }}" in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_names_of_all_kinds_of_vocabulary():
    added = [{"id": 2, "content": "</s>"}]
    listed = {
        "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]},
        "added_tokens": added,
    }
    mapped = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": added}
    for spec in (listed, mapped):
        assert token_names(json.dumps(spec)) == {0: "a", 1: "b", 2: "</s>"}
