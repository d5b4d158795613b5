"""A forward pass that somebody else runs, recorded as soon as it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_hf.engine.layout_probing import LayoutProbe
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.layers.recorder import Recorder
from dp_flash_hf.units import Batch, Units, selector


class RecordedForward:
    """The first forward pass with gradients in a block of `ClippingEngine.batch`.

    read: the inputs of the pass -> their units, and the factors of these. Positional inputs are called "argument 0" and so on.

    Attributes:
        units, scale: what `read` said, once the pass has begun.
    """

    def __init__(self, read: Callable[[Batch], tuple[Units, Tensor | None]], probe: LayoutProbe, recorder: Recorder) -> None:
        self.units: Units | None = None
        self.scale: Tensor | None = None
        self._read, self._probe, self._recorder = read, probe, recorder

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Within the context the pass is awaited. Raises PrivacyError where none came."""
        handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if self.units is None:
            raise PrivacyError("engine.batch: the model was not called inside it; run forward and backward inside the block")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.units is not None or not torch.is_grad_enabled():
            return
        inputs = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
        self.units, self.scale = self._read(inputs)
        units = self.units
        if not self._probe.knows(inputs, units):

            def forward(part: Batch) -> Any:
                return module(*(part[f"argument {i}"] for i in range(len(args))), **{name: part[name] for name in kwargs})

            if not self._probe.extend(forward, inputs, units):
                self._probe.probe(forward, inputs, selector(units), units)
        self._recorder.start("record", self.units)
