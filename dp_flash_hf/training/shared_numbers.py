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
_KEYS = 2**32  # whole numbers of such a range are keys of generators that count by row, as in attention's dropout
_ALMOST_ONE = 1 - 2.0**-8  # in bfloat16, too

Draw = tuple[str, tuple[int, ...]]  # function and shape of its result


def shares_random_numbers(
    engine: ClippingEngine, loss: UnitLoss, batch: dict[str, Any], units: Units, *, tolerance: float
) -> bool:
    """Whether gradients of this batch depend, in training mode, on random numbers that its units share.

    Shared are numbers of torch that are drawn as often for all units as for one of them, and whatever is drawn from numpy's and
    Python's generators, of which that is not known. They are exchanged, with all others repeated, and a norm that moves tells
    that they matter. Not seen: numbers of generators that the model holds itself.

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
            np.random.seed(number)
            random.seed(number)
            with _Draws(devices, shared, number):
                engine.backward(loss, batch, units)
        engine.withhold_sums()
        return engine.norms.double()

    with training_mode(engine.model, True), engine.eagerly():
        whole, alone = drawn(batch), drawn(select_unit(batch, units, 0))
        shared = frozenset(draw for draw, times in whole.items() if draw in alone and times < units.n * alone[draw])
        one, other = norms(0, shared), norms(1, shared)
    return bool(((one - other).abs() > tolerance * torch.maximum(one, other)).any())


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
            low, high = args[1:3] if name.startswith("uniform") and len(args) > 2 else (0.0, 1.0)
            return out.fill_(low + (high - low) * _ALMOST_ONE * self._number)
        with repeated_randomness(self._devices):
            torch.manual_seed(self._number + 2 * self.seen[draw])
            return func(*args, **kwargs)
