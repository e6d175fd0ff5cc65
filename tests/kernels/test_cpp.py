"""Building and loading the C++ kernels: what is used, and what is said where they cannot be built."""

import stat
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import headway
from headway.kernels import cpp as module
from headway.kernels.cpp import CppKernels, _cpp_kernels, cpp_kernels, undispatched
from headway.kernels.norm import norm_rope
from headway.kernels.rope import rope, rope_tables


def fresh(monkeypatch, **environment) -> CppKernels:
    for name, value in {"HEADWAY_NATIVE": 1, **environment}.items():
        monkeypatch.setenv(name, str(value))
    return _cpp_kernels.__wrapped__()


def test_switched_off(monkeypatch):
    found = fresh(monkeypatch, HEADWAY_NATIVE=0)
    assert found.library is None and "HEADWAY_NATIVE=0" in found.why
    assert not found.supports(torch.zeros(1))


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    found = fresh(monkeypatch)
    assert found.library is None and "no C++ compiler" in found.why


def test_a_compiler_that_fails_is_named_with_its_first_words(monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such target >&2\nexit 1\n'
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    found = fresh(monkeypatch, CXX=broken, HEADWAY_CACHE=tmp_path)
    assert found.library is None and "broken-c++ failed: no such target" in found.why
    assert list((tmp_path / "native").iterdir()) == []


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    found = fresh(monkeypatch, CXX=tmp_path / "nothing")
    assert found.library is None and "nothing" in found.why


needs = pytest.mark.skipif(cpp_kernels().library is None, reason=cpp_kernels().why)


@needs
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    found = fresh(monkeypatch, HEADWAY_CACHE=tmp_path / "file")
    assert found.library is None and str(tmp_path / "file") in found.why


@needs
def test_two_processes_build_at_once_and_both_load(tmp_path):
    program = (
        "from headway.kernels.cpp import cpp_kernels; print(cpp_kernels().library is not None)"
    )
    command = [sys.executable, "-c", program]
    environment = {**module.os.environ, "HEADWAY_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in both] == ["True", "True"]
    assert len(list((tmp_path / "native").glob("*.so"))) == 1


@needs
def test_takes_what_the_kernels_know():
    found = cpp_kernels()
    assert found.supports(torch.zeros(1))
    assert found.supports(torch.zeros(1, dtype=torch.bfloat16)) == found.bfloat16
    assert not found.supports(torch.zeros(1, dtype=torch.float64))
    assert not found.supports(torch.zeros(1), torch.zeros(1, device="meta"))


def test_the_dispatcher_is_skipped_only_where_nothing_looks_at_operators():
    x = torch.randn(3, 8)
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        seen.append(undispatched(x))
        return x + 1

    assert not undispatched(x)  # autograd may look
    with torch.no_grad():
        assert undispatched(x)
        assert not undispatched(torch.nn.Parameter(x))
        with FakeTensorMode() as mode:
            assert not undispatched(x)
        assert not undispatched(mode.from_tensor(x))
        with FlopCounterMode(display=False):
            assert not undispatched(x)
        compiled(x)
    assert seen in ([], [False])  # a compiler may drop the side effect, but never sees True


@needs
def test_without_gradients_the_same_bits_with_and_without_the_dispatcher():
    """Each operator of one token, called itself and through a mode that looks at operators."""
    torch.manual_seed(0)
    layer = headway.MultiHeadLatentMoE(32, 2, 4, 2, 16, d_shared=24)
    x, weight = torch.randn(1, 1, 2, 16), torch.randn(16)
    tables = rope_tables(torch.arange(3, 4), 16, 1e4, torch.float32)

    def results():
        y, stats = layer(torch.ones(1, 32))
        return y, stats.prob_HE, norm_rope(x, weight, 1e-6, *tables), rope(x, *tables)

    with torch.no_grad():
        plain = results()
        with FlopCounterMode(display=False):
            dispatched = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, dispatched, strict=True))
