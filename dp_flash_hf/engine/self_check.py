"""Are a batch's units apart, and is what the engine adds for them what each of them alone would have added?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from dp_flash_hf.distributed import Shards
from dp_flash_hf.engine.physical_batch import PhysicalBatch
from dp_flash_hf.errors import PrivacyError


class UnusedParametersError(PrivacyError):
    """Parameters that the loss does not depend on require gradients. `names` are all of theirs."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        super().__init__(f"these parameters require gradients but the loss does not depend on them: {names[:8]}; freeze them")


class Trial(NamedTuple):
    """One batch, computed without leaving a trace.

    loss: float64 scalar. norms: (units,). sums: every trained parameter's clipped sum, of a sharded one this rank's part.
    unused: names of trained parameters that the loss does not depend on.
    """

    loss: Tensor
    norms: Tensor
    sums: dict[nn.Parameter, Tensor]
    unused: list[str]


def self_check(
    compute: Callable[[PhysicalBatch, bool], Trial],
    batch: PhysicalBatch,
    shards: Shards,
    *,
    max_grad_norm: float,
    tolerance: float,
) -> None:
    """Compare a batch with its units one by one; see `ClippingEngine.check` for what is proved.

    compute: (batch, whether one unit at a time) -> what came of it.
    Raises PrivacyError on the first mismatch.
    """
    try:
        whole = compute(batch, False)
        alone = compute(batch, True)
        moved = None
        if batch.units.kind == "rows" and batch.units.identity and batch.units.n > 1 and batch.divisible:
            moved = abs(float(compute(batch.in_other_company(), False).norms[0]) - float(whole.norms[0]))
    except AssertionError as error:
        raise PrivacyError(f"the model cannot be checked in evaluation mode, without dropout: {error}") from error
    scale = max(float(alone.norms.max()), 1e-12) if batch.units.n else 1.0
    if whole.unused:
        raise UnusedParametersError(whole.unused)
    if not abs(float(whole.loss - alone.loss)) <= tolerance * max(abs(float(alone.loss)), 1e-3):  # so written, NaN fails too
        raise PrivacyError(
            f"the loss couples units: {float(whole.loss):.6g} in one batch, {float(alone.loss):.6g} as the sum of each alone; "
            "make the loss a sum over units (divide by a constant, not by what is in the batch)"
        )
    if moved is not None and not moved <= tolerance * scale:
        raise PrivacyError("a unit's gradient changes with the other units of its batch; look for operations across the batch")
    apart = float((whole.norms - alone.norms).abs().max()) if batch.units.n else 0.0
    off = float(shards.square({p: (own - alone.sums[p]) / shards.copies(p) for p, own in whole.sums.items()})) ** 0.5
    if not (apart <= tolerance * scale and off <= tolerance * max_grad_norm * max(batch.units.n, 1)):
        raise PrivacyError(
            f"gradients in the batch differ from those of each unit alone: norms by {apart:.3g} of {scale:.3g}, clipped "
            f"sum by {off:.3g}; units see each other (padding, routing, batch statistics), or a layer's rule is wrong"
        )
