"""Flash attention over segments, in Triton: exact, forward and backward, with the DP mechanism of privatised attention inside.

Memory is linear in the length (Dao 2023, arXiv 2307.08691, with the online softmax of Milakov and Gimelshein 2018,
arXiv 1805.02867). Nothing outside a segment is ever read into a product, so that not even a NaN crosses between units, and
nothing is added atomically: the same call gives the same bits again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.kernels.types import AttentionOptions, Release, SegmentTable

LARGEST_HEAD = 256  # wider accumulators do not fit the registers of any GPU
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: SegmentTable,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: Sequence[int] | None = None,
    release: Release | None = None,
) -> Tensor:
    """Attention within segments, differentiable once in query, key, value and sinks.

    It computes what `reference.attention` does, for keys that a query may see by segment, diagonal and window: for query i with
    visible keys V(i), ``out_i = sum_V e^{s_j} v_j / (e^{sink} + sum_V e^{s_j})`` with ``s_j = scale * q_i . k_j``. Queries that
    see nothing give zero and no gradient. Weights are rounded to the value's dtype before they multiply the values; softmax and
    sums run in float32.

    With a `release` the result is a Gaussian mechanism: see `Release` for what is bounded. With `dropout`, the mask is a
    function of `dropout_key` and place, see `counter_noise.keep_mask`.

    Args:
        query: (B, H, Q, D) float32, float16 or bfloat16, D <= 256; any strides (copied if it is not contiguous along D). On an
            NVIDIA GPU, or on the CPU in Triton's interpreter.
        key: (B, G, K, D), H a multiple of G; query head h reads key head h // (H // G).
        value: (B, G, K, E), E <= 256; all three of one dtype.
        segments: Which queries see which keys.
        causal: Query i of a segment sees its keys j <= i + n_k - n_q (the last query sees the last key).
        window: With `causal`, only the last `window` keys up to the diagonal; without, those less than `window` away from it.
        scale: Of the logits; 1 / sqrt(D) by default.
        softcap: Logits s become softcap * tanh(s / softcap), as in Gemma 2 (arXiv 2408.00118).
        sinks: (H,) any floating dtype: one more logit per query, without a value, as in GPT-OSS.
        dropout: Probability of dropping an attention weight; the others are divided by 1 - dropout.
        dropout_key: Two 32-bit words; backward draws the same mask from it again.
        release: The mechanism of privatised attention. Its noise is a constant to the gradient; clipping is differentiated.

    Returns:
        (B, H, Q, E) in the value's dtype, laid out as (B, Q, H, E).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; dropout without a key; options out of range.
        UnsupportedError: Heads beyond 256, other dtypes, dropout with a release.
    """
    _check(query, key, value, segments, sinks, release)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    pattern = AttentionOptions(causal, window, scale, softcap, dropout, tuple(dropout_key or ()) if dropout else ())
    _check_pattern(pattern, release)
    if release is not None and value.dtype == torch.float16:
        # Its values below 2^-14 are evenly spaced: rounding weight times clip factor can double it, and the norm with it.
        query, key, value = query.float(), key.float(), value.float()
        options: dict[str, Any] = {**pattern._asdict(), "segments": segments, "sinks": sinks, "release": release}
        return flash_attention(query, key, value, **options).to(torch.float16)
    query, key, value = (_addressable(x) for x in (query, key, value))
    sinks = None if sinks is None else sinks.contiguous()
    segments = segments.contiguous()
    if release is not None:
        release = Release(release.clip_norms.contiguous(), release.noise_std.contiguous(), release.key)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, sinks)):
        inputs = query, key, value, sinks, segments, pattern, release
        return _FlashAttention.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    from dp_flash_hf.kernels import attention_forward

    return attention_forward.forward(query, key, value, sinks, segments, pattern, release, keep=False).output


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: SegmentTable,
        pattern: AttentionOptions,
        release: Release | None,
    ) -> Tensor:
        from dp_flash_hf.kernels import attention_forward

        result = attention_forward.forward(query, key, value, sinks, segments, pattern, release, keep=True)
        clip_norms = None if release is None else release.clip_norms
        ctx.save_for_backward(query, key, value, sinks, result.clean, result.lse, result.factors, clip_norms)
        ctx.segments, ctx.pattern = segments, pattern
        return result.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from dp_flash_hf.kernels import attention_backward

        grad = _addressable(grad)
        query, key, value, sinks, clean, lse, factors, clip_norms = ctx.saved_tensors
        grads = attention_backward.backward(
            grad, query, key, value, sinks, clean, lse, factors, clip_norms, ctx.segments, ctx.pattern, ctx.needs_input_grad
        )
        return *grads, None, None, None


def _addressable(x: Tensor) -> Tensor:
    """x (batch, heads, length, head dim), copied unless its rows are dense and so near that offsets in a tile fit 32 bits."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**23 else x.contiguous()


def _check(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, sinks: Tensor | None, release: Release | None
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise invalid(
                name, expected="4 dimensions", actual=tuple(tensor.shape), remedy="give (batch, heads, length, head dim)"
            )
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(f"{name}: {tensor.dtype} is not one of {_DTYPES}; use another attention implementation")
        if not 0 < tensor.shape[3] <= LARGEST_HEAD:
            raise UnsupportedError(
                f"{name}: heads of {tensor.shape[3]} are not 1 to {LARGEST_HEAD} wide; use another implementation"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise invalid(
                name, expected=f"{query.dtype} on {query.device}", actual=(tensor.dtype, tensor.device), remedy="convert it"
            )
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape[0] != batch or key.shape[3] != dim or kv_heads == 0 or heads % kv_heads:
        expected = f"({batch}, a number of heads dividing {heads}, length, {dim})"
        raise invalid("key", expected=expected, actual=tuple(key.shape), remedy="check the head layout")
    if value.shape[:3] != key.shape[:3]:
        raise invalid("value", expected=(*key.shape[:3], "any"), actual=tuple(value.shape), remedy="give a value for every key")
    _check_vector("sinks", sinks, heads, query.device)
    for name, tensor in zip(segments._fields[:5], segments[:5], strict=True):
        if tensor.dtype != torch.int32 or tensor.shape != segments.row.shape or tensor.device != query.device:
            actual = (tensor.dtype, tuple(tensor.shape), tensor.device)
            raise invalid(
                f"segments.{name}", expected=f"int32 (n,) on {query.device}", actual=actual, remedy="use a constructor"
            )
    if release is not None:
        _check_vector("release.clip_norms", release.clip_norms, kv_heads, query.device, torch.float32)
        _check_vector("release.noise_std", release.noise_std, heads, query.device, torch.float32)
        _check_key("release.key", release.key, (2, 8))


def _check_pattern(pattern: AttentionOptions, release: Release | None) -> None:
    if pattern.window is not None and pattern.window < 1:
        raise invalid("window", expected=">= 1", actual=pattern.window, remedy="give None for no window")
    if not 0 < pattern.scale < math.inf:
        raise invalid("scale", expected="> 0 and finite", actual=pattern.scale, remedy="put the sign into the queries")
    if pattern.softcap is not None and not pattern.softcap > 0:
        raise invalid("softcap", expected="> 0", actual=pattern.softcap, remedy="give None for no soft-cap")
    if not 0 <= pattern.dropout < 1:
        raise invalid("dropout", expected="0 <= dropout < 1", actual=pattern.dropout, remedy="give the probability of dropping")
    if pattern.dropout:
        if release is not None:
            raise UnsupportedError("dropout with a release: a scaled-up weight breaks the bound; use dropout=0")
        _check_key("dropout_key", pattern.dropout_key, (2,))


def _check_vector(name: str, tensor: Tensor | None, size: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
    if tensor is None:
        return
    fits = tensor.dtype == dtype if dtype is not None else tensor.is_floating_point()
    if tensor.shape != (size,) or tensor.device != device or not fits:
        expected = f"{dtype or 'a floating dtype'} ({size},) on {device}"
        raise invalid(name, expected=expected, actual=(tensor.dtype, tuple(tensor.shape), tensor.device), remedy="one per head")


def _check_key(name: str, key: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    if len(key) not in sizes or not all(0 <= word < 2**32 for word in key):
        expected = f"{' or '.join(map(str, sizes))} words of 32 bits"
        actual = f"{len(key)} words"  # and not which: they are secret
        raise invalid(name, expected=expected, actual=actual, remedy="draw every word with secrets.randbits(32)")
