import pytest

from tests.train.tiny_run import tiny, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run: (root, result)."""
    root = tmp_path_factory.mktemp("whole")
    return root, train(tiny(root))
