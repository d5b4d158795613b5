"""For your own tests: is what the engine computes for a model what a loop over single units computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.units import Batch, Units, leading_shape, select_unit


def check_exact(
    model: nn.Module,
    batch: Batch,
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    units: Tensor | None = None,
    strategy: Strategy = "bookkeeping",
    tolerance: float | None = None,
) -> dict[str, str]:
    """Prove or refute, on one batch and without dropout, that every per-unit gradient is exact, parameter by parameter.

    The truth is plain autograd on every unit alone, clipped at the median of the norms so that some units are and some are not.
    The batch is computed twice, because layouts are learnt the first time.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.second(self.first(x).relu())
    >>> sorted(check_exact(Model(), {"x": torch.randn(5, 3)}))
    ['first.bias', 'first.weight', 'second.bias', 'second.weight']

    Args:
        model: in float32 or float64, without an engine. It and its `.grad` are left as they were.
        batch: what the model takes by keyword, first dimension the rows, two units at least.
        loss_fn: batch -> scalar, a sum of terms that depend on one unit each; default: a weighted sum over everything floating
            in the model's output, whose first dimension must be the rows.
        units: as of `ClippingEngine.backward`.
        strategy: "bookkeeping" also proves that no parameter escapes its rule; "auto" allows that, unit by unit.
        tolerance: relative to each parameter's own clipped sum; default: 1e-4 in float32, 1e-9 in float64.

    Returns:
        How the norm of each parameter was computed, by name.

    Raises:
        PrivacyError: that names the parameters that are wrong, or that no rule covers.
        ValueError, UnsupportedError: as `ClippingEngine` and its `backward`.
    """
    resolved = Units.of(units, leading_shape(batch))
    loss = loss_fn or (lambda part: _weighted(model(**part)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {p: p.grad for p in trained.values()}
    with training_mode(model, False):
        try:
            alone = [dict(_gradients(trained, loss(select_unit(batch, resolved, unit)))) for unit in range(resolved.n)]
            norms = torch.stack([torch.stack([g.norm() for g in unit.values()]).norm() for unit in alone])
            bound = float(norms.median()) or 1.0
            for p in trained.values():
                p.grad = None
            engine = ClippingEngine(model, max_grad_norm=bound, strategy=strategy)
            try:
                for _ in range(2):  # the second time, layouts are known already
                    engine.backward(loss, batch, units)
                methods = engine.norm_methods()
                wrong = list(_wrong(engine, trained, alone, norms, bound, tolerance))
            finally:
                engine.detach()
        finally:
            for p, gradient in held.items():
                p.grad = gradient
    if wrong:
        raise PrivacyError(f"not what a loop over single units gives: {'; '.join(wrong)}")
    return methods


def _gradients(trained: dict[str, nn.Parameter], loss: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for (name, p), gradient in zip(trained.items(), found, strict=True):
        yield name, torch.zeros_like(p, dtype=torch.float64) if gradient is None else gradient.double()


def _wrong(
    engine: ClippingEngine,
    trained: dict[str, nn.Parameter],
    alone: list[dict[str, Tensor]],
    norms: Tensor,
    bound: float,
    tolerance: float | None,
) -> Iterator[str]:
    double = all(p.dtype == torch.float64 for p in trained.values())
    allowed = tolerance if tolerance is not None else 1e-9 if double else 1e-4
    apart = float(((engine.norms.double() - norms).abs() / norms.clamp(min=1e-300)).nan_to_num(0.0).max())
    if not apart <= allowed:
        yield f"norms of units (relative error {apart:.2g})"
    factors = (bound / norms.clamp(min=1e-300)).clamp(max=1.0)
    for name, p in trained.items():
        wanted = sum(factor * unit[name] for factor, unit in zip(factors, alone, strict=True))
        off = float((engine.clipped_sum(p).double() / 2 - wanted).norm())
        if not off <= allowed * (float(wanted.norm()) + 1e-2 * bound):  # small parameters share the rounding of large ones
            yield f"{name} (off by {off:.2g} of {float(wanted.norm()):.2g})"


def _weighted(output: Any) -> Tensor:
    """A sum over rows in which every value has a slope of its own."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    total: Any = 0.0
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            weights = torch.linspace(0.5, 1.5, value[0].numel(), dtype=value.dtype, device=value.device).view(value.shape[1:])
            total = total + (value.square() * weights + value * weights).sum()
    out: Tensor = total
    return out
