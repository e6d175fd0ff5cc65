"""What a run reads and writes around its mathematics: records, evaluations, checkpoints, its
end."""

import dataclasses
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headway.checkpoint import checkpoint_dir, load, save
from headway.checkpoint.async_save import AsyncSave
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.run_folder import resume_command, update_optim
from headway.config import Config, OptimConfig, RunError, UsageError, from_dict
from headway.data.stream import Stream
from headway.data.tokenizer import Tokenizer
from headway.data.validation import ValidationText
from headway.eval.bits_per_byte import evaluate
from headway.eval.sampling import generate
from headway.model.moe import MoE
from headway.model.transformer import Transformer
from headway.optim.groups import Optimizers
from headway.optim.schedule import change, steps_before_fall
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism
from headway.parallel.straggler import StragglerDetector
from headway.plan.volume import token_bytes
from headway.report.html import write_report
from headway.report.metrics import progress_line
from headway.report.sinks import JsonlSink, NoSink
from headway.train.interval import Interval
from headway.train.progress import Progress
from headway.train.resolve import Sizes

Log = Callable[[str], None]


@dataclasses.dataclass
class Run:
    """A run in progress: its parts, and what is written about it."""

    config: Config
    dir: Path
    model: Transformer
    sizes: Sizes
    optimizers: Optimizers
    stream: Stream
    validation: ValidationText
    tokenizer: Tokenizer
    progress: Progress
    sink: JsonlSink | NoSink
    log: Log
    parallelism: Parallelism = SINGLE_PROCESS
    saved: Path | None = None
    saved_step: int = -1
    error: str = ""
    offered: list[int] = dataclasses.field(default_factory=list)
    """Steps up to which the newest checkpoint is kept, since the user may go on from there."""
    writing: AsyncSave | None = None
    """A checkpoint that is being written beside training."""

    def __post_init__(self) -> None:
        mesh = self.parallelism.mesh
        self.busy = StragglerDetector(mesh)
        self.gather_objects = (
            mesh.object_gatherer() if self.config.run.async_checkpoint else mesh.all_gather_object
        )
        self.expected_bytes = 0.0
        if (dispatcher := self.parallelism.dispatcher) is not None:
            self.expected_bytes = token_bytes(
                self.config, dispatcher.scheme, self.model.dtype.itemsize
            )

    @property
    def tokens(self) -> int:
        """Seen so far: a pure function of the step."""
        return self.progress.step * self.config.data.batch_size * self.config.data.seq_len

    def restore(self, path: Path | None, problems: list[str]) -> Progress:
        """Goes back to a checkpoint, or to step 0 when none was finished; drops later records."""
        for problem in problems:
            self.log(f"resume: {problem}; going back")
        if path is None:
            if self.parallelism.mesh.is_main:
                update_optim(self.dir, self.config.optim)
            self.sink.resume_at(-1)
            self.log(f"resume: {self.dir} has no checkpoint yet; starting over at step 0")
            return self.progress
        state = load.load_checkpoint(
            path, self.model, self.optimizers, self.config.model, self.parallelism.sharding
        )
        for name, value in self._identity().items():
            if state[name] != value:
                raise UsageError(
                    f"resume: {name} is {state[name]} in the checkpoint and {value} now; "
                    "restore it, or start another run with --run"
                )
        before, now = state.get("mesh"), self.parallelism.mesh.sizes
        if before and before != now:
            was, goes = (", ".join(f"{k}={n}" for k, n in m.items()) for m in (before, now))
            self.log(f"resume: saved on {was}, goes on with {goes}")
        self.progress = Progress.from_dict(state["progress"], self.config.optim.spike)
        self.saved, self.saved_step = path, self.progress.step
        self.offered = state.get("offered", [])
        if old := state.get("optim"):
            self._tell_schedule(from_dict(OptimConfig, old))
        if self.parallelism.mesh.is_main:
            checkpoint_dir.set_aside_after(self.dir, self.progress.step)
            update_optim(self.dir, self.config.optim)
        self.sink.resume_at(self.progress.step)
        self.event("resumed", "; ".join([f"from {path.name}", *problems]))
        self.log(f"resumed from {path} at step {self.progress.step}")
        return self.progress

    def _tell_schedule(self, old: OptimConfig) -> None:
        """Says how the learning rate goes on, where that is not by the schedule `old`; offers the
        checkpoint before its fall."""
        step, new = self.progress.step, self.config.optim
        if not (line := change(step, old, new)):
            return
        fall = steps_before_fall(old)
        if old.schedule != "cosine" and step > fall:
            offer = f"{self.dir} keeps no checkpoint from before its fall, after step {fall}"
            if before := checkpoint_dir.latest_up_to(self.dir, fall):
                self.offered = [*self.offered, fall]
                again = f"--run {self.dir}-{new.steps} --steps {new.steps}"
                offer = f"to go on from before the fall: {resume_command(self.config.mesh, before)}"
                offer += f" {again}"
            line += f"; {offer}"
        self.log(f"resume: {line}")

    def _identity(self) -> dict[str, Any]:
        """What must not change within a run, beside the architecture."""
        return {
            "seed": self.config.run.seed,
            "tokenizer": self.tokenizer.fingerprint,
            "data": self.stream.dataset.fingerprint,
            "validation text": self.validation.fingerprint,
        }

    def write(self, record: dict[str, Any]) -> None:
        """One record; a full disk costs the record, not the run."""
        counters = {"step": self.progress.step, "tokens": self.tokens}
        try:
            self.sink.write({**counters, "seconds": self.progress.seconds, **record})
        except OSError as error:
            self.log(f"metrics of step {self.progress.step} were not written: {error.strerror}")

    def event(self, name: str, detail: str) -> None:
        """Something that the reader of the report should know."""
        self.write({"event": name, "detail": detail})

    def count_skip(self, reason: str) -> None:
        """Counts and reports a skipped step; raises `RunError` after too many in a row."""
        progress, most = self.progress, self.config.optim.max_skipped
        if not reason:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.log(f"step {progress.step} skipped: {reason}")
        self.event("skipped", reason)
        if progress.skipped_in_a_row >= most:
            text = f"{most} steps in a row were skipped, the last at step {progress.step}: {reason}"
            self.event("stopped", text)
            self.report()
            self.landed(wait=True)
            advice = f"{text}; lower optim.lr or look at the data (limit optim.max_skipped)"
            raise RunError(advice if self.parallelism.mesh.is_main else "")

    def record_interval(self, lr: float) -> None:
        """The progress line, and its record."""
        progress, steps = self.progress, self.config.optim.steps
        interval, progress.interval = progress.interval, Interval()
        record = interval.record()
        speed = record["tokens_per_second"]
        record |= {
            "lr": lr,
            "flops_per_second": self.sizes.flops_per_token * speed,
            "memory_gib": _memory_gib(self.model.embed.weight.device),
            "skipped": progress.skipped,
            **self._wire(interval),
        }
        progress.loss = record["loss"] if interval.steps else None
        self.write(record)
        per_step = self.config.data.batch_size * self.config.data.seq_len / speed
        eta = (steps - progress.step) * per_step
        self.log(progress_line({"step": progress.step, **record}, steps, eta))
        if slow := self.busy.slow_rank(interval.seconds):
            self.log(slow)

    def _wire(self, interval: Interval) -> dict[str, Any]:
        """What this rank sent in the interval; nothing in a single process."""
        mesh, data = self.parallelism.mesh, self.config.data
        if mesh.size == 1:
            return {}
        steps = interval.tokens / (data.batch_size * data.seq_len)
        layers = self._wire_layers(steps, interval.seconds)
        taken = mesh.traffic.take()
        exchanged = [c["bytes"] for key, c in taken.items() if key[:3] in ("hp ", "ep ")]
        waited = sum(c["wait"] for c in taken.values())
        return {
            "wire": {key: c | {"bytes": c["bytes"] / steps} for key, c in taken.items()},
            "wire_bytes": sum(exchanged) / steps,
            "wire_expected": self.expected_bytes,
            "wire_wait": waited / max(interval.seconds, 1e-9),
            "wire_layers": layers,
        }

    def _wire_layers(self, steps: float, seconds: float) -> dict[str, list[float]]:
        """The same by block, as columns: what report/metrics.py says of `wire_layers`."""
        expected = self.expected_bytes / max(1, len(self.model.sparse_layers()))
        columns: dict[str, list[float]] = {}
        for layer, axes in self.parallelism.mesh.traffic.by_layer().items():
            tokens = sum(c.bytes for axis, c in axes.items() if axis in ("hp", "ep"))
            row = {
                "layer": layer,
                "bytes": tokens / steps,
                "expected": expected if isinstance(self.model.blocks()[layer].ffn, MoE) else 0.0,
                "weights": (sum(c.bytes for c in axes.values()) - tokens) / steps,
                "wait": round(sum(c.wait for c in axes.values()) / max(seconds, 1e-9), 6),
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return columns

    def evaluate(self) -> None:
        """Validation, always on the same windows."""
        windows, micro = self.validation.windows, self.config.data.micro_batch_size
        with self.parallelism.mesh.traffic.aside():
            found = evaluate(self.model, self.stream, windows, micro, self.parallelism)
        self.progress.evaluated(found)
        self.write(dataclasses.asdict(found))
        self.log(
            f"step {self.progress.step}/{self.config.optim.steps}  val loss {found.val_loss:.4f}  "
            f"val bits/byte {found.val_bits_per_byte:.4f}"
        )

    def sample(self) -> None:
        """A text sample with the run's seed, so that samples of one run can be compared."""
        run = self.config.run
        if not run.sample_tokens:
            return
        with self.parallelism.mesh.traffic.aside():
            text = generate(
                self.model,
                self.tokenizer,
                run.sample_prompt,
                run.sample_tokens,
                0.8,
                50,
                seed=run.seed,
                dispatcher=self.parallelism.dispatcher,
            )
        self.progress.sample = text
        self.write({"prompt": run.sample_prompt, "sample": text})

    def save(self) -> None:
        """A checkpoint of this step. An error is reported and kept in `error`; the run goes on."""
        state = {
            "progress": self.progress.to_dict(),
            "optim": dataclasses.asdict(self.config.optim),
            "offered": self.offered,
            "tokens": self.tokens,
            **self._identity(),
        }
        self.landed(wait=True)  # at most one is under way
        parts = (self.model, self.optimizers, self.config.model, state)
        target = (self.dir, self.progress.step)
        run, optim = self.config.run, self.config.optim
        up_to = [] if optim.schedule == "cosine" else [steps_before_fall(optim)]
        how = (run.keep_checkpoints, self.parallelism, [*up_to, *self.offered])
        if run.async_checkpoint:
            plan = save.plan_save(*target, *parts, *how).stage()
            self.writing = AsyncSave(plan, self.gather_objects)
            return
        try:
            self._saved(save.save_checkpoint(*target, *parts, *how), self.progress.step)
        except CheckpointError as error:
            self._not_saved(error)

    def landed(self, wait: bool = False) -> None:
        """Takes note of a checkpoint that was written beside training, if it is done."""
        if self.writing is None or not (wait or self.writing.done):
            return
        writing, self.writing = self.writing, None
        try:
            self._saved(writing.result(), writing.step)
        except CheckpointError as error:
            self._not_saved(error)

    def _saved(self, path: Path, step: int) -> None:
        self.saved, self.saved_step, self.error = path, step, ""

    def _not_saved(self, error: CheckpointError) -> None:
        self.error = str(error)
        self.log(f"{error}; the run goes on, {self.saved or 'nothing'} is the last one saved")
        self.event("checkpoint failed", str(error))

    def finish(self, signal_name: str) -> dict[str, Any]:
        """Says how it ended, writes the report, returns the result of `train`."""
        self.landed(wait=True)
        progress, config = self.progress, self.config
        stopped = progress.why_stop(config.run) if progress.step < config.optim.steps else ""
        interrupted = bool(signal_name) and not stopped and progress.step < config.optim.steps
        if interrupted:
            kept = f"saved {self.saved}" if self.saved_step == progress.step else "not saved"
            self.event("interrupted", f"{signal_name} at step {progress.step}, {kept}")
            self.log(
                f"{signal_name}: step {progress.step} is finished, {kept}; "
                f"go on with: {resume_command(config.mesh, self.dir)}"
            )
        elif stopped:
            self.event("stopped", stopped)
            self.log(f"stopped early: {stopped}")
        report = self.report()
        self.parallelism.mesh.barrier()  # a launcher may end all ranks as soon as one has left
        return {
            "val_bits_per_byte": progress.last and progress.last.val_bits_per_byte,
            "val_loss": progress.last and progress.last.val_loss,
            "first_val_bits_per_byte": progress.first and progress.first.val_bits_per_byte,
            "best_val_bits_per_byte": progress.best_bits_per_byte,
            "loss": progress.loss,
            "tokens_per_second": self.tokens / max(progress.seconds, 1e-9),
            "steps": progress.step,
            "tokens": self.tokens,
            "seconds": progress.seconds,
            "skipped": progress.skipped,
            "parameters_total": self.sizes.total,
            "parameters_active": self.sizes.active,
            "sample": progress.sample,
            "checkpoint": str(self.saved) if self.saved else None,
            "report": report,
            "stopped": stopped,
            "interrupted": interrupted,
            "error": self.error,
        }

    def report(self) -> str | None:
        """Writes report.html; returns its path, None when it could not be written."""
        if not self.parallelism.mesh.is_main:
            return None
        try:
            return str(write_report([self.dir], self.dir / "report.html"))
        except (OSError, UsageError) as error:
            self.log(f"the report was not written: {error}")
            return None


def _memory_gib(device: torch.device) -> float:
    """Peak so far: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
