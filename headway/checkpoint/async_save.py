"""Write a checkpoint in a thread while training continues."""

import threading
from pathlib import Path

from headway.checkpoint import save
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.save import GatherObjects, SavePlan


class AsyncSave:
    """One checkpoint that is being written. `plan` is staged and `gather_objects` has a connection
    that training does not use. A process that ends meanwhile leaves a temporary folder, and the
    checkpoint before."""

    def __init__(self, plan: SavePlan, gather_objects: GatherObjects) -> None:
        self.step = plan.step
        self._plan, self._gather_objects = plan, gather_objects
        self._outcome: Path | CheckpointError | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it is written, or has failed."""
        return self._outcome is not None

    def result(self) -> Path:
        """Block until it is written; return its folder. Raises `CheckpointError`."""
        self._thread.join()
        assert self._outcome is not None
        if isinstance(self._outcome, CheckpointError):
            raise self._outcome
        return self._outcome

    def _write(self) -> None:
        try:
            self._outcome = save.write_checkpoint(self._plan, self._gather_objects)
        except CheckpointError as error:
            self._outcome = error
        except Exception as error:  # such as a rank that is gone: the training loop must know
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"checkpoint at step {self.step} was not written: {problem}"
            self._outcome = CheckpointError(text)
