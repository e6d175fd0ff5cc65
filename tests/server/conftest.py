"""A tiny trained run and a server of it; the engines of `tests/serve`."""

import pytest

from tests.serve.conftest import engine, model  # noqa: F401


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a tiny trained run."""
    from tests.server.served import train_tiny

    return train_tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """A server that keeps routes; at the end of the module no block is held, nothing went wrong."""
    from tests.server.served import Server

    server = Server(run, "--return-routes", log=tmp_path_factory.mktemp("server") / "log.txt")
    try:
        yield server
        code, stopped = server.stop()
        assert (code, stopped["event"], stopped["blocks_used"]) == (0, "stopped", 0)
    finally:
        server.kill()
