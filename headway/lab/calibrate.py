"""CPU seconds of a step of each arm, measured in turn."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from headway.config import Config
from headway.data.batch import micro_batches
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.train.objective import NextToken
from headway.train.open_session import Edit
from headway.train.records import Log
from headway.train.resolve import resolve
from headway.train.step import gradient, update

WARM, ROUNDS, PIECE = 2, 7, 2
"""Steps that are not measured; pieces of each arm; steps of a piece."""


def calibrate(arms: Mapping[str, tuple[Config, Edit | None]], log: Log = print) -> dict[str, float]:
    """Return the CPU seconds of a training step of each arm: the median of pieces that take turns,
    A B C A B C, so that a machine that slows down slows all of them down. Without evaluation,
    records and checkpoints. Configs are resolved; all models are in memory at once."""
    steps = {name: _stepper(config, edit) for name, (config, edit) in arms.items()}
    threads = torch.get_num_threads()
    pieces: dict[str, list[float]] = {name: [] for name in arms}
    try:
        for i in range(ROUNDS + 1):
            for name, step in steps.items():
                torch.set_num_threads(arms[name][0].run.threads or threads)
                begin = time.process_time()
                for _ in range(PIECE if i else WARM):
                    step()
                if i:
                    pieces[name].append((time.process_time() - begin) / PIECE)
    finally:
        torch.set_num_threads(threads)
    seconds = {name: statistics.median(values) for name, values in pieces.items()}
    log("CPU time of a step: " + ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in seconds.items()))
    return seconds


def _stepper(config: Config, edit: Edit | None) -> Callable[[], None]:
    """Return a function that takes the next training step of a model of its own."""
    tokenizer = load_tokenizer(config.data.vocabulary)
    resolved = resolve(config, tokenizer.vocab_size)
    compute = Compute(resolved.dtype, config.run.recompute)
    model = Transformer(config.model, compute, seed=config.run.seed).to(resolved.device)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    optimizers = build_optimizers(model, config.optim, resolved.newton_schulz_dtype)
    stream = Stream(prepare(config.data, tokenizer, lambda _: None), config.data, config.run.seed)
    balance, size = config.model.moe.balance, config.data.micro_batch_size
    objective, done = NextToken(balance), 0

    def step() -> None:
        nonlocal done
        parts = micro_batches(stream.batch(done), size, model.device)
        result = gradient(model, parts, objective)
        update(model, optimizers, result, 0.1, config.optim, balance)
        optimizers.zero_grad()
        done += 1

    return step
