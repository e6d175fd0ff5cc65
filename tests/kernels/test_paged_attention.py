"""Paged attention: float64 by the definition, the same bits however sequences are cut and mixed."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import packed
from headway.kernels.norm import HeadRotation
from headway.kernels.paged_attention import (
    PAGE,
    Pages,
    Pass,
    paged_attention,
    paged_attention_reference,
)
from headway.kernels.rope import rope_tables
from tests.compare import assert_close
from tests.kernels.cpp_paths import BOUND, NATIVE_DTYPES, needs_native, switch_off, threads

CPU = torch.device("cpu")


class Sequences:
    """Sequences with scattered pages, and a pool whose pages were used before."""

    def __init__(self, lengths, N, M, d, dtype, seed=0, d_value=None, **options):
        g = torch.Generator().manual_seed(seed)
        self.qkv = [
            [torch.randn(n, h, d, generator=g).to(dtype) for h in (N, M, M)] for n in lengths
        ]
        if d_value is not None:
            for qkv in self.qkv:
                qkv[2] = qkv[1][..., :d_value]
        self.width = -(-max(lengths) // PAGE)
        n_pages = len(lengths) * self.width
        self.table = torch.randperm(n_pages, generator=g).int().view(len(lengths), -1)
        self.pages = Pages(n_pages, M, d, dtype, CPU, d_value)
        stale = 0x7FC07FC0 if self.pages.batch_invariant else 3  # NaN, in both dtypes
        self.pages.data.fill_(stale)
        self.options = options

    def run(self, *chunks):
        """One pass of (sequence, start, end); a list of results."""
        parts = [[t[a:b] for t in self.qkv[r]] for r, a, b in chunks]
        q, k, v = (torch.cat(t) for t in zip(*parts, strict=True))
        sizes = [b - a for _, a, b in chunks]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        rows = [(f, n, a) for f, n, (_, a, _) in zip(firsts, sizes, chunks, strict=True)]
        where = Pass(torch.tensor(rows), self.table[[r for r, _, _ in chunks]])
        v = None if self.pages.shared else v
        return paged_attention(q, k, v, self.pages, where, **self.options).split(sizes)

    def whole(self):
        return self.run(*((r, 0, len(q)) for r, (q, _, _) in enumerate(self.qkv)))


OPTIONS = [
    {},
    {"window": 5},
    {"window": 20, "scale": 0.3, "sinks_N": torch.linspace(-1, 2, 4)},
    {"window": 16},
]


@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "M, d, d_value", [(4, 16, None), (2, 6, None), (1, 70, None), (1, 151, 130), (2, 12, 8)]
)
def test_the_definition(native_path, dtype, options, M, d, d_value, monkeypatch):
    if not native_path:
        switch_off(monkeypatch, packed)
    s = Sequences([37, 1, 64, 16], 4, M, d, dtype, d_value=d_value, **options)
    assert s.pages.batch_invariant == (native_path and packed.cpp_kernels().library is not None)
    for out, qkv in zip(s.whole(), s.qkv, strict=True):
        want = paged_attention_reference(*(t.double() for t in qkv), **options)
        assert_close(out, want, BOUND[dtype] * (3 if dtype == torch.bfloat16 else 1))


@needs_native
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(NATIVE_DTYPES),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([2, 16, 24, 80]),
    st.booleans(),
    st.sampled_from(OPTIONS),
    st.integers(0, 10_000),
)
def test_no_cut_and_no_company_changes_a_bit(dtype, lengths, M, d, shared, options, seed):
    draw, d_value = random.Random(seed), d - 1 if shared else None
    want = Sequences(lengths, 4, M, d, dtype, seed, d_value, **options).whole()
    s = Sequences(lengths, 4, M, d, dtype, seed, d_value, **options)
    done, outputs = [0] * len(lengths), [[] for _ in lengths]
    while any(a < n for a, n in zip(done, lengths, strict=True)):
        chunks = []
        for r, (a, n) in enumerate(zip(done, lengths, strict=True)):
            if size := draw.randint(0, min(n - a, 40)):
                chunks.append((r, a, a + size))
        if not chunks:
            continue
        with threads(draw.choice([1, 2])):
            parts = s.run(*chunks)
        for (r, _, b), part in zip(chunks, parts, strict=True):
            done[r] = b
            outputs[r].append(part)
    for parts, whole in zip(outputs, want, strict=True):
        assert torch.equal(torch.cat(parts), whole)
        assert whole.isfinite().all()


def test_many_queries_share_a_head():
    """More query heads than a block has rows."""
    s = Sequences([20, 3], 130, 1, 6, torch.float32, sinks_N=torch.linspace(-1, 2, 130))
    for out, qkv in zip(s.whole(), s.qkv, strict=True):
        want = paged_attention_reference(*(t.double() for t in qkv), **s.options)
        assert_close(out, want, BOUND[torch.float32])


def test_shared_values_take_no_memory():
    for native_width in (12, 18):  # even: bfloat16 lies in pairs
        for dtype in NATIVE_DTYPES:
            pages = Pages(5, 1, native_width, dtype, CPU, d_value=8)
            assert pages.bytes == 5 * PAGE * native_width * dtype.itemsize


@needs_native
def test_views_of_one_product_are_read_where_they_lie():
    qkv = torch.randn(20, 3 * 4 * 8)
    parts = [t.unflatten(-1, (4, 8)) for t in qkv.split(32, -1)]
    where = Pass(torch.tensor([[0, 20, 0]]), torch.tensor([[1, 0]], dtype=torch.int32))
    outputs = [
        paged_attention(*(f(t) for t in parts), Pages(2, 4, 8, torch.float32, CPU), where)
        for f in (
            lambda t: t,
            torch.clone,
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        )
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_inside_is_rotation_before(native_path, dtype, normed, monkeypatch):
    if not native_path:
        switch_off(monkeypatch, packed)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(40, heads, 22, generator=g).to(dtype) for heads in (4, 2, 2))
    tables = rope_tables(torch.arange(3, 43), 22, 100.0, dtype)
    weights = [torch.rand(22, generator=g) if normed else None for _ in range(2)]
    rotation = HeadRotation(tables, *weights, 1e-6)
    where = Pass(torch.tensor([[0, 40, 0]]), torch.tensor([[1, 0, 2]], dtype=torch.int32))

    def run(q, k, **options):
        return paged_attention(q, k, v, Pages(3, 2, 22, dtype, CPU), where, **options)

    with torch.no_grad():
        assert torch.equal(run(q, k, rotation=rotation), run(*rotation(q, k)))
