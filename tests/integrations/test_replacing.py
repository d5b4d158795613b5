"""Changes of others' objects, and how they are undone."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from torch import nn

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.integrations.replacing import put_first, replace_attribute


class Owner(SimpleNamespace):
    of_class = 0


def test_an_attribute_is_restored_or_deleted_last_change_first() -> None:
    owner = Owner(own=1)
    with ExitStack() as undo:
        for name, value in (("own", 2), ("own", 3), ("of_class", 4)):
            replace_attribute(undo, owner, name, value)
        assert vars(owner) == {"own": 3, "of_class": 4}
    assert vars(owner) == {"own": 1}


def test_what_is_not_there_cannot_be_replaced() -> None:
    """Or a trainer that computes a norm of gradients under a new name would log it without noise."""
    owner = Owner(own=1)

    def change() -> None:
        with ExitStack() as undo:
            replace_attribute(undo, owner, "own", 2)
            replace_attribute(undo, owner, "renamed", 3)

    with pytest.raises(UnsupportedError, match="Owner has no renamed"):
        change()
    assert vars(owner) == {"own": 1}
    with ExitStack() as undo:
        replace_attribute(undo, owner, "new", 3, may_be_new=True)
        assert owner.new == 3
    assert vars(owner) == {"own": 1}


def test_what_is_gone_already_is_no_error() -> None:
    owner, items = Owner(), ["a"]
    with ExitStack() as undo:
        replace_attribute(undo, owner, "of_class", 1)
        put_first(undo, items, "b")
        del owner.of_class
        items.remove("b")
    assert vars(owner) == {}
    assert items == ["a"]


def test_a_change_that_fails_undoes_those_before_it() -> None:
    module = nn.Linear(2, 2)
    before = dict(vars(module))

    def change() -> None:
        with ExitStack() as undo:
            replace_attribute(undo, module, "forward", module.extra_repr)
            replace_attribute(undo, module, "weight", 1)  # torch refuses it

    with pytest.raises(TypeError):
        change()
    assert vars(module) == before


def test_a_stack_that_is_forgotten_undoes_nothing() -> None:
    """Or a callback that is held no more would silently give a trainer back without privacy."""
    owner = SimpleNamespace(own=1)
    undo = ExitStack()
    replace_attribute(undo, owner, "own", 2)
    del undo
    assert owner.own == 2


@pytest.mark.parametrize("items", [["x", "y"], ["y", "x"], ["y"], []])
def test_first_and_back_in_its_place(items: list[str]) -> None:
    before = list(items)
    with ExitStack() as undo:
        put_first(undo, items, "x")
        assert items[0] == "x"
        assert items.count("x") == 1
    assert items == before
