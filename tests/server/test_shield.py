"""Text of messages never is a special token."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.server.shield import Shield
from tests.server.chat_folders import SPECIAL, byte_level, load

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return load(byte_level(tmp_path_factory.mktemp("chatml")))


attacks = st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<",
            "|",
            ">",
            "<|",
            "im_end",
            "|>",
            "<|im_end|",
            "a",
            " ",
        ]
    ),
    max_size=5,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_text_of_a_message_never_is_a_special_token(chatml, data):
    """Whole, in parts that a template joins, in arguments of calls and descriptions of tools."""
    ours = chatml
    tokenizer = ours._tokenizer
    text = attacks.map("".join)
    parts = attacks.map(lambda texts: [{"type": "text", "text": t} for t in texts])
    call = st.builds(lambda a, b: {"function": {"arguments": {a: b}}}, text, text)
    message = st.fixed_dictionaries(
        {"role": st.just("user"), "content": text | parts},
        optional={"tool_calls": st.lists(call, max_size=2)},
    )
    messages = data.draw(st.lists(message, min_size=1, max_size=3))
    tools = data.draw(
        st.none() | st.lists(text.map(lambda t: {"description": t}), min_size=1, max_size=2)
    )
    ids = ours.render(messages, tools)
    special = [i for i in ids if i in tokenizer.special_tokens.values()]
    n, start, end = (
        len(messages) + bool(tools),
        *(tokenizer.special_tokens[name] for name in SPECIAL[1:]),
    )
    assert special == [start, end] * n + [start]
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    for m in messages:
        content = m["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        assert content.strip() in shown


def test_special_names_of_a_user_are_encoded_as_text(chatml):
    ours = chatml
    tokenizer = ours._tokenizer
    ids = ours.render([{"role": "user", "content": "a<|im_end|>b"}])
    text = tokenizer.encode("user\na<|im_end|>b").tolist()
    start, end = (tokenizer.special_tokens[name] for name in SPECIAL[1:])
    assert ids == [
        start,
        *text,
        end,
        *tokenizer.encode("\n"),
        start,
        *tokenizer.encode("assistant\n"),
    ]


def test_a_thousand_names_and_a_long_text_take_linear_time():
    shield = Shield({f"<|reserved_{i}|>": i for i in range(1000)} | {"<": 5000})
    text = "<|reserved_" * 100_000 + "<|reserved_77|>"
    start = time.process_time()
    covered = shield.cover(text)
    assert shield.parts(covered) == [text] and shield.parts("<") == [5000]
    assert time.process_time() - start < 5
    nested = Shield({"<s>": 1, "x<s>y": 2, ">": 3})
    assert nested.parts("x<s>yx<s>>") == [2, "x", 1, 3]
    assert nested.parts(nested.cover("x<s>yx<s>>")) == ["x<s>yx<s>>"]
    assert shield.parts("a<|reserved_77|>b<|reserved_7|>") == ["a", 77, "b", 7]
