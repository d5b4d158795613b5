"""Models and batches that are known to couple units are refused by name, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from dp_flash_hf.engine.batch_guard import BatchGuard, refuse_model
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import UnsupportedError
from tests.support.models import VOCABULARY, tiny

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def llama(positions: int, rope: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **sizes, num_hidden_layers=1, vocab_size=VOCABULARY, max_position_embeddings=positions, rope_parameters=rope
        )
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)])
def test_statistics_of_the_batch_are_refused(norm: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"1: batch normalisation .* GroupNorm"):
        refuse_model(nn.Sequential(nn.Linear(3, 3), norm))
    refuse_model(nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3)))


@pytest.mark.parametrize(("rope", "positions"), [(LONGROPE, 32), (DYNAMIC, 8)])
def test_rotary_frequencies_that_follow_the_longest_text(rope: dict[str, Any], positions: int) -> None:
    """Up to 8 positions a text's loss is the same beside any other; beyond, it is not, and the batch is refused."""
    model, guard = llama(positions, rope).double(), BatchGuard(llama(positions, rope))
    ids = torch.randint(3, VOCABULARY, (1, 6))
    with torch.no_grad():
        alone, short, long = (model(F.pad(ids, (0, n - 6))).logits[:, :6] for n in (6, 8, 12))  # a causal model sees no padding
    torch.testing.assert_close(short, alone, rtol=1e-12, atol=1e-12)
    assert float((long - alone).abs().max()) > 1e-7
    guard({"input_ids": ids.expand(3, -1)})
    guard({"input_ids": torch.zeros(1, 16, dtype=torch.long), "position_ids": torch.arange(8).repeat(2)[None]})  # packed
    for long in ({"input_ids": torch.zeros(2, 9)}, {"input_ids": ids, "position_ids": torch.tensor([[0, 8]])}):
        with pytest.raises(UnsupportedError, match=r"9 positions: beyond 8 .* cut texts to 8 tokens"):
            guard({name: value.long() for name, value in long.items()})


def test_engines_ask_before_they_compute() -> None:
    engine = ClippingEngine(llama(32, LONGROPE), max_grad_norm=1.0)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with pytest.raises(UnsupportedError, match="9 positions"):
        engine.backward(lambda batch: engine.model(**batch, num_items_in_batch=1).loss, {"input_ids": ids, "labels": ids})
    with pytest.raises(UnsupportedError, match="9 positions"), engine.batch():
        engine.model(input_ids=ids, labels=ids, num_items_in_batch=1).loss.backward()
    assert all(parameter.grad is None for parameter in engine.parameters)


def test_other_rotary_embeddings_have_no_limit() -> None:
    BatchGuard(llama(8))({"input_ids": torch.zeros(1, 99, dtype=torch.long)})
    BatchGuard(tiny("gpt2"))({"input_ids": torch.zeros(1, 99, dtype=torch.long)})


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index", "video_token_id", "audio_token_id"])
def test_rows_of_unequal_numbers_of_pictures_are_refused(name: str) -> None:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(**{name: 7})  # type: ignore[assignment]
    guard = BatchGuard(model)
    pictures = {"pixel_values": torch.zeros(2, 3)}
    guard({"input_ids": torch.tensor([[7, 7, 1], [1, 7, 7]]), **pictures})
    guard({"input_ids": torch.tensor([[1, 2], [3, 4]]), **pictures})
    guard(pictures)
    guard({"input_ids": torch.tensor([[7, 7, 1], [1, 2, 3]])})  # nothing for them to stand for
    with pytest.raises(UnsupportedError, match=r"rows hold \[0, 2\] tokens 7 each"):
        guard({"input_ids": torch.tensor([[7, 7, 1], [1, 2, 3]]), **pictures})
