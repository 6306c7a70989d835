"""Numbers that users pass: each check is one line where it is needed, and every message has one form."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

from .errors import ConfigurationError

_COUNTABLE = 2**63 - 1  # what torch can count to
_LONG = 100  # characters of a value that a message may show


def real(name: str, value: Any, wanted: str, fits: Callable[[float], bool], remedy: str = "") -> float:
    """A finite number, of Python or numpy.

    Args:
        name: Of the argument, as the user knows it.
        value: What was passed.
        wanted: What it must be, for the message.
        fits: Whether a finite number is that.
        remedy: More of the message: why, or what to do.

    Returns:
        The number.

    Raises:
        ConfigurationError: If it is anything else.
    """
    number = _finite(value)
    if number is None or not fits(number):
        raise ConfigurationError(f"{name} must be {wanted}, not {shown(value)}{remedy}.")
    return number


def positive(name: str, value: Any, wanted: str = "a finite number greater than 0") -> float:
    """A finite number above 0; arguments as for `real`."""
    return real(name, value, wanted, lambda number: number > 0)


def whole(name: str, value: Any, wanted: str, least: int = 0, most: int = _COUNTABLE, remedy: str = "") -> int:
    """A whole number from ``least`` to ``most``; other arguments as for `real`, numpy's integers as well."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ConfigurationError(f"{name} must be {wanted}, not {shown(value)}{remedy}.")
    return int(value)


def is_word(value: Any, words: Collection[str]) -> bool:
    """Whether a value is one of some words; an array or a list is none, and is not compared with them."""
    return isinstance(value, str) and value in words


def flag(name: str, value: Any) -> bool:
    """True or False, also of numpy; what only has a truth value, as the text ``"False"``, is neither."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ConfigurationError(f"{name} must be True or False, not {shown(value)}.")
    return bool(value)


def losses_of(name: str, value: Any, returns: str) -> None:
    """Refuse what is no function that computes losses, such as a class of criteria in place of a criterion."""
    if isinstance(value, type):
        raise ConfigurationError(f"{name} is the class {value.__name__}; pass an instance: {value.__name__}().")
    if not callable(value):
        raise ConfigurationError(f"{name} must be a function that returns {returns}, not {shown(value)}.")


def shown(value: Any) -> str:
    """A value as a message shows it: by its type, where more would not be read."""
    if isinstance(value, int) and value.bit_length() > 63:
        return f"{'-' * (value < 0)}2^{value.bit_length() - 1} or more"  # Python writes out no integer of 4301 digits
    if type(value).__repr__ is object.__repr__ or len(text := repr(value)) > _LONG:
        return f"a {type(value).__name__}"
    return text


def _finite(value: Any) -> float | None:
    if type(value) is float:  # mostly so, in every step; the look at other kinds takes longer
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float is as large as
        return None
    return number if math.isfinite(number) else None
