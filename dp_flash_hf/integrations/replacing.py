"""Changing objects of others so that it can be undone: every change notes on an `ExitStack` how to put back what was there.

The stack undoes the last change first, also where a later change failed, and nothing is undone before it is closed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from dp_flash_hf.errors import UnsupportedError

_ABSENT = object()


def replace_attribute(undo: ExitStack, owner: Any, name: str, value: Any, *, may_be_new: bool = False) -> None:
    """Give the object this attribute until `undo` is closed; then its own one is there again, or that of its class.

    Raises UnsupportedError if there is none to be replaced, unless it `may_be_new`: nothing would read it, and what it was to
    replace may go on under another name in that version.

    >>> class Lamp: colour = "white"
    >>> lamp = Lamp()
    >>> with ExitStack() as undo:
    ...     replace_attribute(undo, lamp, "colour", "red")
    ...     lamp.colour
    'red'
    >>> lamp.colour, vars(lamp)
    ('white', {})
    """
    if not (may_be_new or hasattr(owner, name)):
        raise UnsupportedError(
            f"{type(owner).__name__} has no {name}, which has to be replaced; use versions that dp-flash-hf is tested with "
            "(dp-flash doctor says which)"
        )
    undo.callback(_put_back, owner, name, vars(owner).get(name, _ABSENT))
    setattr(owner, name, value)


def put_first(undo: ExitStack, items: list[Any], item: Any) -> None:
    """Make the item the first of the list until `undo` is closed; then it is where it was before, or not in it.

    What others add to the list or take out of it meanwhile stays so.

    >>> callbacks = ["progress", "ours"]
    >>> with ExitStack() as undo:
    ...     put_first(undo, callbacks, "ours")
    ...     callbacks.append("theirs")
    ...     callbacks
    ['ours', 'progress', 'theirs']
    >>> callbacks
    ['progress', 'ours', 'theirs']
    """
    place = items.index(item) if item in items else None
    undo.callback(_move_back, items, item, place)
    if place is not None:
        items.remove(item)
    items.insert(0, item)


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is not _ABSENT:
        setattr(owner, name, before)
    elif name in vars(owner):
        delattr(owner, name)


def _move_back(items: list[Any], item: Any, place: int | None) -> None:
    if item in items:
        items.remove(item)
        if place is not None:
            items.insert(place, item)
