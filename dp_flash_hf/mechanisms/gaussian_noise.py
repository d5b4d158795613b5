"""Gaussian noise that is what the proof says, to the last bit: on a grid, with full tails, from words that nobody can foresee.

**What is released.** Let C be the clipping bound, D a power of two, the grid's spacing, and S the clipped sum. The release is

    (round(S / D) + n) D,   n = a round((R z - t) / a) + t,   z ~ N(0, 1),   t uniform on {0, ..., a - 1},

with R = std / D, and a power of two a. n is a whole number, so the release says nothing about the bits of S below the grid
(Mironov 2012, doi 10.1145/2382196.2382264, reads them off noise that is added in floating point).

**Why that is the Gaussian mechanism.** For a whole number s, t and (t - s) mod a are equally distributed, so s + n is
distributed as a round((s + R z - t) / a) + t: the Gaussian mechanism's s + R z, rounded to a lattice with a random offset that
depends on nothing. What holds for the Gaussian mechanism therefore holds for the release, with the sensitivity of round(S / D).
The lattice is coarse, a is between R / 16 and R / 8, so that a z computed in float64 is precise enough: what is missing of it
is the charge below.

**Sensitivity.** Rounding moves every one of d values by D / 2 at most, and so neighbours' sums apart by D sqrt(d) at most:
2^-10 C here. The sums themselves are rounded on the way: see `SENSITIVITY`, by which the noise is wider than sigma C.

**Charge.** z is computed, by Box and Muller's transform in float64. Every cell of the lattice has the probability that it
should have up to a factor 1 + eta, E eta^2 <= ETA^2 for the two numbers of one transform; so all noise of a run is (e, d)-close
to the ideal one, both ways, and the run (epsilon + 2 e, e^e delta + d (1 + e^(epsilon + e)))-private: see `closeness`, and the
page on noise in the documentation for the proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.errors import invalid

Words = Callable[[int], Tensor]  # n -> int64 (n,), every bit uniform and independent of all others, none ever given twice

# How much further neighbours' sums may be apart than C, for all that rounds them, in units of C: 2^-10 for the grid; 2^-9 for
# adding parts up (see `GradientBuffer`); 2^-10 for float32 products inside a part, an allowance that is not proven.
SENSITIVITY = 1 + 2.0**-8
MOST_VALUES = 2**37  # trained values of a model, at most: charged for, whatever a model has
ETA = 2.0**-42

_CELLS = 8  # of the coarse lattice in a standard deviation, at least, and fewer than twice as many
_LEAST_CELLS = 2**10  # of the grid in a standard deviation
_CHUNK = 2**16  # numbers made at a time: stays in a core's cache
_BITS = 63  # of a word that are used for a uniform number
_LARGEST = 2**_BITS - 1


def spacing(n_values: int, max_grad_norm: float, std: float) -> float:
    """The grid's spacing for so many values: a power of two that moves neighbours apart by at most 2^-10 max_grad_norm.

    >>> spacing(10**6, max_grad_norm=1.0, std=1.0) == 2.0**-20
    True

    Args:
        n_values: In all tensors that are released together, on all ranks.
        max_grad_norm: C.
        std: Standard deviation of the noise; the grid has at least 2^10 cells in it.

    Raises:
        ValueError: More than 2^37 values, for which the noise is not charged.
    """
    validation.whole_number("n_values", n_values, remedy="train something")
    if n_values > MOST_VALUES:
        raise invalid(
            "n_values",
            expected=f"at most {MOST_VALUES} trained values, which is what secure noise is accounted for",
            actual=n_values,
            remedy="train fewer of them (LoRA)",
        )
    return 2.0 ** math.floor(min(math.log2(max_grad_norm * 2.0**-10) - math.log2(n_values) / 2, math.log2(std / _LEAST_CELLS)))


def add_gaussian_noise_(tensors: list[Tensor], *, std: float, spacing: float, words: Words) -> None:
    """Round to the grid and add noise, in place: the whole of the mechanism.

    =========================== ======================================================================
    Case                        Result
    =========================== ======================================================================
    a tensor of whole numbers   ValueError, nothing changed
    std 0, negative, NaN, inf   ValueError, nothing changed
    no tensors, empty tensors   nothing is drawn
    NaN or inf in a tensor      stays: clip first, which leaves such units out
    float32, float64            rounded once, at the end, from the exact multiple of the spacing
    views, strided tensors      written through
    =========================== ======================================================================

    Args:
        tensors: Of float32 or float64, any shape, all on the device of the words.
        std: Standard deviation, finite and above 0, in the unit of the tensors' values.
        spacing: From `spacing`, with this std.
        words: Where randomness comes from. Ranks that give the same words to the same tensors, in the same order, add the same
            noise.

    Raises:
        ValueError: An argument is out of range; nothing was changed.
    """
    validation.positive("std", std, remedy="give noise multiplier * max_grad_norm")
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise invalid("tensors", expected="float32 or float64", actual=tensor.dtype, remedy="give sums as they were formed")
    with torch.no_grad():
        for tensor in tensors:
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
            for part in flat.split(_CHUNK * (torch.get_num_threads() if tensor.device.type == "cpu" else 2**8)):
                on_grid = part.double().mul_(1 / spacing).round_()
                part.copy_(on_grid.add_(whole_noise(len(part), std / spacing, words)).mul_(spacing))
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))


def whole_noise(n: int, std: float, words: Words) -> Tensor:
    """n as in this file's first lines: whole numbers of this standard deviation, or a little more, independent of each other.

    Exactly: of variance std^2 + a^2 / 12, which is at most 0.14 % more.

    Args:
        n: How many.
        std: R, at least 8: in cells of the grid, below 2^46.
        words: Where randomness comes from; 5 words are used for two numbers.

    Returns:
        float64 (n,), on the device of the words.
    """
    coarse = 2 ** math.floor(math.log2(std / _CELLS))
    pairs = -(-n // 2)
    given = words(5 * pairs).view(5, pairs)
    radius = (_minus_log(given[0], given[1], words) * 2).sqrt_()
    angle = given[2].double().mul_(math.pi * 2.0**-_BITS)
    z = torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)])[:n]
    offset = given[3:].flatten()[:n].bitwise_and(coarse - 1).double()
    return z.mul_(std / coarse).sub_(offset / coarse).round_().mul_(coarse).add_(offset)


def _minus_log(high: Tensor, low: Tensor, words: Words) -> Tensor:
    """-ln u of uniform u in (0, 1), from 126 bits each; where the first 63 are zeros, from further words, however many.

    That is a chance of 2^-63, so the time that is taken does not depend on what is drawn, but for that chance.
    """
    leading = high.bitwise_and(_LARGEST).double()
    out = low.bitwise_and(_LARGEST).double().add_(0.5).mul_(2.0**-_BITS).add_(leading).mul_(2.0**-_BITS).log_().neg_()
    zero = leading == 0
    if bool(zero.any()):
        n = int(zero.sum())
        more = words(2 * n).view(2, n)
        out[zero] = _minus_log(more[0], more[1], words) + _BITS * math.log(2)
    return out


def closeness(steps: int, log_inverse: float) -> float:
    """How close all noise of a run is to the ideal one: e, for a failure d = exp(-log_inverse), as in this file's first lines.

    The logarithm of the ratio of both probabilities is a sum over n = steps 2^37 / 2 independent transforms, of mean at most
    n ETA^2 and of variance at most n ETA^2; Bernstein's inequality says how far above its mean it is but for d.

    >>> f"{closeness(400, math.log(1e12)):.1e}"
    '8.9e-06'

    Args:
        steps: Of the run, and of all others that are added up with it.
        log_inverse: ln(1 / d), at least 0.
    """
    n = steps * MOST_VALUES / 2
    return n * ETA**2 + ETA * math.sqrt(2 * n * log_inverse) + ETA * _FARTHEST * log_inverse / 3


_FARTHEST = 2.0**10  # times ETA: what eta is at most, where numbers are a hundred standard deviations
