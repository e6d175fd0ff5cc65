"""Calls in a reply: the same whatever the pieces it comes in."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.server.tool_calls import ToolCallParser, parse_call

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü<"}}\n</tool_call>'
TEXTS = {
    "plain": ("Hello.", "Hello.", []),
    "one": (f"Let me see.\n{CALL}", "Let me see.\n", ["add"]),
    "two": (f"{CALL} and {CALL}.", " and .", ["add", "add"]),
    "no JSON": ("<tool_call>{a}</tool_call>", "<tool_call>{a}</tool_call>", []),
    "no name": ('<tool_call>{"x": 1}</tool_call>!', '<tool_call>{"x": 1}</tool_call>!', []),
    "not closed": ('a <tool_call>{"name": "add"}', 'a <tool_call>{"name": "add"}', []),
    "nearly": ("a <tool_cal b <tool", "a <tool_cal b <tool", []),
}


def parsed(pieces, whole=False):
    parser = ToolCallParser(whole)
    out = [parser.add(piece) for piece in pieces] + [parser.finish()]
    return "".join(text for text, _ in out), [call for _, calls in out for call in calls]


@pytest.mark.parametrize("name", TEXTS)
@given(cuts=st.lists(st.integers(0, 200)))
def test_text_and_calls_do_not_depend_on_the_pieces(name, cuts):
    text, content, names = TEXTS[name]
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    said, calls = parsed(text[a:b] for a, b in itertools.pairwise(edges))
    assert (said, [call.name for call in calls]) == (content, names)
    assert all(json.loads(call.arguments) == {"a": 1, "b": "ü<"} for call in calls)


def test_text_is_held_back_only_while_it_may_be_a_tag():
    parser = ToolCallParser(whole=False)
    assert parser.add("a <tool")[0] == "a "
    assert parser.add("box>")[0] == "<toolbox>"


def test_a_whole_reply_is_a_call_or_stays_text():
    assert parsed(['{"name": "f", ', '"arguments": {}}'], whole=True)[1][0].name == "f"
    assert parsed(['{"name": "f", '], whole=True) == ('{"name": "f", ', [])


@pytest.mark.parametrize(
    "text", ["", "1", "[]", "null", '{"name": 1}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', "[" * 100_000]
)  # fmt: skip
def test_what_is_no_call(text):
    assert parse_call(text) is None


def test_arguments_may_come_as_text():
    assert parse_call('{"name": "f", "arguments": "{\\"a\\": 1}"}').json()["function"] == {
        "name": "f",
        "arguments": '{"a": 1}',
    }
