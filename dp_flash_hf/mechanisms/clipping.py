"""Clip factors from per-unit gradient norms, and the sensitivity they guarantee."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dp_flash_hf.mechanisms.config import Clipping

STABILITY = 0.01  # gamma of automatic clipping (Bu et al. 2023, arXiv 2206.07136)


def clip_factors(squared_norms: Tensor, max_grad_norm: float, clipping: Clipping) -> Tensor:
    """Factor of each unit (and layer) such that no unit moves the clipped sum by more than `max_grad_norm`.

    squared_norms: float (units, groups), squared L2 norm of each unit's gradient in each group of parameters.
    Returns factors of the same shape and dtype:

    - flat: min(1, C / n) over all groups together (Abadi et al. 2016, arXiv 1607.00133)
    - automatic: C / (n + gamma) over all groups together (Bu et al. 2023)
    - per_layer: min(1, C_l / n_l) in each group by itself, with C_l = C / sqrt(groups), so that sum C_l^2 = C^2

    A unit whose norm is NaN or infinite in any group gets factor 0 in every group. An all-zero gradient gets a finite factor.
    """
    totals = squared_norms.sum(1, keepdim=True)
    valid = torch.isfinite(totals)
    if clipping == "per_layer":
        factors = (max_grad_norm / math.sqrt(squared_norms.shape[1]) / squared_norms.sqrt()).clamp(max=1.0)
    elif clipping == "automatic":
        factors = (max_grad_norm / (totals.sqrt() + STABILITY)).expand_as(squared_norms)
    else:
        factors = (max_grad_norm / totals.sqrt()).clamp(max=1.0).expand_as(squared_norms)
    return torch.where(valid, factors, torch.zeros_like(factors))


def groups_of(model: nn.Module, parameters: Mapping[nn.Parameter, str], clipping: Clipping) -> dict[nn.Parameter, int]:
    """The clipping group of each parameter: one for all, or with per_layer one for every module that owns parameters."""
    if clipping != "per_layer":
        return dict.fromkeys(parameters, 0)
    owners: dict[nn.Parameter, int] = {}
    for number, module in enumerate(model.modules()):
        for parameter in module.parameters(recurse=False):
            if parameter in parameters:
                owners.setdefault(parameter, number)
    numbers = {owner: group for group, owner in enumerate(dict.fromkeys(owners.values()))}
    return {parameter: numbers[owner] for parameter, owner in owners.items()}
