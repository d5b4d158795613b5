"""Softmax cross entropy of logits that never exist all at once: formed in blocks of columns, used, dropped.

The loss and its gradient need one block of logits at a time (Wijmans et al. 2024, arXiv 2411.09009). So does a unit's norm, as
the squared norm of a matrix is the sum of those of its blocks of rows, and so does the clipped sum, block by block.

Sums run in float32, or float64 for float64 inputs. Gradients of logits are rounded to the dtype of the hidden states before
anything is made of them, so that norms and clipped sums are those of the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dp_flash_hf.kernels.clipped_sum import add_linear_
from dp_flash_hf.kernels.ghost_norm import linear_squared_norms, row_sums
from dp_flash_hf.kernels.numerics import runs_on_triton, upcast
from dp_flash_hf.kernels.types import Head

# Float32 logits that exist at once take this many bytes, or what the fewest columns take that products are still fast with.
BLOCK_BYTES = 2**26
FEWEST_COLUMNS = 256


def linear_cross_entropy(hidden: Tensor, head: Head, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Every row's cross entropy and normaliser, with memory for one block of logits (Wijmans et al. 2024, arXiv 2411.09009).

    Example:
        >>> hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([6, -100, 0])
        >>> losses, lse = linear_cross_entropy(hidden, Head(weight), labels)
        >>> expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
        >>> torch.allclose(losses, expected, atol=1e-5)
        True

    Args:
        hidden: (rows, d), any floating dtype; the head's weight and bias are cast to it.
        head: The output layer.
        labels: int64 (rows,), below V, or `ignore_index`.
        ignore_index: The label of rows without a loss.

    Returns:
        Two tensors (rows,), float32 or float64: ``-log softmax(logits)[label]``, which is 0 where the label is ignored, and
        ``log sum exp(logits)``.

    Raises:
        IndexError: A label outside the vocabulary, on the CPU; on a GPU the kernel asserts.
    """
    rows, size = len(hidden), len(head.weight)
    if runs_on_triton(hidden):
        from dp_flash_hf.kernels import linear_cross_entropy_triton as triton

        lse = triton.log_sum_exp(hidden, head)
    else:
        lse = torch.full((rows,), -torch.inf, dtype=upcast(hidden).dtype, device=hidden.device)
        for columns in _blocks(rows, size):
            lse = torch.logaddexp(lse, _logits(hidden, head, columns).logsumexp(1))
    ignored = labels == ignore_index
    found = labels.masked_fill(ignored, 0)
    own = (upcast(hidden) * upcast(head.weight.index_select(0, found).to(hidden.dtype))).sum(1)
    if head.bias is not None:
        own = own + upcast(head.bias.index_select(0, found).to(hidden.dtype))
    return (lse - _squashed(own, head)).masked_fill(ignored, 0.0), lse


@dataclass(frozen=True, eq=False)
class LogitGradients:
    """Gradients (rows, V) of a weighted sum of cross entropies with respect to h W^T + b, formed when they are asked for.

    With softmax P and one-hot labels Y they are ``scale * weights * (P - Y)``, times ``1 - (logits / softcap)^2`` under a
    soft-cap.

    Args:
        hidden: h (rows, d), any floating dtype, which is also that of the gradients.
        head: The output layer.
        labels: int64 (rows,); only those of rows with a weight are looked at.
        lse: (rows,), the normalisers that `linear_cross_entropy` gave.
        weights: (rows,), the gradient that came back to every row's loss, in the dtype of `lse`. A row of weight 0 is zero,
            whatever else it holds.
        kept: The gradients themselves (rows, V), where they are stored.
    """

    hidden: Tensor
    head: Head
    labels: Tensor
    lse: Tensor
    weights: Tensor
    kept: Tensor | None = None

    @property
    def size(self) -> int:
        """The size V of the vocabulary."""
        return len(self.head.weight)

    def columns(self, columns: slice) -> Tensor:
        """(rows, columns), in the dtype of the hidden states."""
        if self.kept is not None:
            return self.kept[:, columns]
        if runs_on_triton(self.hidden):
            from dp_flash_hf.kernels import linear_cross_entropy_triton as triton

            at = columns.start, columns.stop
            return triton.logit_gradients(self.hidden, self.head, self.labels, self.lse, self.weights, *at)
        logits = _logits(self.hidden, self.head, columns)
        out = self._softmax(logits)
        own = self.labels - columns.start
        inside = (own >= 0) & (own < out.shape[1])
        out.scatter_add_(1, own.clamp(0, out.shape[1] - 1).unsqueeze(1), -inside.to(out.dtype).unsqueeze(1))
        return self._scaled(out, logits)

    def entries(self, rows: slice, ids: Tensor) -> Tensor:
        """(rows, ids): some columns, in any order and as often as they are asked for. ids: int64."""
        if self.kept is not None:
            return self.kept[rows].index_select(1, ids)
        own, head = self.rows(rows), self.head
        bias = None if head.bias is None else head.bias.index_select(0, ids)
        logits = _logits(own.hidden, head._replace(weight=head.weight.index_select(0, ids), bias=bias), slice(None))
        return own._scaled(own._softmax(logits) - (ids == own.labels.unsqueeze(1)).to(logits.dtype), logits)

    def rows(self, rows: slice) -> LogitGradients:
        """Those of some rows."""
        kept = None if self.kept is None else self.kept[rows]
        return LogitGradients(self.hidden[rows], self.head, self.labels[rows], self.lse[rows], self.weights[rows], kept)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All columns, block by block."""
        for columns in _blocks(len(self.hidden), self.size):
            yield columns, self.columns(columns)

    def whole(self) -> Tensor:
        """All of them (rows, V)."""
        if self.kept is not None:
            return self.kept
        out = self.hidden.new_empty(len(self.hidden), self.size)
        for columns, block in self.blocks():
            out[:, columns] = block
        return out

    def _softmax(self, logits: Tensor) -> Tensor:
        return (logits - self.lse.unsqueeze(1)).exp_()

    def _scaled(self, out: Tensor, logits: Tensor) -> Tensor:
        if self.head.softcap is not None:
            out *= 1 - (logits / self.head.softcap).square_()
        out *= (self.weights * self.head.scale).unsqueeze(1)
        # The select, not the product, clears a row without weight: it may hold NaN.
        return out.masked_fill_((self.weights == 0).unsqueeze(1), 0.0).to(self.hidden.dtype)


class Gradients(NamedTuple):
    """What one pass over the blocks gives. Those not asked for are None."""

    hidden: Tensor | None  # (rows, d)
    squared_norms: Tensor | None  # (units,), of the units' weight gradients
    bias: Tensor | None  # (units, V)
    kept: Tensor | None  # (rows, V)


def gradients(
    g: LogitGradients, sizes: tuple[int, ...], *, hidden: bool, norms: bool, bias: bool = False, keep: bool = False
) -> Gradients:
    """What a backward pass needs of the gradients of logits, from one pass over their blocks.

    Args:
        g: The gradients, rows in unit order.
        sizes: The number of rows of each unit.
        hidden: Whether to compute the gradients of the hidden states.
        norms: Whether to compute the squared norms ``||sum_{t in u} g_t h_t^T||_F^2`` of every unit u.
        bias: Whether to compute every unit's gradient of the bias.
        keep: Whether to store the gradients of all logits, in the dtype of the hidden states.

    Returns:
        What was asked for; sums are float32, or float64 for float64 hidden states.
    """
    wide = upcast(g.hidden)
    n, dtype, device = len(sizes), wide.dtype, wide.device
    out = Gradients(
        torch.zeros_like(wide) if hidden else None,
        torch.zeros(n, dtype=dtype, device=device) if norms else None,
        torch.zeros(n, g.size, dtype=dtype, device=device) if bias else None,
        g.hidden.new_empty(len(wide), g.size) if keep else None,
    )
    for columns, block in g.blocks():
        if out.hidden is not None:
            out.hidden.add_(_product(block, g.head.weight[columns].to(block.dtype)))
        if out.squared_norms is not None:
            out.squared_norms.add_(_squared_norms(g.hidden, block, sizes))
        if out.bias is not None:
            out.bias[:, columns] = row_sums(block, sizes)
        if out.kept is not None:
            out.kept[:, columns] = block
    return out


def add_cross_entropy_(out: Tensor, g: LogitGradients, factors: Tensor, sizes: tuple[int, ...]) -> None:
    """Add the clipped sum of the head's weight gradients, block by block, in place.

    Args:
        out: (V, d), float32 or float64.
        g: The gradients of the logits, rows in unit order.
        factors: (units,).
        sizes: The number of rows of each unit.
    """
    for columns, block in g.blocks():
        add_linear_(out[columns], g.hidden, block, factors, sizes)


def head_cross_terms(g: LogitGradients, ids: Tensor, g_rows: Tensor, sizes: Sequence[int], row_sizes: Sequence[int]) -> Tensor:
    """As `ghost_norm.tied_cross_terms`, with the gradients of logits formed for the looked-up tokens only.

    Args:
        g: The gradients of the logits, rows in unit order.
        ids: int64 (looked up,), what was looked up, in unit order.
        g_rows: (looked up, d), gradients of what was found.
        sizes: The number of rows of each unit in `g`.
        row_sizes: The number of each unit's lookups.

    Returns:
        (units,), float32 or float64.
    """
    out = torch.zeros(len(sizes), dtype=upcast(g.hidden).dtype, device=g.hidden.device)
    start = 0
    for unit, (size, ids_u, rows_u) in enumerate(
        zip(sizes, ids.split(list(row_sizes)), g_rows.split(list(row_sizes)), strict=True)
    ):
        rows = slice(start, start := start + size)
        hidden = upcast(g.hidden[rows])
        for some in _blocks(size, len(ids_u)):
            out[unit] += (upcast(g.entries(rows, ids_u[some])) * (hidden @ upcast(rows_u[some]).mT)).sum()
    return out


def _blocks(rows: int, size: int) -> Iterator[slice]:
    step = max(FEWEST_COLUMNS, BLOCK_BYTES // (4 * max(rows, 1)))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _logits(hidden: Tensor, head: Head, columns: slice) -> Tensor:
    z = _product(hidden, head.weight[columns].to(hidden.dtype).mT)
    if head.bias is not None:
        z = z.add_(upcast(head.bias[columns].to(hidden.dtype)))
    return _squashed(z, head)


def _squashed(z: Tensor, head: Head) -> Tensor:
    if head.scale != 1.0:
        z = z * head.scale
    return z if head.softcap is None else (z / head.softcap).tanh_().mul_(head.softcap)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed up in float32 or float64."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return upcast(a) @ upcast(b)


def _squared_norms(hidden: Tensor, block: Tensor, sizes: tuple[int, ...]) -> Tensor:
    d, p = hidden.shape[1], block.shape[1]
    # Longer units take fewer products without Gram matrices.
    return linear_squared_norms(hidden, [block], sizes, longest_gram=d * p / (d + p))[0]
