"""Where the rows of each privacy unit stand in a tensor, and how sums over units are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.units import Units


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the items of a batch stand in the leading dimensions of a tensor.

    An *item* is a row of the batch, or a token of a packed one; `units` says which unit it belongs to, if any. In a tensor
    ``(*lead, *features)`` the items stand along some of the leading dimensions: along the first for hidden states
    (rows, length, d), along both for packed ones, along the second for a model that puts the sequence first.

    Example:
        >>> two_rows_of_unit_0_one_of_unit_1 = Units("rows", torch.tensor([0, 0, 1]), 2)
        >>> layout = Layout(two_rows_of_unit_0_one_of_unit_1, lead=(3, 4), dims=(0,))
        >>> layout.sizes
        (8, 4)
        >>> layout.arrange(torch.zeros(3, 4, 5)).shape
        torch.Size([12, 5])

    Args:
        units: The unit of every item.
        lead: The leading sizes.
        dims: The dimensions of `lead` that run over items, outermost first; empty when everything belongs to one single unit.
    """

    units: Units
    lead: tuple[int, ...]
    dims: tuple[int, ...]

    @staticmethod
    def of_one_unit(lead: tuple[int, ...]) -> Layout:
        """Everything belongs to one unit."""
        return Layout(Units.rows(1), lead, ())

    @property
    def unit_of_row(self) -> Tensor:
        """int64 (prod(lead),), on the CPU: the unit of each row of a tensor ``(*lead, d)``, -1 where it has none."""
        if self.whole:
            return torch.full((math.prod(self.lead),), self.units.last)
        return self._owner.expand(self.lead).reshape(-1)

    @property
    def _owner(self) -> Tensor:
        """The unit of each item, so shaped that it is broadcast to `lead`."""
        per_item = math.prod(self.lead[dim] for dim in self.dims) // self.units.n_items
        shape = [size if dim in self.dims else 1 for dim, size in enumerate(self.lead)]
        return self.units.of_item.repeat_interleave(per_item).view(shape)

    @property
    def whole(self) -> bool:
        """Whether everything belongs to one unit."""
        return not self.dims

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each unit in the result of `arrange`; 0 for units that are not in the batch."""
        rows = math.prod(self.lead)
        if self.whole:
            return tuple(rows if size else 0 for size in self.units.sizes)
        return tuple(size * (rows // self.units.n_items) for size in self.units.sizes)

    def arrange(self, x: Tensor) -> Tensor:
        """The rows of x ``(*lead, d)`` in unit order, (rows, d); those without a unit (padding) are left out."""
        if self.whole:
            return x.reshape(-1, x.shape[-1])
        if self.dims != (0,) and self.dims != (0, 1):
            x = x.movedim(self.dims, tuple(range(len(self.dims))))
        return self.units.arrange(x.reshape(self.units.n_items, -1, x.shape[-1]))

    def of_rows(self, rows: Tensor) -> Layout:
        """How these rows of a tensor ``(*lead, d)`` are laid out, once they stand by themselves, as (len(rows), d).

        Args:
            rows: int64, at least one, numbered as in ``x.reshape(-1, d)``.
        """
        n = len(rows)
        return Layout(Units("tokens", self.unit_of_row[rows], self.units.n, (1, n)), (n,), (0,))

    def equals(self, other: Layout) -> bool:
        """Whether the two are the same, for the same units."""
        return self.units is other.units and self.lead == other.lead and self.dims == other.dims

    def take(self, x: Tensor, unit: int) -> Tensor:
        """The part of x that belongs to one unit.

        Only for layouts of rows, in which items run along one dimension: the tokens of a packed row are no block of it.

        Args:
            x: ``(*lead, ...)``, of any dtype, on any device.
            unit: Its number; -1 is padding.

        Returns:
            A copy with the entries of this unit alone, in their order, in the dimension that runs over items: 0 entries for a
            unit that is not in the batch. x itself where everything belongs to one unit.

        Raises:
            ValueError: Items run along two dimensions.
        """
        if self.whole:
            return x
        (dim,) = self.dims
        return x.index_select(dim, self._rows_of(unit).to(x.device))

    def put_(self, out: Tensor, part: Tensor, unit: int) -> None:
        """Add to the part of out ``(*lead, ...)`` that belongs to one unit."""
        if self.whole:
            out.add_(part)
        else:
            (dim,) = self.dims
            out.index_add_(dim, self._rows_of(unit).to(out.device), part.to(out.dtype))

    def sums(self, g: Tensor) -> Tensor:
        """Sum g ``(*lead, ...)`` over each unit's items.

        Returns:
            (units, ...) without the dimensions that run over items; float32, or float64 where g is.
        """
        g = upcast(g)
        if self.whole:
            out = torch.zeros(self.units.n, *g.shape, dtype=g.dtype, device=g.device)
            out[self.units.last] = g
            return out
        rest = [size for dim, size in enumerate(g.shape) if dim not in self.dims]
        per_item = g.movedim(self.dims, tuple(range(len(self.dims)))).reshape(self.units.n_items, -1, *rest).sum(1)
        if self.units.identity:
            return per_item
        owned = self.units.of_item >= 0
        out = torch.zeros(self.units.n, *rest, dtype=g.dtype, device=g.device)
        return out.index_add_(0, self.units.of_item[owned].to(g.device), per_item[owned.to(g.device)])

    def parts(self, g: Tensor) -> Tensor:
        """For each unit a copy of g ``(*lead, ...)`` with zeros in place of what is not its own.

        Returns:
            ``(units, *lead, ...)``, float32, or float64 where g is.
        """
        g = upcast(g)
        out = torch.zeros(self.units.n, *g.shape, dtype=g.dtype, device=g.device)
        if self.whole:
            out[self.units.last] = g
            return out
        owner = self._owner.to(g.device)
        owner = owner.view(*owner.shape, *(1,) * (g.dim() - owner.dim()))
        for unit in range(self.units.n):
            out[unit] = torch.where(owner == unit, g, 0.0)
        return out

    def _rows_of(self, unit: int) -> Tensor:
        rows = self.lead[self.dims[0]] // self.units.n_items
        return (self.units.items(unit).unsqueeze(1) * rows + torch.arange(rows)).flatten()
