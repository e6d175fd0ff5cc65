"""Conditions on runs, as `model.moe.top_k=4 and (bits_per_byte<2 or run.seed in 1,2)`.

    condition   all { "or" all }
    all         part { "and" part }
    part        "not" part | "(" condition ")" | comparison
    comparison  FIELD OPERATOR VALUE | FIELD "in" values | FIELD "in" "(" values ")"
    values      VALUE { "," VALUE }

The text is parsed here; no part of it is ever run as code."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from headway.config import UsageError

Row = Mapping[str, Any]
"""A run: dotted path of its config, or name of a result → value."""
Condition = Callable[[Row], bool]

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_TOKEN = re.compile(r"""\s*(?:(==|!=|<=|>=|[=<>(),])|("[^"]*"|'[^']*')|([^\s=!<>(),"']+))""")
_WORDS = {"true": True, "false": False, "none": None, "null": None}


class _Token(NamedTuple):
    text: str
    quoted: bool


def condition(text: str, fields: Sequence[str]) -> Condition:
    """Return the condition that a text describes. A field may be cut off on the left where that is
    unique. Raises UsageError, which points at the place, for what cannot be read, and for fields
    that no run has."""
    parser = _Parser(text, fields)
    result = parser.condition()
    parser.expect_end()
    return result


def field_named(name: str, fields: Sequence[str]) -> str:
    """Return the field that a name means: the whole path, or the only one that ends in it; of
    several the only one of the sparse layer or of the model. Raises UsageError for none, with the
    nearest, and for several."""
    path = name.replace("-", "_")
    if path in fields:
        return path
    ending = [field for field in fields if field.endswith(f".{path}")]
    of_model = [field for field in ending if field in (f"model.moe.{path}", f"model.{path}")]
    if len(ending) == 1 or len(of_model) == 1:
        return (of_model or ending)[0]
    if ending:
        raise UsageError(f"{name} may be {' or '.join(ending)}; give the whole path")
    tails = {field.rpartition(".")[2]: field for field in fields}
    near = get_close_matches(path.rpartition(".")[2], tails, n=1, cutoff=0.7)
    hint = f"; did you mean {tails[near[0]]}?" if near else ""
    raise UsageError(f"there is no field {name}{hint}")


def value_of(text: str) -> Any:
    """Return the value that a word stands for: a number, true, false, none, or itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class _Parser:
    def __init__(self, text: str, fields: Sequence[str]):
        self.text, self.fields = text, fields
        self.tokens: list[_Token] = []
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                raise UsageError(f"--where {text!r}: cannot read {text[place:].strip()!r}")
            symbol, quoted, word = match.groups()
            self.tokens.append(_Token(quoted[1:-1] if quoted else symbol or word, bool(quoted)))
            place = match.end()
        self.at = 0

    def condition(self) -> Condition:
        parts = [self._all()]
        while self._takes("or"):
            parts.append(self._all())
        return lambda row: any(part(row) for part in parts)

    def _all(self) -> Condition:
        parts = [self._part()]
        while self._takes("and"):
            parts.append(self._part())
        return lambda row: all(part(row) for part in parts)

    def _part(self) -> Condition:
        if self._takes("not"):
            inner = self._part()
            return lambda row: not inner(row)
        if self._takes("("):
            inner = self.condition()
            if not self._takes(")"):
                self._fail("a ) is missing")
            return inner
        field = field_named(self._next("a field").text, self.fields)
        if self._takes("in"):
            enclosed, values = self._takes("("), [self._value()]
            while self._takes(","):
                values.append(self._value())
            if enclosed and not self._takes(")"):
                self._fail("a ) is missing")
            return lambda row: any(_holds(operator.eq, _one(row.get(field)), v) for v in values)
        sign = self._next("an operator").text
        if sign not in OPERATORS:
            self._fail(f"{sign!r} is no operator; use {' '.join(OPERATORS)} or in")
        compares, value = OPERATORS[sign], self._value()
        return lambda row: _holds(compares, _one(row.get(field)), value)

    def expect_end(self) -> None:
        if self.at < len(self.tokens):
            self._fail(f"{self.tokens[self.at].text!r} follows a whole condition; use and, or")

    def _value(self) -> Any:
        token = self._next("a value")
        return token.text if token.quoted else value_of(token.text)

    def _takes(self, text: str) -> bool:
        """Go past the next token if it is this one."""
        here = self.at < len(self.tokens) and self.tokens[self.at] == _Token(text, False)
        self.at += here
        return here

    def _next(self, wanted: str) -> _Token:
        if self.at == len(self.tokens):
            self._fail(f"{wanted} is missing at the end")
        self.at += 1
        return self.tokens[self.at - 1]

    def _fail(self, why: str) -> None:
        raise UsageError(f"--where {self.text!r}: {why}")


def _one(value: Any) -> Any:
    """Return the only item of a list of one: `data.source=stdlib` means `["stdlib"]`."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _holds(compares: Callable[[Any, Any], bool], left: Any, right: Any) -> bool:
    """Compare; values of kinds without an order are in no order, and 1 is not true."""
    if isinstance(left, bool) != isinstance(right, bool):
        return compares is operator.ne
    try:
        return bool(compares(left, right))
    except TypeError:
        return False
