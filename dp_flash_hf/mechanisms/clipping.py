"""Clip factors from per-unit gradient norms, and the sensitivity they guarantee."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dp_flash_hf.mechanisms.config import Clipping

STABILITY = 0.01  # gamma of automatic clipping (Bu et al. 2023, arXiv 2206.07136)


def clip_factors(squared_norms: Tensor, max_grad_norm: float, clipping: Clipping) -> Tensor:
    """Factor of each unit (and group of parameters) by which its gradient is multiplied before units are summed.

    - ``flat``: min(1, C / n), with n the norm over all groups (Abadi et al. 2016, arXiv 1607.00133)
    - ``automatic``: C / (n + gamma), with the same n and gamma = `STABILITY` (Bu et al. 2023, arXiv 2206.07136)
    - ``per_layer``: min(1, C_l / n_l) in each group by itself, with C_l = C / sqrt(groups), so that sum C_l^2 = C^2

    Formal guarantees:

    - The clipped gradient of a unit, over all groups, has L2 norm at most C, up to the rounding of its dtype: adding
      or removing one unit moves the sum over units by at most C.
    - The factors of a unit depend on that unit alone.

    Edge cases:

    ====================================== ===================================================
    A unit's gradient                      Its factors
    ====================================== ===================================================
    norm NaN or infinite in any group      0 in every group: the unit is left out
    square too large for the dtype         0 in every group, likewise
    zero, or square too small for it       flat, per_layer: 1; automatic: C / gamma; both finite
    no units                               empty, of shape (0, groups)
    ====================================== ===================================================

    Whoever multiplies by a factor of 0 must not multiply NaN by it: drop such units with `torch.where`.

    >>> clip_factors(torch.tensor([[9.0, 16.0], [0.0, 0.25]]), max_grad_norm=1.0, clipping="flat")  # norms 5 and 0.5
    tensor([[0.2000, 0.2000],
            [1.0000, 1.0000]])

    Args:
        squared_norms: float32 or float64 (units, groups), squared L2 norm of each unit's gradient in each group of parameters.
        max_grad_norm: C, finite and above 0.
        clipping: See above.

    Returns:
        Factors of the same shape and dtype, at least 0 and finite.
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
    """The clipping group of each parameter: one for all, or with per_layer one for every module that owns parameters.

    Args:
        model: Where modules are looked up, in the order of `model.modules()`.
        parameters: Those that are trained, with their names. A parameter that several modules share belongs to the first.
        clipping: See `clip_factors`.

    Returns:
        For each parameter the column of `clip_factors` that scales its gradient: whole numbers from 0 on, without gaps.
    """
    if clipping != "per_layer":
        return dict.fromkeys(parameters, 0)
    owners: dict[nn.Parameter, int] = {}
    for number, module in enumerate(model.modules()):
        for parameter in module.parameters(recurse=False):
            if parameter in parameters:
                owners.setdefault(parameter, number)
    group_of = {owner: group for group, owner in enumerate(dict.fromkeys(owners.values()))}
    return {parameter: group_of[owner] for parameter, owner in owners.items()}
