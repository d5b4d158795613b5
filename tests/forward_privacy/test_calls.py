"""A report speaks of calls that were made as `verify_cut` tried them, and of no others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.forward_privacy.calls import Calls, Verdict, Way
from dp_flash_hf.forward_privacy.privatize import privatize
from dp_flash_hf.forward_privacy.verify_cut import verify_cut
from tests.support.forward_privacy import ACROSS, ATTENTION, RESIDUAL, bart, llama, pairs, plain_output, texts


def test_another_set_of_inputs_is_another_call() -> None:
    """BART without decoder inputs shifts the private ones, which is no cut."""
    model = bart()
    privatized = privatize(model, ATTENTION, layers="cross")
    verify_cut(privatized, pairs(), **ACROSS)
    plain_output(model, pairs())
    privatized.report(1e-5)
    plain_output(model, {name: value for name, value in pairs().items() if name != "decoder_input_ids"})
    with pytest.raises(PrivacyError, match=r"not been verified: forward\(attention_mask, input_ids, use_cache=False\)\."):
        privatized.report(1e-5)


@pytest.mark.parametrize("options", [{"use_cache": True}, {"output_hidden_states": True}, {"return_dict": False}])
def test_other_options_are_another_call(options: dict[str, Any]) -> None:
    model = llama()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    verify_cut(privatized, texts(use_cache=False))
    model(**{**texts(use_cache=False), **options})
    with pytest.raises(PrivacyError, match=f"not been verified: forward.*{next(iter(options))}"):
        privatized.report(1e-5)


def test_positions_and_names_of_arguments_are_the_same_call() -> None:
    model = llama()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    verify_cut(privatized, texts(use_cache=False))
    batch = texts()
    model(batch["input_ids"], batch["attention_mask"], use_cache=False, labels=None)
    assert privatized.report(1e-5).verified_calls == ("forward(attention_mask, input_ids, use_cache=False)",)


def test_a_part_that_is_called_by_itself_was_not_verified() -> None:
    for part in ("model", "model.layers.0", None):
        model = llama()
        privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
        verify_cut(privatized, texts(use_cache=False))
        if part == "model.layers.0":
            states = torch.randn(1, 2, 16).double()
            model.model.layers[0](states, position_embeddings=model.model.rotary_emb(states, torch.arange(2)[None]))
        else:
            (model.model if part else model.forward)(**texts(use_cache=False))
        with pytest.raises(
            PrivacyError, match=r"not been verified: (forward of a LlamaModel|a privatised module called by itself)"
        ):
            privatized.report(1e-5)


def test_a_copy_is_called_as_verified_or_not() -> None:
    model = llama()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    verify_cut(privatized, texts(use_cache=False))
    twin = copy.deepcopy(model)
    plain_output(twin, texts(use_cache=False))
    assert privatized.report(1e-5).calls == 1
    twin.lm_head.register_forward_hook(lambda *_: None)
    plain_output(twin, texts(use_cache=False))
    with pytest.raises(PrivacyError, match="another lm_head"):
        privatized.report(1e-5)


def test_verdicts_hold_in_their_process_and_what_was_not_verified_stays_so_in_others() -> None:
    calls, way = Calls(), Way.of("forward", {"input_ids": torch.zeros(1)}, {"": llama})
    calls.record(way)
    calls.verify(way, Verdict(("input_ids",), (), ("logits",), frozenset()))
    assert calls.not_verified() == []
    assert not pickle.loads(pickle.dumps(calls)).is_verified({"": llama})
    assert copy.deepcopy(calls) is calls
    calls.verify(way, None)
    assert pickle.loads(pickle.dumps(calls)).not_verified() == ["forward(input_ids)"]


def test_rows_are_counted_as_the_verdict_on_the_call_says() -> None:
    """One verdict saw that rows do not mix; the other, on generation, had one row, which shows nothing."""
    model = llama()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    verify_cut(privatized, texts((4,), max_new_tokens=2), call="generate")
    verify_cut(privatized, texts(use_cache=False))
    plain_output(model, texts(use_cache=False))
    assert privatized.ledger.squared_mu == pytest.approx(1 / 4)
    model.generate(**texts(), max_new_tokens=1)
    assert privatized.ledger.squared_mu == pytest.approx((1 + 3) / 4)
