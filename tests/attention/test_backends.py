"""Implementations of attention: the Triton kernels behind the function, and what each of them takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import dp_flash_hf
from dp_flash_hf.attention.backends import use
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels import reference
from tests.support.attention import (
    CUTS,
    EXTRAS,
    MOE,
    H,
    S,
    assert_same,
    causal_mask,
    for_oracle,
    padding,
    run,
    tensors,
    trainable,
)

# What the Triton kernels have to recognise in a call: (tensors(), run(), reference.attention()) arguments.
_UNIT = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
_RESTARTS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
FOR_TRITON: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {}, {"causal": True}),
    "all": ({}, {"causal": False}, {}),
    "padded right": ({}, {"mask": padding([5, S])}, {"causal": True, "lengths": [5, S]}),
    "padded left": (
        {},
        {"mask": padding([5, S], "left")},
        {"mask": causal_mask(S) & padding([5, S], "left")[:, None, None, :] & padding([5, S], "left")[:, None, :, None]},
    ),
    "padded keys": ({}, {"mask": padding([5, S]), "causal": False}, {"mask": padding([5, S])[:, None, None]}),
    "packed, ends": ({"batch": 1}, {"cu_seq_lens_q": torch.tensor(CUTS)}, {"causal": True, "cu_seqlens_q": CUTS}),
    "packed, positions": ({"batch": 1}, {"position_ids": _RESTARTS}, {"causal": True, "cu_seqlens_q": CUTS}),
    "packed, mask": (
        {},
        {"mask": ((_UNIT[:, None] == _UNIT) & causal_mask(S))[None, None]},
        {"causal": True, "cu_seqlens_q": CUTS},
    ),
    "window": ({}, {"sliding_window": 3}, {"causal": True, "window": 3}),
    "window, packed": (
        {},
        {"mask": ((_UNIT[:, None] == _UNIT) & causal_mask(S, 3))[None, None]},
        {"causal": True, "window": 3, "cu_seqlens_q": CUTS},
    ),
    "cross": ({"q": 4, "k": 7}, {"causal": False}, {}),
    "cross, padded": (
        {"q": 4, "k": 7},
        {"causal": False, "mask": padding([7, 3], size=7)},
        {"mask": padding([7, 3], size=7)[:, None, None]},
    ),
    "cross, packed": (
        {"batch": 1, "q": 4, "k": 7},
        {"causal": False, "cu_seq_lens_q": torch.tensor([0, 3, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 7])},
        {"cu_seqlens_q": [0, 3, 4], "cu_seqlens_k": [0, 2, 7]},
    ),
}


# What is added to the logits changes how they are computed, not who sees whom: each with a few cases of every kind.
_WITH = {
    "plain": set(FOR_TRITON),
    "softcap": {"causal", "padded left", "window, packed", "cross, packed"},
    "sinks": {"all", "padded keys", "packed, ends", "window"},
}


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=() if case in cases else pytest.mark.complete)
        for name, cases in _WITH.items()
        for case in FOR_TRITON
    ],
)
def test_triton(case: str, name: str, device: str) -> None:
    pytest.importorskip("triton")
    sizes, arguments, for_reference = FOR_TRITON[case]
    qkv, extra = tensors(**sizes), EXTRAS[name]()
    query, key, value = qkv
    oracle = reference.attention(query, key, value, **for_reference, **for_oracle(extra))

    def on_device(x: Any) -> Any:
        return (x.float() if x.is_floating_point() else x).to(device) if isinstance(x, Tensor) else x

    with use("triton"):
        ours = run([on_device(x) for x in qkv], **{key: on_device(x) for key, x in {**arguments, **extra}.items()})
    assert_same(ours.double().cpu(), oracle, trainable(qkv, extra), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"position_bias": torch.zeros(1, H, S, S)}, "added to the logits"),
        ({"mask": torch.zeros(1, 1, S, S)}, "added to the logits"),
        ({"mask": torch.arange(S * S).view(1, 1, S, S) % 3 > 0}, "such a mask"),
    ],
    ids=["bias", "float mask", "holes"],
)
def test_triton_runs_or_raises(kwargs: dict[str, Any], match: str, device: str) -> None:
    qkv = [x.detach().float().to(device) for x in tensors()]
    with use("triton"), pytest.raises(UnsupportedError, match=match):
        run(qkv, **{key: x.to(device) for key, x in kwargs.items()})
    with use("triton"), pytest.raises(UnsupportedError, match="float64"):
        run(tensors())


@pytest.mark.complete
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_engine_records_through_the_kernels(name: str, device: str) -> None:
    pytest.importorskip("triton")
    config = transformers.AutoConfig.for_model(name, **MOE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash").to(device).train()  # type: ignore[no-untyped-call]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in parameter_name and "sinks" not in parameter_name)
    ids = torch.randint(3, 50, (3, 9), device=device)
    mask = padding([9, 4, 1]).to(device)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    def clipped() -> list[Tensor]:
        model.zero_grad()
        engine = dp_flash_hf.ClippingEngine(model, max_grad_norm=0.01)
        engine.backward(lambda rows: model(**rows, num_items_in_batch=1).loss, batch)
        assert "microbatch" not in set(engine.norm_methods().values())
        engine.detach()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    wanted = clipped()
    with use("triton"):
        found = clipped()
        # Sinks are trained by torch alone, where their gradients are recorded.
        if name == "gpt_oss":
            model.model.layers[0].self_attn.sinks.requires_grad_()
            with pytest.raises(UnsupportedError, match="trained sinks"):
                clipped()
    for one, other in zip(found, wanted, strict=True):
        # Of norm 0.01 at most, and sums of fewer than 2^10 rounded products on the way.
        torch.testing.assert_close(one, other, rtol=0, atol=2**10 * torch.finfo(torch.float32).eps * 0.01)


def test_reference_refuses_dropout() -> None:
    with use("reference"), pytest.raises(UnsupportedError, match="dropout"):
        run(tensors(), dropout=0.1)


def test_use_knows_its_implementations() -> None:
    with pytest.raises(ValueError, match="one of sdpa, triton, reference"), use("eager"):  # type: ignore[arg-type]
        pass


def test_use_holds_in_all_threads() -> None:
    """Autograd computes checkpointed layers again in threads of its own, which must give what the first forward gave."""
    qkv = tensors()
    with use("reference"), ThreadPoolExecutor(1) as pool, pytest.raises(UnsupportedError, match=r'"reference".*dropout'):
        pool.submit(run, qkv, dropout=0.1).result()
