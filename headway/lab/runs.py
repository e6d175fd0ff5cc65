"""Runs of experiments: a folder each, named by the hash of its config.

    DIR/runs/HASH/run.json, metrics.jsonl     as of `headway train`
    DIR/runs/HASH/documents.npz               the loss of each validation document at its end
    DIR/runs/HASH/attempts                    a line each time that it was started
    DIR/runs/HASH/lease                       who trains it, with a heartbeat
    DIR/runs/HASH/result.json                 what it gave; renamed into place at the very end

A folder with a result.json is finished and is never touched again. One without is continued from
its newest checkpoint, or started over, by whoever creates its lease; that of a process that is gone
is taken over (`checkpoint.lock`). So several processes share the runs of a folder. Checkpoints are
deleted at the end.

Runs of several lengths that begin alike share a trunk (`execute_branches`): the longest one keeps
the step at which the rate of each shorter one falls, and that one goes on from there, bit for bit
as if it had been alone."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.checkpoint.lock import Lock
from headway.checkpoint.runtime import resolve_runtime
from headway.config import Config, RunError, UsageError, cannot_write
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.eval.bits_per_byte import DocumentLosses
from headway.lab.folder import Scores, config_hash, read_result, tries, trunk_hash, write_json
from headway.lab.match import measure
from headway.optim.schedule import begin_alike, steps_before_fall
from headway.train import loop
from headway.train.interrupt import Interrupt
from headway.train.open_session import Edit
from headway.train.records import Log

BATCHES = 8
"""Batches that are hashed, to show that two runs read the same tokens."""


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    config: Config
    """Resolved; `run.dir` is not read."""
    edit: Edit | None = None
    scores: Scores | None = None
    """What else is measured at its end; another measure is another run."""

    @property
    def key(self) -> str:
        """The name of its folder."""
        return config_hash(self.config, self.edit, self.scores)


def execute(
    run: Run,
    root: Path,
    log: Log = lambda _: None,
    interrupt: Interrupt | None = None,
    *,
    forks: Sequence[int] = (),
    start: Path | None = None,
) -> dict[str, Any]:
    """Return the result of a run, from its folder in `root`/runs where it is finished there.

    Args:
        forks: steps whose checkpoints are left in the folder.
        start: a checkpoint of another run, from which this one starts if it is new.
    Returns: `config`, `config_hash`, `bits_per_byte`, `bits_per_byte_uncopied` (of targets that
        their window does not give away, `eval.copying`), `val_loss` (None where it diverged),
        `scores` (empty where it diverged, None where none were asked for), `error`, `attempts`,
        `steps`, `continued` (steps that another run had done), `tokens`, `train_flops`,
        `cpu_seconds` and `seconds` (those steps included), `tokens_per_second`,
        `batches_sha256`, `validation` (the fingerprint of its text), `commit`, `cpu`, `auto_dtype`
        (what `run.dtype=auto` was on its machine; None where the config says it).
    Raises: KeyboardInterrupt where it was interrupted; it is saved. InUseError where another
        process trains it, OtherDtypeError where other runs of `root` are of machines with another
        `run.dtype=auto`, UsageError for a folder that cannot be written."""
    folder = root / "runs" / run.key
    if (result := read_result(folder)) is not None:
        return result
    _check_dtype_beside(run, root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    with Lock(folder, "lease") as lease:
        lease.acquire(log)
        # another process may have finished it meanwhile
        return read_result(folder) or _train(run, folder, log, interrupt, forks, start)


def execute_branches(
    runs: Sequence[Run], root: Path, log: Log = lambda _: None, interrupt: Interrupt | None = None
) -> list[dict[str, Any]]:
    """Return the results of runs that differ in their lengths, in order. The longest is trained
    first, and each other one continues it from where their rates part, if they begin alike.
    Raises as `execute`."""
    trunk = max(runs, key=lambda run: run.config.optim.steps)
    optim = trunk.config.optim
    falls = {run.key: steps_before_fall(run.config.optim) for run in runs if run is not trunk}
    alike = {r.key for r in runs if r is not trunk and _branches_off(r, trunk, falls[r.key])}
    forks = sorted({falls[key] for key in alike if falls[key] < optim.steps})
    checkpoints = root / "runs" / trunk.key / "checkpoints"
    results = {trunk.key: execute(trunk, root, log, interrupt, forks=forks)}
    for run in runs:
        if run.key not in results:
            parting = checkpoints / f"step-{falls[run.key]:06d}"
            start = parting if run.key in alike and parting.is_dir() else None
            results[run.key] = execute(run, root, log, interrupt, start=start)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return [results[run.key] for run in runs]


def _branches_off(run: Run, trunk: Run, step: int) -> bool:
    """Return whether two runs are the same up to a step."""
    same = trunk_hash(run.config, run.edit) == trunk_hash(trunk.config, trunk.edit)
    return same and begin_alike(run.config.optim, trunk.config.optim, step)


def _train(
    run: Run,
    folder: Path,
    log: Log,
    interrupt: Interrupt | None,
    forks: Sequence[int],
    start: Path | None,
) -> dict[str, Any]:
    """Train a run to its end and write its result."""
    config = dataclasses.replace(
        run.config, run=dataclasses.replace(run.config.run, dir=str(folder), keep_checkpoints=1)
    )
    attempts = _count_attempt(folder)
    begun = (folder / "run.json").is_file()
    trained, error = dict[str, Any](), ""
    try:
        trained = loop.train(
            config,
            resume=folder if begun else start,
            overwrite=not begun,
            log=log,
            interrupt=interrupt,
            edit=run.edit,
            forks=forks,
            # one evaluation costs as much as tens of steps
            first_evaluation=config.run.eval_every < config.optim.steps,
        )
    except RunError as failed:
        error = str(failed)
    if trained.get("interrupted"):
        raise KeyboardInterrupt(
            f"interrupted; run {run.key} is saved and goes on when called again"
        )
    info = json.loads((folder / "run.json").read_text("utf-8"))
    bits = trained.get("val_bits_per_byte")
    finite = bits is not None and math.isfinite(bits)
    result = {
        "config": run.config.to_dict(),
        "config_hash": run.key,
        "bits_per_byte": bits if finite else None,
        "bits_per_byte_uncopied": _uncopied(folder) if finite else None,
        "val_loss": trained["val_loss"] if finite else None,
        "scores": _scores(run.scores, folder if finite else None),
        "error": error if finite or error else "the validation loss is not finite",
        "attempts": attempts,
        "steps": trained.get("steps", 0),
        "continued": int(start.name.removeprefix("step-")) if start is not None else 0,
        "tokens": trained.get("tokens", 0),
        "train_flops": trained.get("tokens", 0) * measure(run.config, "active-flops", run.edit),
        "cpu_seconds": trained.get("cpu_seconds", 0.0),
        "seconds": trained.get("seconds", 0.0),
        "tokens_per_second": trained.get("tokens_per_second", 0.0),
        "batches_sha256": batches_sha256(config),
        "validation": info["validation"],
        "commit": info["commit"],
        "cpu": info["machine"]["cpu"],
        "auto_dtype": auto_dtype(config),
    }
    write_json(folder / "result.json", result)
    if not forks:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for checkpoint in sorted((folder / "checkpoints").glob("*")):
        if checkpoint.name not in {f"step-{step:06d}" for step in forks}:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return result


def auto_dtype(config: Config) -> str | None:
    """Return the dtype of the matmuls where this machine chooses it, which no config says."""
    if config.run.dtype != "auto":
        return None
    return str(resolve_runtime(config).dtype).removeprefix("torch.")


class OtherDtypeError(UsageError):
    """A folder has runs of machines on which `run.dtype=auto` is another dtype than on this one:
    no run of this machine belongs there."""


def _check_dtype_beside(run: Run, root: Path) -> None:
    """Raise OtherDtypeError where run.dtype=auto is not here what it was where the run began, or
    another one of its folder."""
    if (here := auto_dtype(run.config)) is None:
        return
    folders = [root / "runs" / run.key, *(root / "runs").glob("*")]
    there = next(filter(None, map(_dtype_of, folders)), here)
    if there != here:
        raise OtherDtypeError(
            f"run.dtype=auto is {here} on this machine, and was {there} for runs in {root}: they "
            "would not be compared; set run.dtype to float32 in all, or use another folder"
        )


def _dtype_of(folder: Path) -> str:
    """Return what run.dtype=auto was where a run began; "" where its config says the dtype, or
    there is none."""
    with suppress(OSError, ValueError):
        derived = json.loads((folder / "run.json").read_text("utf-8")).get("derived", {})
        return derived.get("run.dtype", "").partition(":")[0]
    return ""


def check_dtypes(results: Iterable[Mapping[str, Any]]) -> None:
    """Raise UsageError where machines have chosen different dtypes for runs that are compared."""
    dtypes = {dtype for result in results if (dtype := result.get("auto_dtype"))}
    if len(dtypes) > 1:
        raise UsageError(
            f"runs with run.dtype=auto were trained in {' and '.join(sorted(dtypes))}, as their "
            "machines have it, and are not compared; set run.dtype to float32 in all"
        )


def _scores(scores: Scores | None, folder: Path | None) -> dict[str, float] | None:
    """Return what `scores` says of a run; {} of one that diverged, which has no folder here."""
    if scores is None or folder is None:
        return None if scores is None else {}
    return {name: float(value) for name, value in scores(folder).items()}


def _uncopied(folder: Path) -> float | None:
    """Return the bits per byte without copied targets; None where the file could not be written."""
    path = folder / "documents.npz"
    return DocumentLosses.load(path).bits_per_byte_uncopied if path.is_file() else None


def batches_sha256(config: Config, n: int = BATCHES) -> str:
    """Return a hash of the tokens of the first batches of a run."""
    tokenizer = load_tokenizer(config.data.vocabulary)
    dataset = prepare(config.data, tokenizer, lambda _: None)
    stream, digest = Stream(dataset, config.data, config.run.seed), hashlib.sha256()
    for step in range(n):
        digest.update(stream.batch(step).tokens_BS.numpy().tobytes())
    return digest.hexdigest()


def documents(root: Path, key: str) -> DocumentLosses:
    """Return the losses of the validation documents of a finished run. Raises UsageError where the
    file is missing or damaged."""
    path = root / "runs" / key / "documents.npz"
    try:
        return DocumentLosses.load(path)
    except (OSError, ValueError, TypeError) as error:
        fix = f"delete {path.parent} and run again"
        raise UsageError(f"{path} cannot be read ({error}); {fix}") from None


def _count_attempt(folder: Path) -> int:
    """Note that the run is started, and return how often it has been."""
    try:
        with (folder / "attempts").open("a", encoding="utf-8") as file:
            file.write(f"{platform.node()} {os.getpid()}\n")
    except OSError as error:
        raise cannot_write(folder, error) from None
    return len(tries(folder))
