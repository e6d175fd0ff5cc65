"""Checks of single numbers, and the lists of values that an error message proposes."""

import math
from collections.abc import Iterable
from typing import Any

from headway.config.errors import UsageError


def at_least(least: float, section: str, values: dict[str, Any], fields: str) -> None:
    """Raise UsageError for the first of `fields`, separated by spaces, whose value is below `least`
    or not finite. A `section` of "" has no name."""
    for name in fields.split():
        if not least <= (value := values[name]) < math.inf:  # also false for NaN
            name = f"{section}.{name}".lstrip(".")
            raise UsageError(f"{name}={value} is below {least}; use a finite number ≥ {least}")


def above_zero(section: str, values: dict[str, Any], fields: str) -> None:
    """Raise UsageError for the first of `fields`, separated by spaces, whose value is not positive
    or not finite."""
    for name in fields.split():
        if not 0 < (value := values[name]) < math.inf:
            name = f"{section}.{name}".lstrip(".")
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
