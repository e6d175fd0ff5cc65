"""bench/gpu_layer.py --tune without a GPU: what is timed is a whole pass with the candidate's tiles,
and the fastest one is kept. The clock counts how many kernels are not cut as the test wants it."""

import pytest
import torch

from bench import gpu_rows
from headway.kernels.gpu import _gpu, experts, scores
from headway.kernels.gpu import tune as tuning
from headway.kernels.gpu.tune import Tiles

CPU = torch.device("cpu")


class Clock:
    """Stands in for the GPU's: knows which tiles every kernel of the last pass was given."""

    def __init__(self) -> None:
        self.wanted: dict[str, Tiles] = {}
        self.passes: list[dict[str, Tiles]] = [{}]

    def tiles(self, kernel, shape, default) -> Tiles:
        self.passes[-1][kernel] = tuning.tiles(kernel, shape, default)
        return self.passes[-1][kernel]

    def time(self, run, repeats) -> list[float]:
        """Of the pass that was run just before, once, to compile it."""
        found = self.passes[-1]
        self.passes.append({})
        return [float(sum(found.get(k) != c for k, c in self.wanted.items()))]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here kernels are compiled")
    monkeypatch.setenv("HEADWAY_TRITON", "interpret")
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    found = Clock()
    monkeypatch.setattr(tuning, "_time", lambda *a: found.time(*a))
    for module in (experts, scores):
        monkeypatch.setattr(module, "tiles", lambda *a: found.tiles(*a))
        monkeypatch.setattr(module, "CANDIDATES", SMALL)
    _gpu.cache_clear()
    tuning._measured.cache_clear()
    yield found
    _gpu.cache_clear()
    tuning._measured.cache_clear()


SMALL = (Tiles(16, 16, 4, 1), Tiles(16, 32, 4, 1))


def test_experts(clock):
    names = [f"experts_{k}" for k in experts.KERNELS]
    clock.wanted = dict(zip(names, (*SMALL, SMALL[0]), strict=True))
    found = gpu_rows.tune_experts(gpu_rows.Shape(6, 1, 32, 2, 1, 32, "gelu"), CPU)
    assert {f"experts_{k}": c for k, c in found.items()} == clock.wanted
    for name in names:
        assert {p[name] for p in clock.passes if name in p} >= {*SMALL}


@pytest.mark.parametrize("chunk", SMALL)
def test_router(clock, chunk):
    """With one chunk for all experts the kernel of the others is not launched, so not tuned."""
    kernels = [k for k in scores.KERNELS if k != "route_columns" or chunk.cols < 20]
    clock.wanted = {k: SMALL[i % 2] for i, k in enumerate(kernels)} | {"route": chunk}
    found = gpu_rows.tune_router(gpu_rows.Shape(4, 1, 16, 20, 1, 0), CPU)
    assert found == clock.wanted
    for kernel in kernels:  # by passes forward and backward
        assert {p[kernel] for p in clock.passes if "route_dw" in p} >= {*SMALL}
    x, w = torch.empty(4, 1, 16), torch.empty(1, 20, 16)
    for kernel, kept in found.items():
        assert scores.fitting(kernel, x.bfloat16(), w) == kept
        assert scores.fitting(kernel, x, w) != kept  # measured in bfloat16


@pytest.mark.parametrize("E", [1, 16, 20, 64, 100, 1000])
def test_candidates_of_the_router_are_launched_as_they_are(E):
    """No wider than the experts, none twice, the default among them."""
    found = scores.candidates(E)
    assert len(set(found)) == len(found) and max(c.cols for c in found) < max(2 * E, 17)
    w = torch.empty(1, E, 16)
    assert {scores.fitting(k, torch.empty(1, 1, 16), w) for k in scores.KERNELS} <= set(found)
