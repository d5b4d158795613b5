"""Clipped sums and norms of whole architectures equal a loop over single units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError
from tests.support.models import BUILDERS, Batch, Loss, batch_of, loss_of, packed_batch, tiny
from tests.support.oracle import clipped_sum, distance, each_row, grads, rows_of, unit_gradients

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
STRATEGIES: tuple[Strategy, ...] = ("auto", "bookkeeping", "two_pass", "microbatch")
CLIPPINGS: tuple[Any, ...] = ("flat", "automatic", "per_layer")
WAYS = tuple(product(CLIPPINGS, STRATEGIES))
# Every clipping and every strategy; the whole product is for `make test-all`.
SOME_WAYS = (
    *(("flat", strategy) for strategy in ("auto", "two_pass", "microbatch")),
    *(("automatic", "bookkeeping"), ("per_layer", "bookkeeping"), ("per_layer", "two_pass")),
)


def assert_exact(
    model: Any,
    loss: Loss,
    batch: Batch,
    parts: list[Batch],
    tolerance: float,
    *,
    units: Tensor | None = None,
    ways: Sequence[tuple[Any, Any]] = SOME_WAYS,
) -> None:
    """These clippings and strategies against the oracle, at a bound that clips some units and not others."""
    truth = unit_gradients(model, loss, parts)
    C = float(clipped_sum(truth, 1.0)[1].median())
    for clipping, strategy in ways:
        wanted, norms = clipped_sum(truth, C, clipping)
        engine = ClippingEngine(model, max_grad_norm=C, clipping=clipping, strategy=strategy)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a fall-back would announce itself
                engine.backward(loss, batch, units)
            assert distance(grads(model), wanted) <= tolerance, (clipping, strategy)
            torch.testing.assert_close(engine.norms.double(), norms, rtol=tolerance, atol=0.0)
        finally:
            engine.detach()
            model.zero_grad()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", BUILDERS)
def test_padded_rows(name: str) -> None:
    model, batch = tiny(name), batch_of(name)
    ways = WAYS if name == "gpt2" else SOME_WAYS
    assert_exact(model, loss_of(name, model), batch, each_row(batch), TOLERANCE[torch.float64], ways=ways)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", BUILDERS)
def test_padded_rows_in_float32(name: str) -> None:
    model, batch = tiny(name, torch.float32), batch_of(name, dtype=torch.float32)
    ways = (("flat", "bookkeeping"), ("per_layer", "two_pass"))
    assert_exact(model, loss_of(name, model), batch, each_row(batch), TOLERANCE[torch.float32], ways=ways)


@pytest.mark.coverage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_padded_rows_in_every_way(name: str, dtype: torch.dtype) -> None:
    model, batch = tiny(name, dtype), batch_of(name, dtype=dtype)
    assert_exact(model, loss_of(name, model), batch, each_row(batch), TOLERANCE[dtype], ways=WAYS)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "qwen3", "phi3", "gemma3"])
def test_packed_row(name: str) -> None:
    model = tiny(name)
    batch, boundaries = packed_batch()
    ends = boundaries.tolist()
    parts = [{k: v[:, a:b] for k, v in batch.items()} for a, b in pairwise(ends)]
    inside = torch.float32 if name == "gemma3" else torch.float64  # Gemma's norms round to float32 whatever the model's dtype
    ways = [way for way in WAYS if "automatic" not in way]
    assert_exact(model, loss_of(name, model), batch, parts, TOLERANCE[inside], units=boundaries, ways=ways)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama"])
def test_units_of_several_rows(name: str) -> None:
    model, batch = tiny(name), batch_of(name, rows=6)
    ids = torch.tensor([0, 1, 0, -1, 1, 2])
    parts = [rows_of(batch, rows) for rows in ([0, 2], [1, 4], [5])]
    assert_exact(model, loss_of(name, model), batch, parts, 1e-12, units=ids)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "bert", "t5", "vit"])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    if name == "t5" and reentrant:
        pytest.skip("the bias table goes through the old checkpoint's own autograd function, and so unit by unit")
    model, batch = tiny(name), batch_of(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    assert_exact(model, loss_of(name, model), batch, each_row(batch), 1e-12, ways=tuple(product(("flat",), STRATEGIES)))


LORA: dict[str, dict[str, Any]] = {
    "qv": {"target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


def _lora(name: str, **options: Any) -> Any:
    model = get_peft_model(tiny(name), LoraConfig(r=3, lora_alpha=5, task_type=TaskType.CAUSAL_LM, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B starts at zero, which would hide errors in A
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().eval()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", LORA)
def test_lora(kind: str) -> None:
    model, batch = _lora("llama", **LORA[kind]), batch_of("llama")
    assert_exact(model, loss_of("llama", model), batch, each_row(batch), 1e-12)


def test_lora_on_conv1d_and_packed() -> None:
    model, batch = _lora("gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), batch_of("gpt2")
    assert_exact(model, loss_of("gpt2", model), batch, each_row(batch), 1e-12)


def test_dora_is_exact_one_way_or_the_other() -> None:
    model, batch = _lora("llama", target_modules=["q_proj", "v_proj"], use_dora=True), batch_of("llama")
    loss = loss_of("llama", model)
    wanted, norms = clipped_sum(unit_gradients(model, loss, each_row(batch)), 0.5)
    engine = ClippingEngine(model, max_grad_norm=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.backward(loss, batch)
    assert distance(grads(model), wanted) <= 1e-12
    torch.testing.assert_close(engine.norms, norms, rtol=1e-12, atol=0.0)


def test_parameters_that_cannot_be_followed_go_unit_by_unit_and_are_named() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    head = model.lm_head.weight
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, head)
    loss = loss_of("llama", model)
    wanted, norms = clipped_sum(unit_gradients(model, loss, each_row(batch)), 0.5)
    engine = ClippingEngine(model, max_grad_norm=0.5)
    with pytest.warns(UserWarning, match=r"no rule covers how .*lm_head.weight.*exact, but slower") as caught:  # noqa: PT031
        engine.backward(loss, batch)
        engine.backward(loss, batch)
    assert len([w for w in caught if "no rule" in str(w.message)]) == 1
    assert distance({n: g / 2 for n, g in grads(model).items()}, wanted) <= 1e-12
    torch.testing.assert_close(engine.norms, norms, rtol=1e-12, atol=0.0)
    assert set(engine.norm_methods().values()) == {"microbatch"}
    engine.detach()
    model.zero_grad()
    fast: tuple[Strategy, ...] = ("bookkeeping", "two_pass")
    for strategy in fast:
        engine = ClippingEngine(model, max_grad_norm=0.5, strategy=strategy)
        with pytest.raises(PrivacyError, match="no rule covers"):
            engine.backward(loss, batch)
        assert all(p.grad is None for p in model.parameters())
        engine.detach()
