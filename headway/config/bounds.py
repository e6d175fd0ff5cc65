"""Checks of single numbers, and the lists of values that an error message proposes."""

import math
from collections.abc import Iterable

from headway.config.errors import UsageError


def at_least(*fields: tuple[str, float, float]) -> None:
    """Raise UsageError for the first `(name, value, least)` whose value is below `least` or not
    finite."""
    for name, value, least in fields:
        if not least <= value < math.inf:  # also false for NaN
            raise UsageError(f"{name}={value} is below {least}; use a finite number ≥ {least}")


def above_zero(*fields: tuple[str, float]) -> None:
    """Raise UsageError for the first `(name, value)` whose value is not positive or not finite."""
    for name, value in fields:
        if not 0 < value < math.inf:
            raise UsageError(f"{name}={value} is not above 0; use a finite number > 0")


def divisors(n: int) -> list[int]:
    """Return all divisors of n, in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest_divisors(width: int, n: int) -> str:
    """Format the two divisors of `width` nearest to `n`, as in `4 or 8`."""
    return alternatives(sorted(sorted(divisors(width), key=lambda d: abs(d - n))[:2]))


def alternatives(numbers: Iterable[int], most: int = 8) -> str:
    """Format numbers as `1, 2, 4 or 8`."""
    names = [str(n) for n in numbers]
    if len(names) > most:
        return f"{', '.join(names[:most])}, …"
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
