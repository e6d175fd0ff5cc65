"""Errors that end a command: mistakes of the user and runs that fail."""


class UsageError(ValueError):
    """An error of the user: the command line prints its text as one line and exits with code 2."""


class RankError(UsageError):
    """A user error that only one rank of a mesh met: that rank reports it."""


class PeerError(UsageError):
    """A user error that another rank of the mesh reports; this one exits silently."""


class RunError(RuntimeError):
    """The run failed by itself, not by a mistake of the user: the command line prints its text,
    where there is one, and exits with code 1."""
