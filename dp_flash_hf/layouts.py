"""Where each layer keeps which unit: learnt from the model itself, never guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dp_flash_hf.kernels.ghost_norm import upcast
from dp_flash_hf.units import Units


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the items of a batch stand in the leading dimensions of a tensor.

    lead: the leading sizes. dims: the dimension(s) of `lead` that run over items, outermost first; empty when everything
    belongs to one single unit.
    """

    units: Units
    lead: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether everything belongs to one unit."""
        return not self.dims

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each unit in the result of `arrange`."""
        rows = math.prod(self.lead)
        if self.whole:
            return tuple(rows if size else 0 for size in self.units.sizes)
        return tuple(size * (rows // self.units.n_items) for size in self.units.sizes)

    def arrange(self, x: Tensor) -> Tensor:
        """(*lead, d) -> (rows, d) in unit order; rows of nobody are left out."""
        if self.whole:
            return x.reshape(-1, x.shape[-1])
        if self.dims != (0,) and self.dims != (0, 1):
            x = x.movedim(self.dims, tuple(range(len(self.dims))))
        return self.units.arrange(x.reshape(self.units.n_items, -1, x.shape[-1]))

    def parameter_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape to which a parameter that is broadcast against (*lead, ...) is expanded so that every item has its own."""
        return (*(size if dim in self.dims else 1 for dim, size in enumerate(self.lead)), *shape)

    def reduce(self, g: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradient of an expanded parameter (`parameter_shape(shape)`) -> per-unit gradients (units, *shape), upcast."""
        g = upcast(g)
        if self.whole:
            out = torch.zeros(self.units.n, *shape, dtype=g.dtype, device=g.device)
            out[self.units.last] = g.reshape(shape)
            return out
        per_item = g.reshape(self.units.n_items, -1, *shape).sum(1)
        if self.units.identity:
            return per_item
        owned = self.units.of_item >= 0
        out = torch.zeros(self.units.n, *shape, dtype=g.dtype, device=g.device)
        return out.index_add_(0, self.units.of_item[owned].to(g.device), per_item[owned.to(g.device)])


@dataclass
class Place:
    """Where a layer's input keeps items, as proven on a batch: in `dims` of its leading ones, with so many rows for each."""

    dims: tuple[int, ...]
    rows_per_item: set[int]


class Layouts:
    """The layouts of one model's layers.

    Nothing says which dimension of a layer's input runs over units, so it is *learnt*, from forward passes: the whole
    batch (`observe`), every unit alone (`compare`), and the whole batch with its activations disturbed (`disturb`). A layer's
    place is known when every unit's part of the whole is what that unit's own pass held there, and no other reading of the
    shape says the same. Where any of it fails the layer stays without a place, its gradient is left to autograd, and the
    engine finds it there.
    """

    def __init__(self) -> None:
        self.unsettled = False  # whether a layer's input came in a shape that its place was not proven for
        self.calls: dict[nn.Parameter, int] = {}  # how often a forward pass uses each parameter through its layer
        self._places: dict[tuple[nn.Module, int], Place | None] = {}
        self._kind: str | None = None
        self._known = False
        self._shares = True  # whether lookups for all rows are given to every row
        self._lengths: set[tuple[int, ...]] = set()
        # While learning: the batch, the items of the present pass, what each call saw of the whole batch, and calls met so far.
        self._length: tuple[int, ...] = ()
        self._pass: Literal["observe", "compare", "disturb"] = "observe"
        self._whole = Units.rows(0)
        self._items = torch.zeros(0, dtype=torch.long)
        self._seen: dict[nn.Module, list[Tensor]] = {}
        self._found: dict[tuple[nn.Module, int], Place | None] = {}
        self._shared: dict[nn.Module, list[bool]] = {}
        self._met: dict[nn.Module, int] = {}
        self._met_lookups: dict[nn.Module, int] = {}

    def knows(self, units: Units, length: tuple[int, ...]) -> bool:
        """Whether the layouts of this kind of batch are known, or need not be. length: sizes of its inputs beside the rows."""
        if units.is_single:
            return True
        flattened = any(place is not None and place.rows_per_item != {1} for place in self._places.values())
        return self._known and self._kind == units.kind and (not flattened or length in self._lengths)

    def find(self, module: nn.Module, lead: tuple[int, ...], units: Units) -> Layout | None:
        """The layout of a layer's input with these leading sizes; None if it is not certain."""
        if units.is_single:
            return Layout(units, lead, ())
        place = self._places.get((module, len(lead)))
        if place is None:
            return None
        rows, rest = divmod(math.prod(lead[dim] for dim in place.dims), units.n_items)
        if rest or rows not in place.rows_per_item or (len(place.dims) > 1 and lead[:2] != units.shape):
            self.unsettled = True
            return None
        return Layout(units, lead, place.dims)

    def forget(self) -> None:
        """Learn anew from the next batch; what was proven stays."""
        self._known, self.unsettled = False, False

    # Learning: the order of the calls is observe, compare for every unit, disturb, settle.

    def observe(self, units: Units, length: tuple[int, ...] = ()) -> None:
        """Learn layouts: watch a forward pass over a whole batch, ..."""
        if self._kind != units.kind:
            self._places, self._lengths = {}, set()
        self._length = length
        self._kind, self._known, self.unsettled = units.kind, False, False
        self._whole = units
        self._seen, self._found, self._shared, self.calls = {}, {}, {}, {}
        self._start("observe", torch.arange(units.n_items))

    def compare(self, unit: int) -> None:
        """... then one over each unit alone, ..."""
        self._end_pass()
        self._start("compare", self._whole.items(unit))

    def disturb(self) -> None:
        """... then the whole batch with layers' outputs disturbed: shapes that follow the data cannot be relied on, ..."""
        self._end_pass()
        self._start("disturb", torch.arange(self._whole.n_items))

    def settle(self) -> None:
        """... and keep what all of them agreed on."""
        self._end_pass()
        for key, place in self._found.items():
            old = self._places.get(key, place)
            if place is not None and old is not None and place.dims == old.dims:
                place.rows_per_item |= old.rows_per_item
            elif old != place:
                place = None
            self._places[key] = place
        self._known = True
        self._lengths.add(self._length)
        self._seen = {}

    def meet(self, module: nn.Module, x: Tensor, lead: int) -> None:
        """A layer was called, in one of the passes, with x of `lead` leading dimensions."""
        x = _one_number_per_row(x.detach(), lead)
        if self._pass == "observe":
            self._seen.setdefault(module, []).append(x)
            for parameter in module.parameters(recurse=False):
                self.calls[parameter] = self.calls.get(parameter, 0) + 1
            return
        number = self._met.get(module, 0)
        self._met[module] = number + 1
        seen = self._seen.get(module, [])
        if number >= len(seen) or seen[number].dim() != x.dim():
            self._refuse(module)
            self._found[(module, x.dim())] = None
        elif self._pass == "disturb":
            if seen[number].shape != x.shape:
                self._refuse(module)
        else:
            key, place = (module, x.dim()), self._place(x, seen[number])
            old = self._found.setdefault(key, place)
            if place is None or old is None or place.dims != old.dims:
                self._found[key] = None
            else:
                old.rows_per_item |= place.rows_per_item

    def leave_shared(self) -> bool:
        """From now on leave lookups for all rows as they are; False if there were none.

        For models that repeat for every row what they looked up once, as prompt tuning does.
        """
        had = self._shares and any(any(shared) for shared in self._shared.values())
        self._shares = self._shares and not had
        return had

    def is_shared(self, ids: Tensor, units: Units) -> bool:
        """Whether a lookup (1, ...) stands for all rows of the batch."""
        return self._shares and units.kind == "rows" and ids.dim() >= 2 and ids.shape[0] == 1 and units.n_items > 1

    def lookup(self, module: nn.Module, ids: Tensor, table_rows: int) -> Tensor:
        """What `per_item_rows` gives while learning: every item looks up other rows of the table.

        A model which mixes the items' lookups, or uses the first of them for all, is then seen to do so.
        """
        if self._pass == "observe":
            shared = self.is_shared(ids, self._whole)
            self._shared.setdefault(module, []).append(shared)
        else:  # a row alone looks as if it were shared: what counts is what the same lookup was in the whole batch
            number = self._met_lookups.get(module, 0)
            self._met_lookups[module] = number + 1
            shared = number < len(self._shared.get(module, [])) and self._shared[module][number]
        if not shared:
            return ids
        shift = self._items.to(ids.device).reshape(-1, *[1] * (ids.dim() - 1))
        return (ids + shift) % table_rows

    def _start(self, kind: Literal["observe", "compare", "disturb"], items: Tensor) -> None:
        self._pass, self._items = kind, items
        self._met, self._met_lookups = {}, {}

    def _end_pass(self) -> None:
        if self._pass != "observe":
            for module, seen in self._seen.items():
                if self._met.get(module, 0) != len(seen):
                    self._refuse(module)

    def _refuse(self, module: nn.Module) -> None:
        for seen in self._seen.get(module, []):
            self._found[(module, seen.dim())] = None

    def _place(self, alone: Tensor, whole: Tensor) -> Place | None:
        """Where the compared unit's items stand in `whole`, given what its own pass held, both (*lead,); None if unproven."""
        units, items = self._whole, self._items.to(whole.device)
        if units.kind == "tokens" and units.shape[0] > 1 and whole.dim() > 1:  # rows of tokens; a unit alone is one row
            if tuple(whole.shape[:2]) != units.shape or tuple(alone.shape[:2]) != (1, len(items)):
                return None
            return Place((0, 1), {1}) if _same(alone[0], whole.flatten(0, 1)[items]) else None
        changed = [dim for dim, (one, all_) in enumerate(zip(alone.shape, whole.shape, strict=True)) if one != all_]
        if len(changed) != 1 or whole.shape[changed[0]] * len(items) != alone.shape[changed[0]] * units.n_items:
            return None
        (dim,) = changed
        rows, rest = divmod(whole.shape[dim], units.n_items)
        if rest:
            return None
        alone, whole = alone.movedim(dim, 0).unflatten(0, (len(items), rows)), whole.movedim(dim, 0)
        if not _same(alone, whole.unflatten(0, (units.n_items, rows))[items]):
            return None
        other = whole.unflatten(0, (rows, units.n_items)).transpose(0, 1)[items]
        constant = rows > 1 and _same(alone, other)  # nothing tells the items' rows from each other
        return Place((dim,), set() if constant else {rows})


def _one_number_per_row(x: Tensor, lead: int) -> Tensor:
    """(*lead, *features) -> (*lead,): enough to tell rows apart, and small enough to keep for every layer."""
    if x.dim() == lead:
        return x.double() if x.is_floating_point() else x
    x = upcast(x.flatten(lead))
    weights = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    return (x * weights).sum(-1)


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two passes agree on the same rows: rounding apart, no two units do."""
    if not found.is_floating_point():
        return bool(torch.equal(found, wanted))
    found, wanted = found.double().nan_to_num(), wanted.double().nan_to_num()
    return bool((found - wanted).norm() <= 0.05 * wanted.norm())
