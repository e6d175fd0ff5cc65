"""A training session: mesh, model, optimisers, records, checkpoints and stops of a run.

A trainer brings its data and its loop:

    with open_session(resolved, tokenizer, load_data, …) as session:
        while session.begin_step():
            result = gradient(session.model, …, session.parallelism, load=session.progress.load, …)
            reason = session.reason_to_skip(result)
            if not reason:
                update(session.model, session.optimizers, result, session.lr_factor, …)
            session.end_step(result, reason)
        return session.finish()"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from headway.checkpoint.lock import Lock
from headway.checkpoint.run_folder import resume_command
from headway.config import Config, RunError
from headway.data.tokenizer import Tokenizer
from headway.eval.bits_per_byte import Evaluation
from headway.eval.text import generate
from headway.model.build import without_pages
from headway.model.transformer import Transformer
from headway.optim.schedule import lr_factor
from headway.parallel.mesh import Mesh
from headway.parallel.parallelize import Parallelism
from headway.serve.params import SamplingParams
from headway.train.checkpoints import Checkpoints
from headway.train.interrupt import Interrupt
from headway.train.records import Log, Records
from headway.train.step import Gradient


class TrainingData(Protocol):
    """What a session needs to know about the data of a trainer."""

    @property
    def identity(self) -> dict[str, str]:
        """Name → fingerprint of what must not change when a run is resumed."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says about the data."""
        ...

    @property
    def notes(self) -> list[str]:
        """Lines for people, before step 0."""
        ...

    def evaluate(self, model: Transformer, parallelism: Parallelism) -> Evaluation:
        """Return the validation loss, always on the same text. Collective."""
        ...


D = TypeVar("D", bound=TrainingData)
LoadData = Callable[[Config, Tokenizer, Mesh, Log], D]
"""Loads the data on this rank; every rank must get the same."""


@dataclass
class Session(Generic[D]):
    """A run in training on this rank, from `open_session`; the order of calls is at the head."""

    data: D
    tokenizer: Tokenizer
    records: Records
    checkpoints: Checkpoints
    lock: Lock
    interrupt: Interrupt
    ended_by: str = ""
    """The signal after which all ranks end together; empty until there is one."""

    def __post_init__(self) -> None:
        self.config, self.log = self.records.config, self.records.log
        self.model, self.parallelism = self.records.model, self.records.parallelism
        self.optimizers, self.progress = self.checkpoints.optimizers, self.records.progress
        self._started = self._cpu_started = 0.0
        self._no_samples = without_pages(self.model.blocks())
        if self._no_samples and self.config.run.sample_tokens:
            self.log(f"note: no samples: {self._no_samples}")

    @property
    def rows(self) -> int:
        """The sequences of this step; the last one may have fewer than the others."""
        data, last = self.config.data, self.progress.step == self.config.optim.steps - 1
        return (last and data.last_batch_size) or data.batch_size

    @property
    def lr_factor(self) -> float:
        """The learning rate of this step over the peak rate."""
        return lr_factor(self.progress.step, self.config.optim)

    def begin_step(self) -> bool:
        """Begin the next step; return False where the run has ended instead."""
        progress, config = self.progress, self.config
        if self.ended_by or progress.step >= config.optim.steps or progress.why_stop(config.run):
            return False
        self.parallelism.mesh.begin_step(progress.step)
        self.lock.check()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        return True

    def reason_to_skip(self, result: Gradient) -> str:
        """Return why the update of a step must not be applied; empty for an ordinary step."""
        loss, spikes = result.loss, self.progress.spikes
        if not result.weight:
            return "no valid targets"
        if not math.isfinite(loss + result.balance):
            return f"loss {loss}"
        if not math.isfinite(result.norm):
            return f"gradient norm {result.norm}"
        if spikes.is_spike(loss):
            return f"loss {loss:.4f} is a spike over its running mean {spikes.mean:.4f}"
        return ""

    def end_step(self, result: Gradient, skipped: str = "") -> None:
        """Count the step, then do what is due after it: record, evaluate, sample, save, end.

        Args:
            skipped: why the update was not applied; empty where it was.
        Raises: `RunError` after `optim.max_skipped` skipped steps in a row."""
        progress, run, mesh = self.progress, self.config.run, self.parallelism.mesh
        lr = self.config.optim.lr * self.lr_factor
        if not skipped:
            progress.add_step(result)
        self.optimizers.zero_grad()
        progress.step += 1
        elapsed = time.perf_counter() - self._started
        if run.max_seconds:  # all ranks must stop at the same step
            elapsed = mesh.broadcast(elapsed)
        progress.seconds += elapsed
        progress.cpu_seconds += time.process_time() - self._cpu_started
        tokens_of = self.records.tokens_of
        progress.interval.add_time(tokens_of(progress.step) - tokens_of(progress.step - 1), elapsed)

        self.checkpoints.poll()
        self._count_skip(skipped)
        last = progress.step == self.config.optim.steps or progress.out_of_time(run)
        if last or progress.step % run.log_every == 0:
            self.records.write_interval(lr)
        if last or progress.step % run.eval_every == 0:
            self.evaluate()
        last = last or bool(progress.why_stop(run))
        if last or progress.step % run.sample_every == 0:
            self.sample()
        # ranks end together: at a signal that came to one of them before this step began
        if mesh.size == 1:
            self.ended_by = self.interrupt.requested
        elif result.signals:
            self.ended_by = self.interrupt.requested or "a signal to another rank"
        if last or self.ended_by or progress.step % run.checkpoint_every == 0:
            self.checkpoints.save()

    def _count_skip(self, reason: str) -> None:
        """Count and record a skipped step; raise `RunError` after too many in a row."""
        progress, most = self.progress, self.config.optim.max_skipped
        if not reason:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.log(f"step {progress.step} skipped: {reason}")
        self.records.event("skipped", reason)
        if progress.skipped_in_a_row >= most:
            text = f"{most} steps in a row were skipped, the last at step {progress.step}: {reason}"
            self._fail(text, "lower optim.lr or look at the data (limit optim.max_skipped)")

    def _fail(self, text: str, advice: str) -> NoReturn:
        """Record why the run ends, and raise `RunError`."""
        self.records.event("stopped", text)
        self.records.write_report()
        self.checkpoints.poll(wait=True)
        raise RunError(f"{text}; {advice}" if self.parallelism.mesh.is_main else "")

    def evaluate(self) -> None:
        """Validate, and record the result."""
        with self.parallelism.mesh.traffic.paused():
            evaluation = self.data.evaluate(self.model, self.parallelism)
        self.progress.add_evaluation(evaluation)
        self.records.write({**evaluation.numbers(), **evaluation.reliability()})
        if evaluation.documents is not None and self.progress.step == self.config.optim.steps:
            self.records.write_documents(evaluation.documents)
        self.log(
            f"step {self.progress.step}/{self.config.optim.steps}  "
            f"val loss {evaluation.val_loss:.4f}  "
            f"val bits/byte {evaluation.val_bits_per_byte:.4f}"
        )

    def sample(self) -> None:
        """Record a text sample, with the run's seed so that those of a run can be compared."""
        run = self.config.run
        if not run.sample_tokens or self._no_samples:
            return
        step, last = self.progress.step, self.progress.last
        if last is not None and not math.isfinite(last.val_loss):
            text = f"step {step}: the validation loss is {last.val_loss}, the weights have diverged"
            self._fail(text, "lower optim.lr, or resume from an earlier checkpoint")
        prompt, dispatcher = run.sample_prompt, self.parallelism.dispatcher
        params = SamplingParams(run.sample_tokens, temperature=0.8, top_k=50, seed=run.seed)
        model = self.model
        with self.parallelism.mesh.traffic.paused():
            text = generate(model, self.tokenizer, prompt, params, dispatcher=dispatcher).text
        self.progress.sample = text
        self.records.write({"prompt": prompt, "sample": text})

    def fork(self) -> Path | None:
        """Save this step for good and return its checkpoint, from which runs of other lengths
        continue (`open_session(resume=…)`), bit for bit as if each had been alone from step 0:
        until the rate of the shortest falls, all of them take the same steps. Return None, with
        the reason in the log, where it could not be saved. Collective."""
        self.checkpoints.offered.append(self.progress.step)
        self.checkpoints.save()
        self.checkpoints.poll(wait=True)
        return self.checkpoints.path if self.checkpoints.step == self.progress.step else None

    def finish(self) -> dict[str, Any]:
        """Log how the run ended, write the report and return the result (`loop.train`)."""
        self.checkpoints.poll(wait=True)
        progress, config, saved = self.progress, self.config, self.checkpoints
        unfinished = progress.step < config.optim.steps
        stopped = progress.why_stop(config.run) if unfinished else ""
        interrupted = bool(self.ended_by) and not stopped and unfinished
        if interrupted:
            where = f"saved {saved.path}" if saved.step == progress.step else "not saved"
            self.records.event("interrupted", f"{self.ended_by} at step {progress.step}, {where}")
            command = resume_command(config.mesh, saved.run_dir)
            done = f"step {progress.step} is finished, {where}"
            self.log(f"{self.ended_by}: {done}; go on with: {command}")
        elif stopped:
            self.records.event("stopped", stopped)
            self.log(f"stopped early: {stopped}")
        report = self.records.write_report()
        self.parallelism.mesh.barrier()  # a launcher may end all ranks as soon as one has left
        return {
            "val_bits_per_byte": progress.last and progress.last.val_bits_per_byte,
            "val_loss": progress.last and progress.last.val_loss,
            "first_val_bits_per_byte": progress.first and progress.first.val_bits_per_byte,
            "best_val_bits_per_byte": progress.best_bits_per_byte,
            "loss": progress.loss,
            "tokens_per_second": self.records.tokens / max(progress.seconds, 1e-9),
            "steps": progress.step,
            "tokens": self.records.tokens,
            "seconds": progress.seconds,
            "cpu_seconds": progress.cpu_seconds,
            "skipped": progress.skipped,
            "parameters_total": self.records.sizes.total,
            "parameters_active": self.records.sizes.active,
            "sample": progress.sample,
            "checkpoint": str(saved.path) if saved.path else None,
            "report": report,
            "stopped": stopped,
            "interrupted": interrupted,
            "error": saved.error,
        }
