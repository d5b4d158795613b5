"""Losses that are sums over privacy units, made of the losses Transformers models compute.

Models divide by `num_items_in_batch`, or by what the batch holds: rows, or labels that are not ignored. Both denominators
depend on other units. Here the division is undone, on evidence: the model itself is asked, on numbers, how it divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.units import Batch, Units, leading_shape

IGNORED = -100  # label that takes no part in a loss, everywhere in Transformers

Counted = Literal["rows", "labels", "shifted labels"]
# (batch, num_items_in_batch) -> scalar loss; None leaves the division to the model.
ModelLoss = Callable[[dict[str, Any], Tensor | None], Tensor]


def _valid_labels(batch: Batch, counted: Counted) -> Tensor | None:
    """Bool tensor, shaped as the labels: which are counted. None where every row counts once."""
    labels = batch.get("shift_labels", batch.get("labels"))
    if counted == "rows" or not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    valid = labels != IGNORED
    if counted == "shifted labels" and "shift_labels" not in batch:
        valid[:, 0] = False
    return valid


def label_counts(batch: Batch, units: Units, counted: Counted) -> Tensor:
    """How many labels each unit has: float32 (units,) on the CPU.

    "labels" counts those not ignored, "shifted labels" leaves out the first position, which a causal model predicts from
    nothing, and "rows" counts the unit's rows.
    """
    valid = _valid_labels(batch, counted)
    per_item = torch.ones(units.n_items) if valid is None else valid.cpu().float().reshape(units.n_items, -1).sum(1)
    owned = units.of_item >= 0
    return torch.zeros(units.n).index_add_(0, units.of_item[owned], per_item[owned])


@dataclass(frozen=True)
class UnitLoss:
    """One model's loss, called with a batch or part of one, as a sum of label losses, each of one unit alone.

    divides: whether the model divides by what it counts in the batch ("mean"), or by the number it is given ("sum").
    counted: what it counts.
    """

    model_loss: ModelLoss
    divides: Literal["mean", "sum"]
    counted: Counted

    def __call__(self, batch: Batch) -> Tensor:
        """Sum of all label losses of the batch, a scalar with gradient."""
        loss = self.model_loss(dict(batch), torch.ones((), device=_device(batch)))
        return loss * self.count(batch) if self.divides == "mean" else loss

    def count(self, batch: Batch) -> int:
        """How many labels the batch has."""
        valid = _valid_labels(batch, self.counted)
        return leading_shape(batch)[0] if valid is None else int(valid.sum())

    def scale(self, batch: Batch, units: Units) -> Tensor:
        """Factor of each unit, float32 (units,), that makes its sum a mean over its own labels; 0 for a unit without labels."""
        counts = label_counts(batch, units, self.counted)
        return torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)


def learn_loss(model_loss: ModelLoss, batch: dict[str, Any], units: Units, alone: Callable[[Batch, int], Mapping[str, Any]]) -> UnitLoss:
    """Find out how a model divides its loss, from a batch of at least one unit with a label.

    alone: (batch, unit) -> that unit's batch. Runs forward passes only.
    Raises UnsupportedError when the loss is no mean over rows or labels: it would then couple units.
    """
    with torch.no_grad():
        one = alone(batch, 0)
        device = _device(batch)
        once, half = (float(model_loss(dict(one), torch.full((), n, device=device))) for n in (1.0, 2.0))
        options: tuple[Counted, ...] = ("rows", "labels", "shifted labels") if _has_token_labels(batch) else ("labels",)
        if once != 0.0 and abs(half / once - 0.5) < 1e-3:
            mean = float(model_loss(dict(one), None))
            single = Units(units.kind, torch.zeros(units.sizes[0], dtype=torch.long), 1)
            found = once / mean if mean else 1.0
            counted = min(options, key=lambda option: abs(float(label_counts(one, single, option)) - found))
            return UnitLoss(model_loss, "sum", counted)
        tried = _uneven(batch, units)
        whole = float(model_loss(dict(tried), torch.ones((), device=device)))
        means = torch.tensor([float(model_loss(dict(alone(tried, u)), torch.ones((), device=device))) for u in range(units.n)])
    errors = {}
    for option in options:
        counts = label_counts(tried, units, option)
        errors[option] = abs(float((counts * means).sum() / counts.sum()) - whole) / max(abs(whole), 1e-6)
    best = min(errors, key=lambda option: errors[option])
    others = [error for option, error in errors.items() if option != best]
    if errors[best] > 1e-2 or any(error < 3 * errors[best] + 1e-6 for error in others):
        raise UnsupportedError(
            "the model's loss is neither a mean over rows or labels nor a sum divided by num_items_in_batch, so units would share a "
            f"denominator (relative errors {errors}); override Trainer.compute_loss to return such a loss"
        )
    return UnitLoss(model_loss, "mean", best)


def _device(batch: Mapping[str, Any]) -> torch.device:
    return next((v.device for v in batch.values() if isinstance(v, Tensor)), torch.device("cpu"))


def _has_token_labels(batch: Batch) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.dim() >= 2 and not labels.is_floating_point()


def _uneven(batch: dict[str, Any], units: Units) -> dict[str, Any]:
    """The batch with labels of its first unit ignored, the first position among them, so that each way of counting differs."""
    if not _has_token_labels(batch):
        return batch
    labels = batch["labels"].clone()
    flat = labels if units.kind == "rows" else labels.flatten(0, 1)
    items = units.items(0).to(labels.device)
    own = flat[items]
    positions = (own != IGNORED).flatten().nonzero().flatten()
    own.view(-1)[positions[: max(1, len(positions) // 2)]] = IGNORED
    flat[items] = own
    return {**batch, "labels": flat.view_as(labels)}
