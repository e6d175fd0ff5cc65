"""One pool of ranks for all parity tests."""

import pytest

from tests.parity.ranks import Pool


@pytest.fixture(scope="session")
def ranks():
    pool = Pool()
    yield pool
    pool.close()
