"""A checkpoint that is written in a thread while training goes on."""

import threading
from pathlib import Path

from headway.checkpoint import save as checkpoint
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.save import Collect, Snapshot


class AsyncSave:
    """One checkpoint under way; `snapshot` has tensors and `collect` a connection of its own. A
    process that ends meanwhile leaves a temporary folder, and the checkpoint before."""

    def __init__(self, snapshot: Snapshot, collect: Collect) -> None:
        self.step = snapshot.step
        self._snapshot, self._collect = snapshot, collect
        self._outcome: Path | CheckpointError | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it is written, or has failed."""
        return self._outcome is not None

    def result(self) -> Path:
        """Waits; the folder of the checkpoint. Raises `CheckpointError`."""
        self._thread.join()
        assert self._outcome is not None
        if isinstance(self._outcome, CheckpointError):
            raise self._outcome
        return self._outcome

    def _write(self) -> None:
        outcome: Path | CheckpointError
        try:
            outcome = checkpoint.write(self._snapshot, self._collect)
        except CheckpointError as error:
            outcome = error
        except Exception as error:  # such as a rank that went away: the loop must hear of it
            text = (
                f"checkpoint at step {self.step} was not written: {type(error).__name__}: {error}"
            )
            outcome = CheckpointError(" ".join(text.split()))
        self._outcome = outcome
