"""The training loop, from a config to a result."""

import dataclasses
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.checkpoint import load, run_folder
from headway.checkpoint.lock import Lock
from headway.config import Config, PeerError, RankError, UsageError, leaves
from headway.data.batch import micro_batches
from headway.data.shards import Dataset, prepare
from headway.data.stream import Stream
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.data.validation import ValidationText, validation_text
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.optim.schedule import lr_factor
from headway.parallel.mesh import Mesh, launch
from headway.parallel.parallelize import materialize
from headway.report.provenance import commit, provenance, versions
from headway.report.sinks import JsonlSink, NoSink
from headway.train.allocator import set_allocator
from headway.train.interrupt import Interrupt
from headway.train.interval import SpikeDetector
from headway.train.objective import NextToken
from headway.train.progress import Progress
from headway.train.resolve import Resolved, Sizes, oversubscribed, resolve
from headway.train.run import Log, Run
from headway.train.step import Gradient, gradient, update


def train(
    config: Config,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    recipe_source: str = "",
    log: Log = print,
    interrupt: Interrupt | None = None,
) -> dict[str, Any]:
    """Trains the model of `config` and returns what came out of it.

    Args:
        resume: the folder of a run to go on with, bit for bit; `run_folder.read_config` gives its
            config. A run that was killed before its first checkpoint starts over. Or a checkpoint
            folder inside a run, from which another run, in `run.dir`, goes on.
        overwrite: clear a run that `run.dir` already holds, instead of refusing.
        recipe_source: text of the recipe, kept in run.json.
        log: gets every line for people.
        interrupt: of a caller that is in its context; without, signals are caught here.
    Returns: `val_bits_per_byte`, `val_loss`, `first_val_bits_per_byte`, `best_val_bits_per_byte`,
        `loss` (training, nats/token), `tokens_per_second`, `steps`, `tokens`, `seconds`, `skipped`,
        `parameters_total`, `parameters_active`, `sample`, `checkpoint` and `report` (paths or
        None), `stopped` (why it ended early), `interrupted` (then exit 130), `error` (what could
        not be saved; then exit 1).
    Raises: `UsageError` before step 0; `RunError` after `optim.max_skipped` skipped steps in a row.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    resolved = resolve(config, tokenizer.vocab_size)

    def facts() -> dict[str, Any]:
        return {**leaves(resolved.config.to_dict()), **versions(), "commit": commit()[0]}

    opening = run_folder.RunStart.of(resolved.config, resume, overwrite)
    with (
        nullcontext(interrupt) if interrupt else Interrupt() as interrupt,
        launch(resolved.config.mesh, resolved.device, facts) as mesh,
        Lock(opening.run_dir) as lock,
    ):
        resolved = dataclasses.replace(resolved, device=mesh.device)
        try:
            return _train(mesh, resolved, tokenizer, opening, lock, interrupt, recipe_source, log)
        except UsageError as error:
            if isinstance(error, PeerError):
                raise
            raise RankError(f"rank {mesh.rank}: {error}") if mesh.rank else error from None


def _train(
    mesh: Mesh,
    resolved: Resolved,
    tokenizer: Tokenizer,
    opening: run_folder.RunStart,
    lock: Lock,
    interrupt: Interrupt,
    recipe_source: str,
    log: Log,
) -> dict[str, Any]:
    """`train` on one of the ranks of a mesh."""
    log = log if mesh.is_main else _silent
    config = resolved.config
    run, optim, balance, micro = (
        config.run,
        config.optim,
        config.model.moe.balance,
        config.data.micro_batch_size,
    )
    run_dir, resume, overwrite, start = opening
    found = mesh.on_main(
        lambda: (
            run_folder.resume_run(run_dir, lock, log) if resume else run_folder.verify_fork(start)
        )
    )
    if found[0] is not None:
        load.check_architecture(load.read_model_config(found[0]), config.model)
    if run.threads:
        torch.set_num_threads(run.threads)
    if resolved.device.type == "cpu":
        set_allocator(run.allocator)

    # before the run folder is touched: a wrong --data must not clear a run
    with mesh.one_per_host():
        stream = Stream(prepare(config.data, tokenizer, log), config.data, run.seed)
    mesh.check_equal({"the fingerprint of the data": stream.dataset.fingerprint})
    with torch.device("meta"):
        model = Transformer(config.model, dtype=resolved.dtype, recompute=run.recompute)
    sizes = Sizes.of(model, config.data.seq_len)  # of the whole model, before it is spread
    parallelism = materialize(model, mesh, run.seed)
    validation = validation_text(stream, run.eval_tokens)
    info = _run_info(resolved, sizes, stream.dataset, validation, recipe_source)
    if not resume:
        start = mesh.on_main(
            lambda: run_folder.create_run(run_dir, info, overwrite, lock, log, start)
        )
        found = start, []
    _announce(resolved, mesh, sizes, run_dir, log)
    log(f"validation: {validation.sentence}")
    for note in stream.dataset.notes:
        log(f"note: {note}")
    optimizers = build_optimizers(model, optim, resolved.newton_schulz_dtype, parallelism.sharding)
    # of router noise and jitter, other ones on every rank; weights and samples have their own
    torch.manual_seed(run.seed + (mesh.rank << 32))
    progress = Progress(SpikeDetector(optim.spike))

    sink = JsonlSink(run_dir / "metrics.jsonl") if mesh.is_main else NoSink()
    with sink:
        side = Run(
            config,
            run_dir,
            model,
            sizes,
            optimizers,
            stream,
            validation,
            tokenizer,
            progress,
            sink,
            log,
            parallelism,
        )
        if resume or start is not None:
            progress = side.restore(*found)
        interrupt.defer(mesh.all_gather_object)
        if run.compile:
            for block in model.layers:
                block.compile()
        if progress.step == 0:
            side.evaluate()
        asked, objective = "", NextToken(balance)

        while progress.step < optim.steps and not progress.why_stop(run):
            mesh.begin_step(progress.step)
            lock.check()
            started = time.perf_counter()
            batch = stream.batch(progress.step, mesh.rank, mesh.size, micro)
            micros = micro_batches(batch, micro, resolved.device)
            rate = lr_factor(progress.step, optim)
            got = gradient(
                model,
                micros,
                objective,
                parallelism,
                load=progress.load,
                signal=bool(interrupt.requested),
            )
            reason = _reason_to_skip(got, progress.spikes)
            if not reason:
                update(model, optimizers, got, rate, optim, balance, parallelism)
                progress.load = got.load
                progress.spikes.add(got.loss)
                progress.interval.add_step(got)
            optimizers.zero_grad()
            progress.step += 1
            elapsed = time.perf_counter() - started
            if run.max_seconds:  # all ranks must stop at the same step
                elapsed = mesh.broadcast(elapsed)
            progress.seconds += elapsed
            progress.interval.add_time(batch.tokens_BS.numel() * mesh.size, elapsed)

            side.landed()
            side.count_skip(reason)
            last = progress.step == optim.steps or progress.out_of_time(run)
            if last or progress.step % run.log_every == 0:
                side.record_interval(optim.lr * rate)
            if last or progress.step % run.eval_every == 0:
                side.evaluate()
            last = last or bool(progress.why_stop(run))
            if last or progress.step % run.sample_every == 0:
                side.sample()
            asked = interrupt.requested if mesh.size == 1 else _asked(got.signals, interrupt)
            if last or asked or progress.step % run.checkpoint_every == 0:
                side.save()
            if asked:
                break
        return side.finish(asked)


def _asked(signals: int, interrupt: Interrupt) -> str:
    """The signal after which all ranks end together: one that came before this step began."""
    return (interrupt.requested or "a signal to another rank") if signals else ""


def _silent(_: str) -> None:
    """The log of the ranks that do not lead."""


def _reason_to_skip(got: Gradient, spikes: SpikeDetector) -> str:
    """Why the update of a step is not applied; empty for an ordinary step."""
    loss = got.loss
    if not got.weight:
        return "no valid targets"
    if not math.isfinite(loss + got.balance):
        return f"loss {loss}"
    if not math.isfinite(got.norm):
        return f"gradient norm {got.norm}"
    if spikes.is_spike(loss):
        return f"loss {loss:.4f} is a spike over its running mean {spikes.mean:.4f}"
    return ""


def _run_info(
    resolved: Resolved,
    sizes: Sizes,
    dataset: Dataset,
    validation: ValidationText,
    recipe_source: str,
) -> dict[str, Any]:
    overlap = dataset.overlap
    return {
        "config": resolved.config.to_dict(),
        "job": run_folder.torchrun_job(),
        "recipe_source": recipe_source,
        "derived": resolved.derived,
        **provenance(),
        "parameters": {"total": sizes.total, "active": sizes.active},
        "validation": dataclasses.asdict(validation),
        "overlap": {**dataclasses.asdict(overlap), "sentence": overlap.sentence},
        "approximate": dataset.approximate,
    }


def _announce(resolved: Resolved, mesh: Mesh, sizes: Sizes, run_dir: Path, log: Log) -> None:
    """What will run, before step 0."""
    for name, sentence in resolved.derived.items():
        log(f"{name} = {sentence}")
    for note in resolved.notes:
        log(f"note: {note}")
    for remark in resolved.remarks:
        log(f"slow: {remark}")
    if resolved.device.type == "cpu":
        threads, policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "")
        if note := oversubscribed(os.getloadavg()[0], os.cpu_count() or 1, threads, policy):
            log(f"note: {note}")
    run = resolved.config.run
    kept = "recomputed in backward" if run.recompute else "kept for backward"
    log(
        f"parameters {sizes.total:,} total, {sizes.active:,} active per token; run folder {run_dir}"
    )
    log(
        f"path: {resolved.device.type}, {torch.get_num_threads()} threads, matmuls in "
        f"{str(resolved.dtype).removeprefix('torch.')}, expert activations {kept}, "
        f"{'compiled' if run.compile else 'not compiled'}"
    )
    if mesh.size > 1:
        kept = (
            ""
            if mesh.config.shard == "replicate"
            else f", parameters in pieces ({mesh.config.shard})"
        )
        log(f"mesh: {mesh.size} ranks, {mesh}, over {dist.get_backend()}{kept}")
