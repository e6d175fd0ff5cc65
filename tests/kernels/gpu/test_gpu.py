"""Where the Triton kernels run, what is said where they do not, and which tiles they take."""

import json
from importlib.metadata import version

import pytest
import torch

from headway.kernels import gpu as module
from headway.kernels.gpu import GpuKernels, _gpu_kernels
from headway.kernels.gpu import tune as tuning
from headway.kernels.gpu.tune import Tiles, tiles


def fresh(monkeypatch, wish: str) -> GpuKernels:
    monkeypatch.setenv("HEADWAY_TRITON", wish)
    return _gpu_kernels.__wrapped__()


def test_switched_off(monkeypatch):
    found = fresh(monkeypatch, "0")
    assert "HEADWAY_TRITON=0" in found.why
    assert not found.supports(torch.zeros(1))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'headway[gpu]'" in fresh(monkeypatch, "1").why


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = fresh(monkeypatch, "1")
    assert found.why == "there is no CUDA device" and not found.supports(torch.zeros(1))


def test_on_a_device_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = fresh(monkeypatch, "1")
    assert "7.5" in found.why and not found.device


def test_the_interpreter_takes_what_a_device_would():
    found = GpuKernels("cpu", "")
    assert found.supports(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not found.supports(torch.zeros(1, dtype=torch.float64))
    assert not found.supports(torch.zeros(1, device="meta"))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    tuning._measured.cache_clear()
    yield tmp_path
    tuning._measured.cache_clear()


def test_kept_tiles_are_what_later_calls_get(cache):
    """On disk under the GPU's name; a bench puts candidates into what was measured."""
    default, best = Tiles(16, 16, 4, 2), Tiles(64, 32, 8, 3)
    shape = (64, "swiglu")
    assert tiles("experts", shape, default) == default
    tuning.measured()[tuning.key("experts", shape)] = best
    assert tiles("experts", shape, default) == best
    tuning._measured.cache_clear()
    assert tiles("experts", shape, default) == default
    tuning.keep(tuning.key("experts", shape), best)
    tuning.keep(tuning.key("route", (64, 8, 2)), default)
    assert tiles("experts", shape, default) == best
    assert tiles("experts", (128, "swiglu"), default) == default
    (file,) = (cache / "tiles").iterdir()
    assert set(json.loads(file.read_text())["tiles"]) == {"experts 64 swiglu", "route 64 8 2"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"triton": "3.0.0", "tiles": {}}', "measured with Triton 3.0.0"),
        ('{"experts 64": {"rows": 16}}', "not a file of tiles"),
        ('{"triton": VERSION, "tiles": {"experts 64": {"rows": 16, "lanes": 3}}}', "not a file"),
        ("[]", "not a file of tiles"),
        ("{", "not a file of tiles"),
    ],
)
def test_tiles_that_do_not_fit_this_triton_are_ignored_with_a_line(cache, capsys, text, why):
    """Another compiler may need more registers or shared memory than there are."""
    path = tuning._path(tuning._device(0) if torch.cuda.is_available() else "cpu")
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("VERSION", json.dumps(version("triton"))))
    default = Tiles(16, 16, 4, 2)
    for _ in range(2):
        assert tiles("experts", (64,), default) == default
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and why in told[0] and "default tiles are used" in told[0]
