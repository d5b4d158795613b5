"""Embedding tables and what Transformers makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import UnsupportedError
from tests.support.layer_checks import how
from tests.support.oracle import grads


def ids(*shape: int, high: int = 9) -> Tensor:
    return torch.randint(0, high, shape)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4), (1, 6), (4, 1)], ids=str)
def test_ids_of_any_shape(shape: tuple[int, ...]) -> None:
    assert how(nn.Embedding(9, 4).double(), ids(*shape)) == "fast"
    assert how(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double(), ids(*shape)) == "fast"


def test_rows_at_padding_idx_get_no_gradient() -> None:
    model = nn.Embedding(9, 4, padding_idx=2).double()
    batch = ids(3, 6, high=4)
    assert bool((batch == 2).any())
    assert how(model, batch) == "fast"
    engine = ClippingEngine(model, max_grad_norm=1.0)
    engine.backward(lambda b: model(b["ids"]).sum(), {"ids": batch})
    assert not grads(model)["weight"][2].any()


def test_scale_grad_by_freq_counts_within_one_unit() -> None:
    """What autograd does for a unit alone; over the batch its counts would couple units."""
    assert how(nn.Embedding(9, 4, scale_grad_by_freq=True).double(), ids(3, 6, high=4)) == "fast"


def test_max_norm_is_refused() -> None:
    model = nn.Embedding(9, 4, max_norm=1.0)
    with pytest.raises(UnsupportedError, match="max_norm"):
        ClippingEngine(model, max_grad_norm=1.0)


def test_subclasses_with_scales_and_offsets() -> None:
    scaled = Gemma3TextScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=3.0).double()
    assert how(scaled, ids(3, 5)) == "fast"
    positions = OPTLearnedPositionalEmbedding(12, 4).double()
    mask = torch.ones(3, 5, dtype=torch.long)
    assert how(positions, mask, forward=lambda m: positions(m, position_ids=m.cumsum(1) - 1)) == "fast"


def test_sparse_gradients_are_summed_densely() -> None:
    model = nn.Embedding(9, 4, sparse=True).double()
    assert how(model, ids(3, 5), strategy="bookkeeping") == "fast"
