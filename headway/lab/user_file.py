"""What is said of a Python file of the user's, a sweep or a study, that raises. No PyTorch."""

import traceback
from pathlib import Path

from headway.config import UsageError


def raised(error: Exception, path: Path) -> UsageError:
    """Return the error of a file that raises one, with the line in it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return UsageError(f"{where} raises {type(error).__name__}: {error}")
