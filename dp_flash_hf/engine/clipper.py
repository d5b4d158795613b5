"""From the units' gradient norms to their clip factors, and what is known of the last batch's norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dp_flash_hf.distributed import device_of
from dp_flash_hf.errors import invalid
from dp_flash_hf.mechanisms.clipping import clip_factors, groups_of
from dp_flash_hf.mechanisms.config import Clipping
from dp_flash_hf.units import Units


class Clipper:
    """Decides by how much each unit's gradient is multiplied before it is added.

    parameters: the trained ones and their names.

    Attributes:
        groups: the clipping group of each parameter; several with clipping="per_layer" only.
        norms: see `ClippingEngine.norms`.
        dropped_units: see `ClippingEngine.dropped_units`.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[nn.Parameter, str], max_grad_norm: float, clipping: Clipping
    ) -> None:
        self.max_grad_norm, self.clipping = max_grad_norm, clipping
        self.groups = groups_of(model, parameters, clipping)
        self.n_groups = len(set(self.groups.values()))
        self.norms = torch.zeros(0)
        self.dropped_units = 0
        self._first = next(iter(parameters))
        self._adds = True

    @property
    def like(self) -> Tensor:
        """A scalar of the dtype and on the device in which norms and factors are computed: float32, or float64."""
        dtype = torch.promote_types(self._first.dtype, torch.float32)
        return torch.zeros((), device=device_of(self._first), dtype=dtype)

    def scale_of(self, loss_scale: Tensor | None, units: Units) -> Tensor | None:
        """Read what the user passed as `loss_scale`: None, or (units,), like the norms. Raises ValueError for anything else."""
        if loss_scale is None:
            return None
        scale = torch.as_tensor(loss_scale).detach()
        if scale.shape != (units.n,) or not bool(torch.isfinite(scale).all()):
            raise invalid(
                "loss_scale", expected=f"({units.n},) finite numbers", actual=scale, remedy="give one factor for every unit"
            )
        return scale.to(self.like)

    @torch.no_grad()
    def factors(self, squared_norms: Tensor, scale: Tensor | None) -> Tensor:
        """The factors (units, groups) of the unscaled gradients; sets `norms` and counts the units that are dropped.

        squared_norms: (units, groups), of the unscaled gradients. scale: (units,) or None.
        """
        if scale is not None:
            squared_norms = squared_norms * scale.square().unsqueeze(1)
        if not self._adds:
            return torch.zeros_like(squared_norms)
        factors = clip_factors(squared_norms, self.max_grad_norm, self.clipping)
        self.norms = squared_norms.sum(1).sqrt()
        self.dropped_units += int((~torch.isfinite(self.norms)).sum())
        return factors if scale is None else factors * scale.unsqueeze(1)

    def set_norms(self, norms: Tensor) -> None:
        """The norms of a batch that was computed in parts, or of an empty one."""
        self.norms = norms

    def recount_from(self, dropped_units: int) -> None:
        """A batch is computed again: the count is what it was before."""
        self.dropped_units = dropped_units

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the context batches are computed for a check; afterwards norms and the count are what they were before."""
        norms, dropped = self.norms, self.dropped_units
        try:
            yield
        finally:
            self.norms, self.dropped_units = norms, dropped

    @contextmanager
    def adding_nothing(self) -> Iterator[None]:
        """Within the context all factors are zero and no unit is counted; afterwards `norms` is empty."""
        norms, self._adds = self.norms, False
        try:
            yield
        finally:
            self._adds, self.norms = True, norms[:0]
