"""A model given to `torch.compile`: which batches run its compiled code, and what happens where that code shows too little."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipper import Clipper
from dp_flash_hf.engine.gradient_buffer import GradientBuffer
from dp_flash_hf.engine.physical_batch import LossFunction, PhysicalBatch
from dp_flash_hf.engine.strategies import UncoveredParametersError, shown_names
from dp_flash_hf.layers.compiled import CompiledLayers, is_compiled_function
from dp_flash_hf.layers.recorder import Recorder


class CompiledExecution:
    """Runs whole batches compiled where that is exact, and eagerly otherwise.

    It is exact on batches of rows if layers with a compiled variant (`layers.compiled`) hold all trained parameters and
    autograd sees no more of these than the layers do. A batch that shows otherwise is computed again eagerly, and so are all
    later ones.

    Attributes:
        found: whether the model, a part of it or a loss function it was given is compiled.
        runs: whether compiled code may still run: False once a batch showed that it is not exact.
    """

    def __init__(
        self,
        found: bool,
        layers: CompiledLayers,
        parameters: Mapping[nn.Parameter, str],
        recorder: Recorder,
        clipper: Clipper,
        buffer: GradientBuffer,
    ) -> None:
        self.found, self.runs = found, True
        self._parameters, self._layers, self._recorder = parameters, layers, recorder
        self._clipper, self._buffer = clipper, buffer

    def notice(self, loss_fn: LossFunction) -> None:
        """A loss function may be compiled, too."""
        self.found = self.found or is_compiled_function(loss_fn)

    def suspended(self) -> AbstractContextManager[Any]:
        """Within the context compiled code does not run, except inside `run`."""
        # Asking the compiler would import it, which takes seconds.
        return torch.compiler.set_stance("force_eager") if self.found else nullcontext()

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Within the context compiled code does not run."""
        before, self.runs = self.runs, False
        try:
            with self.suspended():
                yield
        finally:
            self.runs = before

    def run(self, add: Callable[[PhysicalBatch], Tensor], batch: PhysicalBatch) -> Tensor:
        """`add` the batch, compiled if that is exact. Raises what `add` raises when it runs eagerly."""
        if not self.found or not self.runs or batch.units.kind != "rows":
            return add(batch)
        uncovered = self._layers.uncovered()
        if uncovered:
            if self._recorder.layouts.learnt:
                self._give_up(uncovered)
            return add(batch)
        dropped = self._clipper.dropped_units
        try:
            with self._layers.recording(batch.units.n_items, self._clipper.like):
                return add(batch)
        except UncoveredParametersError as error:
            if not self._recorder.layouts.inconclusive:
                self._give_up(error.parameters)
        self._clipper.recount_from(dropped)
        self._buffer.clear_gradients()
        return add(batch)

    def _give_up(self, uncovered: set[nn.Parameter]) -> None:
        """No batch runs compiled from now on, because of these parameters."""
        self.runs = False
        names = sorted(self._parameters[p] for p in uncovered)
        warnings.warn(
            f"compiled code does not show how the model uses {shown_names(names)}: it runs eagerly from now on, exact but no "
            "faster than without torch.compile",
            stacklevel=2,
        )
