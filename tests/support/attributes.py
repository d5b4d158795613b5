"""Everything a trainer is, attribute by attribute, to compare before and after."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


def attributes(trainer: Any) -> dict[str, Any]:
    """Attributes of the trainer, of what it trains with, and of every module of its model, with what lists and dicts hold."""
    owners = {
        "trainer": trainer,
        "handler": trainer.callback_handler,
        "accelerator": trainer.accelerator,
        "arguments": trainer.args,
        "state": trainer.state,
        **{f"model {name}": module for name, module in trainer.model.named_modules()},
    }
    if trainer.optimizer is not None:
        owners["optimizer"] = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found: dict[str, Any] = {}
    for owner, value in owners.items():
        found[f"type of {owner}"] = type(value)
        for name, attribute in vars(value).items():
            found.update(_contents(f"{owner}.{name}", attribute))
    return found


def differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of those that differ, that are new, or that are gone."""
    names = before.keys() | after.keys()
    return {name for name in names if not _same(before.get(name, _ABSENT), after.get(name, _ABSENT))}


def _contents(name: str, value: Any) -> dict[str, Any]:
    """The value, and below it what it holds."""
    found = {name: value}
    if isinstance(value, dict):
        for place, (key, inner) in enumerate(value.items()):  # hooks are numbered through all of a process
            found.update(_contents(f"{name}[{place if isinstance(key, int) else key!r}]", inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            found.update(_contents(f"{name}[{place}]", inner))
    return found


def _same(one: Any, other: Any) -> bool:
    plain = (int, float, str, tuple, type(None), type)
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)
