"""One architecture examined end to end: what the engine leaves in `.grad`, against the model's own loss on every row alone."""

from __future__ import annotations

import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dp_flash_hf.attention import usage
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.training.losses import UnitLoss, learn_loss
from dp_flash_hf.training.unit_checks import check_alone, check_training_mode
from dp_flash_hf.units import Units
from tests.support.models import Batch
from tests.support.oracle import clipped_sum, grads, total_norm, unit_gradients
from tests.support.zoo import NotBuiltError, Specimen, build

# Relative, of each parameter's own gradient. Many models compute norms, rotations or routing in float32 whatever their dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
FLOOR = 1e-3  # of the whole gradient: parameters far below it need not agree to as many digits

Verdict = Literal["fast", "microbatch", "one length", "refused", "inexact", "crash", "not built"]
Gradient = dict[str, Tensor]
_REFUSALS = (PrivacyError, UnsupportedError)


@dataclass(frozen=True)
class Examination:
    """What was found about one class for one task.

    attention: the implementation that was called, or why none was. slow: the parameters, or the reason, for which every unit
    was computed by itself; empty on the fast path. error: the largest relative deviation of a parameter's clipped sum or of a
    norm. refused: what a guard of the library said. one_length: whether it is refused only because padding is felt, and exact
    when every row is padded to one length. inputs: the tensors of the batch. problem: why the class fails the examination.
    frozen: how many parameters no loss reached.
    """

    task: str
    name: str
    attention: str = ""
    dtype: str = ""
    slow: str = ""
    error: float = 0.0
    refused: str = ""
    padding_felt: bool = False
    one_length: bool = False
    inputs: str = ""
    problem: str = ""
    not_built: str = ""
    frozen: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        if self.not_built:
            return "not built"
        if self.problem:
            return "inexact" if self.error > 0 else "crash"
        if self.refused:
            return "one length" if self.one_length else "refused"
        return "microbatch" if self.slow else "fast"


def examine(task: str, name: str) -> Examination:
    """Build the class and compare the engine, on the padded ragged batch, with the oracle, on each row alone and unpadded.

    The oracle is `model(**row).loss.backward()`; the candidate is what `DPCallback` would run. Both of its calls are compared,
    the one that learns the layouts and the one that has learnt them.
    """
    start = time.monotonic()
    row = Examination(task, name)
    try:
        specimen = build(task, name)
    except NotBuiltError as error:
        return replace(row, not_built=str(error))
    row = replace(
        row,
        inputs=", ".join(specimen.batch),
        dtype=str(specimen.dtype).removeprefix("torch."),
        attention=attention_called(specimen),
    )
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trainer = Trainer(model=specimen.model, args=TrainingArguments(output_dir=folder, use_cpu=True, report_to=[]))
        row = _compare(row, specimen, trainer)
    return replace(row, seconds=time.monotonic() - start)


def attention_called(specimen: Specimen) -> str:
    """The implementation that ran, or why ours did not."""
    modules = list(specimen.model.modules())
    if usage.any_has_called(specimen.model):
        return specimen.attention
    if not any(re.search(r"att(entio)?n|performer", type(module).__name__, re.I) for module in modules):
        return "none"
    if "take its attention" in specimen.why_not or not specimen.why_not:
        return "its own"
    return f"eager: {specimen.why_not}"


@dataclass
class _Candidate:
    """The engine and the loss as `DPCallback` makes them for this batch."""

    specimen: Specimen
    engine: ClippingEngine
    loss: UnitLoss
    units: Units
    scale: Tensor

    @classmethod
    def of(cls, specimen: Specimen, model_loss: Callable[..., Tensor], max_grad_norm: float) -> _Candidate:
        engine = ClippingEngine(specimen.model, max_grad_norm=max_grad_norm)
        try:
            units = Units.rows(specimen.rows)
            with training_mode(specimen.model, False):
                loss = learn_loss(
                    model_loss,
                    specimen.batch,
                    units,
                    n_classes=getattr(specimen.model.config, "num_labels", None),
                )
            return cls(specimen, engine, loss, units, loss.scale(specimen.batch, units))
        except BaseException:
            engine.detach()
            raise

    def run(self) -> tuple[Gradient, Tensor, str]:
        """(clipped sum, norms, why every unit was computed by itself) of one call."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.engine.backward(self.loss, self.specimen.batch, None, self.scale)
        slow = [str(warning.message) for warning in said if "computed by itself" in str(warning.message)]
        uncovered = self.engine.uncovered
        found = grads(self.specimen.model), self.engine.norms.double(), _patterns(uncovered) or (slow or [""])[0]
        self.specimen.model.zero_grad()
        return found

    def preflight(self, *, one_length: bool = False) -> str:
        """What the checks before the first step say against this model; empty if nothing.

        one_length: the collator is one that pads every row to the same length.
        """
        engine, loss, batch = self.engine, self.loss, self.specimen.batch
        try:
            engine.check(loss, batch, self.units, self.scale, tolerance=1e-3)
            alone = partial(self.specimen.alone, cut=not one_length)
            check_alone(engine, loss, batch, self.units, self.scale, alone, tolerance=1e-3)
            check_training_mode(engine, loss, batch, self.units, self.scale, random.Random(0), tolerance=1e-5)
        except _REFUSALS as error:
            return str(error)
        return ""


def _compare(row: Examination, specimen: Specimen, trainer: Trainer) -> Examination:
    model: Any = specimen.model

    def model_loss(part: Batch, num_items: Tensor | None) -> Tensor:
        return trainer.compute_loss(model, dict(part), num_items_in_batch=num_items)  # type: ignore[return-value]

    try:
        ClippingEngine(model, max_grad_norm=1.0).detach()  # batch normalisation would update itself in the oracle
    except _REFUSALS as error:
        return replace(row, refused=str(error))

    parts = [specimen.alone(number) for number in range(specimen.rows)]
    try:
        truth, frozen = _truth(model, parts)
    except Exception as error:
        return replace(row, not_built=f"does not run on a row alone: {type(error).__name__}: {error}")
    row = replace(row, frozen=frozen)
    C = float(clipped_sum(truth, 1.0)[1].median())
    if not 0 < C < float("inf"):
        return replace(row, not_built=f"the median gradient norm of its rows is {C}")
    tolerance = TOLERANCE[specimen.dtype]
    candidate = None
    try:
        candidate = _Candidate.of(specimen, model_loss, C)
        runs = [candidate.run() for _ in range(2)]
        row = replace(row, slow=runs[-1][2] or runs[0][2], error=max(_error(run, truth, C) for run in runs))
        said, said_of_one_length = candidate.preflight(), candidate.preflight(one_length=True)
    except Exception as error:
        if isinstance(error, _REFUSALS) or _raised_by_library(error):
            return replace(row, refused=str(error))
        return replace(row, error=0.0, problem=f"{type(error).__name__}: {error}")
    finally:
        if candidate is not None:
            candidate.engine.detach()
        model.zero_grad()
    if row.error <= tolerance:
        return replace(row, refused=said)
    row = _diagnosed(row, specimen, candidate, runs, C, said)
    return replace(row, one_length=row.padding_felt and not said_of_one_length)


def _raised_by_library(error: Exception) -> bool:
    """Whether this is one of the library's own messages to its user, such as those of `errors.invalid`."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return (
        frame is not None and isinstance(error, ValueError) and frame.tb_frame.f_globals["__name__"].startswith("dp_flash_hf")
    )


def _diagnosed(
    row: Examination, specimen: Specimen, candidate: _Candidate, runs: list[tuple[Gradient, Tensor, str]], C: float, said: str
) -> Examination:
    """Whether the model itself couples its rows, which a guard must then have refused, or the library is wrong."""
    model, tolerance = specimen.model, TOLERANCE[specimen.dtype]
    padded = [specimen.alone(number, cut=False) for number in range(specimen.rows)]
    truth, _ = _truth(model, padded)
    again, _ = _truth(model, padded)
    repeated = max(_distance(a, b) for a, b in zip(again, truth, strict=True))
    if repeated > tolerance:
        cause = f"its gradient is random: {repeated:.1e} apart when repeated"
    elif max(_error(run, truth, C) for run in runs) <= tolerance:
        cause = "padding changes its gradients"
        row = replace(row, padding_felt=True)
    else:
        whole = unit_gradients(model, candidate.loss, [specimen.batch])[0]
        alone = unit_gradients(model, candidate.loss, padded)
        summed = {name: torch.stack([unit[name] for unit in alone]).sum(0) for name in whole}
        apart = _distance(whole, summed)
        if apart <= tolerance:
            return replace(row, problem=f"the engine is off by {row.error:.1e}" + (f"; preflight: {said}" if said else ""))
        cause = f"its rows change each other's gradients by {apart:.1e}"
    return replace(row, refused=f"{cause}: {said}") if said else replace(row, problem=f"{cause}, which nothing refuses")


def _truth(model: Any, parts: Sequence[Batch]) -> tuple[list[Gradient], int]:
    """The gradient of the model's own loss on every part, once the parameters that none of them reaches are frozen."""
    reached = set()
    for part in parts:
        model.zero_grad()
        model(**part).loss.backward()
        reached |= {parameter for parameter in model.parameters() if parameter.grad is not None}
    model.zero_grad()
    frozen = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in reached:
            parameter.requires_grad_(False)
            frozen += 1
    return unit_gradients(model, lambda part: model(**part).loss, parts), frozen


def _error(found: tuple[Gradient, Tensor, str], truth: Sequence[Gradient], C: float) -> float:
    """The largest relative deviation, over norms and parameters."""
    got, norms, _ = found
    wanted, wanted_norms = clipped_sum(truth, C)
    off = float(((norms - wanted_norms).abs() / wanted_norms.clamp(min=1e-12)).max())
    return max(off if off == off else float("inf"), _distance(got, wanted))


def _distance(got: Gradient, wanted: Gradient) -> float:
    """The largest relative deviation of a single parameter, so that no rule hides behind larger gradients."""
    floor = FLOOR * total_norm(wanted)
    worst = 0.0
    for name, gradient in wanted.items():
        off = float((got[name] - gradient).norm()) if name in got else float(gradient.norm())
        size = float(gradient.norm()) + floor
        worst = max(worst, off / size if off == off and size > 0 else float("inf"))
    return worst


def _patterns(names: Sequence[str]) -> str:
    """Names of parameters, layers of a stack as one, shortened."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}))
