"""What a field of a request body may hold. A kind reads a JSON value or refuses it in one line, and
says the same to OpenAPI and to people, so that the three cannot disagree."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from headway.server.errors import BadRequest

Json: TypeAlias = Any
"""What `json.loads` returns."""
MAX_INT = 2**63 - 1


class Kind(Protocol):
    """What a field may hold."""

    @property
    def words(self) -> str:
        """Return it for people, after "use" or "give"."""
        ...

    @property
    def schema(self) -> dict[str, Json]:
        """Return the JSON Schema of the values that `read` takes."""
        ...

    def read(self, value: Json, param: str) -> Any:
        """Return the value of the field `param`; raise BadRequest."""
        ...


@dataclass(frozen=True)
class Integer:
    low: int
    high: int

    @property
    def words(self) -> str:
        low = f"{self.low}" if self.low > -MAX_INT else "−2⁶³"
        return f"a whole number from {low} to {self.high if self.high < MAX_INT else '2⁶³ − 1'}"

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def read(self, value: Json, param: str) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise _refused(value, param, self)
        return value


@dataclass(frozen=True)
class Number:
    low: float
    high: float
    above: bool = False
    """Whether `low` itself is refused."""

    @property
    def words(self) -> str:
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"

    @property
    def schema(self) -> dict[str, Json]:
        low = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "number", low: self.low, "maximum": self.high}

    def read(self, value: Json, param: str) -> float:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise _refused(value, param, self)
        if self.above and value == self.low:
            raise _refused(value, param, self)
        return float(value)


@dataclass(frozen=True)
class Flag:
    @property
    def words(self) -> str:
        return "true or false"

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "boolean"}

    def read(self, value: Json, param: str) -> bool:
        if type(value) is not bool:
            raise _refused(value, param, self)
        return value


@dataclass(frozen=True)
class Text:
    most: int
    """Characters."""
    least: int = 0

    @property
    def words(self) -> str:
        return f"a text of {self.least} to {self.most} characters"

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "minLength": self.least, "maxLength": self.most}

    def read(self, value: Json, param: str) -> str:
        if type(value) is not str or not self.least <= len(value) <= self.most:
            raise _refused(value, param, self)
        return value


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    @property
    def words(self) -> str:
        return " or ".join(self.values)

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "enum": list(self.values)}

    def read(self, value: Json, param: str) -> str:
        if type(value) is not str or value not in self.values:
            near = difflib.get_close_matches(str(value)[:40], self.values, n=1)
            raise _refused(value, param, self, f"did you mean {near[0]}? " if near else "")
        return value


@dataclass(frozen=True)
class Many:
    of: Kind
    most: int
    least: int = 0

    @property
    def words(self) -> str:
        return f"a list of {self.least} to {self.most}, each {self.of.words}"

    @property
    def schema(self) -> dict[str, Json]:
        size = {"minItems": self.least, "maxItems": self.most}
        return {"type": "array", "items": self.of.schema, **size}

    def read(self, value: Json, param: str) -> list[Any]:
        if type(value) is not list or not self.least <= len(value) <= self.most:
            raise _refused(value, param, self)
        return [self.of.read(item, f"{param}[{i}]") for i, item in enumerate(value)]


@dataclass(frozen=True)
class Either:
    """One of several kinds, told apart by the JSON type of the value, then of its first item."""

    kinds: tuple[Kind, ...]

    @property
    def words(self) -> str:
        return ", or ".join(kind.words for kind in self.kinds)

    @property
    def schema(self) -> dict[str, Json]:
        return {"anyOf": [kind.schema for kind in self.kinds]}

    def read(self, value: Json, param: str) -> Any:
        for kind in self.kinds:
            if _looks_like(kind.schema, value):
                return kind.read(value, param)
        raise _refused(value, param, self)


@dataclass(frozen=True)
class Table:
    """An object whose names are free: `logit_bias`, `metadata`."""

    names: str
    """A regular expression in the common subset of JSON Schema and Python, for OpenAPI."""
    of: Kind
    most: int

    @property
    def words(self) -> str:
        return f"an object of at most {self.most} entries, each {self.of.words}"

    @property
    def schema(self) -> dict[str, Json]:
        names = {"patternProperties": {self.names: self.of.schema}, "additionalProperties": False}
        return {"type": "object", "maxProperties": self.most, **names}

    def read(self, value: Json, param: str) -> dict[str, Any]:
        if type(value) is not dict or len(value) > self.most:
            raise _refused(value, param, self)
        return {
            name: self.of.read(item, f"{param}.{shown_name(name)}") for name, item in value.items()
        }


@dataclass(frozen=True)
class Free:
    """An object that others check: a JSON Schema, arguments of a template."""

    @property
    def words(self) -> str:
        return "an object"

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "object"}

    def read(self, value: Json, param: str) -> dict[str, Json]:
        if type(value) is not dict:
            raise _refused(value, param, self)
        return value


@dataclass(frozen=True)
class Field:
    """A field of an object: what it may hold, what it is without, what it does."""

    kind: Kind
    help: str
    default: Any = None
    needed: bool = False


@dataclass(frozen=True)
class Record:
    """An object with named fields. `null` is as if the field was not there; every other name is
    refused, with the reason where the API it comes from has it and this server does not."""

    fields: Mapping[str, Field]
    unsupported: Mapping[str, str]
    """Name → why it is not supported."""

    @property
    def words(self) -> str:
        needed = [name for name, field in self.fields.items() if field.needed]
        names = needed or list(self.fields)[:8]
        return f"an object with {', '.join(names)}{' …' * (len(names) < len(self.fields))}"

    @property
    def schema(self) -> dict[str, Json]:
        properties = {
            name: {**field.kind.schema, "description": field.help}
            if field.needed
            else {"anyOf": [field.kind.schema, {"type": "null"}], "description": field.help}
            for name, field in self.fields.items()
        }
        required = [name for name, field in self.fields.items() if field.needed]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def read(self, value: Json, param: str) -> dict[str, Any]:
        """Return a value for every field, its default where it is not given."""
        if type(value) is not dict:
            raise _refused(value, param, self)
        dot = f"{param}." if param else ""
        for name, given in value.items():
            if name in self.unsupported:
                if given is not None:
                    why = f"{dot}{name} is not supported: {self.unsupported[name]}"
                    raise BadRequest(why, dot + name, code="unsupported_parameter")
            elif name not in self.fields:
                raise _unknown(name, self.fields, dot)
        values = {}
        for name, field in self.fields.items():
            given = value.get(name)
            if given is None and field.needed:
                why = f"{dot}{name} is missing; give {field.kind.words}"
                raise BadRequest(why, dot + name, code="missing_required_parameter")
            values[name] = field.default if given is None else field.kind.read(given, dot + name)
        return values


def show(value: Json) -> str:
    """Return a value in a few words, for a message."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case dict():
            return f"an object of {len(value)} entries" if value else "an empty object"
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case str() if len(value) > 40:
            return f"a text of {len(value)} characters"
        case str():
            return repr(value)
        case int() if abs(value) >= 10**20:
            return f"a number of {math.ceil(value.bit_length() * math.log10(2))} digits"
        case _:
            return f"{value}"


def _refused(value: Json, param: str, kind: Kind, hint: str = "") -> BadRequest:
    where = param or "the body"
    code = "invalid_value" if _looks_like(kind.schema, value) else "invalid_type"
    return BadRequest(f"{where} is {show(value)}; {hint}use {kind.words}", param or None, code=code)


def _unknown(name: str, known: Collection[str], dot: str) -> BadRequest:
    near = difflib.get_close_matches(name[:60], known, n=1)
    fix = f"did you mean {near[0]}?" if near else "docs/serving.md lists the fields"
    where = dot + shown_name(name)
    return BadRequest(f"unknown field {where}; {fix}", where, code="unknown_parameter")


def shown_name(name: str) -> str:
    """Return the name of a field for a message: on one line, and short."""
    short = name if len(name) <= 60 else f"{name[:60]}…"
    return short if short.isprintable() else repr(short)


_TYPES = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def _looks_like(schema: dict[str, Json], value: Json) -> bool:
    """Return whether a value has the JSON type of a schema, and a list's first item that of its
    items."""
    if "anyOf" in schema:
        return any(_looks_like(option, value) for option in schema["anyOf"])
    if type(value) not in _TYPES[schema["type"]]:
        return False
    return not (type(value) is list and value) or _looks_like(schema["items"], value[0])
