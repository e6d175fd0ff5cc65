"""Folders of a cache that are whole or absent: written under another name, synced, then renamed."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headway.config import DataConfig, UsageError, cache_root

Log = Callable[[str], None]
"""Takes one line for people."""


def root_of(config: DataConfig) -> Path:
    """Return the cache of a config: its `cache_dir`, else $HEADWAY_CACHE, else ~/.cache/headway."""
    return cache_root(config.cache_dir)


def make(folder: Path, write: Callable[[Path], None], log: Log) -> None:
    """Have `write(temporary folder)` make `folder` unless it is there. Of several processes that
    want the same folder one writes and the others wait; what a killed one left behind is removed.
    """
    if folder.is_dir():
        return
    root = folder.parent
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{folder.name}.lock", log) as alone:
        if alone:  # nobody else is at work, so these were left by a process that died
            for stale in root.glob(f".{folder.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
        if not folder.is_dir():
            _make(folder, write)


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    with writing(folder.parent):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        write(temporary)
        with writing(folder.parent):
            temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
            _sync(temporary)
            try:
                temporary.rename(folder)
            except OSError as error:
                # Where there are no locks another process may have been first; its folder is as
                # good.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn an error of the file system while writing to the cache into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no space left for tokenised data in {root}"
            fix = "free some, or set data.cache_dir to a folder on another disk"
        else:
            problem = f"cannot write tokenised data to {root}: {error.strerror or error}"
            fix = "set data.cache_dir to a folder that you may write"
        raise UsageError(f"{problem}; {fix}") from error


@contextmanager
def _locked(path: Path, log: Log) -> Iterator[bool]:
    """Hold a lock file, released when a process dies; yield False where there are no locks."""
    with writing(path.parent):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that tokenises the same data ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, which is on the disk once the body has ended."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
