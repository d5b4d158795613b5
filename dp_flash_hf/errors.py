"""What goes wrong, by who can mend it."""

from __future__ import annotations


class PrivacyError(RuntimeError):
    """A promise of the library would have been broken; nothing was released."""


class UnsupportedError(ValueError):
    """What was asked for cannot be trained privately as it is; the message says what to change."""


def invalid(name: str, *, expected: object, actual: object, remedy: str) -> ValueError:
    """The error for a bad argument: its name, what was expected, what came, and what to do.

    >>> invalid("target_delta", expected="0 < target_delta < 1", actual=2.0, remedy="use less than 1 / dataset size")
    ValueError('target_delta: expected 0 < target_delta < 1, got 2.0; use less than 1 / dataset size')
    """
    return ValueError(f"{name}: expected {expected}, got {actual!r}; {remedy}")
