"""From norms to factors: what is counted, what is not, and what the user's scale may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipper import Clipper
from dp_flash_hf.mechanisms.config import Clipping
from dp_flash_hf.units import Units


def clipper(clipping: Clipping = "flat", dtype: torch.dtype = torch.float64) -> Clipper:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(dtype)
    return Clipper(model, {p: name for name, p in model.named_parameters()}, 2.0, clipping)


def squared(*norms: float) -> Tensor:
    return torch.tensor(norms, dtype=torch.float64).square().unsqueeze(1)


def test_factors_are_of_scaled_norms_and_apply_to_unscaled_gradients() -> None:
    own = clipper()
    assert len(own.norms) == 0
    factors = own.factors(squared(1.0, 4.0, 0.0), torch.tensor([3.0, 0.25, -1.0], dtype=torch.float64))
    torch.testing.assert_close(own.norms, torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(factors, torch.tensor([[2.0], [0.25], [-1.0]], dtype=torch.float64))  # 3 * 2/3, 1/4, -1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_units_that_are_not_finite_are_counted_and_get_no_factor(bad: float) -> None:
    own = clipper()
    for count in (1, 2):
        factors = own.factors(squared(1.0, bad), None)
        assert factors.flatten().tolist() == [1.0, 0.0]
        assert own.dropped_units == count
    own.recount_from(1)
    assert own.dropped_units == 1


def test_within_adding_nothing_nothing_is_counted_nor_added() -> None:
    own = clipper()
    own.factors(squared(1.0), None)
    with own.adding_nothing():
        assert own.factors(squared(1.0, math.nan), None).flatten().tolist() == [0.0, 0.0]
    assert own.dropped_units == 0
    assert len(own.norms) == 0
    assert own.factors(squared(1.0), None).item() == 1.0


def test_one_group_or_one_for_each_layer() -> None:
    assert clipper().n_groups == 1
    assert clipper("per_layer").n_groups == 2


@pytest.mark.parametrize(("dtype", "computed"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_factors_are_computed_in_float32_at_least(dtype: torch.dtype, computed: torch.dtype) -> None:
    own = clipper(dtype=dtype)
    assert own.like.dtype == computed
    scale = own.scale_of(torch.ones(2, dtype=torch.bfloat16), Units.rows(2))
    assert scale is not None
    assert scale.dtype == computed


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(2, 1), torch.tensor(1.0), torch.tensor([1.0, math.nan])])
def test_a_scale_that_is_not_one_finite_number_for_each_unit_is_refused(scale: Tensor) -> None:
    with pytest.raises(ValueError, match=r"loss_scale: expected \(2,\) finite numbers"):
        clipper().scale_of(scale, Units.rows(2))
