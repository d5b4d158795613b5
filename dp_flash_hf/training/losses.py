"""Losses that are sums over privacy units, made of the losses that models compute.

Models divide by `num_items_in_batch`, or by what the batch holds: rows, or labels that are not ignored. Both denominators
depend on other units, so a unit's gradient would, and clipping it would not bound what the unit does. Here the division is
undone, on evidence: the model itself is asked, on made-up labels, how it divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dp_flash_hf.engine.model_loss import ModelLoss
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.units import IGNORED, Batch, Units, leading_shape, select_items, select_unit, text_starts

_LABELS_TRIED = 16  # several at a time, each time for a forward pass of the preflight's batch and of its units

Counted = Literal["rows", "labels", "shifted labels"]


def _valid_labels(batch: Batch, counted: Counted) -> Tensor | None:
    """Bool tensor, shaped as the labels: which are counted. None where every row counts once."""
    labels = batch.get("shift_labels", batch.get("labels"))
    if counted == "rows" or not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    valid = labels != IGNORED
    if counted == "shifted labels" and "shift_labels" not in batch:
        valid[:, 0] = False
    return valid


def label_counts(batch: Batch, units: Units, counted: Counted, rows_per_example: int = 1) -> Tensor:
    """How many labels each unit has.

    Args:
        batch: with `labels` (or `shift_labels`), int64, `IGNORED` where a position takes no part; else every row counts once.
        units: of its rows or tokens.
        counted: "labels" counts those not ignored, "shifted labels" leaves out the first position of a row, which a causal
            model predicts from nothing, and "rows" counts the unit's rows.
        rows_per_example: with 2, a pair of rows counts once.

    Returns:
        float32 (units,), on the CPU.
    """
    valid = _valid_labels(batch, counted)
    nothing = torch.full((units.n_items,), 1 / rows_per_example)
    per_item = nothing if valid is None else valid.cpu().float().reshape(units.n_items, -1).sum(1)
    owned = units.of_item >= 0
    return torch.zeros(units.n).index_add_(0, units.of_item[owned], per_item[owned])


@dataclass(frozen=True)
class UnitLoss:
    """A model's loss as a sum of label losses, each of which depends on one unit alone.

    This is what `ClippingEngine.backward` may be given: called with a batch, it returns the sum over the batch's units; called
    with some of them, the sum over those. Nothing in it depends on what else was drawn. How the model divides is a public
    property of its code, found by `learn_loss`.

    A term that depends on no data (a penalty on weights, AdaLoRA's regulariser) may stand beside a mean: its gradient is part
    of that of every unit, once for each of its labels, and is clipped with it.

    **Edge cases.** A batch without a label has loss 0, where a model that takes means would divide 0 by 0, and one that takes
    sums may not know what to do with labels of no width. A unit without a label adds 0, and `scale` gives it the factor 0.

    Attributes:
        model_loss: the loss as the model computes it, `(batch, num_items) -> scalar`.
        divides: "mean" where the model divides by what it counts in the batch; "sum" where it divides by the number that it is
            given, by a constant, or not at all.
        counted: what it counts.
        rows_per_example: 2 where the loss is one of pairs of rows.
    """

    model_loss: ModelLoss
    divides: Literal["mean", "sum"]
    counted: Counted
    rows_per_example: int = 1

    def __call__(self, batch: Batch) -> Tensor:
        """The sum of all label losses of the batch: a scalar with gradient, in the dtype of the model's loss.

        Raises:
            UnsupportedError: an answer (`start_positions`, `end_positions`) lies outside its text; models leave such rows out
                of a mean over the others.
        """
        _refuse_answers_outside(batch)
        count = self.count(batch)
        if count == 0:
            return torch.zeros((), device=_device(batch), requires_grad=True)
        if self.divides == "sum":
            return self.model_loss(dict(batch), torch.ones((), device=_device(batch)))
        # The count is also the number that a model with a term beside the mean may divide by.
        return self.model_loss(dict(batch), torch.tensor(float(count), device=_device(batch))) * count

    def count(self, batch: Batch) -> int:
        """How many labels the batch has, of all units."""
        valid = _valid_labels(batch, self.counted)
        return leading_shape(batch)[0] // self.rows_per_example if valid is None else int(valid.sum())

    def scale(self, batch: Batch, units: Units) -> Tensor:
        """The factor of each unit that makes its sum a mean over its own labels.

        Returns:
            float32 (units,), on the CPU: 1 / labels, or 0 for a unit without labels.
        """
        counts = label_counts(batch, units, self.counted, self.rows_per_example)
        return torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)


class ZeroLossError(UnsupportedError):
    """How a loss divides cannot be learnt of examples whose loss is 0."""


def learn_loss(
    model_loss: ModelLoss,
    batch: dict[str, Any],
    units: Units,
    *,
    n_classes: int | None = None,
    rows_per_example: int = 1,
    tolerance: float = 1e-4,
) -> UnitLoss:
    """Find out how a model divides its loss, by forward passes on made-up labels.

    First one unit is computed with `num_items` 1, 2 and 4: a loss that halves and halves again is a sum divided by the number
    it is given, and one that tends to something else has a term beside it. Any other has to be a mean over what the batch
    holds, or a sum: the batch's loss is compared with what each way of counting makes of the losses of its units alone, and
    with their sum. A term beside a mean is the same for all of them if it depends on no data, and shows here if it does. Labels
    are replaced by made-up ones, a different number of them in the first unit, so that every way of counting gives another
    value, whatever the data are; and so do class weights, which divide by the weights of the classes in the batch.

    It cannot see a loss that divides otherwise for inputs unlike these: `preflight` compares units alone and in a batch again,
    on the data's own labels.

    Args:
        model_loss: `(batch, num_items) -> scalar`.
        batch: the model's inputs with labels, of at least one unit; of two or more where the loss is a mean.
        units: of its rows or tokens.
        n_classes: of a classifier, to try labels that the batch does not hold.
        rows_per_example: 2 where the loss is one of pairs of rows.
        tolerance: relative difference that rounding of the model may make.

    Returns:
        The loss as a sum over units.

    Raises:
        PrivacyError: the loss is not finite.
        ZeroLossError: it is 0 for these examples.
        UnsupportedError: it is neither a sum nor a mean over rows or labels, so it couples units.
    """
    _refuse_answers_outside(batch)
    device = _device(batch)

    def loss(part: Mapping[str, Any], divisor: float | None) -> float:
        return float(model_loss(dict(part), None if divisor is None else torch.tensor(divisor, device=device)))

    # In a packed row the first label of a text counts for none: it would be predicted from the text before.
    options: tuple[Counted, ...] = ("labels",) if units.kind == "tokens" else ("labels", "shifted labels", "rows")
    if not _has_token_labels(batch):
        options = ("labels",)
    with torch.no_grad():
        values = _label_values(batch, n_classes)
        one = select_unit(_relabelled(batch, units, values[:1]), units, 0)
        once, half = loss(one, 1.0), loss(one, 2.0)
        if not math.isfinite(once):
            raise PrivacyError(
                f"the loss of the first example tried is {once}, whatever its labels: look for NaN among its inputs, and for "
                "values that the model's dtype cannot hold (load it in float32 or bfloat16, not in float16)"
            )
        divided, beside = _divided_by_number(once, half, loss(one, 4.0), tolerance)
        if divided:
            found = divided / (loss(one, None) - beside)
            single = Units(units.kind, torch.zeros(units.sizes[0], dtype=torch.long), 1)
            counted = min(options, key=lambda option: abs(float(label_counts(one, single, option)) - found))
            if not beside:
                return UnitLoss(model_loss, "sum", counted, rows_per_example)
            options = (counted,)
        # Likely labels for the first unit and unlikely ones for the rest: losses far apart tell the ways of counting apart.
        values.sort(key=lambda value: loss(select_unit(_relabelled(batch, units, [value]), units, 0), 1.0), reverse=True)
        likely = values[-1]
        errors: dict[Counted | Literal["sum"], float] = dict.fromkeys((*options, *(() if divided else ("sum",))), 0.0)
        largest = 0.0
        most = max(1, units.n - 1)
        for others in ([values[0]], *(values[begin : begin + most] for begin in range(1, len(values), most))):
            tried = _relabelled(batch, units, [likely, *others])
            parts = [select_unit(tried, units, unit) for unit in range(units.n)]
            given = label_counts(tried, units, options[0]) if divided else torch.ones(units.n)
            means = torch.tensor([loss(part, n) for part, n in zip(parts, given.tolist(), strict=True)])
            whole = loss(tried, float(given.sum()) if divided else 1.0)
            largest = max(largest, abs(whole))
            for option in errors:
                counts = torch.ones(units.n) if option == "sum" else label_counts(tried, units, option)
                divisor = 1.0 if option == "sum" else counts.sum()
                error = abs(float((counts * means).sum() / divisor) - whole) / max(abs(whole), 1e-6)
                errors[option] = error if math.isnan(error) else max(errors[option], error)
    best = min(errors, key=lambda option: errors[option])
    apart = min((error for option, error in errors.items() if option != best), default=1.0)
    if not (errors[best] <= tolerance and apart > 3 * errors[best] + 1e-6):  # also when something is not a number
        if largest < 1e-6:
            raise ZeroLossError(
                "the loss of the examples tried is 0 whatever their labels, so it is unknown how it divides: a margin that all "
                "of them keep, or a loss that does not depend on them"
            )
        raise _compares_rows() if _is_comparing(loss, batch, units, tolerance) else _neither_mean_nor_sum(errors)
    return UnitLoss(model_loss, *(("sum", options[0]) if best == "sum" else ("mean", best)), rows_per_example)


def _divided_by_number(once: float, half: float, quarter: float, tolerance: float) -> tuple[float, float]:
    """Of a loss with `num_items` 1, 2 and 4: what it divides by that number, and what stands beside; zeros if it ignores it.

    A term smaller than the tolerance is none.
    """
    divided = 2 * (once - half)
    scale = max(abs(once), abs(divided))
    if abs(divided) <= 1e-2 * scale or abs(divided - 4 * (half - quarter)) > 1e-2 * abs(divided):
        return 0.0, 0.0
    beside = once - divided
    return divided, 0.0 if abs(beside) <= 4 * tolerance * scale else beside


def _is_comparing(
    loss: Callable[[Mapping[str, Any], float | None], float], batch: dict[str, Any], units: Units, tolerance: float
) -> bool:
    """Whether copies of a row change what it adds, or rows alone have no loss: not so where all only share a divisor."""
    if units.kind != "rows" or units.n < 2 or len(set(units.sizes)) > 1:
        return False
    rows = torch.stack([units.items(unit) for unit in range(units.n)])

    def of(first: int, others: Sequence[int]) -> float:
        return loss(select_items(batch, units, rows[[first, *others]].T.flatten()), None)

    with torch.no_grad():
        alone = [loss(select_unit(batch, units, unit), None) for unit in range(units.n)]
        own, copies = range(1, units.n), [0] * (units.n - 1)
        whole, same = of(0, own), of(0, copies)
        contrast = whole - of(1, own) - same + of(1, copies)  # as of `check_interaction`
    within = 10 * tolerance * max(abs(whole), max(map(abs, alone)))
    if max(alone) - min(alone) <= within < abs(whole - alone[0]):
        return True
    return not abs(contrast) <= within and all(not abs(same - n * alone[0]) <= within for n in (1, units.n))


def _compares_rows() -> UnsupportedError:
    return UnsupportedError(
        "the loss compares the rows of a batch with each other (a row among copies of itself has another loss than alone), as "
        "in-batch negatives, rankings, correlations and batch statistics do, so it couples units. Use a loss in which "
        "every row, pair or triplet has a value of its own: cross entropy, cosine similarity, contrastive pairs "
        "with a label, triplets. If the loss is one of these, the model lets rows see each other"
    )


def _neither_mean_nor_sum(errors: Mapping[Any, float]) -> UnsupportedError:
    return UnsupportedError(
        "the model's loss is neither a mean over rows or labels, nor a sum over them (divided by num_items_in_batch, by a "
        f"constant, or not at all), so units would share a denominator (relative errors {dict(errors)}). Override "
        "Trainer.compute_loss, or give make_private a loss_fn, so that it is one of them. Class weights: not "
        "cross_entropy(..., weight=w), which divides by the weights of the batch, but each row's own, "
        "(w[labels] * cross_entropy(logits, labels, reduction='none')).mean(). A term that depends on no data may be added to "
        "a mean, not to a sum. If the loss is one of these already, the model lets units see each other: look for operations "
        "across the batch"
    )


def _refuse_answers_outside(batch: Batch) -> None:
    mask = batch.get("attention_mask")
    for name in ("start_positions", "end_positions"):
        answers = batch.get(name)
        if not isinstance(answers, Tensor) or answers.dim() != 1:
            continue
        inside = (answers >= 0) & (answers < leading_shape(batch)[-1])
        if isinstance(mask, Tensor) and mask.dim() == 2:
            inside &= mask.gather(1, answers.clamp(0, mask.shape[1] - 1).unsqueeze(1)).squeeze(1) != 0
        if not bool(inside.all()):
            raise UnsupportedError(
                f"{name} outside its text: the model would leave that row out and divide by the others, which couples them; "
                "let unanswerable rows point at position 0, as Transformers' examples do"
            )


def _device(batch: Mapping[str, Any]) -> torch.device:
    return next((v.device for v in batch.values() if isinstance(v, Tensor)), torch.device("cpu"))


def _has_token_labels(batch: Batch) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.dim() >= 2 and not labels.is_floating_point()


def _label_values(batch: Batch, n_classes: int | None) -> list[int]:
    """Some labels: those that occur in the batch, and those a classifier has besides."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return [0]
    found = labels[labels != IGNORED].unique()[:_LABELS_TRIED].tolist()
    if n_classes is None or max(found, default=0) >= n_classes:  # words, some of which mean padding to the model
        n_classes = 0
    return list(dict.fromkeys([*found, *range(n_classes)]))[:_LABELS_TRIED] or [0]


def _relabelled(batch: dict[str, Any], units: Units, values: Sequence[int]) -> dict[str, Any]:
    """The batch with three labels at the start of the first unit's texts, and one label, the second, in all others.

    A text of the first unit then counts 1 row, 3 labels, 2 shifted labels, every other text 1 of each. In a packed row no text
    has a label at its own start, where it would be predicted from the text before. A row of a classifier has one label anyway.

    Args:
        values: the label of each unit; the last one of all further units.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return batch
    of_unit = torch.tensor([values[min(unit, len(values) - 1)] for unit in range(units.n)])
    if not _has_token_labels(batch):
        if len(labels) != units.n_items:
            return {**batch, "labels": labels.masked_fill(labels == IGNORED, values[-1])}
        made = of_unit[units.of_item.clamp(min=0)].to(labels.device, labels.dtype)
        return {**batch, "labels": made.reshape(-1, *[1] * (labels.dim() - 1)).expand_as(labels).contiguous()}
    made = torch.full_like(labels, IGNORED)
    flat = made.flatten(1) if units.kind == "rows" else made.flatten()
    starts = text_starts(batch) if units.kind == "tokens" else None
    for unit, value in enumerate(of_unit.tolist()):
        items = units.items(unit)
        within = items[1:] if starts is None else items[~starts[items]]
        items, within = items.to(labels.device), within.to(labels.device)
        if units.kind == "tokens":
            flat[within[: 3 if unit == 0 else 1]] = value
        elif unit == 0:
            flat[items, :3] = value
        else:
            flat[items, 1:2] = value
    return {**batch, "labels": made}
