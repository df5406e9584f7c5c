"""Checks of numbers: each names the argument, the expected range and the value."""

from __future__ import annotations

import math
import numbers
from typing import SupportsInt


def check_number(name: str, value: float) -> None:
    """Raise unless ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def finite(name: str, value: float) -> None:
    """A finite number that is not negative."""
    check_number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def real(name: str, value: float) -> None:
    """A finite number."""
    check_number(name, value)
    if not abs(value) < math.inf:  # as isfinite, but torch.compile may make the value a symbol
        raise ValueError(f"{name} must be finite, got {value}")


def unit_interval(name: str, value: float) -> None:
    """A number in 0..1."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in 0..1, got {value}")


def as_int(name: str, value: SupportsInt) -> int:
    """An int, also where it comes as one of NumPy's."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def check_range(name: str, value: SupportsInt, limit: int) -> int:
    """The int that ``value`` is; raise unless ``0 <= value < limit``."""
    number = as_int(name, value)
    if not 0 <= number < limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}, got {number}")
    return number
