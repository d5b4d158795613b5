"""The slow, obvious truth: one unit at a time through plain autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import Loss

GAMMA = 0.01  # of automatic clipping


def unit_gradients(model: nn.Module, loss: Loss, parts: Sequence[Any]) -> list[dict[str, Tensor]]:
    """The gradient of each part's loss by parameter name, float64; zeros where there is none. Leaves `.grad` empty."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = []
    for part in parts:
        model.zero_grad()
        loss(part).backward()
        out.append({n: (torch.zeros_like(p) if p.grad is None else p.grad).double() for n, p in named.items()})
    model.zero_grad()
    return out


def rows_of(batch: dict[str, Any], rows: Sequence[int] | Tensor) -> dict[str, Any]:
    """Some rows of a batch."""
    index = torch.as_tensor(rows)
    return {k: v[index] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}


def each_row(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch, row by row."""
    return [rows_of(batch, [row]) for row in range(len(next(iter(batch.values()))))]


def total_norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def clipped_sum(
    gradients: Sequence[dict[str, Tensor]], C: float, clipping: str = "flat", scale: Sequence[float] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """(clipped sum by name, norms) by the definitions; per_layer: a layer is the module that owns parameters."""
    gradients = [{n: g * (1.0 if scale is None else scale[u]) for n, g in unit.items()} for u, unit in enumerate(gradients)]
    names = list(gradients[0])
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    total = {name: torch.zeros_like(gradients[0][name]) for name in names}
    for unit in gradients:
        n = total_norm(unit)
        for layer in layers:
            mine = [name for name in names if name.rpartition(".")[0] == layer]
            if clipping == "per_layer":
                n_layer = total_norm({name: unit[name] for name in mine})
                factor = 1.0 if n_layer == 0 else min(1.0, C / math.sqrt(len(layers)) / n_layer)
            elif clipping == "automatic":
                factor = C / (n + GAMMA)
            else:
                factor = 1.0 if n == 0 else min(1.0, C / n)
            for name in mine:
                total[name] += factor * unit[name]
    return total, torch.tensor([total_norm(unit) for unit in gradients], dtype=torch.float64)


def grads(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what `.grad` holds, float64, by name."""
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| over all parameters."""
    return total_norm({name: a[name] - b[name] for name in a})


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|got - wanted| / |wanted| over all parameters; the names must agree."""
    assert got.keys() == wanted.keys()
    return apart(got, wanted) / total_norm(wanted)
