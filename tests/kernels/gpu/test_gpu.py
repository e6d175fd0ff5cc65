"""Where the Triton kernels run, what is said where they do not, and which tiles they take."""

import json

import pytest
import torch

from headway.kernels import gpu as module
from headway.kernels.gpu import Gpu, _gpu
from headway.kernels.gpu import tune as tuning
from headway.kernels.gpu.tune import Tiles, tiles, tune


def fresh(monkeypatch, wish: str) -> Gpu:
    monkeypatch.setenv("HEADWAY_TRITON", wish)
    return _gpu.__wrapped__()


def test_switched_off(monkeypatch):
    found = fresh(monkeypatch, "0")
    assert "HEADWAY_TRITON=0" in found.why
    assert not found.takes(torch.zeros(1))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'headway[gpu]'" in fresh(monkeypatch, "1").why


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = fresh(monkeypatch, "1")
    assert found.why == "there is no CUDA device" and not found.takes(torch.zeros(1))


def test_on_a_device_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = fresh(monkeypatch, "1")
    assert "7.5" in found.why and not found.device


def test_the_interpreter_takes_what_a_device_would():
    found = Gpu("cpu", "")
    assert found.takes(torch.zeros(1), None, torch.zeros(1, dtype=torch.bfloat16))
    assert not found.takes(torch.zeros(1, dtype=torch.float64))
    assert not found.takes(torch.zeros(1, device="meta"))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    tuning._measured.cache_clear()
    yield tmp_path
    tuning._measured.cache_clear()


def test_tiles_are_measured_once_and_kept(cache, monkeypatch):
    """The fastest that fits wins, is on disk under the GPU's name, and is what later calls get."""
    cost = {Tiles(32, 32, 4, 2): 3.0, Tiles(64, 64, 4, 3): 1.0, Tiles(64, 32, 4, 3): 2.0}
    ran = []

    class OutOfResources(Exception):
        pass

    def launch(shape):
        found = tiles("experts", shape, default)
        if found.rows == 128:
            raise OutOfResources
        ran.append(found)

    def time(call, repeats):
        call()
        return [cost[ran[-1]]] * repeats

    monkeypatch.setattr(tuning, "_time", time)
    default = Tiles(16, 16, 4, 2)
    assert tiles("experts", (64, "swiglu"), default) == default
    tall = Tiles(128, 128, 8, 3)
    best = tune("experts", (64, "swiglu"), [tall, *cost], lambda: launch((64, "swiglu")))
    assert best == Tiles(64, 64, 4, 3) and set(ran) == set(cost)
    tuning._measured.cache_clear()
    assert tiles("experts", (64, "swiglu"), default) == best
    assert tiles("experts", (128, "swiglu"), default) == default
    with pytest.raises(RuntimeError, match="no tiles of experts fit"):
        tune("experts", (512,), [tall], lambda: launch((512,)))
    assert tiles("experts", (512,), default) == default
    with pytest.raises(ZeroDivisionError):  # a defect is no reason to try other tiles
        tune("experts", (64, "swiglu"), [Tiles(32, 32, 4, 2)], lambda: 1 / 0)
    assert tiles("experts", (64, "swiglu"), default) == best
    (file,) = (cache / "tiles").iterdir()
    assert set(json.loads(file.read_text())) == {"experts 64 swiglu"}
