"""What a field takes: the reader, the JSON Schema and the message say the same."""

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.server.bodies import Bounds, bodies
from headway.server.errors import BadRequest
from headway.server.fields import (
    Choice,
    Either,
    Field,
    Flag,
    Integer,
    Many,
    Number,
    Record,
    Table,
    Text,
)

BODIES = bodies(Bounds(vocab_size=257, max_len=64, max_tokens=64, max_n=8))
NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.just("function")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def values(record: Record) -> st.SearchStrategy:
    """Objects that have some of a record's fields, and now and then another."""
    field = st.sampled_from(sorted(record.fields))
    inner = [f.kind for f in record.fields.values() if isinstance(f.kind, Record)]
    likely = st.one_of(JSON, *(values(kind) for kind in inner)) if inner else JSON
    return st.dictionaries(st.one_of(field, field, field, st.text(max_size=3)), likely, max_size=4)


def reads(record: Record, value: object) -> bool:
    try:
        record.read(value, "")
    except BadRequest as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


def whole(value: object) -> bool:
    """JSON Schema calls 2.0 an integer; the reader does not."""
    match value:
        case float():
            return not value.is_integer()
        case list():
            return all(map(whole, value))
        case dict():
            return all(map(whole, value.values()))
    return True


@pytest.mark.parametrize("name", BODIES._fields)
@given(data=st.data())
def test_the_reader_and_the_schema_agree(name, data):
    record = getattr(BODIES, name)
    value = data.draw(values(record).filter(whole))
    value = {
        **{k: data.draw(JSON.filter(whole)) for k, f in record.fields.items() if f.needed},
        **value,
    }
    value = {k: v for k, v in value.items() if k not in record.unsupported}
    if "prompt" in value and data.draw(st.booleans()):
        value["prompt"] = "text"
    if "logit_bias" in value:  # ids are looked at later
        del value["logit_bias"]
    assert reads(record, value) == jsonschema_rs.is_valid(record.schema, value)


def refusal(kind, value) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        kind.read(value, "f")
    return caught.value


@pytest.mark.parametrize(
    "kind, value, message, code",
    [
        (Integer(0, 5), 6, "f is 6; use a whole number from 0 to 5", "invalid_value"),
        (Integer(0, 5), True, "f is true; use a whole number from 0 to 5", "invalid_type"),
        (Integer(0, 5), 10**30, "f is a number of 31 digits; use a whole number from 0 to 5", "invalid_value"),
        (Integer(0, 5), 2.0, "f is 2.0; use a whole number from 0 to 5", "invalid_type"),
        (Number(0, 1, above=True), 0, "f is 0; use a number above 0 to 1", "invalid_value"),
        (Number(0, 1), "x", "f is 'x'; use a number from 0 to 1", "invalid_type"),
        (Flag(), 1, "f is 1; use true or false", "invalid_type"),
        (Text(3), "four", "f is 'four'; use a text of 0 to 3 characters", "invalid_value"),
        (Choice(("auto", "none")), "atuo", "f is 'atuo'; did you mean auto? use auto or none", "invalid_value"),
        (Many(Flag(), 1), [True, True], "f is a list of 2; use a list of 0 to 1, each true or false", "invalid_value"),
        (Many(Flag(), 2), [True, 3], "f[1] is 3; use true or false", "invalid_type"),
        (Either((Flag(), Text(2))), {}, "f is an empty object; use true or false, or a text of 0 to 2 characters", "invalid_type"),
        (Either((Flag(), Text(2))), "abc", "f is 'abc'; use a text of 0 to 2 characters", "invalid_value"),
        (Table("", Number(-1, 1), 2), {"a": 3}, "f.a is 3; use a number from -1 to 1", "invalid_value"),
        (Record({"a": Field(Flag(), "")}, {"b": "use a"}), {"b": 1}, "f.b is not supported: use a", "unsupported_parameter"),
        (Record({"alpha": Field(Flag(), "")}, {}), {"aplha": 1}, "unknown field f.aplha; did you mean alpha?", "unknown_parameter"),
        (Record({"a": Field(Flag(), "", needed=True)}, {}), {"a": None}, "f.a is missing; give true or false", "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_that_says_what_to_use(kind, value, message, code):
    error = refusal(kind, value)
    assert (str(error), error.code, error.status) == (message, code, 400)


def test_null_is_as_if_a_field_was_not_there():
    record = Record({"a": Field(Flag(), "", default=False)}, {"b": "no"})
    assert record.read({"a": None, "b": None}, "") == {"a": False} == record.read({}, "")


def test_every_field_has_a_help_and_every_unsupported_one_a_reason():
    for record in BODIES:
        assert all(field.help.endswith(".") for field in record.fields.values())
        assert (
            all(record.unsupported.values())
            and not record.fields.keys() & record.unsupported.keys()
        )
