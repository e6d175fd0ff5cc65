"""Who may ask, and how much may be sent: the guard around an application, without a network."""

import asyncio
import json

import pytest

from headway.server.guard import Guard, hosts_of


async def echo(scope, receive, send):
    """Answer with the body."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"")})


def ask(headers=(), chunks=(b"",), path="/v1/models", method="POST", pause=0.0, app=echo, **more):
    """Status, headers and body of the reply to one request."""
    options = {"hosts": (), "keys": (), "max_body": 10, "body_seconds": 0.2, **more}
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    if messages:
        messages[-1]["more_body"] = False
    sent = []

    async def receive():
        await asyncio.sleep(pause)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    asyncio.run(Guard(app, **options)(scope, receive, send))
    if not sent:
        return None
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def code(reply):
    status, _, body = reply
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return status, error["code"]


def test_a_body_arrives_whole_and_every_reply_has_an_id():
    status, headers, body = ask(chunks=(b"abc", b"de"))
    assert (status, body) == (200, b"abcde")
    assert headers[b"x-request-id"] != ask()[1][b"x-request-id"]


def test_head_is_answered_as_get_is():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["method"])
        await echo(scope, receive, send)

    for method in ("GET", "HEAD"):
        assert ask(method=method, app=app)[0] == 200
    assert seen == ["GET", "GET"]


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_on_loopback_only_its_own_names_are_answered(host, status):
    reply = ask([(b"host", host.encode())], hosts=hosts_of("127.0.0.1"))
    assert reply[0] == status and (status == 200 or code(reply) == (403, "host_not_allowed"))


def test_elsewhere_every_name_is():
    assert hosts_of("0.0.0.0") == hosts_of("10.0.0.1") == hosts_of("example.org") == ()
    assert hosts_of("::1")[0] == "[::1]"
    assert ask([(b"host", b"any")], hosts=())[0] == 200


@pytest.mark.parametrize(
    "header, status",
    [
        (b"Bearer k1", 200),
        (b"bearer  k2 ", 200),
        (b"Bearer k", 401),
        (b"Bearer k11", 401),
        (b"Basic k1", 401),
        (b"k1", 401),
        (b"Bearer \xff", 401),
        (None, 401),
    ],
)
def test_one_of_the_keys_is_needed(header, status):
    headers = [] if header is None else [(b"authorization", header)]
    reply = ask(headers, keys=("k1", "k2"))
    assert reply[0] == status and (status == 200 or code(reply) == (401, "invalid_api_key"))
    assert ask(headers, keys=("k1", "k2"), path="/health")[0] == 200


def test_a_body_that_is_too_large_is_refused_as_soon_as_that_is_known():
    assert ask(chunks=(b"x" * 10,))[0] == 200
    assert code(ask(chunks=(b"x" * 11,))) == (413, "body_too_large")
    assert code(ask(chunks=(b"x" * 6, b"x" * 6))) == (413, "body_too_large")
    assert code(ask([(b"content-length", b"11")], chunks=(), pause=9)) == (413, "body_too_large")


def test_a_body_that_comes_too_slowly_is_refused():
    assert code(ask(chunks=(b"a", b"b", b"c"), pause=0.09)) == (408, "body_timeout")
    assert ask(chunks=(b"a",), pause=0.09)[0] == 200


def test_a_client_that_leaves_while_sending_is_forgotten():
    assert ask(chunks=()) is None
