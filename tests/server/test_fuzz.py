"""2,000 bodies that hypothesis makes up: no 5xx, no hang, no traceback."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.server.bodies import Bounds, bodies
from headway.server.fields import Either, Flag, Integer, Kind, Many, Number, Record
from tests.server.served import CONTEXT
from tests.server.test_fields import JSON

BODIES = bodies(Bounds(vocab_size=257, max_len=CONTEXT, max_tokens=CONTEXT, max_n=64))
SMALL = {"max_tokens": 3, "max_completion_tokens": 3, "n": 2, "best_of": 3}
"""Largest values that are asked for, so that the fuzz does not wait for text."""


def values(kind: Kind, name: str = "") -> st.SearchStrategy:
    """Values that a field takes, or nearly."""
    match kind:
        case Integer(low, high):
            return st.integers(max(low, -3), min(high, SMALL.get(name, 300)))
        case Number(low, high):
            return st.floats(low, high, allow_nan=False)
        case Flag():
            return st.booleans()
        case Many(of):
            return st.lists(values(of), max_size=3)
        case Either(kinds):
            return st.one_of([values(k) for k in kinds])
        case Record(fields):
            needed = {k: values(f.kind, k) for k, f in fields.items() if f.needed}
            more = {k: values(f.kind, k) for k, f in fields.items() if not f.needed}
            return st.fixed_dictionaries(needed, optional=more) if len(more) < 8 else few(fields)
    return st.one_of(
        st.text(max_size=6),
        st.sampled_from(["user", "function", "text", "json_object", "auto"]),
        JSON,
    )


def few(fields) -> st.SearchStrategy:
    """An object with the needed fields and up to six of the others."""
    needed = [k for k, f in fields.items() if f.needed]
    chosen = st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries(
            {k: values(fields[k].kind, k) for k in {*names, *needed}}
        )
    )


BODY = st.one_of(
    *[values(record).map(lambda b, p=path: (p, b)) for path, record in zip(
        ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"), BODIES, strict=True
    )]
)  # fmt: skip


def test_2000_bodies(server):
    statuses: dict[int, int] = {}

    @settings(
        max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        BODY,
        st.one_of(
            st.none(),
            st.none(),
            st.none(),
            st.tuples(st.sampled_from(sorted(BODIES.chat.fields)), JSON),
        ),
    )
    def ask(body, change):
        path, body = body
        if change is not None:
            body = {**body, change[0]: change[1]}
        if (
            path == "/v1/chat/completions"
            and not {"max_tokens", "max_completion_tokens"} & body.keys()
        ):
            body["max_tokens"] = 2
        reply = server.http.post(
            path, content=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
        assert reply.status_code in (200, 400, 404), reply.text
        if reply.status_code != 200:
            assert "\n" not in reply.json()["error"]["message"]

    ask()
    assert statuses[200] > 100 and statuses[400] > 100, statuses
    server.wait_for("cache_blocks_used", 0)
    assert "Traceback" not in server.log.read_text()
