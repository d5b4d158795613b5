"""The passes that find out where each layer keeps which unit.

A model runs on a whole batch, on every unit alone, and on the batch perturbed, without dropout and without a backward pass; the
recorder's layouts compare what its layers see. How, `layers.layout_inference.Layouts` says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dp_flash_hf.distributed import Shards, device_of
from dp_flash_hf.layers.logits import Logits
from dp_flash_hf.layers.recorder import Recorder
from dp_flash_hf.layers.tracking import Tracked
from dp_flash_hf.units import IGNORED, Batch, Select, Units, inner_sizes, select_items, selector, subset

# Noise on activations, in standard deviations, of every value by itself and of all rows alike, in the passes that show which
# shapes follow the data: the first scatters rows over a router's choices, the second sends them all to one. With one more token
# masked and one label ignored, and without: a batch without padding may take another way through the model.
PERTURBATIONS = tuple((each, alike, masked) for masked in (True, False) for each, alike in ((3.0, 0.0), (1.0, 10.0)))


class LayoutProbe:
    """Learns the layouts of a model's layers by running it, for a recorder.

    What is learnt is used for batches of the same kind (rows or tokens) whose sizes lie between those of probed ones. For one
    whose sizes do not it is extended, by three passes over two units (`extend`); and where these cannot tell, or an input came
    in a shape that does not fit what was learnt, all of the batch is probed. A layer whose layout stays uncertain computes as
    without the library, and the gradient that autograd then leaves on its parameters tells the engine: a wrong guess is
    impossible, a missing one costs time.

    Args:
        model: runs in evaluation mode while it is probed; modes and random states are put back.
        parameters: the trained ones.
        modules: those attached to the recorder.
        recorder: whose `layouts` are taught.
        shards: ranks of a sharded model probe at once.

    Attributes:
        lean: whether the passes keep nothing for a backward pass; False once the loss needed one.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Collection[nn.Parameter],
        modules: Sequence[nn.Module],
        recorder: Recorder,
        shards: Shards,
    ) -> None:
        self._model, self._parameters, self._modules = model, parameters, modules
        self._recorder, self._shards = recorder, shards
        self.lean = True

    def knows(self, batch: Batch, units: Units) -> bool:
        """Whether the layouts of such a batch are known, or need not be; see `Layouts.knows`."""
        return self._recorder.layouts.knows(units, inner_sizes(batch, units))

    def probe(self, forward: Callable[[Any], Any], batch: Batch, select: Select, units: Units) -> None:
        """Learn the layouts of such a batch: as many forward passes as it has units, and about six more.

        On ranks of a sharded model the batch of each that has something to learn is sent to all, and all learn from it.

        Args:
            forward: batch -> anything; calls the model.
            batch: of these units.
            select: (batch, unit) -> that unit's batch.
            units: whose layouts are learnt.
        """
        if not self._shards:
            self._probe(forward, batch, select, units)
            return
        if self._recorder.layouts.inconclusive:
            self._recorder.layouts.forget()
        for rank in range(self._shards.ranks.size):
            if self._shards.ranks.gathered(self.knows(batch, units))[rank]:
                continue
            theirs, their_units = self._shards.ranks.shared((_to(batch, torch.device("cpu")), units), rank)
            here = _to(theirs, device_of(next(iter(self._parameters))))
            self._probe(forward, here, selector(their_units), their_units)
        self.knows(batch, units)

    def extend(self, forward: Callable[[Any], Any], batch: Batch, units: Units) -> bool:
        """Extend what is known to a batch of other sizes, by a pass over two of its units, and one over each of these.

        On sharded models, whose ranks would have to agree on two units, and where it cannot tell: nothing.

        Args:
            forward, units: as of `probe`.
            batch: laid out by rows or tokens.

        Returns:
            Whether the batch is known now.
        """
        layouts = self._recorder.layouts
        chosen = _unlike(batch, units)
        if self._shards or chosen is None or not layouts.extensible(units):
            return False
        items = torch.isin(units.of_item, chosen).nonzero().flatten()
        two = subset(units, items)
        try:
            with self._watching(two):
                self._compare(forward, select_items(batch, units, items), selector(two), two)
                layouts.extend()
        except (ValueError, IndexError, RuntimeError):  # a model may ask for a certain number of rows
            return False
        return self.knows(batch, units)

    def forget(self) -> None:
        """Learn again from the next batch: the last one came in shapes whose layout is not proven."""
        self._recorder.layouts.forget()

    def _probe(self, forward: Callable[[Any], Any], batch: Batch, select: Select, units: Units) -> None:
        if units.is_single:
            return
        again = True
        while again:  # what is the same for all units leads to more operations
            try:
                again = self._observe(forward, batch, select, units)
            except RuntimeError as error:
                if not self.lean or "saved tensor" not in str(error):
                    raise
                self.lean = False  # the loss takes gradients itself, or the model transforms functions

    def _observe(self, forward: Callable[[Any], Any], batch: Batch, select: Select, units: Units) -> bool:
        """All passes once. True if more is to be learnt now, see `Layouts.conclude`."""
        layouts = self._recorder.layouts
        with self._watching(units):
            self._compare(forward, batch, select, units)
            for *noise, masked in PERTURBATIONS:
                layouts.perturb()
                with self._perturbed_outputs(noise):
                    try:
                        forward(_perturbed_inputs(noise, batch, masked=masked))
                    except (ValueError, IndexError, RuntimeError):  # a value that stood for a place, a mark for a picture
                        layouts.restart()
                        forward(_perturbed_inputs(noise, batch, masked=False, whole=False))
            layouts.shorten()
            for names in ({*batch}, {name for name in batch if "ids" not in name}) if units.kind == "rows" else ():
                try:
                    forward(_shortened(batch, units, names))
                    break
                except (ValueError, IndexError, RuntimeError):  # a text without its end, say, is not always allowed
                    layouts.restart()
            return layouts.conclude()

    def _compare(self, forward: Callable[[Any], Any], batch: Batch, select: Select, units: Units) -> None:
        """The pass over all of a batch, and those over each of its units."""
        self._recorder.layouts.observe(units, inner_sizes(batch, units))
        forward(batch)
        for unit in range(units.n):
            if units.sizes[unit]:
                self._recorder.layouts.compare(unit)
                forward(select(batch, unit))

    @contextmanager
    def _watching(self, units: Units) -> Iterator[None]:
        """Within the context layers report what they see to the layouts, without dropout; graphs keep nothing if `lean`."""
        devices = {device_of(p) for p in self._parameters} - {torch.device("cpu")}
        try:
            with torch.random.fork_rng(list(devices)), training_mode(self._model, False):
                torch.manual_seed(0)  # the same perturbations on all ranks
                self._recorder.start("learn", units)
                with _graphs_without_values() if self.lean else nullcontext():
                    yield
        finally:
            self._recorder.stop()

    @contextmanager
    def _perturbed_outputs(self, noise: Sequence[float]) -> Iterator[None]:
        """Within the context every attached module's output has noise on it."""
        hooks = [module.register_forward_hook(partial(_perturbed, noise)) for module in self._modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _unlike(batch: Batch, units: Units) -> Tensor | None:
    """Two units (2,), with the least and the most that masks and labels count: without padding a model may take another way.

    Units without a label come last, of which a loss may compute nothing. None where every unit is needed: with fewer than three
    that have rows, and of tokens.
    """
    owned = torch.tensor(units.sizes) > 0
    if units.kind != "rows" or int(owned.sum()) < 3:
        return None
    counts, ignored = torch.zeros(2, units.n_items)
    for value in batch.values():
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != units.n_items or value.is_floating_point():
            continue
        has_ignored = bool((value == IGNORED).any())
        if has_ignored or bool(((value == 0) | (value == 1)).all()):
            counted = ((value != 0) & (value != IGNORED)).flatten(1).sum(1).cpu()
            counts += counted
            ignored += (counted == 0) & has_ignored
    labelled = torch.zeros(units.n, dtype=torch.bool)
    labelled[units.of_item[(ignored == 0) & (units.of_item >= 0)]] = True
    kept = owned & labelled if int((owned & labelled).sum()) > 1 else owned
    mine = units.of_item >= 0
    order = torch.zeros(units.n).index_add_(0, units.of_item[mine], counts[mine]).argsort(stable=True)
    return order[kept[order]][[0, -1]]


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or evaluation mode; afterwards each in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _graphs_without_values() -> Iterator[None]:
    """Forward passes within know what requires gradients, and keep nothing for backward, which raises RuntimeError."""

    def missing(nothing: None) -> Tensor:
        raise RuntimeError("a saved tensor was not kept")

    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, missing):
        yield


def _to(batch: Batch, device: torch.device) -> Batch:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, dict(batch))  # type: ignore[no-any-return]


def _perturbed(noise: Sequence[float], module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or isinstance(output, Tracked) or not output.is_floating_point():
        return output
    if isinstance(output, Logits):
        return output.later(partial(_with_noise, noise))
    return _with_noise(noise, output)


def _perturbed_inputs(noise: Sequence[float], batch: Batch, *, masked: bool, whole: bool = True) -> dict[str, Any]:
    """Inputs with noise; if masked, with one token of a row masked and one label ignored, whatever the tensors are called.

    A router acts on the first, a model that drops padding on the second, a head for labelled positions only on the third.
    whole: whether whole numbers get noise, too; they may stand for places in a table.
    """
    out = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if value.is_floating_point():
            noisy = _with_noise(noise, value)
            out[name] = noisy if whole else torch.where(value == value.round(), value, noisy)
        elif masked and bool((value == IGNORED).any()):
            out[name] = _without_last(value, value != IGNORED, IGNORED)
        elif masked and bool(((value == 0) | (value == 1)).all()):
            answers = [batch[place] for place in ("start_positions", "end_positions") if place in batch]
            counted = value.bool()
            for answer in answers:
                counted[torch.arange(len(answer)), answer] = False
            out[name] = _without_last(value, counted, 0)
    return out


def _shortened(batch: Batch, units: Units, names: set[str]) -> dict[str, Any]:
    """The first row with one token less, in whatever way the inputs of these names say so.

    A model that sorts rows by it, or drops what is not counted, then moves the others.
    """
    out = dict(batch)
    if "start_positions" in batch:  # an answer must stay inside its text
        return out
    for name in names:
        value = batch[name]
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() == 0 or len(value) != units.n_items:
            continue
        if value.dim() == 1:
            if "label" not in name and "position" not in name and int(value[0]) > 1:
                out[name] = value.clone()
                out[name][0] -= 1
            continue
        lowest = min(int(value.min()), 0)
        counted = value[0] > lowest
        marks = lowest < 0 or bool((value <= 1).all()) or (name.endswith("input_ids") and bool((value == 0).any()))
        if marks and int(counted.sum()) > 1:
            out[name] = value.clone()
            out[name][(0, *counted.nonzero()[-1])] = lowest
    return out


def _without_last(value: Tensor, counted: Tensor, instead: int) -> Tensor:
    """A copy in which the last counted element of the row with most of them is another: some models need one in every row."""
    counts = counted.flatten(1).sum(1)
    row = int(counts.argmax())
    out = value.clone()
    if int(counts[row]) > 1:
        out[(row, *counted[row].nonzero()[-1])] = instead
    return out


def _with_noise(noise: Sequence[float], x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x
    each, alike = noise
    spread = x.detach().float().std(correction=0).to(x.dtype)
    return x + spread * (each * torch.randn_like(x) + alike * torch.randn(x.shape[-1:], dtype=x.dtype, device=x.device))
