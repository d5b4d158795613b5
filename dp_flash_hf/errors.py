"""What goes wrong, by who can fix it. Wrong arguments raise ValueError, in the words of `invalid`."""

from __future__ import annotations


class PrivacyError(RuntimeError):
    """A promise of the library would have been broken, or cannot be shown to hold; nothing was released.

    Raised where a computation would not be private: gradients that escaped clipping, units that see each other, a spend log
    that cannot be written. The message says what was found and what to do about it.
    """


class UnsupportedError(ValueError):
    """What was asked for cannot be trained privately as it is; the message says what to change.

    Raised for models, settings and data of kinds that the library refuses by name: batch normalisation, several trainers at
    once, a dataset without a length.
    """


def invalid(name: str, *, expected: object, actual: object, remedy: str) -> ValueError:
    """The error for a bad argument, for the caller to raise: its name, what was expected, what came, and what to do.

    >>> invalid("target_delta", expected="0 < target_delta < 1", actual=2.0, remedy="use less than 1 / dataset size")
    ValueError('target_delta: expected 0 < target_delta < 1, got 2.0; use less than 1 / dataset size')

    Args:
        name: of the argument, as the caller wrote it.
        expected: which values are allowed.
        actual: the value that came, shown by `repr`.
        remedy: what this user can do, as an instruction.
    """
    return ValueError(f"{name}: expected {expected}, got {actual!r}; {remedy}")
