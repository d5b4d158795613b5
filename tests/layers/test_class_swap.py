"""Swapping a module's class and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import nn

from dp_flash_hf.layers.class_swap import ClassSwap, take_off_mixin


class Plain(nn.Module):
    def forward(self) -> list[str]:
        return ["plain"]


class Below(Plain):
    """A subclass with a forward of its own."""

    def forward(self) -> list[str]:
        return ["below", *super().forward()]


class Rule(Plain):
    def forward(self) -> list[str]:
        return ["rule", *super().forward()]


class Mixin:
    def forward(self) -> list[str]:
        return ["mixin", *super().forward()]  # type: ignore[misc]


class Front:
    def forward(self) -> list[str]:
        return ["front", *super().forward()]  # type: ignore[misc]


def revive(original: type) -> Any:
    made: Any = REVIVED.derived(original, Mixin)
    return made.__new__(made)


REVIVED = ClassSwap(revive=revive)


@pytest.mark.parametrize(
    ("kind", "added", "order"),
    [
        (Plain, None, ["plain"]),
        (Plain, Rule, ["rule", "plain"]),
        (Below, Rule, ["below", "rule", "plain"]),
        (Plain, Mixin, ["mixin", "plain"]),
        (Below, Mixin, ["mixin", "below", "plain"]),
    ],
)
def test_whose_methods_come_first(kind: type[Plain], added: type | None, order: list[str]) -> None:
    module = kind()
    ClassSwap().put_on(module, added)
    assert module.forward() == order
    module = kind()
    ClassSwap(front=(Front,)).put_on(module, added)
    assert module.forward() == ["front", *order]


def test_a_swapped_module_looks_the_same_and_comes_back() -> None:
    swap, module = ClassSwap(), Below()
    assert not swap.is_on(module)
    assert swap.original_of(module) is None
    swap.put_on(module, Mixin)
    assert swap.is_on(module)
    assert swap.original_of(module) is Below
    assert (type(module).__name__, type(module).__module__) == (Below.__name__, Below.__module__)
    assert repr(module) == repr(Below())
    swap.take_off(module)
    assert type(module) is Below
    assert not swap.is_on(module)


def test_classes_are_made_once() -> None:
    swap = ClassSwap()
    assert swap.derived(Plain, Mixin) is swap.derived(Plain, Mixin)
    assert len({swap.derived(Plain, Mixin), swap.derived(Plain), swap.derived(Below, Mixin), ClassSwap().derived(Plain)}) == 4


def test_swaps_stack() -> None:
    top, module = ClassSwap(front=(Front,)), Plain()
    REVIVED.put_on(module, Mixin)
    top.put_on(module)
    assert module.forward() == ["front", "mixin", "plain"]
    assert REVIVED.is_on(module)
    assert REVIVED.original_of(module) is Plain
    assert top.original_of(module) is REVIVED.derived(Plain, Mixin)
    assert type(copy.deepcopy(module)) is type(module)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(module)
    top.take_off(module)
    assert module.forward() == ["mixin", "plain"]


def test_copies_and_pickles_by_the_original_class() -> None:
    module = Plain()
    module.weight = nn.Parameter()
    REVIVED.put_on(module, Mixin)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert other.forward() == ["mixin", "plain"]
        assert [name for name, _ in other.named_parameters()] == ["weight"]
    assert b"test_class_swap" in pickle.dumps(module)
    assert type(module).__name__ == "Plain"


def test_without_a_way_back_a_swapped_module_is_copied_but_not_pickled() -> None:
    swap, module = ClassSwap(), Plain()
    swap.put_on(module, Mixin)
    assert type(copy.deepcopy(module)) is type(module)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(module)


def test_instead_puts_back_whatever_other_swaps_had_made() -> None:
    """Also where the context ends with an error; the attached class does not run within it, as `put_on` would let it."""
    top, module, other = ClassSwap(front=(Front,)), Plain(), Below()
    REVIVED.put_on(module, Mixin)
    before = type(module)
    seen = []

    def failing() -> None:
        seen.extend([module.forward(), other.forward()])
        raise KeyError

    with pytest.raises(KeyError), top.instead({module: top.derived(Plain, Rule), other: top.derived(Below)}):
        failing()
    assert seen == [["front", "rule", "plain"], ["front", "below", "plain"]]
    assert type(module) is before
    assert type(other) is Below


def test_taking_off_what_others_put_on() -> None:
    """As `fully_shard` swaps classes: one for each original, with a mixin in front. A swap of ours below stays."""
    module = Plain()
    REVIVED.put_on(module, Mixin)
    ours = type(module)
    module.__class__ = type("FrontPlain", (Front, ours), {})
    assert module.forward() == ["front", "mixin", "plain"]
    take_off_mixin(module, Front)
    assert type(module) is ours
