"""Blocks of logits and of their gradients, each formed in registers and used there (Triton implementation).

Inputs in bfloat16, float16 or float32, sums in float32. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.triton_common import dot, on_its_device
from dp_flash_hf.kernels.types import Head

# How the kernels are launched, by bytes per element of the hidden states.
LAUNCH: dict[int, dict[str, int]] = {
    2: {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_WIDTH": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_WIDTH": 32, "num_warps": 4, "num_stages": 3},
}
# Columns that one program sums up: few enough that many programs share a row, so many that what they leave is small.
COLUMNS = 4096


@on_its_device
def log_sum_exp(hidden: Tensor, head: Head) -> Tensor:
    """log sum exp of every row's logits, float32 (rows,). hidden: (rows, d)."""
    hidden, (rows, size) = _dense(hidden), (len(hidden), len(head.weight))
    launch = LAUNCH[hidden.element_size()]
    parts = torch.empty(rows, triton.cdiv(size, COLUMNS), dtype=torch.float32, device=hidden.device)
    if rows:
        grid = (triton.cdiv(rows, launch["BLOCK_ROWS"]), parts.shape[1])
        log_sum_exp_kernel[grid](*_operands(hidden, head, 0, size), parts, **_options(head), COLUMNS=COLUMNS, **launch)
    return parts.logsumexp(1)


@on_its_device
def logit_gradients(hidden: Tensor, head: Head, labels: Tensor, lse: Tensor, weights: Tensor, start: int, stop: int) -> Tensor:
    """Columns [start, stop) of the gradients of h W^T + b: (rows, stop - start), in the dtype of the hidden states.

    hidden: (rows, d). labels: int64 (rows,). lse, weights: float (rows,); see `linear_cross_entropy.LogitGradients`.
    """
    hidden = _dense(hidden)
    launch = LAUNCH[hidden.element_size()]
    out = hidden.new_empty(len(hidden), stop - start)
    if len(hidden):
        grid = (triton.cdiv(len(hidden), launch["BLOCK_ROWS"]), triton.cdiv(stop - start, launch["BLOCK_COLUMNS"]))
        operands = _operands(hidden, head, start, stop)
        logit_gradients_kernel[grid](
            *operands,
            labels.contiguous(),
            lse.contiguous(),
            weights.contiguous(),
            out,
            start,
            **_options(head),
            **launch,
        )
    return out


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _operands(hidden: Tensor, head: Head, start: int, stop: int) -> tuple[Any, ...]:
    weight = _dense(head.weight[start:stop])
    bias = hidden if head.bias is None else head.bias[start:stop].contiguous()
    shapes = (len(hidden), stop - start, hidden.shape[1], hidden.stride(0), weight.stride(0))
    return (hidden, weight, bias, *shapes, head.scale, 1.0 if head.softcap is None else head.softcap)


def _options(head: Head) -> dict[str, bool]:
    return {"HAS_BIAS": head.bias is not None, "SOFTCAP": head.softcap is not None}


@triton.jit
def _logits(
    hidden, weight, bias, rows, columns, n_rows, n_columns, width, hidden_stride, weight_stride, scale, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """softcap * tanh(scale * (h W^T + b) / softcap), float32 (BLOCK_ROWS, BLOCK_COLUMNS); what is outside is not used."""
    k = tl.arange(0, BLOCK_WIDTH)
    # The weights of a large vocabulary are more than an int32 can count.
    h_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    w_at = weight + columns.to(tl.int64)[None, :] * weight_stride + k[:, None]
    z = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = k < width - start
        h = tl.load(h_at + start, mask=(rows < n_rows)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at + start, mask=(columns < n_columns)[None, :] & inside[:, None], other=0.0)
        z = dot(h, w.to(h.dtype), z)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=columns < n_columns, other=0.0)
        z += b.to(hidden.dtype.element_ty).to(tl.float32)[None, :]
    z *= scale
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@triton.jit(do_not_specialize=["n_rows"])
def log_sum_exp_kernel(
    hidden, weight, bias, n_rows, n_columns, width, hidden_stride, weight_stride, scale, softcap, parts,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """parts (rows, programs along a row): log sum exp of the logits in COLUMNS columns, by the running maximum.

    hidden: (rows, d), weight: (V, d), bias: (V,) or unused.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * COLUMNS
    largest = tl.full((BLOCK_ROWS,), -1e30, dtype=tl.float32)  # finite: a bias may make all of a block minus infinity
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + COLUMNS, n_columns), BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        z = _logits(
            hidden, weight, bias, rows, columns, n_rows, n_columns, width, hidden_stride, weight_stride, scale, softcap,
            HAS_BIAS, SOFTCAP, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
        )  # fmt: skip
        z = tl.where((columns < n_columns)[None, :], z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger[:, None]), 1)
        largest = larger
    out = parts + rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out, largest + tl.log(total), mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "first"])
def logit_gradients_kernel(
    hidden, weight, bias, n_rows, n_columns, width, hidden_stride, weight_stride, scale, softcap,
    labels, lse, weights, out, first,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """out (rows, columns): weight * (softmax - one at the label) * scale * (1 - (logit / softcap)^2), 0 where the weight is 0.

    weight, bias: from column `first` on. labels: int64 (rows,), of the whole vocabulary. lse, weights: float32 (rows,).
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    z = _logits(
        hidden, weight, bias, rows, columns, n_rows, n_columns, width, hidden_stride, weight_stride, scale, softcap,
        HAS_BIAS, SOFTCAP, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
    )  # fmt: skip
    own = tl.load(labels + rows, mask=rows < n_rows, other=-1) - first
    g = tl.exp(z - tl.load(lse + rows, mask=rows < n_rows, other=0.0)[:, None])
    g = tl.where(columns[None, :] == own[:, None], g - 1.0, g)
    if SOFTCAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    times = tl.load(weights + rows, mask=rows < n_rows, other=0.0)
    g = tl.where(times[:, None] == 0.0, 0.0, g * (times * scale)[:, None])  # a row without weight may hold NaN
    at = out + rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
    tl.store(at, g.to(out.dtype.element_ty), mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :])
