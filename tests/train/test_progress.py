"""The progress of a run, to JSON and back."""

import json

import torch

from headway.train.interval import SpikeDetector
from headway.train.progress import Progress


def restored(values):
    progress = Progress(SpikeDetector(3.0))
    progress.restore(values)
    return progress


def test_the_load_comes_back_exactly_and_may_be_missing():
    progress = Progress(SpikeDetector(3.0), step=7)
    assert restored(progress.to_dict()).load is None
    progress.load = [torch.tensor([[3.0, 16777216.0], [0.0, 1.0]]), torch.ones(1, 4)]
    values = json.loads(json.dumps(progress.to_dict()))
    again = restored(values)
    assert again.step == 7 and again.load is not None
    assert all(torch.equal(a, b) for a, b in zip(again.load, progress.load, strict=True))
    assert again.load[0].dtype == torch.float32
    del values["load"]  # of a version before there was one
    assert restored(values).load is None
