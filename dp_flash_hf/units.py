"""Privacy units: which rows, or which tokens of a packed row, belong to whom.

The one abstraction under padded batches, packed (padding-free) batches, preference pairs and user-level privacy. A *unit* is
what privacy is promised to; it has any number of *items* in a physical batch, which are rows or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from dp_flash_hf.errors import invalid

Batch = Mapping[str, Any]
Select = Callable[[Batch, int], Batch]  # (batch, unit) -> that unit's batch
IGNORED = -100  # label that takes no part in a loss, everywhere in Transformers


@dataclass(frozen=True, eq=False)
class Units:
    """The unit of every item of a physical batch.

    An *item* is a row (`kind="rows"`) or a token of a packed batch (`kind="tokens"`).

    >>> users = Units.of(torch.tensor([1, 0, 1, -1]), (4,))
    >>> users.n, users.sizes
    (2, (1, 2))
    >>> users.items(1)
    tensor([0, 2])

    Attributes:
        kind: "rows" or "tokens".
        of_item: int64 (n_items,), on the CPU: the unit of each item in 0..n-1, or -1 for padding, which belongs to no unit.
        n: number of units, units without items included.
        shape: for tokens, the (rows, length) they are laid out in.
    """

    kind: Literal["rows", "tokens"]
    of_item: Tensor
    n: int
    shape: tuple[int, ...] = ()

    @staticmethod
    def rows(n: int) -> Units:
        """Every row is a unit of its own."""
        return Units("rows", torch.arange(n), n)

    @staticmethod
    def of(units: Tensor | Units | None, rows: tuple[int, ...]) -> Units:
        """Read what the user passed as `units`.

        >>> Units.of(None, (3, 7)).of_item
        tensor([0, 1, 2])
        >>> Units.of(torch.tensor([0, 2, 5], dtype=torch.int32), (1, 6)).of_item  # two texts, and padding
        tensor([ 0,  0,  1,  1,  1, -1])

        Args:
            units: None (every row is a unit), an int64 tensor of unit ids, one per row (rows,) or per token (rows, length), or
                an int32 tensor of cumulative sequence lengths (segments + 1,), as `cu_seq_lens_q` of Transformers, for one
                packed row; or Units, which are returned.
            rows: leading shape of the batch's tensors, (rows,) or (rows, length).

        Returns:
            As many units as the largest id says, those without items included.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(units, Units):
            return units
        if units is None:
            return Units.rows(rows[0])
        remedy = "pass None, int64 unit ids (one per row or per token), or int32 cumulative sequence lengths"
        if not isinstance(units, Tensor) or units.is_floating_point() or units.dtype == torch.bool:
            raise invalid("units", expected="an int64 or int32 tensor", actual=type(units).__name__, remedy=remedy)
        if units.dtype == torch.int32:
            if rows[0] > 1:
                raise invalid("units", expected="boundaries for one packed row", actual=f"{rows[0]} rows", remedy=remedy)
            return _from_boundaries(units, rows, remedy)
        ids = units.detach().cpu().long()
        if ids.shape not in {rows[:1], rows[:2]}:
            wanted = " or ".join(str(tuple(shape)) for shape in dict.fromkeys((rows[:1], rows[:2])))
            raise invalid("units", expected=f"unit ids of shape {wanted}", actual=tuple(ids.shape), remedy=remedy)
        if ids.numel() and int(ids.min()) < -1:
            raise invalid("units", expected="ids >= -1 (-1 is padding)", actual=int(ids.min()), remedy="number units from 0")
        n = int(ids.max()) + 1 if ids.numel() else 0
        if ids.dim() == 1:
            return Units("rows", ids, n)
        return Units("tokens", ids.flatten(), n, tuple(ids.shape))

    @staticmethod
    def of_batch(units: Tensor | Units | None, batch: Batch) -> Units:
        """Read what the user passed as `units` with this batch.

        Args:
            units: as of `of`.
            batch: whose leading shape counts.

        Returns:
            As `of`.

        Raises:
            ValueError: as `of`, and where `units` is None though `cu_seq_lens_q` says that a row holds several texts.
        """
        ends = batch.get("cu_seq_lens_q")
        if units is None and isinstance(ends, Tensor) and len(ends) > 2:
            raise invalid(
                "units",
                expected="the units of a packed batch",
                actual=None,
                remedy="pass units=batch['cu_seq_lens_q'], or unit ids",
            )
        return Units.of(units, leading_shape(batch))

    @property
    def n_items(self) -> int:
        """Number of rows (or tokens)."""
        return self.of_item.numel()

    @cached_property
    def identity(self) -> bool:
        """Whether item i is unit i, so that nothing needs to be moved."""
        return self.n == self.n_items and bool(torch.equal(self.of_item, torch.arange(self.n)))

    @cached_property
    def is_single(self) -> bool:
        """Whether everything belongs to one unit, so that it does not matter where what stands."""
        return self.n_items > 0 and int(self.of_item[0]) >= 0 and bool((self.of_item == self.of_item[0]).all())

    @property
    def last(self) -> int:
        """The unit of the last item that belongs to one."""
        return int(self.of_item[self.of_item >= 0][-1])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Items of each unit."""
        return tuple(torch.bincount(self.of_item[self.of_item >= 0], minlength=self.n).tolist())

    @cached_property
    def order(self) -> Tensor | None:
        """Items sorted by unit, padding left out; None where they already stand so."""
        padding = int((self.of_item < 0).sum())
        order = torch.argsort(self.of_item, stable=True)[padding:]
        return None if torch.equal(order, torch.arange(self.n_items)) else order

    def items(self, unit: int) -> Tensor:
        """LongTensor of the items of one unit."""
        return (self.of_item == unit).nonzero().flatten()

    def arrange(self, x: Tensor) -> Tensor:
        """Sort rows by unit.

        >>> x = torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]])
        >>> Units.of(torch.tensor([1, 0, 1, -1]), (4,)).arrange(x).flatten()
        tensor([2., 1., 3.])

        Args:
            x: (n_items, k, d), any dtype and device: k rows of each item.

        Returns:
            (rows, d), those of unit 0 first: `sizes[u] * k` of every unit u, and none of padding.
        """
        if self.order is not None:
            x = x.index_select(0, self.order.to(x.device))
        return x.reshape(-1, x.shape[-1])


def _from_boundaries(boundaries: Tensor, rows: tuple[int, ...], remedy: str) -> Units:
    total = rows[0] * (rows[1] if len(rows) > 1 else 1)
    ends = boundaries.detach().cpu().long()
    lengths = ends.diff()
    if ends.dim() != 1 or len(ends) < 2 or int(ends[0]) != 0 or bool((lengths < 0).any()) or int(ends[-1]) > total:
        raise invalid("units", expected=f"boundaries 0 = b_0 <= b_1 <= ... <= {total}", actual=ends.tolist(), remedy=remedy)
    ids = torch.full((total,), -1)  # tokens after the last boundary are padding
    ids[: int(ends[-1])] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return Units("tokens", ids, len(lengths), rows[:2])


def leading_shape(batch: Batch) -> tuple[int, ...]:
    """(rows, length) of a batch: the leading sizes of its first integer tensor with two dimensions or more, else of its first.

    Without any tensor, (rows,) of its first list. Raises ValueError when the batch holds neither.
    """
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0]
    lists = [v for v in batch.values() if isinstance(v, list)]
    if not tensors and lists:
        return (len(lists[0]),)
    if not tensors:
        raise invalid(
            "batch", expected="a mapping with at least one tensor", actual=list(batch), remedy="pass the model's inputs"
        )
    first = next((t for t in tensors if t.dim() > 1 and not t.is_floating_point()), tensors[0])
    return tuple(first.shape[:2])


def inner_sizes(batch: Batch, units: Units) -> tuple[tuple[str, int], ...]:
    """The sizes of a batch beside its number of rows, each by a name: lengths of texts and labels, pictures' edges, ...

    >>> batch = {"input_ids": torch.zeros(3, 7), "labels": torch.zeros(3, 5), "patches": torch.zeros(12, 4), "temperature": 1.0}
    >>> inner_sizes(batch, Units.rows(3))
    (('input_ids[1]', 7), ('labels[1]', 5), ('patches[0]', 12), ('patches[1]', 4))

    Returns:
        Pairs of name and size, by name, for all dimensions of its tensors but those that run over rows; of packed rows, of
        tensors with two dimensions or more, for boundaries say how many texts there are.
    """
    return tuple(
        (f"{name}[{dim}]", size)
        for name, value in sorted(batch.items())
        if isinstance(value, Tensor) and (units.kind == "rows" or value.dim() > 1)
        for dim, size in enumerate(value.shape)
        if dim or units.kind == "tokens" or size != units.n_items
    )


def select_unit(batch: Batch, units: Units, unit: int) -> dict[str, Any]:
    """The part of a batch that belongs to one unit, as a batch of its own.

    >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "temperature": 1.0}
    >>> select_unit(batch, Units.rows(3), 1)
    {'input_ids': tensor([[3, 4]]), 'temperature': 1.0}

    Rows: tensors whose first size is the number of rows are indexed along it. Tokens: tensors laid out as the packed rows are
    cut to one row of that unit's tokens, and the boundaries between its texts (`cu_seq_lens_*`, `max_length_*`) follow.
    Everything else passes through, except tensors of two or more dimensions laid out otherwise (pictures of many rows in one
    tensor, say): a unit alone would still see those of all units.

    Raises:
        ValueError: for such tensors.
    """
    return select_items(batch, units, units.items(unit))


def selector(units: Units) -> Select:
    """`select_unit` for batches of these units."""
    return lambda batch, unit: select_unit(batch, units, unit)


def select_items(batch: Batch, units: Units, items: Tensor) -> dict[str, Any]:
    """As `select_unit`, for any rows, or for the tokens of any units, in their order."""
    return {name: _select(name, value, units, items, batch) for name, value in batch.items()}


def restarts(position_ids: Tensor) -> Tensor:
    """Where positions say that another text begins: at one below the one before, or one that repeats the row's first.

    A position may skip numbers within a text, and one may repeat that is above the first of its row: the tokens of a picture
    share theirs. So texts whose positions go on counting from the text before are not distinguished.

    >>> restarts(torch.tensor([[0, 1, 2, 0, 0, 1]]))  # of 3 tokens, 1 token and 2 tokens
    tensor([[False, False,  True,  True, False]])

    Args:
        position_ids: (rows, length) integers.

    Returns:
        (rows, length - 1) bool, on the same device; entry i says whether token i + 1 begins a text.
    """
    step = position_ids.diff(dim=-1)
    return (step < 0) | ((step == 0) & (position_ids[:, 1:] <= position_ids[:, :1]))


def text_starts(batch: Batch) -> Tensor | None:
    """Bool (length,), on the CPU: where the texts of one packed row start; None where the batch does not say.

    Boundaries (`cu_seq_lens_q`) say it, else `position_ids` that restart and count on everywhere else: at any other step a text
    could begin or not, and a token be taken for one of another unit's.
    """
    length = leading_shape(batch)[-1]
    ends, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    starts = torch.zeros(length, dtype=torch.bool)
    if isinstance(ends, Tensor):
        begun = ends.cpu().long()  # what follows the last boundary counts as a text too, which belongs to no unit
        starts[begun[begun < length]] = True
    elif isinstance(positions, Tensor) and positions.shape[-1] == length and positions.numel() == length:
        begun = restarts(positions.view(1, length))[0].cpu()
        if not torch.equal(begun, positions.flatten().diff().cpu() != 1):
            return None
        starts[1:] = begun
        starts[:1] = True
    else:
        return None
    return starts


def _select(name: str, value: Any, units: Units, items: Tensor, batch: Batch) -> Any:
    if isinstance(value, Mapping):
        return {k: _select(k, v, units, items, value) for k, v in value.items()}
    if units.kind == "tokens":
        if name.startswith("cu_seq_lens"):
            return torch.cat([torch.zeros(1), _text_lengths(value, items).cumsum(0)]).to(value)
        if name.startswith("max_length"):
            ends = batch.get(name.replace("max_length", "cu_seq_lens"), batch.get("cu_seq_lens_q"))
            longest = len(items) if ends is None else int(_text_lengths(ends, items).max())
            return longest if isinstance(value, int) else torch.full_like(value, longest)
        if isinstance(value, Tensor) and tuple(value.shape[:2]) == units.shape:
            return value.flatten(0, 1).index_select(0, items.to(value.device)).unsqueeze(0)
    elif isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == units.n_items:
        return value.index_select(0, items.to(value.device))
    elif isinstance(value, list) and len(value) == units.n_items:
        return [value[i] for i in items.tolist()]
    if isinstance(value, Tensor) and value.dim() > 1 and (units.kind == "tokens" or value.shape[0] != 1):
        expected = f"{units.shape} or" if units.kind == "tokens" else f"{units.n_items} rows, one row for all, or"
        raise invalid(
            f"batch[{name!r}]",
            expected=f"{expected} fewer than two dimensions",
            actual=tuple(value.shape),
            remedy="nothing says which part of it belongs to which unit: give one row for every row of the batch, or (a "
            "ClippingEngine of your own) pass select=",
        )
    return value


def _text_lengths(boundaries: Tensor, items: Tensor) -> Tensor:
    """How many of these tokens (ascending) belong to each text that has any."""
    text = torch.bucketize(items, boundaries.cpu().long()[1:], right=True)
    counts: Tensor = torch.unique_consecutive(text, return_counts=True)[1]
    return counts


def subset(units: Units, items: Tensor) -> Units:
    """The units of some rows or tokens, renumbered from 0 in the order of their numbers."""
    kept, renumbered = torch.unique(units.of_item[items], return_inverse=True)
    return replace(units, of_item=renumbered, n=len(kept), shape=(1, len(items)) if units.kind == "tokens" else ())
