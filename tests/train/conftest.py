import signal

import pytest

from tests.train.tiny_run import tiny, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run: (root, result)."""
    root = tmp_path_factory.mktemp("whole")
    return root, train(tiny(root))


@pytest.fixture(autouse=True)
def ctrl_c():
    """SIGINT as at a terminal: a shell's background job, as CI may be one, inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
