"""One pool of ranks for all parity tests."""

from pathlib import Path

import pytest

from tests.parity.ranks import Pool


@pytest.fixture(scope="session")
def ranks():
    pool = Pool()
    yield pool
    pool.close()


def pytest_collection_modifyitems(items):
    """All in one of xdist's processes: a second pool would double the memory."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ranks"))
