"""Errors that end a command: mistakes of the user and runs that fail."""

from pathlib import Path


class UsageError(ValueError):
    """An error of the user: the command line prints its text as one line and exits with code 2."""


def cannot_write(path: Path, error: OSError) -> UsageError:
    """Return the error of a run folder, or a file in it, that cannot be written."""
    return UsageError(f"cannot write {path}: {error.strerror}; choose another folder")


class RankError(UsageError):
    """A user error that only one rank of a mesh met: that rank reports it."""


class PeerError(UsageError):
    """A user error that another rank of the mesh reports; this one exits silently."""


class RunError(RuntimeError):
    """The run failed by itself, not by a mistake of the user: the command line prints its text,
    where there is one, and exits with code 1."""
