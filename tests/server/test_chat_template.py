"""Ids of conversations equal those of Transformers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data.tokenizer import load_tokenizer
from headway.hub.export_tokenizer import PLAIN_TEMPLATE
from headway.server.chat_template import ChatTemplate
from tests.server.chat_folders import (
    SPECIAL,
    Folder,
    byte_level,
    load,
    reference,
    sentence_piece,
    theirs,
)

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    folder = byte_level(tmp_path_factory.mktemp("chatml"))
    return load(folder), theirs(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = sentence_piece(tmp_path_factory.mktemp("llama"))
    return load(folder), theirs(folder)


words = st.text("the cat\n<>|_ü日 [/]INSTs", max_size=20) | st.sampled_from(
    ["<tool_call>", " x ", "<|im_", "|>"]
)


def harmless(text):
    return not any(name in text for name in [*SPECIAL, "<s>", "</s>", "<unk>"])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_ids_equal_transformers(chatml, data):
    ours, tokenizer = chatml
    content = words.filter(harmless)
    parts = st.lists(content.map(lambda text: {"type": "text", "text": text}), max_size=3).filter(
        lambda parts: harmless("".join(part["text"] for part in parts))
    )
    call = st.fixed_dictionaries(
        {
            "function": st.fixed_dictionaries(
                {"arguments": st.dictionaries(content, content, max_size=2)}
            )
        }
    )
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": content | parts},
        optional={"tool_calls": st.lists(call, max_size=2) | st.none()},
    )
    messages = data.draw(st.lists(message, min_size=1, max_size=4))
    tools = data.draw(
        st.sampled_from(
            [None, [{"type": "function", "function": {"name": "f", "description": "ü <"}}]]
        )
    )
    opening = data.draw(st.booleans())
    want = reference(tokenizer, messages, tools, add_generation_prompt=opening)
    assert ours.render(messages, tools, add_generation_prompt=opening) == want


@given(texts=st.lists(words.filter(harmless), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_ids_equal_transformers_with_sentence_piece(llama, texts):
    """Spaces before words of later texts, white space that a special token takes."""
    ours, tokenizer = llama
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    assert ours.render(messages) == reference(tokenizer, messages, add_generation_prompt=True)


def test_a_template_for_tools_is_taken_with_tools(llama):
    ours, messages = llama[0], [{"role": "user", "content": "cat"}]
    text = ours._tokenizer.decode(ours.render(messages, [{"name": "f"}]))
    assert "<|im_start|>" in text and "[INST]" not in text
    assert "[INST]" in ours._tokenizer.decode(ours.render(messages))


@pytest.mark.parametrize(
    "content",
    ["the cat ", " the cat", "the\n\n", "the <|im_end|>", [{"type": "text", "text": "the "}]],
)
def test_a_message_is_continued_where_it_ends(chatml, content):
    ours, tokenizer = chatml
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    ids = ours.render(messages, add_generation_prompt=False, continue_final_message=True)
    if "<|im_end|>" not in content:
        assert ids == reference(tokenizer, messages, continue_final_message=True)
    assert ours._tokenizer.decode(ids).endswith(("the", "the cat", "the <|im_end|>"))
    with pytest.raises(UsageError, match="no text to go on with"):
        ours.render([{"role": "user"}], continue_final_message=True)


def test_a_system_message_is_rendered_at_its_place(chatml):
    ours = chatml[0]
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    before = ours.render(talk, add_generation_prompt=False)
    after = ours.render(
        [*talk, {"role": "system", "content": "be brief"}], add_generation_prompt=False
    )
    assert after[: len(before)] == before  # so that the cached prefix is used


def test_a_model_without_a_template_has_a_plain_one(tmp_path):
    ours = ChatTemplate.load(Folder(tmp_path), load_tokenizer("bytes"))
    ids = ours.render(
        [{"role": "user", "content": "Hi<|endoftext|>"}, {"role": "assistant", "content": "Yes"}]
    )
    assert bytes(ids).decode() == "User: Hi<|endoftext|>\n\nAssistant: Yes\n\nAssistant:"


def test_names_of_special_tokens_come_from_the_tokenizer(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}{{ eos_token }}{{ bos_token }}")
    ours = ChatTemplate.load(Folder(tmp_path), load_tokenizer("bytes"), str(tmp_path / "t.jinja"))
    assert ours.render([{"role": "user", "content": "a"}]) == [97, 256]
    assert ours.render(
        [{"role": "user", "content": "a"}], kwargs={"bos_token": "<|endoftext|>"}
    ) == [97, 256, *b"<|endoftext|>"]


def test_templates_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no Jinja: line 2"):
        ChatTemplate("a\n{% if %}", load_tokenizer("bytes"))
    with pytest.raises(UsageError, match="cannot read the chat template .*missing"):
        ChatTemplate.load(Folder(tmp_path), load_tokenizer("bytes"), str(tmp_path / "missing"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "rag", "template": ""}]}'
    )
    with pytest.raises(UsageError, match="neither a text nor a list with one named default"):
        ChatTemplate.load(Folder(tmp_path), load_tokenizer("bytes"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat')
    with pytest.raises(UsageError, match="cannot read .*tokenizer_config.json"):
        ChatTemplate.load(Folder(tmp_path), load_tokenizer("bytes"))


def test_reserved_characters_and_empty_conversations_are_refused():
    plain = ChatTemplate(PLAIN_TEMPLATE, load_tokenizer("bytes"))
    with pytest.raises(UsageError, match=r"U\+FDD0"):
        plain.render([{"role": "user", "content": "\ufdd0"}])
    with pytest.raises(UsageError, match="messages is empty"):
        plain.render([])
