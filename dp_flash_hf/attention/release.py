"""What a privatised layer asks of attention: to release a noised output of clipped values instead of the output itself.

`forward_privacy.privatize` puts a `Site` on a layer; `dp_flash_attention` finds it there and lets it account every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dp_flash_hf.attention.pattern import Pattern, Segments
from dp_flash_hf.kernels.counter_noise import normals
from dp_flash_hf.kernels.types import Release

_SITE = "_dp_flash_site"


class Call(NamedTuple):
    """What a privatised layer is about to compute.

    Attributes:
        query: (B, H, Q, D).
        key: (B, G, K, D).
        value: (B, G, K, E).
        segments: What each row of the batch consists of, or None where rows are not known to be of several parts.
        fully_masked: (B or 1, 1, Q, 1), True at queries that see no key; None where every query sees one.
        pattern: Which keys a query sees, and how its logits become weights.
        picked: Whether an indexer of the model chose the keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    segments: Segments | None
    fully_masked: Tensor | None
    pattern: Pattern
    picked: bool


class Site(Protocol):
    """What makes a layer private."""

    def open(self, call: Call) -> tuple[Release, float | None] | Tensor:
        """Account a call before it is computed.

        Returns:
            How to release it, and the soft-cap on its logits. Or (B, H, Q, E), the output to return without computing any.

        Raises:
            UnsupportedError: The sensitivity of such a call is not known.
        """


def put_on(layer: nn.Module, site: Site) -> None:
    """From now on, what this layer's attention returns is released through `site`."""
    setattr(layer, _SITE, site)


def take_off(layer: nn.Module) -> None:
    """Undo `put_on`."""
    delattr(layer, _SITE)


def site_of(layer: nn.Module) -> Site | None:
    """The site on this layer."""
    site: Site | None = getattr(layer, _SITE, None)
    return site


def finite(x: Tensor) -> Tensor:
    """`x` in float32 at least, with 0 for NaN and magnitudes of at most 1e15, so that no product or norm of it overflows."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.nan_to_num().clamp(-1e15, 1e15)


def clipped_and_noised(
    attend: Callable[[Tensor, Tensor, Tensor, Segments | None, Pattern], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments | None,
    pattern: Pattern,
    release: Release,
) -> Tensor:
    """(B, H, Q, E) with noise. Every row before it is a convex combination of clipped values, or clipped itself.

    The latter where what is added to the logits is not finite, and where matrix products round (TF32).
    """
    dtype = value.dtype
    query, key, value = finite(query), finite(key), finite(value)
    norms = release.clip_norms.to(value)[:, None, None]
    value = value * (norms / torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp(min=norms))
    if pattern.mask is not None and pattern.mask.is_floating_point():
        pattern = replace(pattern, mask=pattern.mask.to(query.dtype))
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = attend(query, key, value, segments, pattern).nan_to_num(0.0, 0.0, 0.0)
    norms = norms.repeat_interleave(query.shape[1] // key.shape[1], 0)
    output = output * (norms / torch.linalg.vector_norm(output, dim=-1, keepdim=True).clamp(min=norms))
    noise = normals(release.key, output.shape, output.device, secure=len(release.key) > 2)
    noised: Tensor = (output + release.noise_std[:, None, None] * noise).to(dtype)
    return noised
