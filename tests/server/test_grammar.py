"""Whatever a model draws under a grammar's mask matches the grammar, and ends."""

import json
import random
import re
import threading
import time

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from headway.config import UsageError
from headway.data.tokenizer import load_tokenizer, train_bpe
from headway.serve.params import SamplingParams
from headway.serve.request import joined
from headway.serve.sampling import Row, sample
from headway.server.grammar import MAX_SIZE, GrammarCompiler

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [
        '{"name":"the cat","age":12,"tags":["a","b"],"ok":true}\n',
        "日本 ü null false -1.5e3 ",
    ] * 20
    train_bpe(texts, 400, folder / "bpe.json")
    names = [
        "</s>",
        "▁",
        '{"',
        '":',
        "▁cat",
        *'{}[]",:0123456789-.eabcxtruflsn',
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    inner.add_special_tokens(["</s>"])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.save(str(folder / "llama.json"))
    return [
        GrammarCompiler(load_tokenizer(t))
        for t in ("bytes", f"{folder}/bpe.json", f"{folder}/llama.json")
    ]


@pytest.fixture(scope="module")
def of_bytes(compilers):
    return compilers[0]


def write(compiler, grammar, seed, most=600):
    """Draw allowed tokens at random, as an untrained model does; the text and whether it ended."""
    tokenizer, draw, matcher = compiler._tokenizer, random.Random(seed), grammar.matcher()
    ids = []
    while len(ids) < most:
        mask = matcher.mask()
        assert mask.any() and mask.shape == (tokenizer.vocab_size,)
        token = draw.choice(np.flatnonzero(mask).tolist())
        matcher.accept(token)
        assert not matcher.failed
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids), True
        ids.append(token)
    return tokenizer.decode(ids), False


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "ü", 'q"']}, "maxItems": 3},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("which", range(3))
def test_random_tokens_make_the_schema_s_json(compilers, which):
    compiler = compilers[which]
    grammar = compiler.json_schema(PERSON)
    for seed in range(25):
        text, ended = write(compiler, grammar, seed)
        person = json.loads(text)
        assert ended
        assert not re.search(r"[:,{]\s|\s[}:,]", re.sub(r'"(\\.|[^"\\])*"', '""', text))
        assert isinstance(person["name"], str) and len(person["name"]) <= 8
        assert type(person["age"]) is int and 0 <= person["age"] <= 150
        assert set(person) <= {"name", "age", "tags", "ok"} and set(person.get("tags", [])) <= {
            "a",
            "ü",
            'q"',
        }
        assert person.get("ok") in (None, True, False)


@pytest.mark.parametrize("which", range(3))
def test_any_object_and_a_regular_expression(compilers, which):
    compiler = compilers[which]
    any_object, pattern = compiler.json_object(), compiler.regex(r"(ab|c{2,3})+ü?-[0-9]{1,4}")
    ends = 0
    for seed in range(12):
        text, ended = write(compiler, any_object, seed, 3000)
        if ended:
            assert isinstance(json.loads(text), dict)
        ends += ended
        text, ended = write(compiler, pattern, seed)
        assert ended and re.fullmatch(r"(ab|c{2,3})+ü?-[0-9]{1,4}", text)
    assert ends >= 9  # a string may be long


def test_the_end_of_text_is_forced_and_only_allowed_when_complete(of_bytes):
    matcher = of_bytes.regex("ab?").matcher()
    allowed = lambda: np.flatnonzero(matcher.mask()).tolist()  # noqa: E731
    assert allowed() == [ord("a")]
    matcher.accept(ord("a"))
    assert allowed() == [ord("b"), 256]
    matcher.accept(ord("b"))
    assert allowed() == [256] and not matcher.failed
    matcher.accept(256)
    matcher.accept(256)  # ignore_eos writes on
    assert allowed() == [256] and not matcher.failed


def test_choices_do_not_share_a_state(of_bytes):
    grammar = of_bytes.regex("a*")
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(256)
    assert np.flatnonzero(second.mask()).tolist() == [ord("a"), 256]
    assert np.flatnonzero(first.mask()).tolist() == [256]


def test_sampling_obeys_a_grammar(of_bytes):
    grammar = of_bytes.json_schema(PERSON)
    params = SamplingParams(max_tokens=900, grammar=grammar, min_tokens=3)
    generator = torch.Generator().manual_seed(0)
    rows = [Row(params, 5, i, [], [], (256,), grammar.matcher()) for i in range(3)]
    texts = []
    while rows:
        drawn = sample(torch.randn(len(rows), 257, generator=generator), rows)
        for row, (token, _, _) in list(zip(rows, drawn, strict=True)):
            row.matcher.accept(token)
            row.output.append(token)
            if token == 256:
                rows.remove(row)
                texts.append(bytes(row.output[:-1]).decode())
    assert len(texts) == 3 and all(json.loads(text)["age"] <= 150 for text in texts)


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "kind, value, words",
    [
        ("json_schema", {"type": "nonsense"}, "the schema cannot be used: Invalid type: nonsense"),
        ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys"),
        ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ("json_schema", {"$ref": "http://example.invalid/a"}, "cannot be used"),
        ("json_schema", {"$ref": "#/$defs/missing"}, "does not exist"),
        ("json_schema", {"type": "string", "pattern": "(a"}, "regex parse error"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ("json_schema", True, "the schema is bool; give a JSON object"),
        ("json_schema", [], "the schema is list"),
        ("json_schema", nested(200), "nested deeper than 64"),
        ("json_schema", {"description": "x" * MAX_SIZE}, "characters; give at most"),
        ("json_schema", {"const": "\ud800"}, "cannot be used"),
        ("regex", "(a|b", "the regex cannot be used: .*unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"[^\s\S]", "matches no text"),
        ("regex", 5, "the regex is int; give a text"),
        ("regex", "a" * (MAX_SIZE + 1), "characters; give at most"),
    ],
)
def test_what_does_not_compile_is_one_line(of_bytes, kind, value, words):
    start = time.monotonic()
    with pytest.raises(UsageError, match=words) as error:
        {"json_schema": of_bytes.json_schema, "regex": of_bytes.regex}[kind](value)
    assert "\n" not in str(error.value) and time.monotonic() - start < 5


def test_a_grammar_over_the_limits_is_refused():
    compiler = GrammarCompiler(load_tokenizer("bytes"), limits={"initial_lexer_fuel": 50})
    with pytest.raises(UsageError, match="the regex cannot be used: .*too big"):
        compiler.regex("((a{1,9999}b){1,9999}c){1,9999}[^a]{99999}")


def test_a_text_that_outgrows_the_limits_ends(of_bytes):
    """It is never unconstrained: only the end of text is allowed, and the matcher says so."""
    compiler = GrammarCompiler(load_tokenizer("bytes"), limits={"step_max_items": 60})
    grammar = compiler.json_schema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "integer", "minimum": i}} for i in range(12)
            ]
        }
    )
    matcher = grammar.matcher()
    for byte in b"[100,200,300,400":
        mask = matcher.mask()
        if matcher.failed:
            break
        assert mask[byte] and not mask[256]
        matcher.accept(byte)
    assert matcher.failed and np.flatnonzero(matcher.mask()).tolist() == [256]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**12)
    | st.text(max_size=5)
    | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
words = "type properties items enum const minimum maxLength pattern required $ref $defs anyOf allOf oneOf format additionalProperties minItems if".split()
schemas = st.recursive(
    st.dictionaries(
        st.sampled_from(words),
        json_values | st.sampled_from(["object", "string", "#", "a+", "date"]),
        max_size=3,
    ),
    lambda inner: st.dictionaries(
        st.sampled_from(words),
        inner
        | st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_size=3,
    ),
    max_leaves=6,
)


@given(schemas | st.text(max_size=20) | json_values)
@settings(max_examples=300, deadline=None)
def test_any_input_compiles_or_is_refused(of_bytes, value):
    for compile_ in (of_bytes.json_schema, of_bytes.regex):
        try:
            grammar = compile_(value)
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert grammar.matcher().mask().any()


def test_a_tokenizer_whose_texts_do_not_join_has_no_grammars(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(UsageError, match="do not join"):
        GrammarCompiler(load_tokenizer(str(tmp_path / "t.json"))).json_object()


def test_compiling_leaves_the_interpreter_to_others(of_bytes):
    """llguidance gives up Python's lock: a thread that counts goes on."""
    ticks, done = [], threading.Event()

    def count():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    for i in range(20):
        of_bytes.json_schema(
            {"anyOf": [{"type": "string", "pattern": f"[a-z]{{{i},300}}{j}"} for j in range(20)]}
        )
    done.set()
    thread.join()
    gaps = np.diff(ticks)
    assert len(ticks) > 5 and np.median(gaps) < 0.05


AGE = {
    "type": "object",
    "properties": {"age": PERSON["properties"]["age"]},
    "required": ["age"],
    "additionalProperties": False,
}


def test_replies_of_an_engine_match_their_grammars(engine):
    """With and without a grammar side by side; every choice has a state of its own."""
    inference = engine()
    compiler = GrammarCompiler(inference.tokenizer)
    params = [
        SamplingParams(max_tokens=40 if grammar else 6, n=2, seed=i, grammar=grammar)
        for i, grammar in enumerate([compiler.json_schema(AGE), None, compiler.regex("(yes|no)!")])
    ]
    requests = [inference.add([1, 2], p) for p in params]
    updates = []
    while inference.has_work:
        updates += inference.step()
    people, other, answers = (
        [joined([u for u in updates if (u.request, u.choice) == (request, i)]) for i in range(2)]
        for request in requests
    )
    assert other == engine().generate([[1, 2]], params[1])[0]
    assert all(json.loads(choice.text)["age"] <= 150 for choice in people)
    assert {choice.text for choice in answers} <= {"yes!", "no!"}
    assert {choice.finish_reason for choice in [*people, *answers]} == {"stop"}


def test_a_reply_that_outgrows_the_limits_says_that_it_is_cut(engine):
    inference = engine()
    compiler = GrammarCompiler(inference.tokenizer, limits={"step_max_items": 60})
    branches = [{"type": "array", "items": {"type": "integer", "minimum": i}} for i in range(12)]
    params = SamplingParams(
        max_tokens=200, grammar=compiler.json_schema({"anyOf": branches}), seed=1
    )
    [[choice]] = inference.generate([[1]], params)
    assert choice.finish_reason == "length" and len(choice.tokens) < 200
