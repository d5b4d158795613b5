"""Random numbers that units of a batch would share: found, and then every unit is computed with its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.model_loss import model_loss
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.shared_numbers import shares_random_numbers
from dp_flash_hf.units import Units
from tests.support.loops import loop, run
from tests.support.models import VOCABULARY, Toy, batch_of, tiny, toy_batch, toy_loss
from tests.support.trainers import draws, without_dropout

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Rescaled(nn.Module):
    """Scales what passes in training, by numbers that are drawn as one says."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.training else x


def gpt2(draw: Callable[[Tensor], Tensor]) -> Any:
    model = without_dropout(tiny("gpt2"))
    model.transformer.drop = Rescaled(draw)
    return model.train()


def opt(layerdrop: float) -> Any:
    model = without_dropout(tiny("opt")).train()
    model.model.decoder.layerdrop = layerdrop
    return model


def ones(x: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=x.dtype)


SHARED: dict[str, Callable[[], Any]] = {
    "layer drop": lambda: opt(0.01),
    "stochastic depth of a batch": lambda: gpt2(lambda x: (torch.rand(()) > 0.05).to(x) + 0.5),
    "one mask for all rows": lambda: gpt2(lambda x: F.dropout(ones(x, 1, 1, x.shape[2]), 0.2)),
    "a number of numpy": lambda: gpt2(lambda x: torch.tensor(1 + np.random.random(), dtype=x.dtype)),
    "Gumbel noise of a batch": lambda: gpt2(lambda x: 1 - 0.1 * torch.rand((), dtype=x.dtype).log().neg().log()),
    "normal numbers for all rows": lambda: gpt2(lambda x: 1 + torch.randn(x.shape[2], dtype=x.dtype)),
}
APART: dict[str, Callable[[], Any]] = {
    "dropout": lambda: tiny("gpt2").train(),
    "layer drop of probability 0, which draws": lambda: gpt2(lambda x: 1 + (torch.rand(()) < 0.0).to(x)),
    "stochastic depth by row": lambda: gpt2(lambda x: F.dropout(ones(x, len(x), 1, 1), 0.2)),
    "a number for every row, one after the other": lambda: gpt2(
        lambda x: torch.stack([1 + torch.rand((), dtype=x.dtype) for _ in x]).view(-1, 1, 1)
    ),
    "keys of a generator that counts by row": lambda: gpt2(lambda x: 1 + 0 * torch.randint(2**32, (2,)).sum()),
}


def deberta(probability: float) -> Any:
    """Its relative positions are dropped out, which all rows use."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
    torch.manual_seed(1)
    settings: Any = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 32, **sizes, **positions}
    model: Any = without_dropout(hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**settings)).double())
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # positions matter
    for module in model.modules():
        if hasattr(module, "pos_dropout"):
            module.pos_dropout.p = probability
    return model.train()


class Scaled(Toy):
    """Of what it makes, a half is left where a number that all rows share says so."""

    def __init__(self, keeps: Callable[[], Any]) -> None:
        super().__init__()
        self.keeps = keeps

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * (torch.as_tensor(self.keeps()).double() / 2 + 0.5)


def scaled(keeps: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return Scaled(keeps)


# Whatever the probability is, and so however rarely two tries differ.
THRESHOLDS: dict[str, Callable[[float], Any]] = {
    "layer drop": opt,
    "a number of numpy": lambda p: scaled(lambda: np.random.random() >= p),
    "numbers of numpy, once they were used for something else": lambda p: scaled(
        lambda: bool((np.random.uniform(0, 1, size=4) >= p)[-1])
    ),
    "a number of Python": lambda p: scaled(lambda: random.uniform(0, 1) >= p),
    "dropout of one number": lambda p: scaled(lambda: F.dropout(torch.ones(1), p) > 0),
    "dropout of one number, as GPUs compute it": lambda p: scaled(lambda: torch.native_dropout(torch.ones(1), p, True)[0] > 0),
    "a Bernoulli number": lambda p: scaled(lambda: torch.bernoulli(torch.tensor(1 - p))),
    "a Bernoulli number in place": lambda p: scaled(lambda: torch.empty(()).bernoulli_(1 - p)),
    "stochastic depth": lambda p: scaled(lambda: (1 - p + torch.rand(1)).floor()),
    "a number in bfloat16": lambda p: scaled(lambda: torch.rand(1, dtype=torch.bfloat16) >= p),
    "a number of another interval": lambda p: scaled(lambda: torch.empty(1).uniform_(-1, 1) >= 2 * p - 1),
    "a whole number": lambda p: scaled(lambda: torch.randint(0, 1000, (1,)) >= 1000 * p),
    "dropout of relative positions": deberta,
}
OF_TRANSFORMERS = {"layer drop", "dropout of relative positions"}


def sizes_of_batches(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Of the physical batches in which six units are computed, four at most in each."""
    draws(monkeypatch, [0, 1, 2, 3, 4, 5])
    found: list[int] = []
    private, _, optimizer = loop(model, steps=1, **options)
    backward = ClippingEngine.backward

    def counted(self: ClippingEngine, *args: Any, **kwargs: Any) -> Tensor:
        if private._training.checked:
            found.append(args[2].n)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(ClippingEngine, "backward", counted)
    run(private, optimizer)
    return found


def shares(model: Any) -> bool:
    """Whether units of a batch share random numbers that matter."""
    engine = ClippingEngine(model, max_grad_norm=1.0)
    own = toy_loss(model) if isinstance(model, Toy) else partial(model_loss, model)
    batch = toy_batch(3) if isinstance(model, Toy) else batch_of("gpt2", rows=3)
    loss = UnitLoss(lambda batch, num_items: own(batch), "sum", "rows")
    try:
        return shares_random_numbers(engine, loss, batch, Units.rows(3), tolerance=1e-5)
    finally:
        engine.detach()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", SHARED)
def test_units_that_would_share_random_numbers_are_computed_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_batches(SHARED[kind](), monkeypatch) == [1] * 6


def slow(*kinds: str) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.complete) if kind in OF_TRANSFORMERS else kind for kind in kinds]


@pytest.mark.parametrize("kind", slow(*THRESHOLDS))
def test_they_are_found_however_rare_the_event_is_or_its_opposite(kind: str) -> None:
    for probability in (0.002, 0.998):
        assert shares(THRESHOLDS[kind](probability))


@pytest.mark.parametrize("kind", slow(*sorted(THRESHOLDS.keys() - {"stochastic depth"})))  # which is not asked for there
def test_a_probability_of_0_is_no_event(kind: str) -> None:
    assert not shares(THRESHOLDS[kind](0.0))


def test_so_they_are_within_a_budget_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_batches(SHARED["layer drop"](), monkeypatch, max_tokens_per_device=32) == [1] * 6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", APART)
def test_units_with_numbers_of_their_own_are_computed_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_batches(APART[kind](), monkeypatch) == [3, 3]
