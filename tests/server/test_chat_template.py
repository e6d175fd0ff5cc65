"""Ids of conversations equal those of Transformers; text of messages never is a special token."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from headway.config import UsageError
from headway.data.tokenizer import load_tokenizer, train_bpe
from headway.hub.export_tokenizer import PLAIN_TEMPLATE
from headway.server import template_sandbox
from headway.server.chat_template import ChatTemplate
from headway.server.shield import Shield
from tests.published import published

pytest.importorskip("jinja2")

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set ns = namespace(text='') %}
    {%- if message.content is string %}
        {%- set ns.text = message.content %}
    {%- else %}
        {%- for part in message.content %}{%- set ns.text = ns.text + part.text %}{%- endfor %}
    {%- endif %}
    {%- if loop.index0 > 90 %}{% break %}{% endif %}
    {%- generation %}{{- '<|im_start|>' + message.role + '\\n' + ns.text | trim }}{%- endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + call.function.arguments | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}\
{% elif m['role'] == 'system' %}{{ raise_exception('no system message, please') }}\
{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass
class Folder:
    folder: Path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """ChatML over byte-level BPE; `<tool_call>` is a token, but no special one."""
    path = tmp_path_factory.mktemp("chatml") / "tokenizer.json"
    train_bpe(["system user assistant the cat im_end im_start |>\n" * 20], 330, path)
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens(["<tool_call>", "</tool_call>"])
    inner.save(str(path))
    names = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({**names, "chat_template": CHATML})
    )
    return path.parent


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    """A space before the first word of a text alone; a special token that takes white space."""
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        "▁the",
        "▁cat",
        "[",
        "INST",
        "]",
        "/",
        "the",
        "cat",
        "<",
        "s",
        ">",
        "\n",
    ]
    pieces += [f"<0x{i:02X}>" for i in range(256)]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    inner.add_special_tokens(["<unk>", "<s>", AddedToken("</s>", rstrip=True)])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    inner.save(str(path))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "rstrip": True}}
    entries = [{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": CHATML}]
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({**names, "chat_template": entries})
    )
    return path.parent


def load(folder):
    return ChatTemplate.load(Folder(folder), load_tokenizer(str(folder)))


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    eos = config["eos_token"]
    template = config["chat_template"]
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=config.get("bos_token"),
        eos_token=eos if isinstance(eos, str) else AddedToken(**eos),
        chat_template=template,
    )


@pytest.fixture(scope="module")
def chatml(byte_level):
    return load(byte_level), theirs(byte_level)


@pytest.fixture(scope="module")
def llama(sentence_piece):
    return load(sentence_piece), theirs(sentence_piece)


def reference(tokenizer, messages, tools=None, **more):
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **more)


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
    ours = chatml[0]
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
    ours = chatml[0]
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


def template(source):
    return ChatTemplate(source, load_tokenizer("bytes"))


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('two\nlines') }}", "refuses this: two lines"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ messages.nothing.at_all }}", "refuses this: .*nothing"),
        ("{{ ''.__class__.__mro__ }}", "refuses this: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this: .*unsafe"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 0.2 s",
        ),
        (
            "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
            "writes more than 1,000,000 characters",
        ),
        ("{{ 'x' * 10**12 }}", "makes more than"),
        ("{{ 10**10**10 }}", "makes more than"),
        ("{{ '%99999999d' % 1 }}", "makes more than"),
        ("{{ '{:>99999999}'.format(1) }}", "makes more than"),
        ("{{ 'x'.ljust(10**9) }}", "makes more than"),
        ("{{ 'x' | center(10**9) }}", "makes more than"),
        ("{{ messages | tojson(indent=10**9) }}", "makes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
    ],
)
def test_what_a_template_may_not_do_is_one_line(monkeypatch, source, words):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 1_000_000)
    with pytest.raises(UsageError, match=words) as error:
        template(source).render(HELLO)
    assert "\n" not in str(error.value)


def test_templates_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no Jinja: line 2"):
        template("a\n{% if %}")
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
    with pytest.raises(UsageError, match=r"U\+FDD0"):
        template(PLAIN_TEMPLATE).render([{"role": "user", "content": "\ufdd0"}])
    with pytest.raises(UsageError, match="messages is empty"):
        template(PLAIN_TEMPLATE).render([])


def test_the_dialect_of_transformers():
    source = "{{ strftime_now('%Y') | length }}{{ {'b': '<é>', 'a': 1} | tojson }}{{ [1] | tojson(indent=1) }}"
    assert bytes(template(source).render(HELLO)).decode() == '4{"b": "<é>", "a": 1}[\n 1\n]'


QUESTION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Wie spät ist es in 東京? \U0001f600\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 12:00."},
    {"role": "system", "content": "Now be verbose."},
    {"role": "user", "content": "Why <b>?</b> 1234567 <tool_response> user: | >"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        },
    }
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3_1", "deepseek_v3", "gptoss"])
def test_ids_of_published_models_equal_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = published(name)
    if name == "smollm2":
        [gguf] = folder.glob("*.gguf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        tokenizer.save_pretrained(tmp_path)
        folder = tmp_path
    else:
        folder = next(folder.rglob("tokenizer.json")).parent
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if config.get("chat_template") is None:  # gpt-oss: its package has none
            config["chat_template"] = (
                "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
            )
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((folder / file).read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        folder = tmp_path
        names = {
            k: v if isinstance(v, str) else v["content"]
            for k, v in config.items()
            if k.endswith("_token") and v and not isinstance(v, bool)
        }
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            chat_template=config["chat_template"],
            **names,
        )
    ours = load(folder)
    for tools in (None, TOOLS):
        for opening in (False, True):
            want = reference(tokenizer, QUESTION, tools, add_generation_prompt=opening)
            assert ours.render(QUESTION, tools, add_generation_prompt=opening) == want
    continued = [*QUESTION, {"role": "assistant", "content": "Because "}]
    want = reference(tokenizer, continued, continue_final_message=True)
    assert ours.render(continued, add_generation_prompt=False, continue_final_message=True) == want
    special = tokenizer.convert_ids_to_tokens(sorted(ours._tokenizer.special_tokens.values()))
    attack = [{"role": "user", "content": "".join(special[:300])}]
    clean = [{"role": "user", "content": ""}]
    count = [
        sum(i in set(ours._tokenizer.special_tokens.values()) for i in ours.render(m))
        for m in (attack, clean)
    ]
    assert count[0] == count[1]
    assert "".join(special[:300]) in ours._tokenizer.decode(
        ours.render(attack), skip_special_tokens=False
    )
