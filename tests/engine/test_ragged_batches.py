"""Encoder-decoders on texts and labels that are padded to the longest, so that hardly two batches have the same shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from tests.support.models import VOCABULARY, Batch, tiny
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients

_SHAPE: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
BATCHES = 24

MODELS: dict[str, Callable[[], Any]] = {
    "t5": lambda: tiny("t5"),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SHAPE)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**_SHAPE)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**_SHAPE)),
    "m2m_100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**_SHAPE)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**_SHAPE, num_mel_bins=4, max_source_positions=10, max_target_positions=40)
    ),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def padded(texts: list[int], labels: list[int], generator: torch.Generator) -> Batch:
    """Random texts and labels of these lengths, one of each a row."""
    shape = (len(texts), max(texts))
    mask = (torch.arange(shape[1]) < torch.tensor(texts).unsqueeze(1)).long()
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    targets = torch.randint(3, VOCABULARY, (len(labels), max(labels)), generator=generator)
    past = torch.arange(max(labels)) >= torch.tensor(labels).unsqueeze(1)
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "labels": targets.masked_fill(past, -100),
    }


def sounds(batch: Batch, generator: torch.Generator) -> Batch:
    rows = len(batch["labels"])
    return {"input_features": torch.randn(rows, 4, 20, generator=generator).double(), "labels": batch["labels"]}


def ragged(name: str, n: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)

    def lengths(rows: int) -> list[int]:
        return torch.randint(3, 15, (rows,), generator=generator).tolist()

    batches = []
    for number in range(n):
        rows = 4 + number % 3  # of a Poisson draw; lengths equal it now and then
        batch = padded(lengths(rows), lengths(rows), generator)
        batches.append(sounds(batch, generator) if name == "whisper" else batch)
    return batches


def summed(model: Any, seen: list[int]) -> Callable[[Any], Tensor]:
    """The sum of the labels' losses; `seen` gets the rows of every forward pass."""

    def loss(batch: Any) -> Tensor:
        seen.append(len(batch["labels"]))
        logits = model(**batch).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")

    return loss


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_ragged_encoder_decoders_are_learnt_once_and_exact(name: str) -> None:
    """The first batch takes a pass for each of its rows, and more; lengths beyond all before take three, of two rows."""
    model, twin = built(name), built(name)
    engine = ClippingEngine(model, max_grad_norm=0.5)
    passes: list[list[int]] = []
    for number, batch in enumerate(ragged(name, BATCHES)):
        seen: list[int] = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.backward(summed(model, seen), batch)
        passes.append(seen)
        if number % 3 == 0:
            wanted, norms = clipped_sum(unit_gradients(twin, summed(twin, []), each_row(batch)), 0.5)
            assert distance(grads(model), wanted) < 1e-10
            torch.testing.assert_close(engine.norms, norms, rtol=1e-10, atol=1e-12)
        model.zero_grad()
    assert not engine.uncovered
    first, *later = passes
    assert len(first) <= 3 * (4 + 7) + 1
    assert all(len(seen) == 1 or (seen[:3] == [2, 1, 1] and len(seen) == 4) for seen in later)
    assert sum(len(seen) > 1 for seen in later[len(later) // 2 :]) <= 3  # as rare as new extremes are


@pytest.mark.sampled(4)
@pytest.mark.parametrize("texts", [(3, 6), (4, 4), (6, 3), (5, 5)])
def test_lengths_that_equal_each_other_or_the_number_of_rows(texts: tuple[int, int]) -> None:
    """Learnt where source and target are as long as there are rows, used where they are not, and the other way round."""
    generator = torch.Generator().manual_seed(0)
    square = padded([4, 3, 4, 2], [4, 4, 1, 2], generator)
    other = padded([texts[0]] * 5, [texts[1]] * 5, generator)
    for batches in ([square, other, square], [other, square, other]):
        model, twin = built("t5"), built("t5")
        engine = ClippingEngine(model, max_grad_norm=0.5)
        for batch in batches:
            engine.backward(summed(model, []), batch)
            wanted, _ = clipped_sum(unit_gradients(twin, summed(twin, []), each_row(batch)), 0.5)
            assert distance(grads(model), wanted) < 1e-10
            model.zero_grad()
        assert not engine.uncovered
