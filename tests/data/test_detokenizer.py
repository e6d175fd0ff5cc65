"""What streams is what the whole reply says, for any text, tokenizer and stop texts."""

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from headway.data.detokenizer import Detokenizer
from headway.data.tokenizer import load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe(
        ["the cat sat on the mat ", "def f(x):\n    return x\n", "日本 ü "] * 9,
        300,
        folder / "bpe.json",
    )
    names = [
        "</s>",
        "<s>",
        "▁the",
        "▁ca",
        "t",
        "s",
        "▁",
        "a",
        "▁▁",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    inner.add_special_tokens(["</s>", "<s>"])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.save(str(folder / "llama.json"))
    return [
        load_tokenizer(name) for name in ("bytes", f"{folder}/bpe.json", f"{folder}/llama.json")
    ]


def pieces(detokenizer, ids):
    out = []
    for i in ids:
        out.append(detokenizer.add(i))
        if detokenizer.stopped:
            break
    return [*out, detokenizer.finish()]


def reference(text, stops, include):
    """The text up to the stop text that ends first, the longest of them."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[:end] if include else text[: end - len(stop)], stop


alphabet = "the cat sat\n日ü\U0001f600ab"
texts = st.text(alphabet, max_size=40)
# Parts of "abab…" overlap themselves and each other; \ufffd may come from bytes that are no UTF-8.
stops = st.lists(
    st.text("ab ", min_size=1, max_size=4) | st.sampled_from(["at", "cat s", "日", "\ufffd"]),
    max_size=4,
)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_a_stream_equals_the_whole_text(every, data):
    tokenizer = data.draw(st.sampled_from(every))
    ids = st.lists(st.integers(0, tokenizer.vocab_size), max_size=12)
    some = texts.map(lambda text: tokenizer.encode(text).tolist())
    repeats = st.text("ab", max_size=20).map(lambda text: tokenizer.encode(text).tolist())
    parts = data.draw(st.lists(some | ids | repeats, max_size=3))
    tokens = [i for part in parts for i in part]
    stop, include, skip = data.draw(stops), data.draw(st.booleans()), data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, stop=stop, include_stop=include, skip_special_tokens=skip)
    streamed = "".join(pieces(detokenizer, tokens))
    whole = tokenizer.decode(tokens, skip)
    assert (streamed, detokenizer.stop_text) == reference(whole, stop, include)
    assert detokenizer.stopped == (detokenizer.stop_text is not None)


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_only_what_may_become_a_stop_text_is_held_back(text, stop):
    tokenizer = load_tokenizer("bytes")
    detokenizer, shown = Detokenizer(tokenizer, stop=[stop]), ""
    for n, i in enumerate(tokenizer.encode(text)):
        shown += detokenizer.add(i)
        if detokenizer.stopped:
            break
        read = text[: n + 1]
        held = max(k for k in range(len(stop)) if read.endswith(stop[:k]))
        assert shown == read[: len(read) - held]


def test_an_unfinished_character_is_shown_once_at_the_end():
    detokenizer = Detokenizer(load_tokenizer("bytes"))
    assert [detokenizer.add(i) for i in "é日".encode()[:-1]] == ["", "é", "", ""]
    assert (detokenizer.finish(), detokenizer.finish()) == ("\ufffd", "")


def test_nothing_follows_a_stop_text():
    tokenizer = load_tokenizer("bytes")
    detokenizer = Detokenizer(tokenizer, stop=["b"])
    assert [detokenizer.add(i) for i in b"abc"] == ["a", "", ""] and detokenizer.finish() == ""
    assert detokenizer.stop_text == "b"


def test_the_first_tokens_are_not_searched():
    tokenizer = load_tokenizer("bytes")
    detokenizer = Detokenizer(tokenizer, stop=["ab"], min_tokens=3)
    assert "".join(pieces(detokenizer, b"ababab")) == "abab"  # the b at 3 has its a among the first


def test_the_reply_continues_its_prompt(every):
    llama = every[2]
    the, cat = llama.encode("▁the").tolist()[0], 3
    assert Detokenizer(llama, [the]).add(cat) == " ca"
    assert Detokenizer(llama, [llama.eos]).add(cat) == "ca"


@pytest.mark.parametrize("which", range(3))
def test_the_time_is_linear_in_the_length(every, which):
    """8,192 tokens take at most 2.2 times the time of 4,096."""
    tokenizer = every[which]
    stop = "aab", "a" * 3000 + "b"
    ids = (tokenizer.encode("the cat sat " * 400 + "a" * 8000).tolist() * 2)[:8192]

    def seconds(n):
        best = float("inf")
        for _ in range(7):
            detokenizer, start = Detokenizer(tokenizer, stop=stop), time.process_time()
            for i in ids[:n]:
                detokenizer.add(i)
            detokenizer.finish()
            best = min(best, time.process_time() - start)
        return best

    assert min(seconds(8192) / seconds(4096) for _ in range(3)) <= 2.2
