"""What is kept of a parameter's per-unit gradients until the clip factors are known, and what is computed from it.

A *use* is one call in which a parameter was combined with data: of a linear layer, of an output layer whose logits were
deferred, or of an embedding. A `GradientRecord` holds all uses of one parameter, or its per-unit gradients where these are
smaller, and gives squared norms and the clipped sum of the gradients, which are sums over the uses, without forming more than
it has to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dp_flash_hf.kernels.clipped_sum import add_embedding_, add_linear_, add_per_unit_, linear_clipped_sum
from dp_flash_hf.kernels.ghost_norm import embedding_squared_norms, linear_squared_norms, tied_cross_terms, unit_gradients
from dp_flash_hf.kernels.linear_cross_entropy import LogitGradients, add_cross_entropy_, head_cross_terms
from dp_flash_hf.kernels.numerics import hidden_by_rounding, upcast
from dp_flash_hf.layers import cost_model


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Sums over units run in float32 here, whatever the user set: no autocast, no TF32 or bfloat16 inside float32 products.

    The bounds on rounding in `kernels.ghost_norm` rest on it.
    """
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)


@dataclass
class LinearUse:
    """One call of y = a W^T: the gradient of W is the sum of g_t a_t^T over a unit's rows, (p, d).

    The parameter may have as many elements in another shape (p, ...), as convolutions do.

    Args:
        a: Inputs (rows, d) in unit order, any floating dtype.
        g: Gradients of the outputs (rows, p).
        sizes: The number of rows of each unit.
        part: Which rows of the parameter's first dimension W is, start and stop, as one expert of many; None for all.
    """

    a: Tensor
    g: Tensor
    sizes: tuple[int, ...]
    part: tuple[int, int] | None = None

    @property
    def keeps_gradients(self) -> bool:
        """Whether to keep per-unit gradients in place of this."""
        return cost_model.keeps_gradients(self.sizes, self.a.shape[1], self.g.shape[1], self.a.dtype)

    @property
    def input_key(self) -> tuple[object, ...]:
        """Equal for uses of the very same inputs, as those of q, k and v, or gate and up, as long as both are kept."""
        return self.a.data_ptr(), self.a.shape, self.a.stride(), self.a.dtype, self.sizes

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """The view of x that has this use's part of the parameter along `dim`, as (..., p, d)."""
        if self.part is not None:
            x = x.narrow(dim, self.part[0], self.part[1] - self.part[0])
        return x.view(*x.shape[:dim], self.g.shape[1], self.a.shape[1])

    def add_to_units_(self, gradients: Tensor) -> None:
        """Add this use's per-unit gradients to `gradients`, ``(units, *shape)``."""
        unit_gradients(self.a, self.g, self.sizes, self._own(gradients, 1))

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """Add the sum over units of `factors` (units,) times the unit's gradient to `out`, ``(*shape)``."""
        add_linear_(self._own(out, 0), self.a, self.g, factors, self.sizes)

    def squared_norms(self) -> tuple[Tensor, str]:
        """(units,) squared norms of the per-unit gradients, and how they are computed, in words."""
        (norms,), method = linear_norms([self])
        return norms, method

    def cross_terms(self, other: EmbeddingUse) -> Tensor:
        """(units,) inner products of the per-unit gradients of two uses."""
        return tied_cross_terms(self.a, self.g, other.ids, other.g, self.sizes, other.sizes)

    def of_unit(self, unit: int) -> LinearUse:
        """One unit's rows."""
        a, g = self.a.split(self.sizes)[unit], self.g.split(self.sizes)[unit]
        return LinearUse(a, g, (len(a),), self.part)


@dataclass
class HeadUse:
    """One call of an output layer whose logits went to a cross entropy: a `LinearUse` whose g (rows, V) is formed in blocks.

    Args:
        g: The gradients of the logits, rows in unit order.
        sizes: The number of rows of each unit.
        squared: (units,), the squared norms, computed by the backward pass that had the blocks at hand; None where they are not
            asked for.
    """

    g: LogitGradients
    sizes: tuple[int, ...]
    squared: Tensor | None
    part = None

    def formed(self) -> LinearUse:
        """The same with all of g there, to be one of several uses."""
        return LinearUse(self.g.hidden, self.g.whole(), self.sizes)

    def add_to_units_(self, gradients: Tensor) -> None:
        """Add this use's per-unit gradients to `gradients`, (units, V, d)."""
        self.formed().add_to_units_(gradients)

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """Add the sum over units of `factors` (units,) times the unit's gradient to `out`, (V, d)."""
        add_cross_entropy_(out, self.g, factors, self.sizes)

    def squared_norms(self) -> tuple[Tensor, str]:
        """(units,) squared norms of the per-unit gradients, and how they are computed, in words."""
        assert self.squared is not None
        return self.squared, "ghost norm, logits in blocks"

    def cross_terms(self, other: EmbeddingUse) -> Tensor:
        """(units,) inner products of the per-unit gradients of two uses."""
        return head_cross_terms(self.g, other.ids, other.g, self.sizes, other.sizes)

    def of_unit(self, unit: int) -> LinearUse:
        """One unit's rows."""
        start = sum(self.sizes[:unit])
        own = self.g.rows(slice(start, start + self.sizes[unit]))
        return HeadUse(own, (self.sizes[unit],), None).formed()


@dataclass
class EmbeddingUse:
    """One call of y = E[ids].

    Args:
        ids: int64 (rows,), what was looked up, in unit order.
        g: Gradients of what was found (rows, d), any floating dtype.
        sizes: The number of rows of each unit.
    """

    ids: Tensor
    g: Tensor
    sizes: tuple[int, ...]

    def add_to_units_(self, gradients: Tensor) -> None:
        """Add this use's per-unit gradients to `gradients`, (units, V, d)."""
        for out, ids_u, g_u in zip(gradients, self.ids.split(self.sizes), upcast(self.g).split(self.sizes), strict=True):
            out.index_add_(0, ids_u, g_u)

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """Add the sum over units of `factors` (units,) times the unit's gradient to `out`, (V, d)."""
        add_embedding_(out, self.ids, self.g, factors, self.sizes)


def linear_norms(uses: Sequence[LinearUse]) -> tuple[tuple[Tensor, ...], str]:
    """Squared norms (units,) of each of these uses, which share an input, and how they are computed, in words."""
    a, gs, sizes = uses[0].a, [use.g for use in uses], uses[0].sizes
    limit = cost_model.longest_gram(a.shape[1], [g.shape[1] for g in gs], cost_model.speed_of(a.device, a.dtype))
    ways = ("Gram",) * (min(sizes, default=0) <= limit) + ("direct",) * (max(sizes, default=0) > limit)
    return linear_squared_norms(a, gs, sizes, limit).unbind(), f"ghost norm ({' and '.join(ways)})"


class GradientRecord:
    """All uses of one parameter in one backward pass.

    They make one gradient: the norm is that of the sum over uses, so inner products between them count. Uses of a linear weight
    are more rows of each unit; an output layer and an embedding table that are tied have a cross term
    (`kernels.ghost_norm.tied_cross_terms`); for other mixtures per-unit gradients are formed.

    Args:
        shape: Of the parameter.
        n_units: Units of the batch, those without rows included.
    """

    def __init__(self, shape: torch.Size, n_units: int) -> None:
        self.shape, self.n_units = shape, n_units
        self.linear: list[LinearUse | HeadUse] = []  # a HeadUse is the only one
        self.embedding: list[EmbeddingUse] = []
        self.per_unit: Tensor | None = None  # (units, *shape)
        self.norm_method = ""  # how `squared_norms` last computed them, in words

    def add(self, use: LinearUse | HeadUse | EmbeddingUse) -> None:
        """Keep one more use, as it is or as per-unit gradients, whichever `cost_model.keeps_gradients` says is smaller."""
        if not isinstance(use, EmbeddingUse) and self.linear:
            use = use.formed() if isinstance(use, HeadUse) else use
            self.linear = [other.formed() if isinstance(other, HeadUse) else other for other in self.linear]
        first = self.per_unit is None and not self._uses
        if first and isinstance(use, LinearUse) and use.part is None and use.keeps_gradients:
            self.per_unit = unit_gradients(use.a, use.g, use.sizes).view(self.n_units, *self.shape)
            return
        if self.per_unit is not None:
            use.add_to_units_(self.per_unit)
        elif isinstance(use, EmbeddingUse):
            self.embedding.append(use)
        else:
            self.linear.append(use)

    def add_per_unit(self, gradients: Tensor) -> None:
        """Add per-unit gradients ``(units, *shape)`` float32 or float64, formed by the layer; they may change in place."""
        self.per_unit = gradients if self.per_unit is None else self.per_unit.add_(gradients)
        for use in self._uses:
            use.add_to_units_(self.per_unit)
        self.linear, self.embedding = [], []

    @property
    def only_linear(self) -> LinearUse | None:
        """The record's one use, if it is that and a linear one."""
        use = self.linear[0] if self.per_unit is None and len(self.linear) == 1 and not self.embedding else None
        return use if isinstance(use, LinearUse) else None

    @property
    def _uses(self) -> list[LinearUse | HeadUse | EmbeddingUse]:
        return [*self.linear, *self.embedding]

    def squared_norms(self) -> Tensor:
        """Squared L2 norms of the per-unit gradients, (units,), float32 or float64; `norm_method` then says how it was done."""
        if self.per_unit is not None:
            self.norm_method = "per-unit gradient"
            # `vector_norm` adds up one square after the other, of millions too, which loses up to a hundredth of the sum; `sum`
            # adds in pairs, and rows of a matrix are short.
            rows = torch.linalg.vector_norm(self.per_unit.flatten(1, -2), dim=-1) if len(self.shape) > 1 else self.per_unit
            return rows.reshape(self.n_units, -1).square().sum(1)
        if any(use.part is not None for use in self.linear):
            return self._squared_norms_of_parts()
        linear, embedding = _merge_linear(self.linear), _merge_embedding(self.embedding)
        if embedding is None:
            assert linear is not None
            norms, self.norm_method = linear.squared_norms()
            return norms
        table = embedding_squared_norms(embedding.ids, embedding.g, embedding.sizes)
        self.norm_method = "embedding rows"
        if linear is None:
            return table
        head, method = linear.squared_norms()
        self.norm_method = f"{method} + {self.norm_method}"
        cross = linear.cross_terms(embedding)
        norms = head + table + 2 * cross
        # |x + y|^2 with x close to -y has lost its digits: the gradient itself is formed for such a unit.
        for unit in (norms < 2.0**-10 * (head + table)).nonzero().flatten().tolist():
            norms[unit] = self._one_unit(unit).square().sum() + self._hidden(linear, embedding, unit)
        return norms

    def _squared_norms_of_parts(self) -> Tensor:
        uses: dict[tuple[int, int], list[LinearUse | HeadUse]] = {}
        for use in self.linear:
            uses.setdefault(use.part or (0, self.shape[0]), []).append(use)
        ends = sorted(uses)
        if self.embedding or any(stop > start for (_, stop), (start, _) in pairwise(ends)):  # they share elements
            like = upcast(self.linear[0].of_unit(0).g)
            self.add_per_unit(torch.zeros(self.n_units, *self.shape, dtype=like.dtype, device=like.device))
            return self.squared_norms()
        total: Tensor | int = 0
        for own in uses.values():
            merged = _merge_linear(own)
            assert merged is not None
            norms, self.norm_method = merged.squared_norms()
            total = total + norms
        assert isinstance(total, Tensor)
        return total

    @staticmethod
    def _hidden(linear: LinearUse | HeadUse, embedding: EmbeddingUse, unit: int) -> Tensor:
        own = linear.of_unit(unit)
        a, g = upcast(own.a), upcast(own.g)
        rows = upcast(embedding.g.split(embedding.sizes)[unit])
        bound = (a.norm(dim=1) * g.norm(dim=1)).sum() + rows.norm(dim=1).sum()
        return hidden_by_rounding(bound, len(a) + len(rows))

    def _one_unit(self, unit: int) -> Tensor:
        like = upcast(self.embedding[0].g)
        gradient = torch.zeros(1, *self.shape, dtype=like.dtype, device=like.device)
        for linear in self.linear:
            linear.of_unit(unit).add_to_units_(gradient)
        for embedding in self.embedding:
            ids_u, g_u = embedding.ids.split(embedding.sizes)[unit], embedding.g.split(embedding.sizes)[unit]
            EmbeddingUse(ids_u, g_u, (len(ids_u),)).add_to_units_(gradient)
        return gradient[0]

    def clipped_sum(self, factors: Tensor) -> Tensor:
        """The sum over units of `factors` (units,) times the unit's gradient, ``(*shape)`` in the dtype of `factors`."""
        if self.per_unit is None and not self.embedding and len(self.linear) == 1:
            (use,) = self.linear  # a product of its own is one pass over memory less than zeros and a sum
            if isinstance(use, LinearUse) and use.part is None:
                return linear_clipped_sum(use.a, use.g, factors, use.sizes).view(self.shape)
        out = torch.zeros(self.shape, dtype=factors.dtype, device=factors.device)
        self.add_clipped_sum_(out, factors)
        return out

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """Add the sum over units of `factors` (units,) times the unit's gradient to `out`, ``(*shape)``."""
        if self.per_unit is not None:
            add_per_unit_(out, self.per_unit, factors)
        for use in self._uses:
            use.add_clipped_sum_(out, factors)


def _interleave(parts: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([chunk for unit in zip(*parts, strict=True) for chunk in unit])


def _merge_linear(several: list[LinearUse | HeadUse]) -> LinearUse | HeadUse | None:
    """Reuse of a linear weight is just more rows of each unit."""
    if len(several) < 2:
        return several[0] if several else None
    uses = [use for use in several if isinstance(use, LinearUse)]
    a, g = _interleave([u.a.split(u.sizes) for u in uses]), _interleave([u.g.split(u.sizes) for u in uses])
    return LinearUse(a, g, tuple(map(sum, zip(*(u.sizes for u in uses), strict=True))), uses[0].part)


def _merge_embedding(uses: list[EmbeddingUse]) -> EmbeddingUse | None:
    if len(uses) < 2:
        return uses[0] if uses else None
    ids, g = _interleave([u.ids.split(u.sizes) for u in uses]), _interleave([u.g.split(u.sizes) for u in uses])
    return EmbeddingUse(ids, g, tuple(map(sum, zip(*(u.sizes for u in uses), strict=True))))
