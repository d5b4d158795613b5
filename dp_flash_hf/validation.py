"""Checks of arguments, each of which raises the ValueError of `errors.invalid` or returns nothing."""

from __future__ import annotations

import math
from collections.abc import Collection

from dp_flash_hf.errors import invalid


def is_number(value: object) -> bool:
    """Whether this is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole_number(value: object, *, least: int = 1) -> bool:
    """Whether this is an int of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole_number(name: str, value: object, *, remedy: str, least: int = 1) -> None:
    """Raise ValueError unless `value` is an int of at least `least`.

    >>> whole_number("steps", 3, remedy="set max_steps")
    >>> whole_number("steps", 0.5, remedy="set max_steps")
    Traceback (most recent call last):
    ValueError: steps: expected a whole number >= 1, got 0.5; set max_steps
    """
    if not is_whole_number(value, least=least):
        raise invalid(name, expected=f"a whole number >= {least}", actual=value, remedy=remedy)


def positive(name: str, value: object, *, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not (is_number(value) and 0 < value < math.inf):  # type: ignore[operator]
        raise invalid(name, expected="a finite number above 0", actual=value, remedy=remedy)


def non_negative(name: str, value: object, *, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number, 0 or above."""
    if not (is_number(value) and 0 <= value < math.inf):  # type: ignore[operator]
        raise invalid(name, expected="a finite number >= 0", actual=value, remedy=remedy)


def delta(name: str, value: object, *, remedy: str = "use well below 1 / units") -> None:
    """Raise ValueError unless `value` is the delta of a guarantee: above 0 and below 1."""
    if not (is_number(value) and 0 < value < 1):  # type: ignore[operator]
        raise invalid(name, expected="0 < delta < 1", actual=value, remedy=remedy)


def rate(name: str, value: object, *, remedy: str) -> None:
    """Raise ValueError unless `value` is a sampling rate: above 0 and at most 1."""
    if not (is_number(value) and 0 < value <= 1):  # type: ignore[operator]
        raise invalid(name, expected="0 < rate <= 1", actual=value, remedy=remedy)


def one_of(name: str, value: object, choices: Collection[str], *, remedy: str = "choose one of them") -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise invalid(name, expected=f"one of {', '.join(choices)}", actual=value, remedy=remedy)
