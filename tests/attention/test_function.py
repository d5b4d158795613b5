"""dp_flash attention: exact (against the oracle and eager models), isolated (NaN poisoning), really in use, and tidy."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import dp_flash_hf
from dp_flash_hf.attention import function as dp
from dp_flash_hf.attention import registration
from dp_flash_hf.attention import segments as attention_layout
from dp_flash_hf.attention.backends import use
from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels import reference

assert dp_flash_hf.__name__  # imported for its registration, which the next line repeats
registration.register()

EPS64 = torch.finfo(torch.float64).eps
NAN = math.nan


# --- the function, against the oracle --------------------------------------------------------------------------------------

B, H, G, S, D, E = 2, 4, 2, 9, 8, 6


def tensors(batch: int = B, q: int = S, k: int = S, heads: int = H, kv_heads: int = G, e: int = E) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = (batch, heads, q, D), (batch, kv_heads, k, D), (batch, kv_heads, k, e)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def layer(is_causal: bool = True) -> nn.Module:
    module = nn.Module()
    module.is_causal = is_causal  # type: ignore[assignment]
    return module


def run(qkv: list[Tensor], mask: Tensor | None = None, causal: bool = True, **kwargs: Any) -> Tensor:
    query, key, value = qkv
    out, weights = dp_flash_attention(layer(causal), query, key, value, mask, **kwargs)
    assert weights is None
    return out.transpose(1, 2)  # (B, H, Q, E), as the oracle has it


def assert_same(ours: Tensor, oracle: Tensor, inputs: list[Tensor], eps: float = EPS64) -> None:
    """Equal outputs and gradients. Errors are those of sums of at most 64 products of numbers below 8, one after another."""
    atol = 64 * 8 * eps
    torch.testing.assert_close(ours, oracle, rtol=0, atol=atol)
    seed = torch.randn(ours.shape, dtype=ours.dtype)
    grads = [torch.autograd.grad(out, inputs, seed, retain_graph=True) for out in (ours, oracle)]
    torch.testing.assert_close(*grads, rtol=0, atol=atol)


def causal_mask(n: int, window: int | None = None) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    return mask if window is None else mask.triu(1 - window)


def padding(lengths: list[int], side: str = "right", size: int = S) -> Tensor:
    rows = [[1] * n + [0] * (size - n) for n in lengths]
    return torch.tensor(rows if side == "right" else [row[::-1] for row in rows]).bool()


EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {},
    "scaled": lambda: {"scaling": 0.2},
    "softcap": lambda: {"softcap": 1.3},
    "sinks": lambda: {"s_aux": torch.randn(H, dtype=torch.float64, requires_grad=True)},
    "bias": lambda: {"position_bias": torch.randn(1, H, S, S, dtype=torch.float64, requires_grad=True)},
    "all": lambda: EXTRAS["softcap"]() | EXTRAS["sinks"]() | EXTRAS["bias"](),
}
ORACLE_NAMES = {"scaling": "scale", "softcap": "softcap", "s_aux": "sinks", "position_bias": "bias"}


@pytest.fixture(params=EXTRAS)
def extra(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(2)
    return EXTRAS[request.param]()


def for_oracle(extra: dict[str, Any]) -> dict[str, Any]:
    return {ORACLE_NAMES[name]: value for name, value in extra.items()}


def trainable(qkv: list[Tensor], extra: dict[str, Any]) -> list[Tensor]:
    return [*qkv, *(value for value in extra.values() if isinstance(value, Tensor))]


@pytest.mark.parametrize("causal", [True, False])
def test_unmasked(extra: dict[str, Any], causal: bool) -> None:
    qkv = tensors()
    oracle = reference.attention(*qkv, causal=causal, **for_oracle(extra))
    assert_same(run(qkv, causal=causal, **extra), oracle, trainable(qkv, extra))
    assert_same(run(qkv, causal=not causal, is_causal=causal, **extra), oracle, trainable(qkv, extra))  # the argument wins


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(extra: dict[str, Any], side: str) -> None:
    qkv, real = tensors(), padding([5, S], side)
    mask = causal_mask(S) & real[:, None, None, :] & real[:, None, :, None]
    oracle = reference.attention(*qkv, mask=mask, **for_oracle(extra))
    assert_same(run(qkv, mask, **extra), oracle, trainable(qkv, extra))
    assert_same(run(qkv, real, **extra), oracle, trainable(qkv, extra))  # the 2-D form of the same mask
    if side == "right":
        assert_same(run(qkv, mask, **extra), reference.attention(*qkv, causal=True, lengths=[5, S], **for_oracle(extra)), qkv)


CUTS = [0, 3, 4, S]


@pytest.mark.parametrize("causal", [True, False])
def test_packed(extra: dict[str, Any], causal: bool) -> None:
    qkv, cuts = tensors(batch=1), torch.tensor(CUTS, dtype=torch.int32)
    positions = torch.tensor([[i - start for start, stop in pairwise(CUTS) for i in range(start, stop)]])
    unit = torch.bucketize(torch.arange(S), cuts[1:], right=True)
    mask = (unit[:, None] == unit[None, :])[None, None] & (causal_mask(S) if causal else True)
    oracle = reference.attention(*qkv, causal=causal, cu_seqlens_q=CUTS, **for_oracle(extra))
    inputs = trainable(qkv, extra)
    assert_same(run(qkv, causal=causal, cu_seq_lens_q=cuts, cu_seq_lens_k=cuts, max_length_q=5, **extra), oracle, inputs)
    assert_same(run(qkv, causal=causal, position_ids=positions, **extra), oracle, inputs)
    assert_same(run(qkv, mask, causal=causal, **extra), oracle, inputs)
    assert_same(run(qkv, mask, causal=causal, cu_seq_lens_q=cuts, **extra), oracle, inputs)
    assert_same(run(qkv, causal_mask(S)[None, None] if causal else None, causal, cu_seq_lens_q=cuts, **extra), oracle, inputs)


def test_a_query_whose_keys_are_all_in_other_segments_gives_zero(extra: dict[str, Any]) -> None:
    qkv, mask = tensors(batch=1), causal_mask(S).tril(-1)[None, None]
    oracle = reference.attention(*qkv, mask=mask, cu_seqlens_q=CUTS, **for_oracle(extra))
    assert_same(run(qkv, mask, cu_seq_lens_q=torch.tensor(CUTS), **extra), oracle, trainable(qkv, extra))


def test_packed_rows_of_a_batch(extra: dict[str, Any]) -> None:
    qkv = tensors()
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [5, 6, 7, 7, 9, 10, 3, 4, 5]])
    cuts = [[0, 3, 5, S], [0, 6, S]]
    oracle = torch.cat(
        [
            reference.attention(*(x[b : b + 1] for x in qkv), causal=True, cu_seqlens_q=cuts[b], **for_oracle(extra))
            for b in (0, 1)
        ]
    )
    assert_same(run(qkv, position_ids=positions, **extra), oracle, trainable(qkv, extra))
    unit = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 6 + [1] * 3])
    mask = (unit[:, :, None] == unit[:, None, :])[:, None] & causal_mask(S)
    assert_same(run(qkv, mask, **extra), oracle, trainable(qkv, extra))


def test_packed_row_with_padding_at_its_end(extra: dict[str, Any]) -> None:
    qkv = tensors(batch=1)
    mask = torch.block_diag(causal_mask(3), causal_mask(4), torch.zeros(2, 2)).bool()[None, None]
    oracle = reference.attention(*qkv, causal=True, cu_seqlens_q=[0, 3, 7], **for_oracle(extra))
    assert_same(run(qkv, mask, **extra), oracle, trainable(qkv, extra))


def test_a_block_whose_first_query_sees_nothing(device: str) -> None:
    """Everything before itself, and not itself: alone in its row, and before two other texts."""
    before = causal_mask(S).tril(-1)
    for mask in (before, torch.block_diag(before[:3, :3], causal_mask(4), torch.ones(2, 2)).bool()):
        qkv = tensors(batch=1)
        assert_same(run(qkv, mask[None, None]), reference.attention(*qkv, mask=mask[None, None]), qkv)
        single = [x.detach().float().to(device) for x in qkv]
        with use("triton"), pytest.raises(UnsupportedError, match="mask of this form"):  # and not zeros
            run(single, mask[None, None].to(device))


def test_sliding_window(extra: dict[str, Any]) -> None:
    qkv, positions = tensors(), torch.tensor([[*range(5), *range(4)]])
    oracle = reference.attention(*qkv, causal=True, window=3, **for_oracle(extra))
    inputs = trainable(qkv, extra)
    assert_same(run(qkv, sliding_window=3, **extra), oracle, inputs)
    assert_same(run(qkv, causal_mask(S, 3)[None, None], sliding_window=3, **extra), oracle, inputs)
    oracle = reference.attention(*qkv, causal=True, window=3, cu_seqlens_q=[0, 5, S], **for_oracle(extra))
    assert_same(run(qkv, sliding_window=3, position_ids=positions, **extra), oracle, inputs)


def test_cross_attention() -> None:
    qkv, real = tensors(q=4, k=7), padding([7, 3], size=7)
    assert_same(run(qkv, causal=False), reference.attention(*qkv), qkv)
    oracle = reference.attention(*qkv, mask=real[:, None, None, :])
    assert_same(run(qkv, real[:, None, None, :].expand(-1, 1, 4, -1), causal=False), oracle, qkv)
    assert_same(run(qkv, real, causal=False), oracle, qkv)
    packed = tensors(batch=1, q=4, k=7)
    cuts = torch.tensor([0, 3, 4]), torch.tensor([0, 2, 7])
    oracle = reference.attention(*packed, cu_seqlens_q=[0, 3, 4], cu_seqlens_k=[0, 2, 7])
    assert_same(run(packed, causal=False, cu_seq_lens_q=cuts[0], cu_seq_lens_k=cuts[1]), oracle, packed)


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


@pytest.mark.parametrize("case", FOR_TRITON)
@pytest.mark.parametrize("name", ["plain", "softcap", "sinks"])
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
        ({"mask": torch.arange(S * S).view(1, 1, S, S) % 3 > 0}, "mask of this form"),
    ],
    ids=["bias", "float mask", "holes"],
)
def test_triton_runs_or_raises(kwargs: dict[str, Any], match: str, device: str) -> None:
    qkv = [x.detach().float().to(device) for x in tensors()]
    with use("triton"), pytest.raises(UnsupportedError, match=match):
        run(qkv, **{key: x.to(device) for key, x in kwargs.items()})
    with use("triton"), pytest.raises(UnsupportedError, match="float64"):
        run(tensors())


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


def test_one_query_sees_all_keys() -> None:
    qkv = tensors(q=1, k=7)
    assert_same(run(qkv), reference.attention(*qkv), qkv)


def test_arbitrary_masks() -> None:
    qkv = tensors()
    mask = torch.rand(B, H, S, S) < 0.4
    assert_same(run(qkv, mask), reference.attention(*qkv, mask=mask), qkv)
    added = torch.randn(B, 1, S, S, dtype=torch.float64, requires_grad=True)
    assert_same(run(qkv, added), reference.attention(*qkv, bias=added), [*qkv, added])
    picked = torch.stack([torch.randperm(S)[:3] for _ in range(B * S)]).view(B, S, 3)
    allowed = torch.zeros(B, 1, S, S, dtype=torch.bool).scatter(-1, picked[:, None], True) & causal_mask(S)
    assert_same(run(qkv, indices=picked.int()), reference.attention(*qkv, mask=allowed), qkv)
    assert_same(run(qkv, causal_mask(S)[None, None], indices=picked), reference.attention(*qkv, mask=allowed), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kwargs", [{}, {"softcap": 1.3}, {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}], ids=str
)
def test_half_precision(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    qkv = [x.detach().to(dtype) for x in tensors()]
    out = run(qkv, **kwargs)
    assert out.dtype == dtype
    with use("reference"):
        oracle = run(qkv, **kwargs)
    # Weights sum to one: rounding weights and values costs one eps of the largest value each, the output and oracle one more.
    atol = 4 * torch.finfo(dtype).eps * qkv[2].abs().max().item()
    torch.testing.assert_close(out, oracle, rtol=0, atol=atol)


@pytest.mark.parametrize("kwargs", [{}, {"softcap": 2.0}, {"cu_seq_lens_q": torch.tensor([0, 100, 400])}], ids=str)
def test_dropout_keeps_the_mean_and_drops_the_right_share(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(3)
    n, p = 400, 0.25
    query, key = torch.zeros(1, 1, n, D), torch.zeros(1, 1, n, D)
    out = run([query, key, torch.ones(1, 1, n, 1)], causal=False, dropout=p, **kwargs)[0, 0, :, 0]
    # Query i averages n_i kept-or-dropped ones: mean 1, variance p / (1-p) / n_i.
    lengths = torch.tensor([100] * 100 + [300] * 300) if kwargs.get("cu_seq_lens_q") is not None else torch.full((n,), n)
    z = (out - 1) / (p / (1 - p) / lengths).sqrt()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / n)


def test_reference_refuses_dropout() -> None:
    with use("reference"), pytest.raises(UnsupportedError, match="dropout"):
        run(tensors(), dropout=0.1)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"sinks": torch.zeros(1)}, "sinks"),
        ({"block_indices": torch.zeros(1)}, "block_indices"),
        ({"output_attentions": True}, "weights"),
        ({"is_causal": False, "sliding_window": 3}, "not causal"),
        ({"mask": causal_mask(S)[None, None], "sliding_window": 3}, "mask ignores"),
        ({"cu_seq_lens_q": torch.tensor([0, S])}, "batch of one"),
        ({"batch": 1, "cu_seq_lens_q": torch.tensor([0, S - 1])}, "rising from 0 to 9"),
        ({"batch": 1, "cu_seq_lens_q": torch.tensor([0, 5, 4, S])}, "rising"),
        ({"batch": 1, "cu_seq_lens_q": torch.tensor([0, 4, S]), "cu_seq_lens_k": torch.tensor([0, 5, S])}, "different numbers"),
        ({"k": S + 1}, "line up"),
        ({"k": S + 1, "mask": torch.ones(B, S + 1)}, "line up"),
        ({"mask": torch.ones(B, S, S)}, "2 or 4 dimensions"),
        ({"mask": causal_mask(S)[None, None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "see each other"),
        ({"mask": torch.zeros(1, 1, S, S), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "see each other"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refuses_what_it_would_get_wrong(kwargs: dict[str, Any], match: str) -> None:
    qkv = tensors(batch=kwargs.pop("batch", B), k=kwargs.pop("k", S))
    with pytest.raises(ValueError, match=match):
        run(qkv, **kwargs)


def test_use_knows_its_implementations() -> None:
    with pytest.raises(ValueError, match="one of sdpa, triton, reference"), use("eager"):  # type: ignore[arg-type]
        pass


# --- isolation: NaN in one unit reaches nobody else -------------------------------------------------------------------------


def poisoned_run(
    units: list[tuple[int, slice]], bad: int, where: str, mask: Tensor | None, extra: dict[str, Any], **kwargs: Any
) -> None:
    """Poison one unit's inputs or output gradient: all other units' outputs and gradients stay bit for bit the same."""
    batch = 1 + max(row for row, _ in units)

    def once(poison: bool) -> tuple[Tensor, list[Tensor]]:
        qkv = tensors(batch=batch)
        torch.manual_seed(4)
        seed = torch.zeros(batch, H, S, E, dtype=torch.float64)
        for row, span in units:
            seed[row, :, span] = torch.randn(H, span.stop - span.start, E, dtype=torch.float64)
        row, span = units[bad]
        with torch.no_grad():
            for name, x in zip("qkv", qkv, strict=True):
                if poison and name in where:
                    x[row, :, span] = NAN
            if poison and "gradient" in where:
                seed[row, :, span] = NAN
        out = run(qkv, mask, **kwargs, **extra)
        return out.detach(), list(torch.autograd.grad(out, qkv, seed))

    clean, grads = once(poison=False)
    dirty, dirty_grads = once(poison=True)
    for unit, (row, span) in enumerate(units):
        if unit != bad:
            for before, after in zip([clean, *grads], [dirty, *dirty_grads], strict=True):
                assert after[row, :, span].isfinite().all(), f"unit {unit}"
                torch.testing.assert_close(after[row, :, span], before[row, :, span], rtol=0, atol=0)
    if where != "gradient":
        row, span = units[bad]
        assert dirty[row, :, span].isnan().any()  # the poison was there


POISON = ["q", "k", "v", "qkv", "gradient"]
PACKED = [(0, slice(0, 3)), (0, slice(3, 4)), (0, slice(4, S))]


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("where", POISON)
def test_packed_units_are_isolated(extra: dict[str, Any], bad: int, where: str) -> None:
    cuts, positions = torch.tensor(CUTS), torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    blocks = torch.block_diag(*(causal_mask(b - a) for a, b in pairwise(CUTS))).bool()[None, None]
    if where == "q" and bad == 1 and "s_aux" not in extra:  # one token attending to itself: its weight is 1 whatever the query
        where = "kv"
    poisoned_run(PACKED, bad, where, None, extra, cu_seq_lens_q=cuts)
    poisoned_run(PACKED, bad, where, None, extra, position_ids=positions)
    poisoned_run(PACKED, bad, where, None, extra, position_ids=positions, sliding_window=2)
    poisoned_run(PACKED, bad, where, blocks, extra)
    poisoned_run(PACKED, bad, where, blocks & causal_mask(S, 2), extra)
    poisoned_run(PACKED, bad, where, causal_mask(S)[None, None], extra, cu_seq_lens_q=cuts)


@pytest.mark.parametrize("where", POISON)
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_padded_units_are_isolated(extra: dict[str, Any], where: str, side: str) -> None:
    lengths = [S, 4, 6]
    spans = [slice(0, n) if side == "right" else slice(S - n, S) for n in lengths] if side != "none" else [slice(0, S)] * 3
    mask = padding(lengths, side) if side != "none" else None
    for bad in (0, 1):
        poisoned_run(list(enumerate(spans)), bad, where, mask, extra)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_reaches_nobody(extra: dict[str, Any], side: str) -> None:
    real = padding([5, S], side)

    def once(poison: bool) -> tuple[Tensor, list[Tensor]]:
        qkv = tensors()
        with torch.no_grad():
            for x in qkv:
                x.transpose(1, 2)[~real] = NAN if poison else 0.5
        out = run(qkv, real, **extra).transpose(1, 2)
        return out[real], [g.transpose(1, 2)[real] for g in torch.autograd.grad(out[real].square().sum(), qkv)]

    torch.testing.assert_close(once(poison=True), once(poison=False), rtol=0, atol=0)


def test_cross_attention_padding_reaches_nobody() -> None:
    real = padding([7, 3], size=7)[:, None, None, :]
    qkv = tensors(q=4, k=7)
    clean = run(qkv, real, causal=False)
    grads = torch.autograd.grad(clean.square().sum(), qkv)
    with torch.no_grad():
        qkv[1][1, :, 3:] = qkv[2][1, :, 3:] = NAN
    out = run(qkv, real, causal=False)
    torch.testing.assert_close(out, clean, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), qkv), grads, rtol=0, atol=0)


# --- models, against their own eager attention ------------------------------------------------------------------------------

TEXT = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}
ENCDEC = {
    **{"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "gpt2": GPT2,
    "qwen3": GQA,
    "mistral": {**GQA, "sliding_window": 4},
    "phi3": GQA,
    "opt": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gemma2": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.5},
    "gemma3_text": {**GQA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": MOE,
    "gpt_oss": {**MOE, "sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "roberta": {**TEXT, "max_position_embeddings": 66},
    "distilbert": {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "albert": {**TEXT, "embedding_size": 16},
    "modernbert": {**TEXT, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        **{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
        **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8},
    },
    "bart": ENCDEC,
}


def build(auto: Any, model_type: str, fields: dict[str, Any], name: str = "dp_flash", **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **fields, **more)
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=name).eval()  # eval: no dropout; gradients flow all the same
    for p in model.parameters():  # initialisers leave biases, sinks and relative positions at zero, which tests nothing
        nn.init.normal_(p, std=0.2) if p.ndim == 1 or "relative_attention_bias" in str(p.shape) else None
    return model


def logits_and_gradients(model: Any, real: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    output = model(**inputs)
    kept = output[0][real]
    kept.square().mean().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [kept.detach(), *(g.clone() for g in grads)]


def assert_models_agree(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Two orders of the same sums: a few hundred roundings of numbers up to the largest one in each tensor."""
    largest = max(x.abs().max().item() for x in theirs[1:])
    for a, b in zip(ours, theirs, strict=True):
        scale = max(b.abs().max().item(), 1e-3 * largest)
        assert (a - b).abs().max().item() <= 300 * torch.finfo(dtype).eps * scale


IDS = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(5))


def padded(side: str) -> tuple[Tensor, dict[str, Any]]:
    real = padding([12, 7, 9], side, 12) if side != "none" else torch.ones(3, 12).bool()
    return real, {"input_ids": IDS.where(real, 0), "attention_mask": real.long()}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("model_type", CAUSAL | ENCODERS)
def test_models_equal_eager(model_type: str, side: str) -> None:
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModel
    model = build(auto, model_type, (CAUSAL | ENCODERS)[model_type])
    real, inputs = padded(side)
    ours = logits_and_gradients(model, real, inputs)
    assert ran(model)
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, real, inputs))


def test_a_causal_model_that_says_it_is_not_equals_eager() -> None:
    model = build(AutoModelForCausalLM, "bigbird_pegasus", {**ENCDEC, "attention_type": "original_full"})
    assert not any(getattr(module, "is_causal", False) for module in model.modules())  # only its mask knows
    real, inputs = padded("none")
    ours = logits_and_gradients(model, real, inputs)
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, real, inputs))


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_encoder_decoders_equal_eager(model_type: str, side: str) -> None:
    model = build(AutoModelForSeq2SeqLM, model_type, SEQ2SEQ[model_type])
    _, inputs = padded(side)
    labelled = torch.ones(3, 5).bool() if side == "none" else padding([5, 2, 4], size=5)
    inputs |= {"decoder_input_ids": IDS[:, :5].where(labelled, 0), "decoder_attention_mask": labelled.long()}
    ours = logits_and_gradients(model, labelled, inputs)
    if model_type == "t5":
        assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.abs().sum() > 0
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, labelled, inputs))


def test_vit_equals_eager() -> None:
    fields = {**TEXT, "image_size": 12, "patch_size": 4}
    model = build(AutoModel, "vit", {k: v for k, v in fields.items() if not k.endswith(("_id", "_embeddings", "vocab_size"))})
    inputs = {"pixel_values": torch.randn(3, 3, 12, 12)}
    real = torch.ones(3, 10).bool()
    ours = logits_and_gradients(model, real, inputs)
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, real, inputs))


def packed_inputs(lengths: list[int]) -> tuple[dict[str, Any], list[Tensor]]:
    rows = [IDS[i % 3, :n] for i, n in enumerate(lengths)]
    inputs = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    return inputs, rows


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_packed_rows_equal_separate_rows(model_type: str, given: str) -> None:
    if given == "cu_seq_lens" and model_type in ("gpt2", "opt"):
        pytest.skip("its own position embeddings would still count across units")
    model = build(AutoModelForCausalLM, model_type, CAUSAL[model_type])
    lengths = [5, 1, 9]
    inputs, rows = packed_inputs(lengths)
    if given == "cu_seq_lens":  # rotary positions are relative, so the boundaries alone are enough
        del inputs["position_ids"]
        cuts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 9, "max_length_k": 9}
    ours = logits_and_gradients(model, torch.ones(1, 15).bool(), {**inputs, "use_cache": False})

    model.set_attn_implementation("eager")
    model.zero_grad()
    logits = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    torch.cat(logits).square().mean().backward()
    assert_models_agree(ours, [torch.cat(logits).detach(), *(p.grad for p in model.parameters() if p.grad is not None)])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_models_equal_the_oracle_in_float64(model_type: str) -> None:
    model = build(AutoModelForCausalLM, model_type, CAUSAL[model_type]).double()
    packed, _ = packed_inputs([5, 1, 6])
    for real, inputs in (padded("left"), padded("right"), (torch.ones(1, 12).bool(), packed)):
        inputs = {**inputs, "use_cache": False}
        ours = logits_and_gradients(model, real, inputs)
        with use("reference"):
            oracle = logits_and_gradients(model, real, inputs)
        # Rotary tables and norms are float32 in the model, but the same ones on both sides.
        assert_models_agree(ours, oracle, torch.float64 if model_type == "llama" else torch.float32)


@pytest.mark.parametrize(("cache", "side"), [(None, "left"), ("static", "left"), ("static", "none")])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_generation_equals_eager(model_type: str, cache: str | None, side: str) -> None:
    model = build(AutoModelForCausalLM, model_type, CAUSAL[model_type])
    _, inputs = padded(side)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"cache_implementation": cache, "disable_compile": True, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(**inputs, **settings)
    model.set_attn_implementation("eager")
    eager = model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, eager.sequences)
    assert_models_agree(list(ours.logits), list(eager.logits))


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_seq2seq_generation_equals_eager(model_type: str) -> None:
    model = build(AutoModelForSeq2SeqLM, model_type, SEQ2SEQ[model_type])
    _, inputs = padded("right")
    ours = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1))


def test_activation_checkpointing_changes_nothing() -> None:
    model = build(AutoModelForCausalLM, "mistral", CAUSAL["mistral"]).train()
    real, inputs = padded("right")
    plain = logits_and_gradients(model, real, {**inputs, "use_cache": False})
    model.gradient_checkpointing_enable()
    assert_models_agree(logits_and_gradients(model, real, {**inputs, "use_cache": False}), plain)


def test_models_keep_the_units_of_a_packed_row_apart() -> None:
    for model_type in ("llama", "gpt2", "mistral", "gpt_oss"):  # gpt2 does not hand position_ids to its attention
        model = build(
            AutoModelForCausalLM,
            model_type,
            {**CAUSAL[model_type], **({"num_experts_per_tok": 4} if "oss" in model_type else {})},
        )
        inputs, _ = packed_inputs([4, 3, 5])

        def once(poison: bool, model: Any = model, inputs: dict[str, Any] = inputs) -> tuple[Tensor, Tensor]:
            embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
            embeds[:, 4:7] = NAN if poison else 0.1
            embeds.requires_grad_()
            logits = model(inputs_embeds=embeds, position_ids=inputs["position_ids"], use_cache=False).logits
            (grad,) = torch.autograd.grad(logits.square().sum(), embeds)
            keep = [*range(4), *range(7, 12)]
            return logits.detach()[:, keep], grad[:, keep]

        clean, dirty = once(poison=False), once(poison=True)
        assert all(x.isfinite().all() for x in dirty), model_type
        assert_models_agree([x.cpu() for x in dirty], list(clean))


@pytest.mark.parametrize("side", ["right", "left"])
def test_models_keep_rows_and_padding_apart(side: str) -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    real, inputs = padded(side)

    def once(poison: bool) -> tuple[Tensor, Tensor]:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        embeds[~real] = NAN if poison else 0.1
        embeds[0] = NAN if poison else 0.1
        embeds.requires_grad_()
        logits = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False).logits
        kept = real & (torch.arange(3) > 0)[:, None]
        (grad,) = torch.autograd.grad(logits[real].square().sum(), embeds)
        return logits.detach()[kept], grad[kept]

    torch.testing.assert_close(once(poison=True), once(poison=False), rtol=0, atol=0)


def test_masks_are_not_kept_alive() -> None:
    model = build(AutoModelForCausalLM, "mistral", CAUSAL["mistral"])
    gc.collect()
    before = len(attention_layout._KNOWN)
    for inputs in (padded("right")[1], packed_inputs([4, 5])[0]):
        with torch.no_grad():
            model(**inputs, use_cache=False)
    del inputs
    gc.collect()
    assert len(attention_layout._KNOWN) == before


def test_a_changed_mask_is_read_again() -> None:
    qkv, mask = tensors(), torch.block_diag(causal_mask(4), causal_mask(S - 4)).bool().expand(B, 1, S, S).clone()
    run(qkv, mask)
    mask[:, :, 4:, :4] = True
    assert_same(run(qkv, mask), reference.attention(*qkv, mask=mask), qkv)


# --- code that a compiler traces ------------------------------------------------------------------------------------------


def made_here(mask: Tensor, window: int | None = None) -> Tensor:
    """A mask as `dp_flash_mask` leaves it."""
    mask.made_by_dp_flash = window  # type: ignore[attr-defined]
    return mask


RESTARTING = torch.tensor([[*range(5), *range(1), *range(S - 6)]])
LEFT_PADDED = torch.tensor([[1] * 3 + [*range(S - 3)]] * B)  # positions as Transformers counts them
TRACED: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {},
    "full": lambda: {"causal": False},
    "softcap and sinks": lambda: {"softcap": 1.3, "s_aux": torch.randn(H, dtype=torch.float64)},
    "bias": lambda: {"position_bias": torch.randn(1, H, S, S, dtype=torch.float64)},
    "window": lambda: {"sliding_window": 3},
    "padding": lambda: {"mask": padding([S, 4])},
    "padding, full sight": lambda: {"mask": padding([S, 4]), "causal": False},
    "4-D padding": lambda: {"mask": made_here(causal_mask(S) & padding([S, 4])[:, None, None])},
    "4-D window": lambda: {"mask": made_here(causal_mask(S, 3)[None, None], 3), "sliding_window": 3},
    "4-D window that a picture looks across": lambda: {
        "mask": made_here((causal_mask(S, 3) | (torch.arange(S) < 5) & (torch.arange(S)[:, None] < 5))[None, None], 3),
        "sliding_window": 3,
    },
    "picked keys": lambda: {"indices": torch.arange(S).remainder(3).expand(B, S, S)[..., :2].contiguous()},
    "restarts": lambda: {"position_ids": RESTARTING},
    "restarts, full sight": lambda: {"position_ids": RESTARTING, "causal": False},
    "restarts in a window": lambda: {"position_ids": RESTARTING, "sliding_window": 3},
    "restarts that a mask crosses": lambda: {"position_ids": RESTARTING, "mask": made_here(causal_mask(S)[None, None])},
    "restarts that a padding mask crosses": lambda: {"position_ids": RESTARTING, "mask": padding([S, 4])},
    "restarts of padding on the left": lambda: {
        "position_ids": LEFT_PADDED,
        "mask": made_here(causal_mask(S) & padding([S - 3] * B, "left")[:, None, None]),
    },
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_code_equals_what_is_read(name: str) -> None:
    torch._dynamo.reset()
    qkv, asked = tensors(), TRACED[name]()
    compiled: Any = torch.compile(run, backend="eager", fullgraph=True)
    trained = [*qkv, *(x.requires_grad_() for x in asked.values() if isinstance(x, Tensor) and x.is_floating_point())]
    assert_same(compiled(qkv, **asked), run(qkv, **asked), trained)


@pytest.mark.parametrize(
    "asked",
    [
        {"cu_seq_lens_q": torch.tensor([0, 5, 6, S], dtype=torch.int32)},
        {"mask": causal_mask(S, 3)[None, None], "sliding_window": 3},
        {"mask": causal_mask(S)[None, None].double().log()},
        {"mask": made_here(padding([S, 4])[:, None, None]), "position_ids": torch.arange(S)[None]},
    ],
    ids=["boundaries", "a window in a mask of somebody else's", "a float mask", "a mask alike for all queries"],
)
def test_what_has_to_be_read_breaks_the_graph_and_counts(asked: dict[str, Any]) -> None:
    torch._dynamo.reset()
    rows = 1 if "cu_seq_lens_q" in asked else B
    qkv = tensors(batch=rows)
    assert_same(torch.compile(run, backend="eager")(qkv, **asked), run(qkv, **asked), qkv)


def test_a_window_that_a_mask_ignores_is_refused_in_compiled_code_too() -> None:
    torch._dynamo.reset()
    for mask in (causal_mask(S)[None, None], made_here(causal_mask(S)[None, None]), padding([S, 4])):
        with pytest.raises(UnsupportedError, match="that its attention mask ignores"):
            torch.compile(run, backend="aot_eager")(tensors(), mask, sliding_window=3)


# --- registration, and the check that it really ran -------------------------------------------------------------------------


def ran(model: nn.Module) -> bool:
    return any(getattr(module, "_dp_flash_ran", False) for module in model.modules())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", dp.NAMES)
def test_every_way_to_ask_for_it(name: str, tmp_path: Path) -> None:
    model = build(AutoModelForCausalLM, "llama", GQA, name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    switched = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert switched.config._attn_implementation == "sdpa"
    switched.set_attn_implementation(name)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(IDS).logits
    for asked in (model, loaded, switched):
        assert asked.config._attn_implementation == name
        assert hooks(asked) > 0
        assert_models_agree([expected, asked(IDS).logits], [expected, expected])
        assert ran(asked)
        assert hooks(asked) == 0


def test_registering_again_changes_nothing() -> None:
    before = vars(PreTrainedModel).copy()
    registration.register()
    assert vars(PreTrainedModel) == before


def test_no_kernel_from_the_hub_takes_its_place() -> None:
    model = build(AutoModelForCausalLM, "gpt_oss", CAUSAL["gpt_oss"])
    assert model._compatible_flash_implementations  # what would be chosen instead
    assert model.config._attn_implementation == "dp_flash"


def test_other_names_behave_as_before() -> None:
    with pytest.raises((ImportError, ValueError)):
        build(AutoModelForCausalLM, "llama", GQA, "flash_attention_2")
    with pytest.raises(ValueError, match="not supported"):
        build(AutoModelForCausalLM, "llama", GQA, "dp_flush")
    model = build(AutoModelForCausalLM, "llama", GQA, "sdpa")
    model(IDS)
    assert not ran(model)
    assert hooks(model) == 0


def test_a_changed_transformers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_attn_implementation(self: Any, name: str) -> None: ...

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", set_attn_implementation)
    with pytest.raises(UnsupportedError, match=r"PreTrainedModel\.set_attn_implementation"):
        registration.register()


XLNET = {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
MAMBA = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize(
    ("model_type", "fields", "match"),
    [
        ("xlnet", XLNET, r"XLNetModel .*two-stream attention.*eager"),
        ("mamba", MAMBA, "MambaModel has no softmax attention; leave attn_implementation out"),
    ],
)
def test_a_model_that_never_calls_it_is_refused_on_its_first_forward(
    model_type: str, fields: dict[str, Any], match: str
) -> None:
    model = build(AutoModelForCausalLM, model_type, fields)
    for _ in range(2):  # and stays refused
        with pytest.raises(UnsupportedError, match=match):
            model(IDS)
    model.config._attn_implementation = "eager"
    model(IDS)
    model(IDS)


def test_setting_it_where_it_cannot_be_set_raises() -> None:
    model = build(AutoModelForCausalLM, "xlnet", XLNET, "eager")
    with pytest.raises(UnsupportedError, match="XLNetLMHeadModel"):
        model.set_attn_implementation("dp_flash")


@pytest.mark.parametrize("name", dp.NAMES)
def test_models_with_their_own_table_of_attentions_are_refused_at_once(name: str) -> None:
    fields: dict[str, Any] = {
        "input_vocab_size": 50,
        "output_vocab_size": 50,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
    }
    config = transformers.BarkSemanticConfig(**fields)
    config._attn_implementation = name
    with pytest.raises(UnsupportedError, match="BarkSemanticModel"):
        transformers.BarkSemanticModel(config)


@pytest.mark.parametrize(
    ("model_type", "fields", "name", "before", "after"),
    [
        ("llama", GQA, "dp_flash", "not called yet", "called"),
        ("llama", GQA, "sdpa", "not asked for", "not asked for"),
        (
            "gptj",
            {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
            "dp_flash",
            "patched",
            "patched",
        ),
        ("bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "eager", *["not asked for"] * 2),
        ("mamba", MAMBA, "eager", *["no softmax attention"] * 2),
        ("xlnet", XLNET, "eager", *["own attention code: two-stream attention with shifted relative logits"] * 2),
    ],
)
def test_status(model_type: str, fields: dict[str, Any], name: str, before: str, after: str) -> None:
    model = build(AutoModelForCausalLM, model_type, fields, name)
    assert registration.status(model) == before
    model(IDS)
    assert registration.status(model) == after


def test_a_model_that_adds_to_its_mask_is_refused() -> None:
    check, config = registration._arm_check(lambda *args: "dp_flash"), SimpleNamespace(model_type="deepseek_v4")
    with pytest.raises(UnsupportedError, match="float mask"):
        check(SimpleNamespace(config=config), "dp_flash")


def test_switching_back_before_the_first_forward_is_fine() -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    model.set_attn_implementation("sdpa")
    model(IDS)
    assert not ran(model)
    assert hooks(model) == 0
    model.set_attn_implementation("dp_flash")
    model(IDS)
    assert ran(model)
    assert hooks(model) == 0


def test_armed_models_can_be_copied_and_pickled() -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(IDS)
        assert hooks(twin) == 0
    assert hooks(model) > 0


class Tower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A vision tower without attention."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.projection = nn.Linear(3, config.hidden_size)

    def forward(self, pixels: Tensor) -> Any:
        return self.projection(pixels)


class Composite(PreTrainedModel):  # type: ignore[no-untyped-call]
    """An attention-free tower in front of a language model."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tower = Tower(config)
        self.text = transformers.LlamaModel(config)

    def forward(self, pixels: Tensor) -> Any:
        return self.text(inputs_embeds=self.tower(pixels)).last_hidden_state


def test_a_part_without_attention_does_not_misfire() -> None:
    config = transformers.AutoConfig.for_model("llama", **GQA)
    config._attn_implementation = "dp_flash"
    model = Composite(config)
    assert Composite.__module__ == Tower.__module__
    model.forward(torch.randn(2, 5, 3))  # as a wrapper calls it: past the outermost hook
    model(torch.randn(2, 5, 3))
    assert ran(model)
    assert hooks(model) == 0
    with pytest.raises(UnsupportedError, match="Tower"):  # on its own it is all there is
        Tower(config)(torch.randn(2, 3))


def test_a_wrapper_that_calls_forward_leaves_no_hook_behind() -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    model.forward(IDS)  # past the outermost hook, but not past the body's
    assert ran(model)
    assert hooks(model) == 0


def test_peft_models_are_checked_too() -> None:
    peft = pytest.importorskip("peft")

    def lora(model: Any) -> Any:
        return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))

    model = lora(build(AutoModelForCausalLM, "llama", GQA))
    model(IDS)
    assert ran(model)
    assert hooks(model) == 0
    with pytest.raises(UnsupportedError, match="XLNetModel"):
        lora(build(AutoModelForCausalLM, "xlnet", XLNET))(IDS)


# --- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, {"softcap": 2.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_on_gpu(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    """Segment by segment or in torch's varlen kernel: equal to the oracle, and NaN stays in its segment."""
    cuts = [0, 3, 70, 200]
    qkv = [x.detach().to("cuda", dtype).requires_grad_() for x in tensors(batch=1, q=200, k=200, e=D)]
    out = run(qkv, cu_seq_lens_q=torch.tensor(cuts, device="cuda"), **kwargs)
    softcap = kwargs.get("softcap")
    oracle = reference.attention(*(x.cpu() for x in qkv), causal=kwargs.get("causal", True), cu_seqlens_q=cuts, softcap=softcap)
    atol = 4 * torch.finfo(dtype).eps * qkv[2].abs().max().item()
    torch.testing.assert_close(out.detach().cpu().double(), oracle.detach(), rtol=0, atol=atol)

    grads = torch.autograd.grad(out.square().sum(), qkv)
    with torch.no_grad():
        for x in qkv:
            x[:, :, 3:70] = NAN
    dirty = run(qkv, cu_seq_lens_q=torch.tensor(cuts, device="cuda"), **kwargs)
    keep = [*range(3), *range(70, 200)]
    torch.testing.assert_close(dirty[:, :, keep], out[:, :, keep], rtol=0, atol=0)
    for after, before in zip(torch.autograd.grad(dirty.square().sum(), qkv), grads, strict=True):
        assert after[:, :, keep].isfinite().all()
        torch.testing.assert_close(after[:, :, keep], before[:, :, keep])
