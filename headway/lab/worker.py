"""A worker: trains the runs of a queue (lab.workers) that nobody trains, one after another.
`python -m headway.lab.worker QUEUE` is one; any number of them share a folder."""

import os
import signal
import sys
import time
from pathlib import Path

from headway.checkpoint.lock import InUseError
from headway.config import RunError, UsageError
from headway.lab.folder import add_error, read_wanted
from headway.lab.workers import wanted

POLL_SECONDS = 0.2


def work(queue: Path, *, ends: bool = False) -> None:
    """Train runs until the process that started this one is gone, or with `ends` until none is
    left that can be taken. A run that fails is tried again, three times in all. Raises
    OtherDtypeError where the runs of the folder are of machines unlike this one."""
    parent, ended = os.getppid(), set[str]()
    while os.getppid() == parent:
        if not any(map(_try, wanted(queue, ended))):
            if ends:
                return
            time.sleep(POLL_SECONDS)


def _try(folder: Path) -> bool:
    """Train a run, if nobody does; return whether this process had it."""
    from headway.lab.runs import OtherDtypeError, Run, execute

    try:
        config, edit, forks, start = read_wanted(folder)
        checkpoint = folder.parent / start if start else None
        if checkpoint is not None and not checkpoint.is_dir():
            checkpoint = None  # the bits are the same
        execute(Run(config, edit), folder.parent.parent, forks=forks, start=checkpoint)
    except InUseError:
        return False
    except OtherDtypeError:
        raise  # it is no failure of the run, which another machine can train
    except (UsageError, RunError) as error:
        add_error(folder, str(error))
    except Exception as error:
        add_error(folder, f"{type(error).__name__}: {error}")
    return True


def main() -> None:
    """Run as a program."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except UsageError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
