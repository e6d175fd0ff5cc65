"""Where a run stands, to JSON and back."""

import json

import torch

from headway.train.interval import SpikeDetector
from headway.train.progress import Progress


def test_the_load_comes_back_exactly_and_may_be_missing():
    progress = Progress(SpikeDetector(3.0), step=7)
    assert Progress.from_dict(progress.to_dict(), 3.0).load is None
    progress.load = [torch.tensor([[3.0, 16777216.0], [0.0, 1.0]]), torch.ones(1, 4)]
    kept = json.loads(json.dumps(progress.to_dict()))
    back = Progress.from_dict(kept, 3.0)
    assert back.step == 7 and back.load is not None
    assert all(torch.equal(a, b) for a, b in zip(back.load, progress.load, strict=True))
    assert back.load[0].dtype == torch.float32
    del kept["load"]  # of a version before there was one
    assert Progress.from_dict(kept, 3.0).load is None
