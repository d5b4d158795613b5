"""A model that changed since it was verified is noticed, at the call or at the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.forward_privacy.fingerprint import changed, fingerprint, token
from dp_flash_hf.forward_privacy.privatize import Privatized, privatize
from dp_flash_hf.forward_privacy.verify_cut import verify_cut
from tests.support.forward_privacy import RESIDUAL, llama, plain_output, texts

Undo = Callable[[], Any]


def unchanged(*args: Any) -> None:
    """A hook."""


class Leaking(nn.Linear):
    """A head of another class."""


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def set_on(owner: Any, name: str, value: Any) -> Undo:
    had, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    return (lambda: setattr(owner, name, before)) if had else (lambda: delattr(owner, name))


def parametrized(model: Any) -> Undo:
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Twice())
    return lambda: nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight", leave_parametrized=False)


def replaced(model: Any) -> Undo:
    before = model.lm_head
    model.lm_head = Leaking(16, 50, bias=False).double().requires_grad_(False)
    model.lm_head.eval()
    model.lm_head.weight = before.weight
    return lambda: setattr(model, "lm_head", before)


def trained(model: Any) -> Undo:
    model.lm_head.requires_grad_(True)
    return partial(model.lm_head.requires_grad_, False)


def added(model: Any) -> Undo:
    model.model.extra = nn.Identity().eval()
    return lambda: delattr(model.model, "extra")


def of_the_class(model: Any) -> Undo:
    original = type(model.model).forward
    type(model.model).forward = lambda *args, **kwargs: original(*args, **kwargs)
    return lambda: setattr(type(model.model), "forward", original)


CHANGES: dict[str, tuple[Callable[[Any], Undo], str]] = {
    "hook": (lambda model: model.lm_head.register_forward_hook(unchanged).remove, "lm_head"),
    "hook before": (lambda model: model.model.layers[1].register_forward_pre_hook(unchanged).remove, r"model\.layers\.1"),
    "hook of the model": (lambda model: model.register_forward_hook(unchanged).remove, "the model"),
    "backward hook": (lambda model: model.lm_head.register_full_backward_hook(unchanged).remove, "lm_head"),
    "hook of every module": (
        lambda model: nn.modules.module.register_module_forward_hook(unchanged).remove,
        "hooks of every module",
    ),
    "module": (replaced, "lm_head"),
    "new module": (added, r"model\.extra"),
    "parametrization": (parametrized, "lm_head"),
    "forward": (lambda model: set_on(model.lm_head, "forward", lambda x: x @ model.lm_head.weight.T), "lm_head"),
    "forward of the class": (of_the_class, "model"),
    "another method": (lambda model: set_on(model, "prepare_inputs_for_generation", unchanged), "the model"),
    "config": (lambda model: set_on(model.config, "use_cache", False), "config of the model"),
    "nested config": (lambda model: set_on(model.config, "rope_parameters", {"rope_type": "default"}), "config of"),
    "switch": (lambda model: set_on(model.model, "leak", True), "model"),
    "mode": (lambda model: partial(model.model.norm.train().train, False), r"model\.norm"),
    "training": (trained, "lm_head"),
}


def verified() -> tuple[Any, Privatized]:
    model = llama()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    verify_cut(privatized, texts(use_cache=False))
    plain_output(model, texts(use_cache=False))
    privatized.report(1e-5)
    return model, privatized


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_where_the_model_is_called_and_where_it_is_reported(change: str) -> None:
    model, privatized = verified()
    make, name = CHANGES[change]
    undo = make(model)
    try:
        with pytest.raises(PrivacyError, match=f"Since it was verified, there is another .*{name}"):
            privatized.report(1e-5)
    finally:
        undo()
    privatized.report(1e-5)  # nothing was released meanwhile
    undo = make(model)
    try:
        plain_output(model, texts(use_cache=False))
    finally:
        undo()
    with pytest.raises(PrivacyError, match=f"not been verified: forward.* with another .*{name}"):
        privatized.report(1e-5)  # though the model stands as it did


def test_a_changed_model_can_be_verified_as_it_stands() -> None:
    model, privatized = verified()
    model.lm_head.register_forward_hook(unchanged)
    plain_output(model, texts(use_cache=False))
    verify_cut(privatized, texts(use_cache=False))
    assert privatized.report(1e-5).calls == 2


def test_calling_generating_and_copying_change_nothing() -> None:
    model, privatized = verified()
    before = fingerprint(model)
    plain_output(model, texts(output_hidden_states=True))
    model.generate(**texts(), max_new_tokens=2)
    assert changed(before, fingerprint(model)) == []
    assert fingerprint(copy.deepcopy(model)) == before
    del privatized


def test_functions_are_told_apart_and_values_compared() -> None:
    def one() -> None: ...

    def other() -> None: ...

    assert token(one) != token(other)
    assert token({"a": [1, None]}) == token({"a": [1, None]}) != token({"a": [True, None]})
    assert token({1, 2}) == token({2, 1})
    assert token(torch.zeros(1)) == token(torch.ones(2))
    assert token(nn.Linear(1, 1).forward) == token(nn.Linear(2, 2).forward)


@pytest.mark.complete
def test_compiling_a_model_changes_nothing_that_was_verified() -> None:
    model, privatized = verified()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain_output(compiled, texts(use_cache=False))
    assert privatized.report(1e-5).calls == 2
