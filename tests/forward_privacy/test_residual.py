"""Noise on hidden states: clipped as a whole, with padding zeroed and noise of the right scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.privatize import privatize
from tests.support.forward_privacy import EPS64, RESIDUAL, SILENT, bart, llama, pairs, texts


def states_after(model: Any, block: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What a block returns, after its hooks."""
    found: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(**batch)
    handle.remove()
    return found[0]


def test_hidden_states_of_a_sequence_are_clipped_as_one_and_padding_is_zeroed() -> None:
    for model, batch, layer in (
        (llama(), texts(use_cache=False), 0),
        (bart(), pairs(), 1),  # the encoder's
        (bart(), pairs(decoder_attention_mask=(torch.arange(4) < torch.tensor([[4], [2], [3]])).long()), 2),
    ):
        mask = batch["decoder_attention_mask" if layer == 2 else "attention_mask"]
        blocks = dict(model.named_modules())
        norm = 0.01
        privatized = privatize(
            model, AttentionPrivacy(clip_norm=norm, noise_multiplier=SILENT), layers=[layer], placement="residual"
        )
        (name,) = privatized.places
        found = states_after(model, blocks[name], batch)
        privatized.remove()
        plain = states_after(model, blocks[name], batch) * mask[:, :, None]
        factors = (norm / plain.flatten(1).norm(dim=1)).clamp(max=1)
        assert (factors < 1).all()
        torch.testing.assert_close(found, plain * factors[:, None, None], rtol=0, atol=16 * EPS64)
        assert (found[mask == 0] == 0).all()


def test_hidden_states_are_clipped_with_their_exact_gradient() -> None:
    model = llama()
    batch = texts()
    embeds = model.model.embed_tokens(batch.pop("input_ids"))
    privatized = privatize(model, AttentionPrivacy(clip_norm=0.5, noise_multiplier=SILENT), layers=[0], placement="residual")

    def after(x: Tensor) -> Tensor:
        return states_after(model, model.model.layers[0], {**batch, "inputs_embeds": x, "use_cache": False})

    x = embeds.detach().clone().requires_grad_()
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad(after(x), x, direction)
    privatized.remove()
    plain = after(x) * batch["attention_mask"][:, :, None]
    expected = plain * (0.5 / plain.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    torch.testing.assert_close(found, torch.autograd.grad(expected, x, direction)[0], rtol=1e-10, atol=1e-12)


def test_noise_on_hidden_states_has_its_scale() -> None:
    model = llama()
    batch = texts((40,) * 16, use_cache=False)
    privatized = privatize(model, AttentionPrivacy(clip_norm=0.5, noise_multiplier=3.0), layers=[0], placement="residual")
    one, other = (states_after(model, model.model.layers[0], batch) for _ in range(2))
    drawn = (one - other) / (math.sqrt(2) * 2 * 0.5 * 3.0)
    # 10,240 squares; 4 standard deviations.
    assert abs(float(drawn.square().mean()) - 1) < 4 * math.sqrt(2 / drawn.numel())
    assert privatized.ledger.squared_mu == pytest.approx(2 / 3.0**2)


def test_without_a_mask_every_row_is_real() -> None:
    model = llama()
    privatize(model, RESIDUAL, layers=[0], placement="residual")
    batch = texts(use_cache=False)
    model(**batch)
    assert (states_after(model, model.model.layers[0], {"input_ids": batch["input_ids"], "use_cache": False}) != 0).all()


def test_infinite_hidden_states_stay_within_the_bound() -> None:
    model = llama()
    privacy = AttentionPrivacy(clip_norm=0.5, noise_multiplier=SILENT)
    privatize(model, privacy, layers=[0], placement="residual")
    embeds = model.model.embed_tokens(texts()["input_ids"]).detach()
    embeds[0, 1] = math.inf
    found = states_after(model, model.model.layers[0], {"inputs_embeds": embeds, "use_cache": False})
    assert (found.flatten(1).norm(dim=1) <= 0.5 * (1 + 16 * EPS64)).all()
