"""Random numbers that all units of a batch share, found before the first step.

Layer drop draws one number for a whole batch, and some models drop out what all rows use, like relative positions. Which units
share such a number depends on how a draw is split into physical batches, and so on who is in it: one unit more would change the
distribution of the others' gradients. `docs/concepts/randomness.md` says why that must not be; units that would share numbers
are computed one by one, each with its own.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dp_flash_hf.distributed import accelerators
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.mechanisms.fresh_randomness import repeated_randomness, same_randomness
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.units import Units, select_unit

_UNIFORM = {"rand", "rand_like", "uniform", "uniform_"}
_WHOLE = {"randint", "randint_like"}
_BERNOULLI = {"bernoulli", "bernoulli_"}
_KEYS = 2**32  # whole numbers of such a range are keys of generators that count by row, as in attention's dropout
# Words of the Mersenne twister, of which numpy and Python make uniform numbers: as they are kept, those of 32 zeros, or ones.
_FIRST_WORDS, _OF_ZEROS, _OF_ONES = 600, 0, 0x12DD9BB3

Draw = tuple[str, tuple[int, ...]]  # function and shape of its result


def shares_random_numbers(
    engine: ClippingEngine, loss: UnitLoss, batch: dict[str, Any], units: Units, *, tolerance: float
) -> bool:
    """Whether gradients of this batch depend, in training mode, on random numbers that its units share.

    Shared are numbers of torch that are drawn as often for all units as for one of them, and whatever is drawn from numpy's and
    Python's generators, of which that is not known. They are exchanged, with all others repeated, and a norm that moves tells
    that they matter. Uniform, Bernoulli and whole numbers are put to the one end of their range and then to the other, so that
    an event is found however rare it is, or its opposite; of numpy's and Python's, the first 300 are. Not seen: numbers of
    generators that the model holds itself.

    Args:
        engine: attached to the model; `.grad` is emptied.
        loss: a sum over units.
        batch: of several units; for one there is nothing to share.
        units: of its rows or tokens.
        tolerance: relative difference of norms.
    """
    if units.n < 2:
        return False
    devices = accelerators(engine.parameters)

    def drawn(inputs: dict[str, Any]) -> Counter[Draw]:
        draws = _Draws(devices)
        with same_randomness(engine.model, devices), torch.no_grad(), draws:
            loss(inputs)
        return draws.seen

    def norms(number: int, shared: frozenset[Draw]) -> Tensor:
        with same_randomness(engine.model, devices):
            _begin_others(number)
            with _Draws(devices, shared, number):
                engine.backward(loss, batch, units)
        engine.withhold_sums()
        return engine.norms.double()

    with training_mode(engine.model, True), engine.eagerly():
        whole, alone = drawn(batch), drawn(select_unit(batch, units, 0))
        shared = frozenset(draw for draw, times in whole.items() if draw in alone and times < units.n * alone[draw])
        one, other = norms(0, shared), norms(1, shared)
    # An end of their range may make numbers that are not finite, as logarithms of 0 in Gumbel noise: these matter, too.
    return not bool(((one - other).abs() <= tolerance * torch.maximum(one, other)).all())


class _Draws(TorchDispatchMode):
    """Counts what is drawn from torch's generators, and gives other values, by number, for those draws that are shared."""

    def __init__(self, devices: list[torch.device], shared: frozenset[Draw] = frozenset(), number: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[Draw] = Counter()
        self._devices, self._shared, self._number = devices, shared, number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "randint" and max(value for value in args if isinstance(value, int)) >= _KEYS:
            return func(*args, **kwargs)
        with repeated_randomness(self._devices):
            out = func(*args, **kwargs)
        draw = (name, tuple((out[0] if isinstance(out, tuple) else out).shape))
        self.seen[draw] += 1
        if draw not in self._shared:
            return func(*args, **kwargs)
        if name in _UNIFORM:
            ends: tuple[float, ...] = args[1:3] if name.startswith("uniform") else ()
            low, high = (*ends, *(0.0, 1.0)[len(ends) :])  # defaults are left out
            below_one = 1 - torch.finfo(out.dtype).eps / 2
            return out.fill_(low + (high - low) * below_one * self._number)
        if name in _WHOLE:
            *given, high = [value for value in args if isinstance(value, int)][:2]
            return out.fill_(high - 1 if self._number else given[0] if given else 0)
        if name in _BERNOULLI:
            probability = (*args[1:2], 0.5 if name == "bernoulli_" else args[0])[0]
            return out.copy_(_at_an_end(torch.as_tensor(probability), self._number))
        if name == "native_dropout":
            kept = _at_an_end(torch.tensor(1.0 - args[1]), self._number)
            return out[0].copy_(args[0] * kept / max(1.0 - args[1], 1e-30)), out[1].fill_(bool(kept))
        with repeated_randomness(self._devices):
            torch.manual_seed(self._number + 2 * self.seen[draw])
            return func(*args, **kwargs)


def _at_an_end(probability: Tensor, number: int) -> Tensor:
    """What is certain, and everywhere else 0 or 1 as the number is."""
    return torch.where((probability > 0) & (probability < 1), float(number), probability.float())


def _begin_others(number: int) -> None:
    """numpy's and Python's generators: their first uniform numbers are 0, or almost 1."""
    np.random.seed(number)
    random.seed(number)
    word = _OF_ONES if number else _OF_ZEROS
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    state["state"]["key"][:_FIRST_WORDS], state["state"]["pos"] = word, 0
    np.random.set_state(state)
    version, words, _ = random.getstate()
    random.setstate((version, (*[word] * _FIRST_WORDS, *words[_FIRST_WORDS:-1], 0), None))
