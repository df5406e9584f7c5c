"""Checks of numbers: each names the argument, the expected range and the value."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, SupportsInt, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


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


def hinted(otherwise: str = "", **hints: str) -> Callable[[F], F]:
    """Decorate a function: Python's error for arguments that do not fit its signature gets a hint.

    Args:
        otherwise: the hint where no argument of ``hints`` was given.
        hints: what to say by the name of an argument that the function does not have.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                hint = next((text for name, text in hints.items() if name in kwargs), otherwise)
                if not hint or _fit(function, args, kwargs):
                    raise
                raise TypeError(f"{error}: {hint}") from None

        return checked  # type: ignore[return-value]

    return decorate


def _fit(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function can be called with these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
