"""Every method does the work it claims, and the same work as the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.benchmarks import methods
from dp_flash_hf.benchmarks.methods import BASELINE, FULL, LORA, MAX_GRAD_NORM, MEMORY, METHODS, VOCABULARY, Work
from dp_flash_hf.kernels.linear_cross_entropy import linear_cross_entropy

TINY = Work(device="cpu", autocast=False, layers=1, width=64, vocabulary=50, batch=3, lengths=(7,), threads=1)


def _row_gradients(model: Any, tokens: Tensor) -> list[list[Tensor]]:
    """Of each row: the gradient of its mean loss, one tensor per trained parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [list(torch.autograd.grad(model(input_ids=row[None], labels=row[None]).loss, trained)) for row in tokens]


@pytest.mark.parametrize(
    ("method", "lora"),
    [*((name, 0) for name in {**METHODS, **FULL, **VOCABULARY, **MEMORY}), *((name, 4) for name in LORA)],
    ids=str,
)
def test_each_method_steps_with_the_gradient_it_claims(method: str, lora: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are clipped to MAX_GRAD_NORM and averaged, except without privacy: a loop over single rows says how."""
    if method.startswith("Opacus"):
        pytest.importorskip("opacus")
    if lora:
        pytest.importorskip("peft")
    work, length = replace(TINY, lora=lora), 7
    if "logits" in method:
        length = 30  # logits larger than the head's gradient, or they are never deferred
        formed = _blocks_counted(monkeypatch)
    rows = _row_gradients(methods.model_of(work, length, "sdpa"), methods.tokens_of(work, length))
    norms = [float(torch.cat([g.flatten() for g in row]).norm()) for row in rows]
    assert min(norms) > MAX_GRAD_NORM  # else clipping would change nothing
    factors = [1.0 if method.startswith(BASELINE) else MAX_GRAD_NORM / norm for norm in norms]
    expected = [sum(f * g for f, g in zip(factors, of_rows, strict=True)) / work.batch for of_rows in zip(*rows, strict=True)]

    model, step = {**METHODS, **FULL, **VOCABULARY, **MEMORY}[method](work, length)
    assert getattr(model, "is_gradient_checkpointing", False) == ("checkpointing" in method)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("lora" in name) == bool(lora) for name in trained)
    before = [parameter.detach().clone() for parameter in trained.values()]
    step()
    for (name, parameter), want, old in zip(trained.items(), expected, before, strict=True):
        assert parameter.grad is not None, name
        # float32 sums in another order; Opacus clips to MAX_GRAD_NORM / (norm + 1e-6)
        error = float((parameter.grad - want).norm() / want.norm())
        assert error < 100 * torch.finfo(torch.float32).eps, name
        assert not torch.equal(parameter, old), f"{name} was not updated"
    if "logits" in method:
        assert bool(formed) == (method == "dp_flash, logits in blocks")


def _blocks_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an item for every cross entropy that is computed in blocks."""
    found: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr("dp_flash_hf.layers.logits.linear_cross_entropy", counted)
    return found


@pytest.mark.parametrize("private", [True, False])
def test_padded_and_padding_free_texts_are_the_same_work(private: bool) -> None:
    """Same weights, same texts: the same gradient. Privately, of texts of which each is clipped."""
    work = replace(TINY, batch=6)
    lengths = methods.text_lengths(work)
    assert lengths == methods.text_lengths(work)
    assert len(set(lengths)) > 1
    assert min(methods.BANKING77) <= min(lengths) <= max(lengths) <= max(methods.BANKING77)
    found = []
    for name in ("padded", "padding-free"):
        model, step = methods.ON_TEXTS[f"{'dp_flash' if private else 'non-private'}, {name}"](work, max(lengths))
        step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    if private:
        assert float(found[0].norm()) <= MAX_GRAD_NORM
    assert float((found[0] - found[1]).norm()) < 100 * torch.finfo(torch.float32).eps * float(found[0].norm())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_ragged_batches_are_the_same_for_both_methods_and_differ_from_step_to_step(family: str) -> None:
    work = replace(TINY, lengths=(12,), family=family)
    seen: list[list[tuple[int, ...]]] = []
    for make in methods.RAGGED.values():
        model, step = make(work, 12)  # which has taken as many steps as the other already
        shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append((*kwargs["input_ids"].shape, *kwargs["labels"].shape)),
            with_kwargs=True,
        )
        for _ in range(6):
            step()
        seen.append([shape for shape in dict.fromkeys(shapes) if shape[0] == 3])
    assert seen[0] == seen[1]
    assert len(seen[0]) > 3
