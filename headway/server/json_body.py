"""The body of a request as JSON, strictly: what other parsers let pass is refused in one line."""

import json
import math
from typing import NoReturn

from headway.server.errors import BadRequest
from headway.server.fields import Json, shown_name

MAX_DEPTH = 64
"""Objects and lists inside each other."""


def read_json(body: bytes) -> Json:
    """Parse the body of a request. Raises BadRequest for what is no JSON in UTF-8, for NaN and
    infinities, a name that is there twice, half of a surrogate pair and nesting past MAX_DEPTH."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is no UTF-8: byte {error.start} cannot be read") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = f"{error.msg} (line {error.lineno}, column {error.colno})"
        raise BadRequest(f"the body is no JSON: {where}", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except BadRequest:
        raise
    except ValueError:  # a whole number of more digits than Python converts
        raise BadRequest("the body has a number of over 4300 digits", code="invalid_json") from None
    _check_values(value)
    return value


def _check_values(value: Json) -> None:
    """Raise BadRequest for nesting past MAX_DEPTH and for text that has no UTF-8."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise _too_deep()
        inner: list[Json] = []
        for item in level:
            match item:
                case str():
                    if not item.isascii():
                        _check_text(item)
                case float() if not math.isfinite(item):
                    raise BadRequest("the body has a number above 1.8e308", code="invalid_json")
                case list():
                    inner += item
                case dict():
                    inner += item
                    inner += item.values()
        level = inner


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise BadRequest(
            f"a text has {half}, half of a surrogate pair, which is no character"
        ) from None


def _too_deep() -> BadRequest:
    return BadRequest(f"the body nests deeper than {MAX_DEPTH}", code="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"the body has {name}, which is no JSON number", code="invalid_json")


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    table: dict[str, Json] = {}
    for name, value in pairs:
        if name in table:
            raise BadRequest(
                f"the field {shown_name(name)} is there twice; give it once", shown_name(name)
            )
        table[name] = value
    return table
