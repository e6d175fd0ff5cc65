"""The checkpoints of a run in training: going back to one, saving them, also asynchronously."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.checkpoint import checkpoint_dir, load, save
from headway.checkpoint.async_save import AsyncSave
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.run_folder import resume_command, update_optim
from headway.config import OptimConfig, UsageError, from_dict
from headway.optim.groups import Optimizers
from headway.optim.schedule import change, steps_before_fall
from headway.train.records import Records


@dataclass
class Checkpoints:
    """Saves and restores weights, optimisers and progress of a run."""

    records: Records
    optimizers: Optimizers
    identity: dict[str, Any]
    """What must not change within a run, beside the architecture; by name."""
    path: Path | None = None
    """The last checkpoint that was saved."""
    step: int = -1
    """Its step."""
    error: str = ""
    """Why the last one could not be saved; empty where it was."""
    offered: list[int] = field(default_factory=list)
    """Steps up to which the newest checkpoint is kept, since the user may go on from there."""

    def __post_init__(self) -> None:
        self.config, self.run_dir = self.records.config, self.records.run_dir
        self.model, self.parallelism = self.records.model, self.records.parallelism
        self.progress, self.log = self.records.progress, self.records.log
        self._pending: AsyncSave | None = None
        mesh, separate = self.parallelism.mesh, self.config.run.async_checkpoint
        self._gather = mesh.object_gatherer() if separate else mesh.all_gather_object

    def restore(self, path: Path | None, problems: list[str]) -> None:
        """Go back to a checkpoint, or to step 0 when there is none; drop later records.

        Args:
            problems: a sentence for each damaged checkpoint that was passed over.
        Raises: `UsageError` where data, tokenizer or seed are not those of the checkpoint."""
        is_main, sink = self.parallelism.mesh.is_main, self.records.sink
        for problem in problems:
            self.log(f"resume: {problem}; going back")
        if path is None:
            if is_main:
                update_optim(self.run_dir, self.config.optim)
            sink.resume_at(-1)
            self.log(f"resume: {self.run_dir} has no checkpoint yet; starting over at step 0")
            return
        sharding, config = self.parallelism.sharding, self.config.model
        state = load.load_checkpoint(path, self.model, self.optimizers, config, sharding)
        if "progress" not in state:  # weights alone, as of an imported run: a first step follows
            self.path, self.step = path, 0
            sink.resume_at(-1)
            self.log(f"starts from the weights of {path}")
            return
        for name, value in self.identity.items():
            if state[name] != value:
                raise UsageError(
                    f"resume: {name} is {state[name]} in the checkpoint and {value} now; "
                    "restore it, or start another run with --run"
                )
        before, now = state.get("mesh"), self.parallelism.mesh.sizes
        if before and before != now:
            old, new = (", ".join(f"{k}={n}" for k, n in m.items()) for m in (before, now))
            self.log(f"resume: saved on {old}, goes on with {new}")
        self.progress.restore(state["progress"])
        self.path, self.step = path, self.progress.step
        self.offered = state.get("offered", [])
        if optim := state.get("optim"):
            self._tell_schedule(from_dict(OptimConfig, optim))
        if is_main:
            checkpoint_dir.set_aside_after(self.run_dir, self.progress.step)
            update_optim(self.run_dir, self.config.optim)
        sink.resume_at(self.progress.step)
        self.records.event("resumed", "; ".join([f"from {path.name}", *problems]))
        self.log(f"resumed from {path} at step {self.progress.step}")

    def _tell_schedule(self, old: OptimConfig) -> None:
        """Log where the rate leaves the schedule `old`; offer the checkpoint before its fall."""
        step, new = self.progress.step, self.config.optim
        if not (line := change(step, old, new)):
            return
        fall = steps_before_fall(old)
        if old.schedule != "cosine" and step > fall:
            offer = f"{self.run_dir} keeps no checkpoint from before its fall, after step {fall}"
            if before := checkpoint_dir.latest_up_to(self.run_dir, fall):
                self.offered = [*self.offered, fall]
                command = resume_command(self.config.mesh, before)
                options = f"--run {self.run_dir}-{new.steps} --steps {new.steps}"
                offer = f"to go on from before the fall: {command} {options}"
            line += f"; {offer}"
        self.log(f"resume: {line}")

    def save(self) -> None:
        """Save this step. A `CheckpointError` is logged and kept in `error`; the run goes on."""
        optim, run = self.config.optim, self.config.run
        state = {
            "progress": self.progress.to_dict(),
            "optim": dataclasses.asdict(optim),
            "offered": self.offered,
            "tokens": self.records.tokens,
            **self.identity,
        }
        self.poll(wait=True)  # at most one is being written
        up_to = [] if optim.schedule == "cosine" else [steps_before_fall(optim)]
        plan = save.plan_save(
            *(self.run_dir, self.progress.step, self.model, self.optimizers, self.config.model),
            *(state, run.keep_checkpoints, self.parallelism, [*up_to, *self.offered]),
        )
        if run.async_checkpoint:
            self._pending = AsyncSave(plan.stage(), self._gather)
            return
        try:
            self._saved(save.write_checkpoint(plan), self.progress.step)
        except CheckpointError as error:
            self._failed(error)

    def poll(self, wait: bool = False) -> None:
        """Take note of an asynchronous checkpoint once it is written; `wait` until it is."""
        if self._pending is None or not (wait or self._pending.done):
            return
        written, self._pending = self._pending, None
        try:
            self._saved(written.result(), written.step)
        except CheckpointError as error:
            self._failed(error)

    def _saved(self, path: Path, step: int) -> None:
        self.path, self.step, self.error = path, step, ""

    def _failed(self, error: CheckpointError) -> None:
        self.error = str(error)
        self.log(f"{error}; the run goes on, {self.path or 'nothing'} is the last one saved")
        self.records.event("checkpoint failed", str(error))
