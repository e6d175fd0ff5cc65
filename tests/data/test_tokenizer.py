import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from headway.config import UsageError
from headway.data.tokenizer import load_tokenizer, train_bpe

unicode = st.text(st.characters(exclude_categories=["Cs"]))
SENTENCES = [
    "def f(x):\n    return x + 1\n",
    "the cat sat on the mat, the cat sat",
    "ü日本 1234",
] * 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(SENTENCES, 320, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@given(text=unicode)
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bytes_vocabulary():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.token_bytes.shape == (257,) and tokenizer.token_bytes[256] == 0
    assert tokenizer.decode([104, 256, 105, 300]) == "hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"


@settings(deadline=None)
@given(text=unicode | st.text("ab \n<|endoftext|>1234'sé"))
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert bpe.eos not in ids


def test_text_never_makes_a_special_token(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.eos not in ids and bpe.decode(ids) == "a<|endoftext|>b"
    assert bpe.decode([bpe.eos, *bpe.encode("x"), 9999]) == "x"


def test_bpe_learns_and_is_deterministic(bpe, tmp_path):
    again = train_bpe(iter(SENTENCES), 320, tmp_path / "t.json")
    assert again.fingerprint == bpe.fingerprint and again.vocab_size == bpe.vocab_size <= 320
    text = "the cat sat"
    assert len(bpe.encode(text)) < len(text) / 2
    batch = bpe.encode_batch(["the cat", "", "ü"])
    for ids, one in zip(batch, ["the cat", "", "ü"], strict=True):
        assert np.array_equal(ids, bpe.encode(one))


def test_load_by_file_or_folder_and_by_content(bpe, tmp_path):
    train_bpe(SENTENCES, 320, tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == bpe.fingerprint
    other = train_bpe(SENTENCES, 270, tmp_path / "other.json")
    assert other.fingerprint != bpe.fingerprint


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>"])
def test_common_names_of_the_end_of_document(tmp_path, name):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, name: 1, "b": 2}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).eos == 1


def test_sentencepiece_style_tokens_are_counted_in_bytes(tmp_path):
    vocabulary = {"</s>": 0, "▁the": 1, "ü": 2, "<0x0A>": 3, "▁": 4}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.add_special_tokens(["</s>"])
    inner.decoder = decoders.Metaspace()
    inner.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).token_bytes.tolist() == [0, 4, 2, 1, 1]


def words(path):
    """Words with a space in front that the first of a text does not show, and single bytes."""
    names = ["</s>", "▁the", "▁cat", "s", "▁", "ü", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.add_special_tokens(["</s>"])
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.save(str(path))
    return load_tokenizer(str(path))


def streamed(tokenizer, ids):
    """The text in pieces, and what was held back at the end."""
    stream = tokenizer.decode_stream()
    return "".join([*map(stream.step, ids), stream.finish()])


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words"])
def test_ids_decoded_one_at_a_time(bpe, tmp_path, kind):
    tokenizer = {"bytes": lambda: load_tokenizer("bytes"), "bpe": lambda: bpe}.get(
        kind, lambda: words(tmp_path / "t.json")
    )()
    stream, spoken = tokenizer.decode_stream(), tokenizer.encode("the cats").tolist()
    for n, i in enumerate(spoken):
        assert (
            stream.step(i) == tokenizer.decode(spoken[: n + 1])[len(tokenizer.decode(spoken[:n])) :]
        )
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12)

    @settings(deadline=None, max_examples=200)
    @given(ids)
    def any_ids(ids):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)

    any_ids()


LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


@pytest.mark.parametrize(
    "stages",
    [
        LLAMA,
        LLAMA[:3],
        [decoders.ByteFallback(), decoders.Metaspace()],
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")],
        [decoders.WordPiece()],
    ],
    ids=["llama", "gemma", "metaspace", "never", "wordpiece"],
)
def test_text_equals_the_library_s(tmp_path, stages):
    """In steps and whole, with and without the names of special tokens."""
    words(tmp_path / "t.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.decoder = decoders.Sequence(stages)
    inner.add_tokens(["▁▁▁"])
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    # A space that is no ▁ is a byte; without ByteFallback bytes are no text.
    characters = "the▁cats" + ("ü日\U0001f600" if len(stages) > 1 else "")

    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.text(characters, max_size=8) | st.none(), max_size=4), st.booleans())
    def any_text(parts, skip):
        ids = [i for part in parts for i in ([0] if part is None else inner.encode(part).ids)]
        want = inner.decode(ids, skip_special_tokens=skip)
        stream = tokenizer.decode_stream(skip)
        assert "".join([*map(stream.step, ids), stream.finish()]) == want
        assert tokenizer.decode(ids, skip) == want

    any_text()


def test_text_that_continues_keeps_its_space(tmp_path):
    """A reply to a prompt is inside a text; after a special token alone it starts one."""
    tokenizer = words(tmp_path / "t.json")
    for before, want in (
        ((), "cat"),
        ((1,), " cat"),
        ((0,), "cat"),
        ((1, 0), " cat"),
        ((999,), "cat"),
    ):
        assert tokenizer.decode_stream(before=before).step(2) == want, before


def test_names_of_special_tokens_are_shown_on_request(bpe):
    ids = [*bpe.encode("a").tolist(), bpe.eos]
    assert bpe.decode(ids, skip_special_tokens=False) == "a<|endoftext|>"
    assert bpe.special_tokens == {"<|endoftext|>": bpe.eos}
    assert load_tokenizer("bytes").decode([97, 256], False) == "a<|endoftext|>"


def test_a_space_is_shown_once_there_is_a_word_before_it(tmp_path):
    stream = words(tmp_path / "t.json").decode_stream()
    assert [stream.step(i) for i in (1, 2, 0, 3, 4, 5)] == ["the", " cat", "", "s", " ", "ü"]


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_decoding_one_at_a_time_takes_linear_time(tmp_path, monkeypatch, kind):
    """Not one more id is decoded at the end of a long text than at its beginning."""
    tokenizer = load_tokenizer("bytes") if kind == "bytes" else words(tmp_path / "t.json")
    decode, decoded = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stream = tokenizer.decode_stream()
    for i in [1, 2, 3, 5] * 100:
        stream.step(i)
    assert max(decoded, default=0) <= 4


def test_added_tokens_that_are_no_text_alphabet(bpe, tmp_path):
    train_bpe(SENTENCES, 320, tmp_path / "t.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.add_tokens(["日本語"])
    inner.add_special_tokens(["<|user|>"])
    inner.save(str(tmp_path / "t.json"))
    made = load_tokenizer(str(tmp_path / "t.json"))
    assert made.vocab_size == bpe.vocab_size + 2
    ids = made.encode("x 日本語 <|user|>")
    assert made.decode(ids) == "x 日本語 <|user|>"
    assert made.token_bytes[ids].sum() == len("x 日本語 <|user|>".encode())
    assert made.token_bytes[inner.token_to_id("<|user|>")] == 0


def test_what_the_files_of_a_tokenizer_say_of_its_ends(bpe, tmp_path):
    """Its second end of a text, its only one, and the id that its post-processor puts first."""
    assert (bpe.eos_ids, bpe.bos) == ((bpe.eos,), None)
    inner = tokenizers.Tokenizer.from_str(bpe._made_from[1])
    inner.add_special_tokens(["<|im_end|>", "<|bos|>"])
    turn, bos = (inner.token_to_id(name) for name in ("<|im_end|>", "<|bos|>"))
    inner.post_processor = processors.TemplateProcessing("<|bos|> $A", None, [("<|bos|>", bos)])
    inner.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    for written in ('"<|im_end|>"', '{"content": "<|im_end|>"}'):
        config.write_text(f'{{"eos_token": {written}}}')
        chat = load_tokenizer(str(tmp_path))
        assert (chat.eos, chat.eos_ids, chat.bos) == (bpe.eos, (bpe.eos, turn), bos)
        assert chat.encode("the cat").tolist() == bpe.encode("the cat").tolist()
        again = pickle.loads(pickle.dumps(chat))
        assert (again.eos_ids, again.bos) == (chat.eos_ids, bos)
    config.write_text('{"eos_token": "a"}')
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_ids == (0,)
    config.write_text("[]")
    assert "tokenizer_config.json cannot be read" in mistake(load_tokenizer, str(tmp_path))


def mistake(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes(tmp_path):
    assert "No such file" in mistake(load_tokenizer, str(tmp_path / "none.json"))
    assert "No such file" in mistake(load_tokenizer, str(tmp_path))
    for name, content in {"a": "{", "b": "{}", "c": "[1]", "d": ""}.items():
        (tmp_path / name).write_text(content)
        assert "headway tokenize" in mistake(load_tokenizer, str(tmp_path / name))
    (tmp_path / "e").write_bytes(b"\xff\xfe\0")
    assert "headway tokenize" in mistake(load_tokenizer, str(tmp_path / "e"))
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.save(str(tmp_path / "f"))
    assert "<|endoftext|>" in mistake(load_tokenizer, str(tmp_path / "f"))
    assert "257" in mistake(train_bpe, ["x"], 256, tmp_path / "t.json")
    assert "no text" in mistake(train_bpe, [""], 300, tmp_path / "t.json")
    assert "does not exist" in mistake(train_bpe, ["x"], 300, tmp_path / "no" / "t.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == list("abcdef")


def test_parts_with_special_tokens_have_the_ids_of_the_library(tmp_path):
    """A special token may take white space beside it, and a space before the first word is put at
    the start of the whole alone; names of special tokens in a text stay text."""
    words(tmp_path / "t.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens(
        [tokenizers.AddedToken("<a>", lstrip=True), tokenizers.AddedToken("<b>", rstrip=True)]
    )
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    names = tokenizer.special_tokens

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.text("the cats ü", min_size=1, max_size=6) | st.sampled_from(["<a>", "<b>", "</s>"]),
            max_size=6,
        )
    )
    def any_parts(parts):
        merged = []
        for part in parts:
            if merged and part not in names and merged[-1] not in names:
                merged[-1] += part
            else:
                merged.append(part)
        want = inner.encode("".join(parts), add_special_tokens=False).ids
        assert tokenizer.encode_parts([names.get(part, part) for part in merged]) == want

    any_parts()
    assert tokenizer.encode_parts(["the<a>"]) == tokenizer.encode("the<a>").tolist()
    assert load_tokenizer("bytes").encode_parts(["é<|endoftext|>", 256, "a"]) == [
        *"é<|endoftext|>".encode(),
        256,
        97,
    ]
