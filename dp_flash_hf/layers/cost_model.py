"""Which of the exact ways is the fastest for a layer: a cost model over shapes, which are public.

It counts multiply-adds and bytes moved through memory and divides by what the device does of each in a second. All ways give
the same values, so a wrong guess costs time and nothing else. Decisions depend on shapes, never on values, and so tell nothing
about the data.

For a linear layer (p, d) and a unit of k rows, with rates of `Speed`:

- from Gram matrices, half of each being formed, the norm costs k (k + block) / 2 (d + p) / gram seconds;
- from the gradient itself, k d p / product + squared d p / bandwidth seconds.

The first grows with k^2 and the second with k, so there is one length `longest_gram` up to which the first is faster. Li et al.
2022 (arXiv 2110.05679) choose by 2 k^2 < d p, which counts memory; Bu et al. 2023 (arXiv 2210.00038) mix both by layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# One unit at a time has to promise this much before it is chosen: the model leaves out attention and all else that is not a
# product. What it promises is less than what was measured (1.10, 1.12, 1.12 for 1.28, 1.23, 1.16 at widths 512, 1024, 2048).
MICROBATCH_GAIN = 1.05


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, and what else a layer costs there.

    Args:
        gram: Multiply-adds a second in Gram matrices.
        product: Multiply-adds a second in products g^T a.
        block: Rows by which a unit's Gram matrix counts as wider than it is, because blocks on the diagonal are formed whole
            and small ones run slower.
        bandwidth: Bytes a second.
        squared: Bytes moved for each element of a unit's gradient that is formed for its norm alone; 0 if it stays in
            registers.
        kept: Likewise, where it is formed and kept until it is summed.
        alone: Likewise, where a backward pass of the unit's own makes it, and it is squared and added to the sum.
        start: Seconds before the products of one layer are under way.
    """

    gram: float
    product: float
    block: int
    bandwidth: float
    squared: int
    kept: int
    alone: int
    start: float


# One core (AVX-512, MKL of torch 2.13), float32. gram, product, block, bandwidth, squared: fitted to medians of both ways at
# 20 shapes, 1 to 1024 rows and widths of 128 to 2048, and within 20 % of them from 16 rows on. kept, alone: 1.0 to 1.9 ns an
# element at widths of 512 to 2048, either, as its memory is new. start: a dozen operations of torch. More cores raise all rates
# alike. Narrower dtypes are computed in float32.
CPU = Speed(gram=52e9, product=56e9, block=64, bandwidth=30e9, squared=8, kept=40, alone=40, start=5e-5)

# Not measured. 60 % of the data sheets' dense rates for products (A100 312, H100 990, B200 2250 teraflop/s in 16 bits; 19.5,
# 67, 75 in float32, no TF32), 50 % for Gram tiles, which hold two sums, and 80 % of their bandwidths (2.0, 3.35, 8 TB/s).
# kept: written, read for the norm, read for the sum. alone: written, read for the norm, read, and the sum read and written.
# start: some 20 launches of 5 microseconds.
_RATES = {  # by compute capability and bytes per element: gram, product, block, bandwidth
    (8, 2): (78e12, 94e12, 128, 1.6e12),
    (9, 2): (250e12, 300e12, 128, 2.7e12),
    (10, 2): (560e12, 675e12, 128, 6.4e12),
    (8, 4): (4.9e12, 5.9e12, 64, 1.6e12),
    (9, 4): (17e12, 20e12, 64, 2.7e12),
    (10, 4): (19e12, 22e12, 64, 6.4e12),
}
GPU = {kind: Speed(*rates, squared=0, kept=12, alone=20, start=1e-4) for kind, rates in _RATES.items()}


def speed_of(device: torch.device, dtype: torch.dtype) -> Speed:
    """The rates for records of this dtype on this device; for GPUs of other generations those of the nearest."""
    if device.type != "cuda":
        return CPU
    major = min(max(torch.cuda.get_device_capability(device)[0], 8), 10)
    return GPU[major, 2 if dtype.itemsize == 2 else 4]


def gram_seconds(k: int, d: int, ps: Sequence[int], speed: Speed) -> float:
    """Seconds for the norms of one unit from Gram matrices.

    Args:
        k: Rows of the unit.
        d: Width of the input.
        ps: Widths of the outputs of the layers that share it.
        speed: Of the device.
    """
    return k * (k + speed.block) / 2 * (d + sum(ps)) / speed.gram


def direct_seconds(k: int, d: int, ps: Sequence[int], speed: Speed) -> float:
    """Seconds for the norms of one unit from its gradients (p, d), formed, squared and dropped. Arguments: `gram_seconds`."""
    size = d * sum(ps)
    return k * size / speed.product + speed.squared * size / speed.bandwidth


def longest_gram(d: int, ps: Sequence[int], speed: Speed) -> float:
    """Rows up to which Gram matrices are the faster way to a unit's norms, for layers (p, d), p in ps, that share an input.

    The positive root k of `gram_seconds` = `direct_seconds`, a quadratic equation.

    Example:
        >>> k = longest_gram(768, [768], CPU)
        >>> abs(gram_seconds(k, 768, [768], CPU) / direct_seconds(k, 768, [768], CPU) - 1) < 1e-9
        True
    """
    width, size = d + sum(ps), d * sum(ps)
    square, linear = width / (2 * speed.gram), speed.block * width / (2 * speed.gram) - size / speed.product
    return (math.sqrt(linear * linear + 4 * square * speed.squared * size / speed.bandwidth) - linear) / (2 * square)


def keeps_gradients(sizes: Sequence[int], d: int, p: int, dtype: torch.dtype) -> bool:
    """Whether to form and keep per-unit gradients (units, p, d) in place of records of `sizes` rows for each unit.

    Wherever they take no more memory than the records, (rows, d) and (rows, p) in `dtype`: forming them takes the product that
    the clipped sum would have taken, and norm and clipped sum are then only read from them.

    Example:
        >>> keeps_gradients([512, 512], d=64, p=64, dtype=torch.float32), keeps_gradients([8, 8], 64, 64, torch.float32)
        (True, False)

    Args:
        sizes: The number of rows of each unit.
        d: Width of the input.
        p: Width of the output.
        dtype: Of the records; gradients are float32, or float64 for float64 records.
    """
    return len(sizes) * p * d * max(dtype.itemsize, 4) <= sum(sizes) * (d + p) * dtype.itemsize


def leaves_out_zero_rows(zero: int, rows: int, d: int, p: int, speed: Speed) -> bool:
    """Whether the backward pass of a linear layer (p, d) is faster without rows whose output gradient is zero.

    Without them the products of both gradients are shorter, and the other rows are copied: inputs, output gradients, and the
    inputs' gradients.

    Args:
        zero: How many rows could be left out.
        rows: How many there are.
        d: Width of the input.
        p: Width of the output.
        speed: Of the device.
    """
    copied = (rows - zero) * (2 * d + p) * 2 * 4
    return 2 * zero * d * p / speed.product > copied / speed.bandwidth + speed.start


def microbatch_is_faster(
    products: Mapping[tuple[int, int], int], others: int, sizes: Sequence[int], dtype: torch.dtype, speed: Speed
) -> bool:
    """Whether one unit at a time is faster than book-keeping for a whole model.

    Forward and backward cost the same in both. Book-keeping adds norms, which grow with the square of a unit's rows; unit by
    unit every gradient passes through memory, however long the unit is. So this is true of long units, and no more of units
    so long that gradients are kept.

    Args:
        products: How many matrices of shape (p, d) the model trains.
        others: Elements of its other parameters.
        sizes: The number of rows of each unit.
        dtype: Of the records.
        speed: Of the device.
    """
    counts = Counter(sizes)
    batched, alone = 0.0, len(sizes) * others * speed.alone / speed.bandwidth
    for (p, d), times in products.items():
        steps = 3 * sum(sizes) * p * d / speed.product  # forward, the gradient of the input, that of the weight
        batched += times * (steps + speed.start)
        alone += times * (steps + len(sizes) * (speed.start + p * d * speed.alone / speed.bandwidth))
        if keeps_gradients(sizes, d, p, dtype):
            batched += times * len(sizes) * p * d * speed.kept / speed.bandwidth
        else:
            for k, units in counts.items():
                batched += times * units * min(gram_seconds(k, d, [p], speed), direct_seconds(k, d, [p], speed))
    return len(sizes) > 0 and batched > MICROBATCH_GAIN * alone
