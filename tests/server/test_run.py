"""A server from start to end: signals, limits, clients that leave, sockets that misbehave."""

import json
import signal
import socket
import threading
import time

import httpx
import pytest

from tests.command import mistake
from tests.server.served import Server, until

LONG = {"prompt": "def", "max_tokens": 250, "ignore_eos": True}


@pytest.fixture
def start(run, tmp_path):
    """Starts servers that are stopped when the test ends: `start(flags…)`."""
    servers = []

    def start(*flags, **environment):
        servers.append(Server(run, *flags, log=tmp_path / f"{len(servers)}.txt", **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def small(run, tmp_path_factory):
    """Two replies at once, two may wait; one token per step, so that replies take a while."""
    log = tmp_path_factory.mktemp("small") / "log.txt"
    flags = "--max-requests 2 --max-waiting 2 --max-batch-tokens 3 --body-timeout 1".split()
    server = Server(run, *flags, log=log)
    try:
        yield server
        assert server.stop()[1]["blocks_used"] == 0
    finally:
        server.kill()


def in_threads(n, function):
    threads = [threading.Thread(target=function, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def address(server):
    url = httpx.URL(server.url)
    return url.host, url.port


def test_past_its_limits_a_server_says_try_again(small):
    statuses, headers = [], []

    def ask(_):
        reply = httpx.post(f"{small.url}/v1/completions", json=LONG, timeout=60)
        statuses.append(reply.status_code)
        headers.append(reply.headers.get("retry-after"))

    in_threads(8, ask)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    assert [h for s, h in zip(statuses, headers, strict=True) if s == 429] == [
        "1"
    ] * statuses.count(429)
    assert small.complete(**LONG)["usage"]["completion_tokens"] == 250


def test_what_can_never_be_taken_is_no_429(small):
    reply = small.post("/v1/completions", {**LONG, "n": 5})
    assert (
        reply.status_code == 400 and "5 replies at once; this server takes at most 4" in reply.text
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_and_leaves_its_cache(small, stream):
    body = json.dumps(
        {**LONG, "prompt": f"{stream} " * 8, "max_tokens": 200, "stream": stream}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    aborted = small.metric("aborted_total")
    with socket.create_connection(address(small)) as client:
        client.sendall(head.encode() + body)
        until(lambda: small.metric("cache_blocks_used") > 0)
        written = small.metric("generation_tokens_total")
        until(lambda: small.metric("generation_tokens_total") >= written + 2)
    small.wait_for("cache_blocks_used", 0, 2)
    assert small.metric("aborted_total") == aborted + 1
    again = small.complete(prompt=f"{stream} " * 8, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32


def test_half_closed_sockets_are_clients_that_left(small):
    body = json.dumps(LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(address(small)) as client:
        client.sendall(head.encode() + body)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(10)
        while client.recv(4096):
            pass
    small.wait_for("cache_blocks_used", 0, 2)


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ",
     b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"],
    ids=["nothing", "half a line", "half a header", "half a body"],
)  # fmt: skip
def test_a_request_that_does_not_arrive_is_given_up(small, sent):
    begin = time.monotonic()
    with socket.create_connection(address(small)) as client:
        client.sendall(sent)
        client.settimeout(10)
        reply = b""
        while part := client.recv(4096):
            reply += part
    assert 0.8 < time.monotonic() - begin < 6
    assert (b"408" in reply.split(b"\r\n")[0]) == sent.endswith(b"{")


def test_a_client_that_does_not_read_is_one_that_left(start):
    server = start("--body-timeout", 1, "--max-requests", 40, "--max-waiting", 0)
    body = json.dumps({**LONG, "n": 40, "stream": True, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(server))
        client.sendall(head.encode() + body)
        until(lambda: server.metric("cache_blocks_used") > 0)
        ask = {"prompt": "x", "max_tokens": 1}
        assert server.post("/v1/completions", ask).status_code == 429
        until(lambda: server.post("/v1/completions", ask).status_code == 200, 30)
        assert server.metric("cache_blocks_used") == 0
    assert server.stop()[0] == 0


def test_bytes_that_are_no_http(small):
    with socket.create_connection(address(small)) as client:
        client.sendall(b"\x16\x03\x01\x00\xff nothing of use\r\n\r\n")
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 400")
    assert small.http.get("/health").status_code == 200


def test_idle_uses_no_core(small):
    def used():
        with open(f"/proc/{small.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100

    small.complete(prompt="x", max_tokens=1)
    before = used()
    time.sleep(2)
    assert used() - before <= 0.04


def test_many_connections_do_not_keep_others_out(start):
    server = start("--max-connections", 50)
    clients = [socket.create_connection(address(server)) for _ in range(300)]

    def is_open(client):
        try:
            return client.recv(1, socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    until(lambda: sum(map(is_open, clients)) <= 50)
    assert sum(map(is_open, clients)) >= 40
    for client in clients:
        client.close()
    time.sleep(0.2)
    assert server.http.get("/health").status_code == 200


def test_sigterm_lets_replies_end(start):
    server, replies = start(), []
    body = {**LONG, "prompt": "x"}
    thread = threading.Thread(
        target=lambda: replies.append(
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        )
    )
    thread.start()
    until(lambda: server.metric("cache_blocks_used") > 0)
    code, stopped = server.stop()
    thread.join()
    assert code == 0 and replies[0].json()["usage"]["completion_tokens"] == 250
    assert stopped == {"event": "stopped", "requests": 1, "generated_tokens": 250, "blocks_used": 0}


def test_past_the_drain_streams_end_with_an_error(start):
    server = start("--drain", 0)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "n": 40, "stream": True}, timeout=60
    ) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        events = [line[6:] for line in lines if line]
    assert json.loads(events[-2])["error"]["code"] == "server_stopping" and events[-1] == "[DONE]"
    code, stopped = server.end()
    assert code == 0 and stopped["blocks_used"] == 0


def test_while_it_drains_new_requests_are_refused_and_a_second_sigint_ends_it(start):
    server = start("--drain", 60)
    other = httpx.Client(base_url=server.url)
    assert other.get("/health").status_code == 200
    many = {**LONG, "prompt": ["def"] * 5, "n": 60, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=many, timeout=60) as reply:
        lines = reply.iter_lines()  # by name: else httpx closes the reply at once
        next(lines)
        server.process.send_signal(signal.SIGINT)
        until(lambda: other.get("/health").status_code == 503)
        assert other.get("/health").headers["retry-after"] == "1"
        refused = other.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_stopping"
        next(lines)  # it still runs
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 130 and time.monotonic() - begin < 2


def test_keys_from_a_file_or_the_environment(start, tmp_path):
    (tmp_path / "keys").write_text("alpha\nbeta\n")
    for server, key in (
        (start("--api-key-file", tmp_path / "keys"), "beta"),
        (start(HEADWAY_API_KEY="gamma"), "gamma"),
    ):
        assert server.http.get("/health").status_code == 200
        assert (
            server.http.get("/v1/models").status_code
            == server.http.get("/metrics").status_code
            == 401
        )
        headers = {"authorization": f"Bearer {key}"}
        assert server.http.get("/v1/models", headers=headers).status_code == 200
        assert key not in server.log.read_text()


def test_mistakes_of_the_command_line(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} on 127.0.0.1 is in use" in mistake("serve", run, "--port", port)
    (tmp_path / "empty").write_text("\n")
    assert "has no key" in mistake("serve", run, "--api-key-file", tmp_path / "empty")
    assert "cannot be read" in mistake("serve", run, "--api-key-file", tmp_path / "none")
    assert "port=65536 is above 65535" in mistake("serve", run, "--port", 65536)
    assert "max_requests=0 is below 1" in mistake("serve", run, "--max-requests", 0)
    assert "drain=-1.0 is below 0" in mistake("serve", run, "--drain", -1)
    assert "did you mean --max-tokens?" in mistake("serve", run, "--max-token", 3)
    assert "neither a run folder" in mistake("serve", tmp_path, "--port", 0)
    assert "--host no.such.host" in mistake("serve", run, "--host", "no.such.host.invalid")
    assert "max_len=9999 is above the context of run" in mistake(
        "serve", run, "--port", 0, "--max-len", 9999
    )
    assert "max_batch_tokens" in mistake("serve", run, "--port", 0, "--max-batch-tokens", 8)
