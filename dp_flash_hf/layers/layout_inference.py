"""Which dimension of each layer's input runs over the batch: learnt from the model itself, never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.units import Units

Pass = Literal["observe", "compare", "perturb", "shorten"]
Site = tuple[Hashable, int]  # where inputs come by, and how many leading dimensions they have
Sizes = tuple[tuple[str, int], ...]  # of a batch, by name: see `units.inner_sizes`


@dataclass
class Place:
    """Where the items of a batch stand in a layer's input, as proven on batches.

    Args:
        dims: The leading dimensions that run over items, () if the input is the same for all items.
        proofs: By the sizes of a batch that it was proven on: the rows that each item had there or, with `dims` (), the shape;
            several where the layer was called on several sequences.
        covered: Whether the sizes of the present batch lie between proven ones.
    """

    dims: tuple[int, ...]
    proofs: dict[Sizes, set[tuple[int, ...]]]
    covered: bool = True

    @property
    def has_one_row(self) -> bool:
        """Whether every item had one row, in all batches."""
        return all(rows == {(1,)} for rows in self.proofs.values())

    def add_proofs(self, other: Place) -> None:
        """Add what another one of the same dimensions was proven on."""
        for sizes, found in other.proofs.items():
            self.proofs.setdefault(sizes, set()).update(found)

    def set_covered(self, covered: bool) -> None:
        """Another batch is the present one."""
        self.covered = covered

    def allows_rows(self, rows: int, sizes: Sizes) -> bool:
        """Whether an item may have so many rows in a batch of these sizes.

        As many as in all proofs, or in all of them the same multiple of one of the sizes.
        """
        if sizes in self.proofs:
            return (rows,) in self.proofs[sizes]

        def in_all(before: int, now: int, name: str = "") -> bool:
            return all(
                any(rows * (dict(seen).get(name, 0) if name else before) == old * now for (old,) in found)
                for seen, found in self.proofs.items()
            )

        return bool(self.proofs) and (in_all(1, 1) or any(in_all(0, size, name) for name, size in sizes))

    def allows_shape(self, shape: tuple[int, ...], sizes: Sizes, n_items: int) -> bool:
        """Whether an input that is the same for all items may have this shape in a batch of these sizes.

        It may if a proof had it, but for dimensions that are as much more, or less, as one of the batch's sizes is. None of
        these may be the number of items, which it could be instead.
        """

        def follows(size: int, old: int, seen: dict[str, int]) -> bool:
            return size != n_items and any(size - old == now - seen.get(name, now) for name, now in sizes)

        return any(
            all(size == old or follows(size, old, dict(seen)) for size, old in zip(shape, proven, strict=True))
            for seen, found in self.proofs.items()
            for proven in found
        )


@dataclass(frozen=True)
class Observation:
    """One way in which a parameter was seen to be combined with a tensor of data.

    Args:
        func: The function of both.
        sizes: How many dimensions what was made of the parameter has, and the data.
        dims: Which of the data's run over items, where there is one row for each; None if that is not certain.
        made_by: Names of the functions that made it of the parameter.
    """

    func: Callable[..., Any]
    sizes: tuple[int, ...]
    dims: tuple[int, ...] | None
    made_by: frozenset[str]

    def is_elementwise(self, functions: Collection[str], also: Collection[str] = ()) -> bool:
        """Whether one of `functions` combines the parameter, or an elementwise function of it, with one row of each item.

        also: names of functions that count as elementwise too.
        """
        name = getattr(self.func, "__name__", "")
        return name in functions and self.dims == (0,) and len(self.sizes) == 2 and self.made_by <= _ELEMENTWISE | {*also}


# Beside Python scalars, these make as many values of a parameter, in the same places.
_ELEMENTWISE = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "neg", "exp"} | {
    f"{left}{name}{right}" for name in ("add", "sub", "mul") for left, right in (("", ""), ("__", "__"), ("__r", "__"))
}


class Layouts:
    """The layouts of one model's layers and of the operations that combine its parameters with data: its *sites*.

    Nothing says which dimension of an input runs over units, so it is *learnt*, from forward passes without dropout:

    - the whole batch (`observe`);
    - every unit alone (`compare`): its input must be its part of what the whole batch held there, by one reading of the shape
      and no other;
    - the whole batch with its activations perturbed (`perturb`): shapes that follow the data cannot be relied on;
    - the whole batch with its first row made shorter (`shorten`): all others must stay where they are.

    Where any of it fails the site has no place, its gradient is left to autograd, and the engine finds it there.

    What is learnt is the *structure* of an input, not its numbers: which dimensions run over items, and which of the batch's
    sizes the others follow. A batch has several sizes (the length of the texts, that of the labels; `units.inner_sizes`), each
    by its name. A place is good for a batch in a new combination of sizes, without another pass, where

    - every size lies between two that the place was proven at (what a model does at longer texts is not taken for granted), and
      one that equals the number of items was proven itself: nothing tells the two apart by number;
    - items have as many rows as in all proofs, or as many as one of the sizes says, in all of them;
    - an input that is the same for all items has the shape of a proof, but for dimensions that moved with one of the sizes.

    Each input of each batch is compared with that. One that does not fit makes the batch `inconclusive`: it is not recorded,
    and the batch is learnt. Where only sizes leave the proven range and every item has one row everywhere, the range is
    *extended* from two units: the structure that was learnt is observed and compared once more, and nothing else is believed.
    That happens a few times at the beginning, and then hardly ever. A batch that told nothing (constant inputs, NaN) may be
    followed by one that does: see `forget`.

    Attributes:
        inconclusive: Whether an input came in a shape that its place was not proven for.
        calls: How often a forward pass uses each parameter.
        learnt: How often layouts were learnt.
    """

    def __init__(self) -> None:
        self.inconclusive = False
        self.calls: dict[nn.Parameter, int] = {}
        self.learnt = 0
        self._places: dict[Site, Place | None] = {}
        self._made_by: dict[Hashable, frozenset[str]] = {}
        self._unknown: set[Site] = set()  # come by since the layouts were learnt, but not then
        self._kind: str | None = None
        self._known = False
        self._proven: set[Sizes] = set()  # sizes of batches that layouts were learnt from
        self._sizes: Sizes = ()
        # While learning: the batch, the items of the present pass, what each call saw of the whole batch, and calls so far.
        self._pass: Pass = "observe"
        self._whole = Units.rows(0)
        self._items = torch.zeros(0, dtype=torch.long)
        self._seen: dict[Hashable, list[Tensor]] = {}
        self._found: dict[Site, Place | None] = {}
        self._visits: dict[Hashable, int] = {}
        self._unperturbed: set[Hashable] = set()
        self._learning = False

    def knows(self, units: Units, sizes: Sizes) -> bool:
        """Whether the layouts of such a batch are known, or need not be; it is the batch that `dims` speaks of from now on.

        sizes: of the batch, as `units.inner_sizes` gives them.
        """
        self._sizes, self._learning = sizes, False
        covered: dict[frozenset[Sizes], bool] = {}
        for place in self._places.values():
            if place is not None:
                seen = frozenset(place.proofs)
                if seen not in covered:
                    covered[seen] = _covers(seen, sizes, units)
                place.set_covered(covered[seen])
        if units.is_single:
            return True
        return self._known and self._kind == units.kind and _covers(self._proven, sizes, units)

    def dims(self, site: Hashable, shape: tuple[int, ...], units: Units) -> tuple[int, ...] | None:
        """Dimensions of an input with these leading sizes that run over items, () for none; None if it is not certain."""
        key = (site, len(shape))
        if key not in self._places:
            self._unknown.add(key)
            self.inconclusive = True
        place = self._places.get(key)
        if place is None:
            return None
        if not place.dims:
            fits = place.allows_shape(shape, self._sizes, units.n_items)
        else:
            rows, rest = divmod(math.prod(shape[dim] for dim in place.dims), units.n_items)
            fits = not rest and place.allows_rows(rows, self._sizes) and (len(place.dims) == 1 or shape[:2] == units.shape)
        if place.covered and fits:
            return place.dims
        self.inconclusive = True
        return None

    def is_shared(self, site: Hashable, shape: tuple[int, ...], units: Units) -> bool:
        """Whether an input with these leading sizes has been proven to be the same for all items.

        While layouts are learnt, any size will do that is as one of the batch's: whether it is is compared.
        """
        place = self._places.get((site, len(shape)))
        n_items = -1 if self._learning else units.n_items
        return place is not None and not place.dims and place.allows_shape(shape, self._sizes, n_items)

    def extensible(self, units: Units) -> bool:
        """Whether layouts of such batches are known at other sizes, each item with one row, and no input did not fit them."""
        places = [place for place in self._places.values() if place is not None and place.dims]
        known = self._known and self._kind == units.kind and not self.inconclusive
        return known and all(place.has_one_row for place in places)

    def forget(self) -> None:
        """Learn again from the next batch; what was proven stays."""
        self._known, self.inconclusive = False, False

    # Learning: the order of the calls is observe, compare for every unit, perturb, shorten, conclude; to extend what is known
    # to other sizes: observe, compare, extend.

    def observe(self, units: Units, sizes: Sizes = ()) -> None:
        """Learn layouts: watch a forward pass over a whole batch, ..."""
        if self._kind != units.kind:
            self._places, self._proven = {}, set()
        self._sizes = sizes
        self._kind, self._known, self.inconclusive = units.kind, False, False
        self._whole, self._learning = units, True
        self._seen, self._found, self.calls, self._unperturbed = {}, {}, {}, set()
        self._start("observe", torch.arange(units.n_items))

    def compare(self, unit: int) -> None:
        """... then one over each unit alone, ..."""
        self._end_pass()
        self._start("compare", self._whole.items(unit))

    def perturb(self) -> None:
        """... then the whole batch with layers' outputs perturbed: shapes that follow the data cannot be relied on, ..."""
        self._end_pass()
        if self._pass != "perturb":
            self._unperturbed = set(self._seen)
        self._start("perturb", torch.arange(self._whole.n_items))

    def shorten(self) -> None:
        """... then the whole batch with its first row made shorter: all others have to stay where they are, ..."""
        self._end_pass()
        self._start("shorten", torch.arange(1, self._whole.n_items))

    def restart(self) -> None:
        """The present pass begins again."""
        self._start(self._pass, self._items)

    def conclude(self) -> bool:
        """... and keep what all of them agreed on. True if an output was found to be shared by all items, and not before."""
        self._end_pass()
        for site in self._unperturbed:
            self._refuse(site)
        more = False
        for site, place in self._found.items():
            old = self._places.get(site, place)
            more |= site not in self._places and place is not None and not place.dims and _is_output(site)
            if place is not None and old is not None and place.dims == old.dims:
                place.add_proofs(old)
            elif old != place:
                place = None
            self._places[site] = place
        self._places |= dict.fromkeys(self._unknown - self._places.keys())  # no pass reaches them
        self._unknown = set()
        self.learnt += 1
        self._keep()
        return more

    def extend(self) -> None:
        """Keep what was observed and compared where it agrees with what was learnt at other sizes; elsewhere, no place."""
        self._end_pass()
        for site in self._found.keys() & self._places.keys():
            place, old = self._found[site], self._places[site]
            if place is None or old is None or place.dims != old.dims:
                self._places[site] = None
            else:
                old.add_proofs(place)
        self._keep()

    def _keep(self) -> None:
        self._known, self._learning, self._seen = True, False, {}
        self._proven.add(self._sizes)

    def observations(self, parameter: nn.Parameter) -> list[Observation]:
        """The operations in which a parameter was seen to be combined with data."""
        found = []
        for (reached, _), place in self._places.items():
            if not isinstance(reached, tuple) or reached[1] != 0:
                continue
            site: Any = reached[0]
            if any(p is parameter for p in site[1]):
                certain = place is not None and bool(place.proofs) and (not place.dims or place.has_one_row)
                sizes = tuple(size for _, size in sorted(site[2], reverse=True))
                dims = place.dims if certain and place is not None else None
                found.append(Observation(site[0], sizes, dims, self._made_by.get(site, frozenset())))
        return found

    def make(self, site: Hashable, functions: frozenset[str]) -> None:
        """What is combined with data at this site was made of its parameters by these functions."""
        self._made_by[site] = self._made_by.get(site, frozenset()) | functions

    def count(self, parameter: nn.Parameter) -> None:
        """A parameter was used once more, in one of the passes."""
        if self._pass == "observe":
            self.calls[parameter] = self.calls.get(parameter, 0) + 1

    def visit(self, site: Hashable, x: Tensor, lead: int) -> None:
        """A site was reached, in one of the passes, with x of `lead` leading dimensions."""
        x = _one_value_per_row(x.detach(), lead)
        if self._pass == "observe":
            self._seen.setdefault(site, []).append(x)
            return
        if site not in self._seen:
            return  # not on the whole batch's way: learnt once it is
        call = self._visits.get(site, 0)
        self._visits[site] = call + 1
        seen = self._seen[site]
        if call >= len(seen) or seen[call].dim() != x.dim():
            self._refuse(site)
            self._found[(site, x.dim())] = None
        elif seen[call].shape != x.shape and self._pass != "compare":
            self._refuse(site)
        elif self._pass == "shorten":
            place = self._found.get((site, x.dim()))
            if place is not None and not _same(self._others(x, place), self._others(seen[call], place)):
                self._refuse(site)
        elif self._pass == "perturb":
            pass
        else:
            key, place = (site, x.dim()), self._place(x, seen[call])
            old = self._found.setdefault(key, place)
            if place is None or old is None or place.dims != old.dims:
                self._found[key] = None
            else:
                old.add_proofs(place)

    def _start(self, kind: Pass, items: Tensor) -> None:
        self._pass, self._items = kind, items
        self._visits = {}

    def _end_pass(self) -> None:
        if self._pass != "observe":
            for site, seen in self._seen.items():
                # Texts without padding may need no mask, and so take another way: it is enough that some pass reaches it.
                if self._visits.get(site, len(seen)) != len(seen):
                    self._refuse(site)
            if self._pass == "perturb":
                self._unperturbed -= self._visits.keys()

    def _others(self, x: Tensor, place: Place) -> Tensor:
        """What stands at `place` for all items but the first."""
        if not place.dims:
            return x
        x = x.movedim(place.dims, tuple(range(len(place.dims)))).flatten(0, len(place.dims) - 1)
        others: Tensor = x.unflatten(0, (self._whole.n_items, -1))[1:]
        return others

    def _refuse(self, site: Hashable) -> None:
        for seen in self._seen.get(site, []):
            self._found[(site, seen.dim())] = None

    def _place(self, alone: Tensor, whole: Tensor) -> Place | None:
        """Where the compared unit's items stand in `whole`, given its own pass, both ``(*lead,)``; None if unproven."""
        units, items = self._whole, self._items.to(whole.device)
        if alone.shape == whole.shape:
            return Place((), {self._sizes: {tuple(whole.shape)}}) if _same(alone, whole) else None
        if units.kind == "tokens" and units.shape[0] > 1 and whole.dim() > 1:  # rows of tokens; a unit alone is one row
            if tuple(whole.shape[:2]) != units.shape or tuple(alone.shape[:2]) != (1, len(items)):
                return None
            return Place((0, 1), {self._sizes: {(1,)}}) if _same(alone[0], whole.flatten(0, 1)[items]) else None
        changed = [dim for dim, (one, all_) in enumerate(zip(alone.shape, whole.shape, strict=True)) if one != all_]
        if len(changed) != 1 or whole.shape[changed[0]] * len(items) != alone.shape[changed[0]] * units.n_items:
            return None
        (dim,) = changed
        rows, rest = divmod(whole.shape[dim], units.n_items)
        if rest:
            return None
        alone, whole = alone.movedim(dim, 0).unflatten(0, (len(items), rows)), whole.movedim(dim, 0)
        blocks, other = whole.unflatten(0, (units.n_items, rows)), whole.unflatten(0, (rows, units.n_items)).transpose(0, 1)
        if not _same(alone, blocks[items]):
            return None
        # Nothing tells the items' rows from each other: the same for every item, or where one row of each follows the other.
        alike = rows > 1 and (_same(alone, other[items]) or _same(blocks, blocks[:1].expand_as(blocks)))
        return Place((dim,), {} if alike else {self._sizes: {(rows,)}})


def _covers(proven: Collection[Sizes], sizes: Sizes, units: Units) -> bool:
    """Whether each of a batch's sizes lies between proven ones, and was proven itself if it equals the number of rows."""
    names = [name for name, _ in sizes]
    seen = [dict(each) for each in proven if [name for name, _ in each] == names]
    for name, size in sizes:
        values = {each[name] for each in seen}
        if not values or not min(values) <= size <= max(values):
            return False
        if units.kind == "rows" and size == units.n_items and size not in values:
            return False
    return bool(seen)


def _is_output(site: Site) -> bool:
    return isinstance(site[0], tuple) and site[0][-1] == "out"


def _one_value_per_row(x: Tensor, lead: int) -> Tensor:
    """``(*lead, *features)`` -> ``(*lead,)``: enough to tell rows apart, and small enough to keep for every layer."""
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
