"""How dp_flash attention is computed: by torch, by this library's Triton kernels, or by the slow oracle.

`compute` takes the implementation that `use` asked for, which runs or raises; without it, the one that `choose` picks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.attention import backend_torch, backend_triton
from dp_flash_hf.attention.pattern import Pattern, Segment, Segments, is_divided
from dp_flash_hf.attention.release import clipped_and_noised
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels import reference
from dp_flash_hf.kernels.types import Release

Implementation = Literal["sdpa", "triton", "reference"]


class _Request:
    """What `use` asked for: for all threads, because autograd computes checkpointed layers again in threads of its own."""

    implementation: Implementation | None = None

    @contextlib.contextmanager
    def during(self, implementation: Implementation) -> Iterator[None]:
        before, self.implementation = self.implementation, implementation
        try:
            yield
        finally:
            self.implementation = before


_REQUEST = _Request()


@contextlib.contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Within the context, all dp_flash attention of this process is computed by one implementation, or raises.

    A requested implementation never falls back to another. The outputs are the same but for rounding; what differs is speed,
    memory and which calls are taken.

    - ``"sdpa"``: torch, on any device: `scaled_dot_product_attention`, one call for separate rows, one per segment for packed
      ones (or one varlen call on CUDA in half precision), and plain products where logits are soft-capped or have sinks.
    - ``"triton"``: this library's kernels (`kernels.attention`), on CUDA devices that run Triton, for float32, float16 and
      bfloat16, heads of at most 256, and masks that are made of full, causal or windowed segments. No bias.
    - ``"reference"``: the float64 oracle of the tests, one query at a time, on any device; no dropout.

    Args:
        implementation: One of the three names.

    Raises:
        ValueError: Another name. Calls within the context raise UnsupportedError for what the implementation does not take.
    """
    validation.one_of("implementation", implementation, get_args(Implementation))
    with _REQUEST.during(implementation):
        yield


def choose(
    query: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern, release: Release | None = None
) -> Implementation:
    """Which implementation computes a call: the one that `use` asked for, else the one that needs the least memory.

    That is torch, unless it would form all weights where this library's kernels need not: on CUDA devices with soft-capped
    logits, sinks, a mask that `segments` say in fewer words, or a release, whose clipping and noise the kernels do on the way.
    Where a compiler traces, it is torch, whose operations it fuses. Which of the two is faster where torch's fused kernels take
    the call has not been measured yet. The choice depends on shapes, dtypes, devices and segments, never on entries of query,
    key and value.

    Args:
        query: (B, H, Q, D).
        value: (B, G, K, E).
        segments: What each row consists of, or None.
        pattern: Which keys a query sees, and how its logits become weights.
        release: Clipping and noise of privatised attention, or None.
    """
    if _REQUEST.implementation is not None:
        return _REQUEST.implementation
    forms_weights = any(x is not None for x in (pattern.softcap, pattern.sinks, pattern.mask, release))
    own_kernels = query.is_cuda and forms_weights and not torch.compiler.is_compiling()
    if own_kernels and not backend_torch.takes_varlen(query, value, segments, pattern):
        return "triton" if backend_triton.lacks(query, value, segments, pattern) is None else "sdpa"
    return "sdpa"


def compute(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern, release: Release | None = None
) -> Tensor:
    """Attention by the implementation that `choose` names; differentiable in query, key, value, sinks and bias.

    Args:
        query: (B, H, Q, D) floating.
        key: (B, G, K, D), H a multiple of G; query head h reads key head h // (H // G).
        value: (B, G, K, E).
        segments: What the rows consist of, where that is known; rows of several segments are computed one by one, so that
            nothing of one, not even a NaN, reaches another.
        pattern: Which keys a query sees, and how its logits become weights.
        release: Clip the values and add noise, as privatised attention does; noise is a constant to the gradient.

    Returns:
        (B, H, Q, E) in the dtype of `value`.

    Raises:
        UnsupportedError: The implementation asked for does not offer what the call needs.
    """
    chosen = choose(query, value, segments, pattern, release)
    if chosen == "triton":
        return backend_triton.attention(query, key, value, segments, pattern, release)
    attend = _reference if chosen == "reference" else backend_torch.attention
    if release is None:
        return attend(query, key, value, segments, pattern)
    return clipped_and_noised(attend, query, key, value, segments, pattern, release)


def _reference(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> Tensor:
    """The float64 oracle, one query at a time. Raises UnsupportedError with dropout, which has no one right answer."""
    if pattern.dropout:
        raise UnsupportedError('the "reference" implementation has no dropout; set the attention dropout to 0')
    bias, mask = pattern.bias, pattern.mask
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias + mask, None
    rows = []
    for b in range(query.shape[0]):
        parts = segments[b] if is_divided(segments) else [Segment(query.shape[2], key.shape[2], "mask")]
        row = slice(b, b + 1)
        rows.append(
            reference.attention(
                *(query[row], key[row], value[row]),
                causal=mask is None and (pattern.causal or any(part.visibility == "causal" for part in parts)),
                mask=mask if mask is None or len(mask) == 1 else mask[row],
                cu_seqlens_q=[0, *accumulate(part.queries for part in parts)],
                cu_seqlens_k=[0, *accumulate(part.keys for part in parts)],
                scale=pattern.scale,
                softcap=pattern.softcap,
                sinks=pattern.sinks,
                bias=bias if bias is None or len(bias) == 1 else bias[row],
            )
        )
    return torch.cat(rows).to(value.dtype)
