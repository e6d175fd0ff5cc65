"""Write a folder or a file that is complete or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headway.checkpoint.checkpoint_dir import fsync
from headway.config import UsageError


@contextmanager
def new_path(to: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder beside `to` that is renamed to `to` when all is written;
    after an error nothing is left of it.

    Raises: UsageError where `to` exists, its parent does not, or the disk is full or read-only."""
    if to.exists() or to.is_symlink():
        raise UsageError(f"{to} exists; choose another --to, or remove it")
    if not to.parent.is_dir():
        raise UsageError(f"cannot write {to}: there is no folder {to.parent}; make it first")
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
        yield temporary / to.name
        for path in sorted((temporary / to.name).rglob("*")):
            fsync(path)
        fsync(temporary / to.name)
        os.rename(temporary / to.name, to)
        fsync(to.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write {to}: {reason}; free some space or choose another --to"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
