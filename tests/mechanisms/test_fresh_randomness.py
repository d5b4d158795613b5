"""Random numbers of a private step: secret, never repeated, and gone afterwards."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dp_flash_hf.mechanisms.fresh_randomness import fresh_randomness, own_generators, repeated_randomness, same_randomness

OWN: dict[str, Callable[[], Any]] = {
    "torch": torch.Generator,
    "numpy": lambda: np.random.default_rng(0),
    "numpy, another kind": lambda: np.random.Generator(np.random.Philox(0)),
    "numpy, the old kind": lambda: np.random.RandomState(0),
    "python": lambda: random.Random(0),
}


def drawn(own: Any = None) -> tuple[Any, ...]:
    """Numbers of every kind of generator."""
    from_own: Any = None
    if isinstance(own, torch.Generator):
        from_own = torch.rand((), generator=own).item()
    elif own is not None:
        from_own = own.random()
    return torch.rand(()).item(), np.random.random(), random.random(), from_own


@pytest.mark.parametrize("kind", OWN)
def test_numbers_are_fresh_inside_and_all_is_as_before_afterwards(kind: str) -> None:
    """Though the generators begin alike, as with a public seed; also when the computation fails."""
    inside, after = [], []
    for fails in (False, True):
        own = OWN[kind]()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            with fresh_randomness(own=[own]):
                inside.append(drawn(own))
                if fails:
                    raise KeyError
        except KeyError:
            pass
        after.append(drawn(own))
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    assert after[0] == after[1] == drawn(OWN[kind]())
    assert all(a != b for a, b in zip(*inside, strict=True))
    assert all(a != b for a, b in zip(inside[0], after[0], strict=True))


@pytest.mark.parametrize("kind", OWN)
def test_a_seed_repeats_a_stream_and_no_other(kind: str) -> None:
    found = []
    for seed, stream in ((1, "a"), (1, "a"), (1, "b"), (2, "a")):
        with fresh_randomness(own=[own := OWN[kind]()], seed=seed, stream=stream):
            found.append(drawn(own))
    assert found[0] == found[1]
    assert len({number for numbers in found for number in numbers}) == 3 * 4  # nor do two generators draw the same


@pytest.mark.parametrize("kind", OWN)
def test_what_is_computed_again_draws_the_same(kind: str) -> None:
    own = OWN[kind]()
    with repeated_randomness(own=[own]):
        first = drawn(own)
    assert drawn(own) == first


def test_a_forked_process_repeats_nothing() -> None:
    """Both go on from the same memory, as workers do that are forked one after the other."""
    reader, writer = os.pipe()
    child = os.fork()
    with fresh_randomness():
        numbers = repr(drawn()[:3]).encode()
    if child == 0:
        os.write(writer, numbers)
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reader, 1000)
    assert theirs
    assert set(theirs.strip(b"()").split(b", ")).isdisjoint(numbers.strip(b"()").split(b", "))


def test_looks_at_data_are_alike_everywhere() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        own = np.random.default_rng(seed)
        with same_randomness([own]):
            found.append(drawn(own))
    assert found[0] == found[1]


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def method(self) -> None: ...


GLOBAL = np.random.default_rng(0)


def uses_a_global() -> float:
    return GLOBAL.random()


def closure(own: Any) -> Callable[[], Any]:
    return lambda: own


@pytest.mark.parametrize(
    "within",
    [
        Holder,
        lambda own: Holder(Holder({"transforms": [Holder(own)]})),
        lambda own: functools.partial(print, generator=own),
        lambda own: Holder(own).method,
        closure,
        lambda own: torch.nn.Sequential(torch.nn.Sequential(_module(own))),
    ],
)
def test_generators_are_found(within: Callable[[Any], Any]) -> None:
    own = torch.Generator()
    assert own_generators(within(own)) == [own]


def _module(own: Any) -> torch.nn.Module:
    module = torch.nn.Linear(1, 1)
    module.own = own
    return module


def test_a_global_generator_is_found_and_what_has_no_state_is_left_alone() -> None:
    assert own_generators(uses_a_global) == [GLOBAL]
    assert own_generators(Holder(random.SystemRandom())) == []
    itself = Holder(None)
    itself.value = itself
    assert own_generators(itself) == []
