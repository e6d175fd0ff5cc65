"""What the host asks of a GPU in a training step, counted on the meta device by bench/launches.py.

Each launch costs a GPU's host some microseconds, and each wait the whole queue: a bound that fails
is one to think about, and to raise only where the launches are worth it."""

from dataclasses import replace
from functools import cache

import torch

from bench.launches import Count, counting, step_of
from headway.recipes import load


@cache
def count(recipe: str, n_layers: int = 0, micro_batches: int = 0) -> Count:
    """Counts of the second step of a recipe, at other depths too."""
    config = load(recipe)
    if n_layers:
        config = replace(config, model=replace(config.model, n_layers=n_layers))
    if micro_batches:
        size = config.data.micro_batch_size
        config = replace(config, data=replace(config.data, batch_size=size * micro_batches))
    step = step_of(config)
    with counting():
        step.run()
    with counting() as counted:
        step.run()
    return counted


def launches(counted: Count, *parts: str) -> int:
    """Launches of PyTorch and of Triton of some files, or of all."""
    chosen = [n for part, n in counted.parts.items() if not parts or part in parts]
    return sum(n.launches + n.triton for n in chosen)


def test_the_host_waits_once_in_a_step():
    """For the loss and the norm, which decide whether the update is applied."""
    assert count("small", 2, 2).total.waits == count("demo").total.waits == 1


def test_a_wait_in_a_layer_is_counted():
    with counting() as counted:
        x = torch.ones(3, device="meta")
        assert float(x.sum()) == 1 and x.tolist() == [1, 1, 1] and bool(x[0])
    assert counted.total.waits == 3


def test_launches_of_a_layer_and_micro_batch():
    """Forward and backward of a block with a sparse layer; a layer more, a micro-batch more."""
    one, two = (launches(count("small", n, 1)) for n in (2, 3))
    assert two - one <= 110
    assert launches(count("small", 2, 2)) - one <= 365


def test_launches_of_the_head_do_not_grow_with_the_vocabulary():
    """Logits come in chunks that fill the device: 16 for 32,768 tokens and 32,768 words."""
    parts = "kernels/cross_entropy", "kernels/gpu/cross_entropy"
    assert launches(count("small", 2, 1), *parts) <= 120


def test_the_optimiser_launches_a_few_kernels_for_all_layers():
    """Matrices of one shape are orthogonalised together, the rest is in kernels over lists."""
    parts = "optim/muon", "optim/adamw", "parallel/reduce"
    assert launches(count("demo"), *parts) <= 95
    assert launches(count("demo"), *parts) - launches(count("demo", 2), *parts) <= 2


def test_a_step_of_the_demo():
    assert launches(count("demo")) <= 515
