"""Pages: equal prefixes are shared, tails go first, nothing is lost or held twice."""

from hypothesis import given
from hypothesis import strategies as st

from headway.model.paged import PAGE
from headway.serve.blocks import BlockPool, page_keys

TEXT = list(range(5 * PAGE))


def fill(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    keys = page_keys(tokens, salt)
    pages = pool.match(keys)
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
    assert pool.match(page_keys(TEXT, "another tenant")) == []
    # a page is known with all before it: the same tokens at another place are not
    assert pool.match(page_keys(TEXT[PAGE:])) == []


def test_a_part_of_a_page_has_no_key():
    assert len(page_keys(TEXT[:-1])) == 4
    assert page_keys(TEXT[: PAGE - 1]) == []
    assert page_keys(TEXT)[:3] == page_keys(TEXT[: 3 * PAGE])


def test_the_tail_of_a_text_goes_first():
    pool = BlockPool(5)
    pool.release(fill(pool, TEXT))
    assert pool.n_free == 5
    pool.allocate(), pool.allocate()  # forget two pages
    assert len(pool.match(page_keys(TEXT))) == 3


def test_the_least_recently_released_goes_first():
    pool = BlockPool(4)
    old, new = [1] * 2 * PAGE, [2] * 2 * PAGE
    a, b = fill(pool, old), fill(pool, new)
    pool.release(a)
    pool.release(b)
    pool.release(pool.match(page_keys(old)))  # used again
    pool.allocate(), pool.allocate()
    assert len(pool.match(page_keys(old))) == 2 and pool.match(page_keys(new)) == []


def test_a_page_that_is_held_is_not_given_away():
    pool = BlockPool(3)
    pages = fill(pool, TEXT[: 2 * PAGE])
    assert pool.match(page_keys(TEXT[: 2 * PAGE])) == pages
    pool.release(pages)
    assert pool.n_free == 1  # the second holder is still there
    pool.release(pages)
    assert pool.n_free == 3


def test_a_pool_can_forget():
    pool = BlockPool(4)
    pages = fill(pool, TEXT[: 3 * PAGE])
    pool.forget(pages)
    assert pool.match(page_keys(TEXT)) == [] and pool.n_free == 1
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
