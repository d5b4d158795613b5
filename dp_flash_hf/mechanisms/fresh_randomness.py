"""Secret random numbers for what a private step computes: dropout, masked tokens, augmentation.

Such numbers usually come from generators that were seeded with a public number, and go on from step to step. Whoever knows the
seed then knows every mask, and one row more shifts the masks of all others, in this step and in those after it: the sum moves
by far more than the clipping bound, and a generator's state, saved with a checkpoint, tells how much was drawn. With numbers
that are secret and start afresh, others' masks are distributed alike with the row and without it; `docs/concepts/randomness.md`
has the proof.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dp_flash_hf.mechanisms.generators import fresh_generator

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# How far `own_generators` looks: transforms are nested a few levels deep, and long lists hold data.
_DEPTH, _ITEMS = 6, 64
_OPAQUE = (str, bytes, int, float, complex, type(None), type, types.ModuleType, Tensor, nn.Module, np.ndarray, torch.device)


@contextmanager
def fresh_randomness(
    devices: Sequence[torch.device] = (), *, own: Sequence[Generator] = (), seed: int | None = None, stream: str = ""
) -> Iterator[None]:
    """Within the context, random numbers start from the operating system's entropy; afterwards all is as it was.

    So it is for torch's default generators of the CPU and of `devices`, numpy's and Python's, and for the generators in `own`.
    Nothing that is drawn inside can be foreseen from a public seed, or read off a state that is saved later. A process that is
    forked before the context draws numbers of its own in it. Contexts may be nested.

    On the CPU, and for numpy and Python, a start has at least 256 bits; on a GPU, where torch keeps a seed of 64 bits, 64.
    It waits for no device.

    Args:
        devices: accelerators whose default generators the computation uses.
        own: further generators, of a collator, say; see `own_generators`.
        seed: for tests: random numbers that are repeated wherever seed and stream are. Whoever knows it knows them.
        stream: with a seed, what is computed, so that different steps draw different numbers.

    Raises:
        PrivacyError: a version of torch whose CPU generator cannot be filled.
    """
    with repeated_randomness(devices, own=own):
        torch.set_rng_state(fresh_generator(seed=seed, stream=f"{stream} torch cpu").get_state())
        for device in devices:
            made = fresh_generator(device, seed=seed, stream=f"{stream} torch {device}")
            _module(device).set_rng_state(made.get_state(), *_named(device))
        np.random.seed(_words(seed, f"{stream} numpy"))
        random.seed(_number(seed, f"{stream} python"))
        for place, generator in enumerate(own):
            _reseed(generator, seed, f"{stream} own {place}")
        yield


@contextmanager
def repeated_randomness(devices: Sequence[torch.device] = (), *, own: Sequence[Generator] = ()) -> Iterator[None]:
    """At the end of the context, all these generators are again where they were at its beginning.

    What is computed after it draws the same numbers as what was computed in it, in the same order.

    Args:
        devices: accelerators whose default generators count beside torch's on the CPU, numpy's and Python's.
        own: further generators.
    """
    with ExitStack() as put_back:
        put_back.callback(torch.set_rng_state, torch.get_rng_state())
        for device in devices:
            state = _module(device).get_rng_state(*_named(device))
            put_back.callback(_module(device).set_rng_state, state, *_named(device))
        put_back.callback(np.random.set_state, np.random.get_state(legacy=False))
        put_back.callback(random.setstate, random.getstate())
        for generator in own:
            _put_back_later(put_back, generator)
        yield


def same_randomness(owner: object, devices: Sequence[torch.device] = ()) -> AbstractContextManager[None]:
    """Within the context, random numbers are the same in every run and on every rank; afterwards all is as it was.

    For looks at data and model outside of steps, which must not show in generators' states and have to find the same whenever
    they are repeated.

    Args:
        owner: whose own generators count too, see `own_generators`.
        devices: as of `fresh_randomness`.
    """
    return fresh_randomness(devices, own=own_generators(owner), seed=0, stream="a look")


def own_generators(owner: object) -> list[Generator]:
    """The random generators that an object holds, in the order in which they are found.

    Looked through are its attributes, theirs, and what functions, partial functions and methods are bound to or name, six
    levels deep. Not seen: generators in compiled code, in slots, in lists of more than 64 items, in globals that the methods of
    a class name, and those that are made anew at every call. `random.SystemRandom` is left out: it has no state, and is
    secret already.

    >>> [type(found).__name__ for found in own_generators(functools.partial(print, np.random.default_rng(0)))]
    ['Generator']

    Args:
        owner: a collator, a transform, a dataset. Of a model, only attributes of its modules, and what stands in their lists.
    """
    found: dict[int, Generator] = {}
    seen: dict[int, object] = {}  # keeps them alive, for a number is an object's only while it lives

    def look(value: Any, depth: int) -> None:
        if isinstance(value, _KINDS):
            if not isinstance(value, random.SystemRandom):
                found[id(value)] = value
            return
        if depth == 0 or id(value) in seen or isinstance(value, _OPAQUE):
            return
        seen[id(value)] = value
        for part in _parts(value):
            look(part, depth - 1)

    if isinstance(owner, nn.Module):
        for module in owner.modules():
            for value in vars(module).values():
                look(value, 1)
    else:
        look(owner, _DEPTH)
    return list(found.values())


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if len(value) <= _ITEMS:
            yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        if len(value) <= _ITEMS:
            yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    else:
        if isinstance(value, types.FunctionType):
            yield from (value.__globals__.get(name) for name in value.__code__.co_names)
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # a variable that has no value yet
                    yield cell.cell_contents
        yield from getattr(value, "__dict__", {}).values()


def _put_back_later(put_back: ExitStack, generator: Generator) -> None:
    if isinstance(generator, torch.Generator):
        put_back.callback(generator.set_state, generator.get_state())
    elif isinstance(generator, np.random.Generator):
        put_back.callback(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    elif isinstance(generator, np.random.RandomState):
        put_back.callback(generator.set_state, generator.get_state(legacy=False))
    else:
        put_back.callback(generator.setstate, generator.getstate())


def _reseed(generator: Generator, seed: int | None, stream: str) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(fresh_generator(generator.device, seed=seed, stream=stream).get_state())
    elif isinstance(generator, np.random.Generator):
        bits: Any = type(generator.bit_generator)
        generator.bit_generator.state = bits(_words(seed, stream)).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(_words(seed, stream))
    else:
        generator.seed(_number(seed, stream))


def _number(seed: int | None, stream: str) -> int:
    """256 bits of the operating system, or of a seed for tests."""
    return int.from_bytes(os.urandom(32) if seed is None else hashlib.sha256(repr((seed, stream)).encode()).digest(), "little")


def _words(seed: int | None, stream: str) -> list[int]:
    """The same as eight numbers of 32 bits, which is what numpy takes."""
    number = _number(seed, stream)
    return [number >> 32 * place & 0xFFFFFFFF for place in range(8)]


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _named(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # of which there is only one
