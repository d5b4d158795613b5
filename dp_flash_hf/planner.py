"""Which of the exact ways is the fastest for a layer: a cost model over shapes, which are public.

It counts multiply-adds and bytes moved through memory and divides by what the device does of each in a second. All ways give
the same numbers, so a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# Bytes moved for each number of a gradient of one unit in float32. Formed and kept: written, read for the norm, read for the
# clipped sum. Unit by unit: written by autograd, read for the norm, read again and added to the sum, which is read and written;
# and its memory is new each time.
KEPT_BYTES = 12
MICROBATCH_BYTES = 24

# Unit by unit has to promise this much before it is chosen: the model leaves out that attention, launches and what is not a
# product run worse in small batches.
MICROBATCH_GAIN = 1.1


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    gram, product: multiply-adds in Gram matrices and in products g^T a. block: rows by which a unit's Gram matrix counts as
    wider than it is, because blocks on the diagonal are formed whole and small ones run slower. bandwidth: bytes. stored: bytes
    moved for each number of a gradient formed for its norm alone (0: it stays in registers).
    """

    gram: float
    product: float
    block: int
    bandwidth: float
    stored: int


# One core (AVX-512, MKL of torch 2.13), float32: least squares over 20 shapes from 1 to 1024 rows and widths from 128 to 2048,
# which it meets within 15 % above 16 rows. More cores raise all three rates alike. Narrower dtypes are computed in float32.
CPU = Speed(gram=52e9, product=56e9, block=64, bandwidth=30e9, stored=8)

# By compute capability and bytes per number. Not measured: 60 % of the data sheets' dense rates for products (A100 312, H100
# 990, B200 2250 teraflop/s in 16 bits; 19.5, 67, 75 in float32, without TF32), 50 % for Gram tiles, whose two sums
# leave less of a multiprocessor to each, and 80 % of their bandwidths (2.0, 3.35, 8 TB/s).
GPU = {
    (8, 2): Speed(gram=78e12, product=94e12, block=128, bandwidth=1.6e12, stored=0),
    (9, 2): Speed(gram=250e12, product=300e12, block=128, bandwidth=2.7e12, stored=0),
    (10, 2): Speed(gram=560e12, product=675e12, block=128, bandwidth=6.4e12, stored=0),
    (8, 4): Speed(gram=4.9e12, product=5.9e12, block=64, bandwidth=1.6e12, stored=0),
    (9, 4): Speed(gram=17e12, product=20e12, block=64, bandwidth=2.7e12, stored=0),
    (10, 4): Speed(gram=19e12, product=22e12, block=64, bandwidth=6.4e12, stored=0),
}


def speed_of(device: torch.device, dtype: torch.dtype) -> Speed:
    """The numbers for records of this dtype on this device; those of the nearest known generation for other GPUs."""
    if device.type != "cuda":
        return CPU
    major = min(max(torch.cuda.get_device_capability(device)[0], 8), 10)
    return GPU[major, 2 if dtype.itemsize == 2 else 4]


def gram_seconds(k: int, d: int, ps: Sequence[int], speed: Speed) -> float:
    """Gram matrices of k rows of an input of width d and of output gradients of widths ps, half of each."""
    return k * (k + speed.block) / 2 * (d + sum(ps)) / speed.gram


def direct_seconds(k: int, d: int, ps: Sequence[int], speed: Speed) -> float:
    """Gradients (p, d) of k rows, formed, squared and dropped."""
    size = d * sum(ps)
    return k * size / speed.product + speed.stored * size / speed.bandwidth


def longest_gram(d: int, ps: Sequence[int], speed: Speed) -> float:
    """Rows up to which Gram matrices are the faster way to a unit's norms, for layers (p, d), p in ps, that share an input.

    The k where `gram_seconds` meets `direct_seconds`.
    """
    width, size = d + sum(ps), d * sum(ps)
    square, linear = width / (2 * speed.gram), speed.block * width / (2 * speed.gram) - size / speed.product
    return (math.sqrt(linear * linear + 4 * square * speed.stored * size / speed.bandwidth) - linear) / (2 * square)


def keeps_gradients(sizes: Sequence[int], d: int, p: int, dtype: torch.dtype, speed: Speed) -> bool:
    """Whether per-unit gradients (units, p, d) are best formed and kept in place of records of `sizes` rows for each unit.

    Only where they take no more memory than the records, (rows, d) and (rows, p) in `dtype`. Their clipped sum is then read
    from them, and the product that forms it from records is not needed.
    """
    rows, kept_bytes = sum(sizes), max(dtype.itemsize, 4)
    if len(sizes) * p * d * kept_bytes > rows * (d + p) * dtype.itemsize:
        return False
    norms = sum(min(gram_seconds(k, d, [p], speed), direct_seconds(k, d, [p], speed)) for k in sizes)
    return len(sizes) * p * d * KEPT_BYTES / speed.bandwidth <= norms


def microbatch_is_faster(
    products: Iterable[tuple[int, int]], others: int, sizes: Sequence[int], dtype: torch.dtype, speed: Speed
) -> bool:
    """Whether one unit at a time beats book-keeping for a whole model.

    products: shapes (p, d) of its matrices. others: numbers in its remaining parameters. sizes: rows of each unit. dtype: of
    the records.

    What a unit costs beyond its own backward is a product for each matrix in either case. Book-keeping adds norms, which grow
    with the square of the rows until gradients are formed; unit by unit every gradient passes through memory, however long
    the unit. So it can win among long units, where gradients are not kept for lack of memory.
    """
    rows, units = sum(sizes), len(sizes)
    together = alone = units * others * MICROBATCH_BYTES / speed.bandwidth
    together = 0.0
    for p, d in products:
        steps = 3 * rows * p * d / speed.product  # forward, the input's gradient, the weight's
        alone += steps + units * p * d * MICROBATCH_BYTES / speed.bandwidth
        if keeps_gradients(sizes, d, p, dtype, speed):
            together += steps + units * p * d * KEPT_BYTES / speed.bandwidth
        else:
            limit = longest_gram(d, [p], speed)
            norms = (gram_seconds(k, d, [p], speed) if k <= limit else direct_seconds(k, d, [p], speed) for k in sizes)
            together += steps + sum(norms)
    return together > MICROBATCH_GAIN * alone
