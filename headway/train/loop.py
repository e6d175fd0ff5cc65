"""The training loop, from a config to a result."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from headway.config import Config
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.model.transformer import Transformer
from headway.report.provenance import provenance
from headway.report.sinks import JsonlSink
from headway.train import checkpoint, folder
from headway.train.allocator import set_allocator
from headway.train.evaluate import count_targets, micro_batches
from headway.train.interrupt import Interrupt
from headway.train.interval import SpikeDetector
from headway.train.optim import build_optimizers
from headway.train.progress import Progress
from headway.train.resolve import Resolved, count_parameters, resolve
from headway.train.run import Log, Run
from headway.train.schedule import lr_factor
from headway.train.step import Gradient, gradient, update


def train(
    config: Config,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    recipe_source: str = "",
    log: Log = print,
) -> dict[str, Any]:
    """Trains the model of `config` and returns what came out of it.

    Args:
        resume: the folder of a run to go on with, bit for bit; `folder.read_config` gives its
            config. A run that was killed before its first checkpoint starts over.
        overwrite: clear a run that `run.dir` already holds, instead of refusing.
        recipe_source: text of the recipe, kept in run.json.
        log: gets every line for people.
    Returns: `val_bits_per_byte`, `val_loss`, `first_val_bits_per_byte`, `best_val_bits_per_byte`,
        `loss` (training, nats/token), `tokens_per_second`, `steps`, `tokens`, `seconds`, `skipped`,
        `parameters_total`, `parameters_active`, `sample`, `checkpoint` and `report` (paths or
        None), `stopped` (why it ended early), `interrupted` (then exit 130), `error` (what could
        not be saved; then exit 1).
    Raises: `UsageError` before step 0; `RunError` after `optim.max_skipped` skipped steps in a row.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    resolved = resolve(config, tokenizer.vocab_size)
    config = resolved.config
    run, optim, balance = config.run, config.optim, config.model.moe.balance
    run_dir = resume or Path(run.dir or f"runs/{config.recipe or 'run'}")
    found = folder.find_checkpoint(run_dir) if resume else (None, [])
    if found[0] is not None:
        checkpoint.check_architecture(checkpoint.read_config(found[0]), config.model)
    if run.threads:
        torch.set_num_threads(run.threads)
    if resolved.device.type == "cpu":
        set_allocator(run.allocator)

    # before the run folder is touched: a wrong --data must not clear a run
    stream = Stream(prepare(config.data, tokenizer, log), config.data, run.seed)
    model = Transformer(
        config.model, dtype=resolved.dtype, recompute=run.recompute, seed=run.seed
    ).to(resolved.device)
    folder.open_folder(run_dir, resume is not None, overwrite)
    if resume is None:
        folder.write_run(run_dir, _run_info(resolved, model, recipe_source))
    _announce(resolved, model, run_dir, log)
    optimizers = build_optimizers(model, optim, resolved.newton_schulz_dtype)
    torch.manual_seed(run.seed)  # of router noise and jitter; weights and samples have their own
    progress = Progress(SpikeDetector(optim.spike))

    with JsonlSink(run_dir / "metrics.jsonl") as sink, Interrupt() as interrupt:
        side = Run(config, run_dir, model, optimizers, stream, tokenizer, progress, sink, log)
        if resume is not None:
            progress = side.restore(*found)
        if run.compile:
            for block in model.layers:
                block.compile()
        if progress.step == 0:
            side.evaluate()

        while progress.step < optim.steps and not progress.why_stop(run):
            started = time.perf_counter()
            batch = stream.batch(progress.step)
            targets, n_bytes = count_targets(batch, side.token_bytes_V)
            micros = micro_batches(batch, config.data.micro_batch_size, resolved.device)
            rate = lr_factor(progress.step, optim)
            got = gradient(model, micros, targets, balance)
            reason = _reason_to_skip(got, targets, progress.spikes)
            if not reason:
                update(model, optimizers, got, rate, optim, balance)
                progress.spikes.add(got.nats / targets)
                progress.interval.add_step(
                    got.nats, targets, n_bytes, got.balance, got.norm, got.routes
                )
            optimizers.zero_grad()
            progress.step += 1
            elapsed = time.perf_counter() - started
            progress.seconds += elapsed
            progress.interval.add_time(batch.tokens_BS.numel(), elapsed)

            side.count_skip(reason)
            last = progress.step == optim.steps or progress.out_of_time(run)
            if last or progress.step % run.log_every == 0:
                side.record_interval(optim.lr * rate)
            if last or progress.step % run.eval_every == 0:
                side.evaluate()
            last = last or bool(progress.why_stop(run))
            if last or progress.step % run.sample_every == 0:
                side.sample()
            if last or interrupt.requested or progress.step % run.checkpoint_every == 0:
                side.save()
            if interrupt.requested:
                break
        return side.finish(interrupt.requested)


def _reason_to_skip(got: Gradient, targets: int, spikes: SpikeDetector) -> str:
    """Why the update of a step is not applied; empty for an ordinary step."""
    loss = got.nats / targets if targets else math.nan
    if not targets:
        return "no valid targets"
    if not math.isfinite(loss + got.balance):
        return f"loss {loss}"
    if not math.isfinite(got.norm):
        return f"gradient norm {got.norm}"
    if spikes.is_spike(loss):
        return f"loss {loss:.4f} is a spike over its running mean {spikes.mean:.4f}"
    return ""


def _run_info(resolved: Resolved, model: Transformer, recipe_source: str) -> dict[str, Any]:
    total, active = count_parameters(model)
    return {
        "config": resolved.config.to_dict(),
        "recipe_source": recipe_source,
        "derived": resolved.derived,
        **provenance(),
        "parameters": {"total": total, "active": active},
    }


def _announce(resolved: Resolved, model: Transformer, run_dir: Path, log: Log) -> None:
    """What will run, before step 0."""
    for name, sentence in resolved.derived.items():
        log(f"{name} = {sentence}")
    for remark in resolved.remarks:
        log(f"slow: {remark}")
    total, active = count_parameters(model)
    run = resolved.config.run
    kept = "recomputed in backward" if run.recompute else "kept for backward"
    log(f"parameters {total:,} total, {active:,} active per token; run folder {run_dir}")
    log(
        f"path: {resolved.device.type}, {torch.get_num_threads()} threads, matmuls in "
        f"{str(resolved.dtype).removeprefix('torch.')}, expert activations {kept}, "
        f"{'compiled' if run.compile else 'not compiled'}"
    )
