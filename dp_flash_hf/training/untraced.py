"""How checks compute: without a trace in what is trained, with random numbers that are repeated, and in full precision."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dp_flash_hf.distributed import accelerators, device_of
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.layers.gradient_records import full_precision
from dp_flash_hf.mechanisms.fresh_randomness import fresh_randomness, own_generators, repeated_randomness
from dp_flash_hf.training.adapter import TrainingAdapter


@contextmanager
def untraced(engine: ClippingEngine, adapter: TrainingAdapter) -> Iterator[None]:
    """Within the context anything may be computed with the model; afterwards training goes on as if nothing had been.

    Put back are `.grad`, sums and counts of the engine, buffers of the model, metrics of the trainer, and the states of the
    global random generators of torch (on all devices of the model), numpy and Python. What the user's own code writes down
    while it computes a loss stays written.
    """
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    with adapter.without_metrics(), engine.aside(), repeated_randomness(accelerators(engine.parameters)):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in engine.model.named_buffers():
                    buffer.copy_(buffers[name])


class Repeated:
    """Contexts in which all random generators begin at a seed, those that the model holds too.

    Args:
        engine: of the model, in which generators are looked for once: that takes longer than a small forward pass.
    """

    def __init__(self, engine: ClippingEngine) -> None:
        self._devices, self._own = accelerators(engine.parameters), own_generators(engine.model)

    @contextmanager
    def from_seed(self, seed: int) -> Iterator[Callable[[], list[bytes]]]:
        """Within the context they begin there.

        Yields:
            A function that says where the global ones stand: what draws as many numbers leaves them at the same place. Code
            that draws more of them for other data moves the numbers that come later, which couples nobody while numbers are
            secret.
        """
        devices = self._devices
        with fresh_randomness(devices, own=self._own, seed=seed, stream="a check"):
            yield lambda: [
                torch.get_rng_state().numpy().tobytes(),
                *(torch.get_device_module(device).get_rng_state(device).numpy().tobytes() for device in devices),
                pickle.dumps((random.getstate(), np.random.get_state())),
            ]


@contextmanager
def without_autocast(engine: ClippingEngine) -> Iterator[None]:
    """Within the context the model computes in the precision of its parameters, whatever autocast the trainer or model enters.

    A term that is as small as the rounding of bfloat16 is seen then. Autocast is entered inside the user's code, so it is
    turned off around every operation instead; compiled code is left as it is, call this within `ClippingEngine.eagerly`.
    """
    device = device_of(next(iter(engine.parameters)))
    with ExitStack() as stack:
        stack.enter_context(full_precision(device))
        stack.enter_context(_WithoutAutocast(device.type))
        yield


class _WithoutAutocast(TorchFunctionMode):
    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch.autocast(self._device_type, enabled=False):
            return func(*args, **(kwargs or {}))


def rounds_within(seconds: float, *, least: int, most: int, late_anywhere: Callable[[bool], bool] = bool) -> Iterator[int]:
    """The numbers of the rounds of a check, from 0: until so many seconds have passed, `least` and at most `most` of them.

    Args:
        seconds, least, most: as said.
        late_anywhere: whether this rank or another one is late, where all have to do the same rounds.
    """
    begun = time.monotonic()
    for number in range(most):
        if number >= least and late_anywhere(time.monotonic() - begun > seconds):
            return
        yield number
