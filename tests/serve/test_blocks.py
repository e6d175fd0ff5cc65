"""Pages: equal prefixes are shared, tails go first, nothing is lost or held twice."""

from hypothesis import given
from hypothesis import strategies as st

from headway.config import EngineConfig
from headway.model.paged import PAGE
from headway.serve.blocks import BlockPool, default_pages, n_reusable, page_keys, pool_sizes

TEXT = list(range(5 * PAGE))


def known(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """The pages of the longest known prefix, held."""
    return pool.match(keys[: n_reusable([pool], keys)]).pages


def fill(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    keys = page_keys(tokens, salt)
    pages = known(pool, keys)
    for key in keys[len(pages) :]:
        pages.append(pool.allocate())
        pool.seal(pages[-1], key)
    return pages


def test_equal_prefixes_share_pages():
    pool = BlockPool(12)
    first = fill(pool, TEXT)
    other = [*TEXT[: 2 * PAGE], *[7] * PAGE]
    assert fill(pool, other)[:2] == first[:2]
    assert pool.n_free == 12 - 5 - 1
    assert known(pool, page_keys(TEXT, "another tenant")) == []
    # a page is known with all before it: the same tokens at another place are not
    assert known(pool, page_keys(TEXT[PAGE:])) == []


def test_a_part_of_a_page_has_no_key():
    assert len(page_keys(TEXT[:-1])) == 4
    assert page_keys(TEXT[: PAGE - 1]) == []
    assert page_keys(TEXT)[:3] == page_keys(TEXT[: 3 * PAGE])


def test_the_tail_of_a_text_goes_first():
    pool = BlockPool(5)
    pool.release(fill(pool, TEXT))
    assert pool.n_free == 5
    pool.allocate(), pool.allocate()  # forget two pages
    assert len(known(pool, page_keys(TEXT))) == 3


def test_the_least_recently_released_goes_first():
    pool = BlockPool(4)
    old, new = [1] * 2 * PAGE, [2] * 2 * PAGE
    a, b = fill(pool, old), fill(pool, new)
    pool.release(a)
    pool.release(b)
    pool.release(known(pool, page_keys(old)))  # used again
    pool.allocate(), pool.allocate()
    assert len(known(pool, page_keys(old))) == 2 and known(pool, page_keys(new)) == []


def test_a_page_that_is_held_is_not_given_away():
    pool = BlockPool(3)
    pages = fill(pool, TEXT[: 2 * PAGE])
    assert known(pool, page_keys(TEXT[: 2 * PAGE])) == pages
    pool.release(pages)
    assert pool.n_free == 1  # the second holder is still there
    pool.release(pages)
    assert pool.n_free == 3


def test_a_pool_can_forget():
    pool = BlockPool(4)
    pages = fill(pool, TEXT[: 3 * PAGE])
    pool.forget(pages)
    assert known(pool, page_keys(TEXT)) == [] and pool.n_free == 1
    pool.release(pages)
    assert len(fill(pool, TEXT[: 4 * PAGE])) == 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=30))
def test_every_page_is_free_or_held(steps):
    """Texts of four families come and go; at the end all pages are free, each once."""
    pool, held = BlockPool(20), []
    for family, n in steps:
        tokens = [family] * (n * PAGE)
        missing = n - sum(key in pool._page_of for key in page_keys(tokens))
        while held and pool.n_free < missing + n:
            pool.release(held.pop(0))
        if pool.n_free >= n:
            held.append(fill(pool, tokens))
        in_use = {page for pages in held for page in pages}
        assert pool.n_free == pool.n_pages - len(in_use)
    for pages in held:
        pool.release(pages)
    assert sorted(pool.allocate() for _ in range(20)) == list(range(20))


def test_behind_a_window_there_are_pages_for_what_runs_and_as_many_again():
    config = EngineConfig(max_requests=3, max_batch_tokens=64)
    assert pool_sizes([0, 33], 200, config) == {0: 200, 33: 2 * (3 * 4 + 4)}
    assert pool_sizes([0, 33], 20, config) == {0: 20, 33: 20}


def test_the_default_cache_fits_a_gibibyte():
    MiB, few = 1 << 20, EngineConfig(max_requests=4, max_batch_tokens=64)
    assert default_pages({0: 1000, 33: 1000}, 100, few) == 4 * 100 // PAGE  # all of all requests
    assert default_pages({0: 8 * MiB}, 4000, few) == 250  # one of them, whatever it takes
    assert default_pages({0: MiB}, 4000, EngineConfig()) == 1024
    # what the window leaves goes to the layers that see all: 1,024 MiB − 2·(4·4 + 4) pages
    assert default_pages({0: MiB, 33: MiB}, 10_000, few) == 1024 - 40
