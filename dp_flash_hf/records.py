"""What layers leave behind in a backward pass, until the clip factors are known.

A `Recorder` is shared by an engine and the layers it attached: layers ask it how their input is laid out and hand it what their
backward saw; the engine reads per-unit norms from it and has it form the clipped sums (book-keeping, Bu et al. 2023,
arXiv 2210.00038).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.kernels.clipped_sum import add_embedding_, add_linear_, add_per_unit_
from dp_flash_hf.kernels.ghost_norm import (
    InputGram,
    embedding_squared_norms,
    hidden_by_rounding,
    is_uniform,
    linear_squared_norms,
    tied_cross_terms,
    upcast,
)
from dp_flash_hf.units import Units

# idle: layers behave as without the library. observe, compare, disturb: layouts are being learnt, nothing is recorded.
# record: keep what backward saw. norms: keep norms only. sum: clip factors are known, add to the sums at once.
Phase = Literal["idle", "observe", "compare", "disturb", "record", "norms", "sum"]

# Per-unit gradients are formed when they are at most this many times larger than the records (inputs and output gradients):
# forming them costs what the ordinary weight gradient costs and makes the norm and the clipped sum nearly free.
DENSE_LIMIT = 1.0


def full_precision(device: torch.device) -> torch.autocast:
    """A region where autocast does not apply: sums over units run in float32 wherever the user turned autocast on."""
    return torch.autocast(device.type, enabled=False)


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


@dataclass
class LinearUse:
    """Inputs a (rows, d) and output gradients g (rows, p) of one call, in unit order; the gradient is sum_t g_t a_t^T (p, d).

    The parameter may have that many numbers in another shape (p, ...), as convolutions do.
    """

    a: Tensor
    g: Tensor
    sizes: tuple[int, ...]

    def add_to_units_(self, gradients: Tensor) -> None:
        """gradients (units, p, d) += this use's per-unit gradients."""
        a, g = upcast(self.a), upcast(self.g)
        gradients = gradients.view(len(self.sizes), g.shape[1], a.shape[1])
        if is_uniform(self.sizes):
            gradients.baddbmm_(g.unflatten(0, (len(self.sizes), -1)).mT, a.unflatten(0, (len(self.sizes), -1)))
            return
        for out, a_u, g_u in zip(gradients, a.split(self.sizes), g.split(self.sizes), strict=True):
            out.addmm_(g_u.mT, a_u)

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (p, d) += clipped sum."""
        add_linear_(out.view(self.g.shape[1], self.a.shape[1]), self.a, self.g, factors, self.sizes)


@dataclass
class EmbeddingUse:
    """Looked-up ids (rows,) and output gradients g (rows, d) of one call, in unit order."""

    ids: Tensor
    g: Tensor
    sizes: tuple[int, ...]

    def add_to_units_(self, gradients: Tensor) -> None:
        """gradients (units, V, d) += this use's per-unit gradients."""
        for out, ids_u, g_u in zip(gradients, self.ids.split(self.sizes), upcast(self.g).split(self.sizes), strict=True):
            out.index_add_(0, ids_u, g_u)

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (V, d) += clipped sum."""
        add_embedding_(out, self.ids, self.g, factors, self.sizes)


class GradientRecord:
    """All uses of one parameter in one backward pass: one gradient, so cross terms between its uses count."""

    def __init__(self, shape: torch.Size, n_units: int) -> None:
        self.shape, self.n_units = shape, n_units
        self.linear: list[LinearUse] = []
        self.embedding: list[EmbeddingUse] = []
        self.per_unit: Tensor | None = None  # (units, *shape)

    def add(self, use: LinearUse | EmbeddingUse) -> None:
        """Keep one more use, as it is or as per-unit gradients, whichever is smaller."""
        if self.per_unit is None and not self.linear and not self.embedding and isinstance(use, LinearUse):
            rows, size = len(use.a), self.shape.numel()
            if is_uniform(use.sizes) and self.n_units * size <= DENSE_LIMIT * rows * (use.a.shape[1] + use.g.shape[1]):
                a, g = upcast(use.a), upcast(use.g)
                formed = torch.bmm(g.unflatten(0, (self.n_units, -1)).mT, a.unflatten(0, (self.n_units, -1)))
                self.per_unit = formed.view(self.n_units, *self.shape)
                return
        if self.per_unit is not None:
            use.add_to_units_(self.per_unit)
        elif isinstance(use, LinearUse):
            self.linear.append(use)
        else:
            self.embedding.append(use)

    def add_per_unit(self, gradients: Tensor) -> None:
        """Add per-unit gradients (units, *shape) formed by the layer itself."""
        self.per_unit = gradients if self.per_unit is None else self.per_unit.add_(gradients)
        for use in self._uses:
            use.add_to_units_(self.per_unit)
        self.linear, self.embedding = [], []

    @property
    def _uses(self) -> list[LinearUse | EmbeddingUse]:
        return [*self.linear, *self.embedding]

    @property
    def form(self) -> str:
        """How the norm is computed, in words."""
        if self.per_unit is not None:
            return "per-unit gradient"
        return " + ".join(name for name, uses in (("ghost norm", self.linear), ("embedding rows", self.embedding)) if uses)

    def squared_norms(self, gram: InputGram | None = None) -> Tensor:
        """(units,) squared L2 norms."""
        if self.per_unit is not None:
            lengths: Tensor = torch.linalg.vector_norm(self.per_unit.flatten(1), dim=1)
            return lengths.square()
        linear, embedding = _merge_linear(self.linear), _merge_embedding(self.embedding)
        if linear is None or embedding is None:
            if linear is not None:
                return linear_squared_norms(linear.a, linear.g, linear.sizes, gram)
            assert embedding is not None
            return embedding_squared_norms(embedding.ids, embedding.g, embedding.sizes)
        head = linear_squared_norms(linear.a, linear.g, linear.sizes, gram)
        table = embedding_squared_norms(embedding.ids, embedding.g, embedding.sizes)
        cross = tied_cross_terms(linear.a, linear.g, embedding.ids, embedding.g, linear.sizes, embedding.sizes)
        norms = head + table + 2 * cross
        # |x + y|^2 with x close to -y has lost its digits: the gradient itself is formed for such a unit.
        for unit in (norms < 2.0**-10 * (head + table)).nonzero().flatten().tolist():
            norms[unit] = self._one_unit(unit).square().sum() + self._hidden(linear, embedding, unit)
        return norms

    @staticmethod
    def _hidden(linear: LinearUse, embedding: EmbeddingUse, unit: int) -> Tensor:
        a, g = upcast(linear.a.split(linear.sizes)[unit]), upcast(linear.g.split(linear.sizes)[unit])
        rows = upcast(embedding.g.split(embedding.sizes)[unit])
        bound = (a.norm(dim=1) * g.norm(dim=1)).sum() + rows.norm(dim=1).sum()
        return hidden_by_rounding(bound, len(a) + len(rows))

    def _one_unit(self, unit: int) -> Tensor:
        first = (self.linear or self.embedding)[0]
        gradient = torch.zeros(1, *self.shape, dtype=upcast(first.g).dtype, device=first.g.device)
        for linear in self.linear:
            a_u, g_u = linear.a.split(linear.sizes)[unit], linear.g.split(linear.sizes)[unit]
            LinearUse(a_u, g_u, (len(a_u),)).add_to_units_(gradient)
        for embedding in self.embedding:
            ids_u, g_u = embedding.ids.split(embedding.sizes)[unit], embedding.g.split(embedding.sizes)[unit]
            EmbeddingUse(ids_u, g_u, (len(ids_u),)).add_to_units_(gradient)
        return gradient[0]

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (*shape) += sum over units of factors (units,) times the unit's gradient."""
        if self.per_unit is not None:
            add_per_unit_(out, self.per_unit, factors)
        for use in self._uses:
            use.add_clipped_sum_(out, factors)


def _interleave(parts: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([chunk for unit in zip(*parts, strict=True) for chunk in unit])


def _merge_linear(uses: list[LinearUse]) -> LinearUse | None:
    """Reuse of a linear weight is just more rows of each unit."""
    if len(uses) < 2:
        return uses[0] if uses else None
    a, g = _interleave([u.a.split(u.sizes) for u in uses]), _interleave([u.g.split(u.sizes) for u in uses])
    return LinearUse(a, g, tuple(map(sum, zip(*(u.sizes for u in uses), strict=True))))


def _merge_embedding(uses: list[EmbeddingUse]) -> EmbeddingUse | None:
    if len(uses) < 2:
        return uses[0] if uses else None
    ids, g = _interleave([u.ids.split(u.sizes) for u in uses]), _interleave([u.g.split(u.sizes) for u in uses])
    return EmbeddingUse(ids, g, tuple(map(sum, zip(*(u.sizes for u in uses), strict=True))))


class Recorder:
    """Shared by an engine and its layers. Layers use `tracks`, `layout`, `per_item_rows` and the four that record.

    Nothing says which dimension of a layer's input runs over units, so it is *learnt*, from passes without gradient: the whole
    batch (`observe`), every unit alone (`compare`), and the whole batch with its activations disturbed (`disturb`). A layer's
    place is known when every unit's part of the whole is what that unit's own pass held there, and no other reading of the
    shape says the same. Where any of it fails, the layer stays without a place, its gradient is left to autograd, and the
    engine finds it there.
    """

    def __init__(self, groups: dict[nn.Parameter, int]) -> None:
        self.phase: Phase = "idle"
        self.units = Units.rows(0)
        self.records: dict[nn.Parameter, GradientRecord] = {}
        self.forms: dict[nn.Parameter, str] = {}  # how the norm of each parameter was last computed
        self._groups = groups
        self._n_groups = max(groups.values(), default=-1) + 1
        self.unsettled = False  # whether a layer's input came in a shape that its place was not proven for
        self._places: dict[tuple[nn.Module, int], Place | None] = {}
        self._learnt_kind: str | None = None
        self._known = False
        self._lengths: set[tuple[int, ...]] = set()
        self._length: tuple[int, ...] = ()
        self._whole = Units.rows(0)  # while learning: the batch, what each call saw of it, and the calls met in this pass
        self._items = torch.zeros(0, dtype=torch.long)
        self._seen: dict[nn.Module, list[Tensor]] = {}
        self._found: dict[tuple[nn.Module, int], Place | None] = {}
        self._shared: dict[nn.Module, list[bool]] = {}
        self._met: dict[nn.Module, int] = {}
        self._met_lookups: dict[nn.Module, int] = {}
        self._calls: dict[nn.Parameter, int] = {}
        self._gram = InputGram()
        self._norms: Tensor | None = None
        self._spent: set[nn.Parameter] = set()
        self._factors: Tensor | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        # A copied model is not attached: its parameters are unknown here, and its layers behave as without the library.
        return self

    # What layers ask and tell.

    def tracks(self, parameter: object) -> bool:
        """Whether this parameter's gradient is to be recorded in the present call."""
        return (
            self.phase != "idle"
            and isinstance(parameter, nn.Parameter)
            and parameter in self._groups
            and parameter.requires_grad
        )

    def layout(self, module: nn.Module, x: Tensor, feature_dims: int = 1) -> Layout | None:
        """How the input x (*lead, *features) of a layer is laid out, or None when that is not certain.

        None makes the layer compute as without the library; the gradient that autograd then leaves tells the engine.
        """
        lead = tuple(x.shape[: x.dim() - feature_dims])
        if self.phase in ("observe", "compare", "disturb"):
            self._learn(module, x.detach(), lead)
            return None
        if not torch.is_grad_enabled():
            return None
        if self.units.is_single:
            return Layout(self.units, lead, ())
        place = self._places.get((module, len(lead)))
        if place is None:
            return None
        rows, rest = divmod(math.prod(lead[dim] for dim in place.dims), self.units.n_items)
        if rest or rows not in place.rows_per_item or (len(place.dims) > 1 and lead[:2] != self.units.shape):
            self.unsettled = True
            return None
        return Layout(self.units, lead, place.dims)

    def per_item_rows(self, module: nn.Module, ids: Tensor, table_rows: int) -> Tensor:
        """(1, ...) -> (rows, ...), for tables that models look up once for all rows; anything else comes back as it is.

        While layouts are learnt every item looks up other rows of the table, so that a model which mixes the items' lookups,
        or uses the first of them for all, is seen to do so.
        """
        units = self._whole if self.phase in ("compare", "disturb") else self.units
        shared = units.kind == "rows" and ids.dim() >= 2 and ids.shape[0] == 1 and units.n_items > 1
        if self.phase not in ("observe", "compare", "disturb"):
            return ids.expand(units.n_items, *ids.shape[1:]) if shared else ids
        if self.phase == "observe":
            self._shared.setdefault(module, []).append(shared)
        else:  # a row alone looks as if it were shared: what counts is what the same lookup was in the whole batch
            number = self._met_lookups.get(module, 0)
            self._met_lookups[module] = number + 1
            shared = number < len(self._shared.get(module, [])) and self._shared[module][number]
        if not shared:
            return ids
        shift = self._items.to(ids.device).reshape(-1, *[1] * (ids.dim() - 1))
        return (ids + shift) % table_rows

    def linear(self, parameter: nn.Parameter, a: Tensor, g: Tensor, layout: Layout) -> None:
        """Record y = x W^T with gradient sum g_t a_t^T. a: (*lead, d), g: (*lead, p)."""
        self._add(parameter, LinearUse(layout.arrange(a), layout.arrange(g), layout.sizes))

    def embedding(
        self, parameter: nn.Parameter, ids: Tensor, g: Tensor, layout: Layout, padding_idx: int | None = None
    ) -> None:
        """Record y = E[ids]. ids: LongTensor (*lead,), g: (*lead, d); rows at `padding_idx` get no gradient."""
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
        arranged = layout.arrange(ids.unsqueeze(-1)).squeeze(-1)
        self._add(parameter, EmbeddingUse(arranged, layout.arrange(g), layout.sizes))

    def bias(self, parameter: nn.Parameter, g: Tensor, layout: Layout) -> None:
        """Record y = x + b. g: (*lead, p)."""
        g, sizes = upcast(layout.arrange(g)), layout.sizes
        uniform = is_uniform(sizes)
        self._add(
            parameter, g.unflatten(0, (len(sizes), -1)).sum(1) if uniform else torch.stack([u.sum(0) for u in g.split(sizes)])
        )

    def per_unit(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Record per-unit gradients (units, *parameter.shape), float32 or float64, formed by the layer itself."""
        self._add(parameter, gradients)

    # What the engine does.

    def knows(self, units: Units, length: tuple[int, ...]) -> bool:
        """Whether the layouts of this kind of batch are known, or need not be. length: sizes of its inputs beside the rows."""
        if units.is_single:
            return True
        flattened = any(place is not None and place.rows_per_item != {1} for place in self._places.values())
        return self._known and self._learnt_kind == units.kind and (not flattened or length in self._lengths)

    def forget(self) -> None:
        """Learn anew from the next batch; what was proven stays."""
        self._known, self.unsettled = False, False

    def observe(self, units: Units, length: tuple[int, ...] = ()) -> None:
        """Learn layouts: watch a forward pass over a whole batch, ..."""
        if self._learnt_kind != units.kind:
            self._places, self._lengths = {}, set()
        self._length = length
        self._learnt_kind, self._known, self.unsettled = units.kind, False, False
        self._whole, self._items = units, torch.arange(units.n_items)
        self._seen, self._found, self._shared, self._calls = {}, {}, {}, {}
        self._start_pass("observe", units)

    def compare(self, units: Units, unit: int) -> None:
        """... then one over each unit alone, ..."""
        self._end_pass()
        self._items = units.items(unit)
        self._start_pass("compare", Units.rows(1))

    def disturb(self, units: Units) -> None:
        """... then the whole batch with layers' outputs disturbed: shapes that follow the data cannot be relied on, ..."""
        self._end_pass()
        self._items = torch.arange(units.n_items)
        self._start_pass("disturb", units)

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
        self.stop()
        self._known = True
        self._lengths.add(self._length)

    def _start_pass(self, phase: Phase, units: Units) -> None:
        self.start(phase, units)
        self._met, self._met_lookups = {}, {}

    def _end_pass(self) -> None:
        if self.phase != "observe":
            for module, seen in self._seen.items():
                if self._met.get(module, 0) != len(seen):
                    self._refuse(module)

    def _refuse(self, module: nn.Module) -> None:
        for seen in self._seen.get(module, []):
            self._found[(module, seen.dim())] = None

    def start(
        self, phase: Phase, units: Units, factors: Tensor | None = None, sums: dict[nn.Parameter, Tensor] | None = None
    ) -> None:
        """Enter a phase for one physical batch. `factors` (units, groups) and `sums` belong to phase "sum"."""
        self.phase, self.units, self.records = phase, units, {}
        self._norms, self._spent = None, set()
        self._factors, self._sums = factors, sums or {}

    def stop(self) -> None:
        """Back to idle; every record is dropped."""
        self.start("idle", Units.rows(0))
        self._seen = {}
        self._gram.clear()

    @property
    def reached(self) -> set[nn.Parameter]:
        """Parameters that the backward pass since `start` recorded."""
        return self._spent | set(self.records)

    @torch.no_grad()
    def squared_norms(self, like: Tensor) -> Tensor:
        """(units, groups) squared norms of everything recorded since `start`. like: a tensor giving dtype and device."""
        with full_precision(like.device):
            for parameter, record in self.records.items():
                self._add_norms(parameter, record)
        return self._norms if self._norms is not None else like.new_zeros(self.units.n, self._n_groups)

    def _add_norms(self, parameter: nn.Parameter, record: GradientRecord) -> None:
        squared = record.squared_norms(self._gram)
        self.forms[parameter] = record.form
        if self._norms is None:
            self._norms = squared.new_zeros(self.units.n, self._n_groups)
        self._norms[:, self._groups[parameter]] += squared

    @torch.no_grad()
    def _add(self, parameter: nn.Parameter, use: LinearUse | EmbeddingUse | Tensor) -> None:
        with full_precision(parameter.device):
            self._add_use(parameter, use)

    def _add_use(self, parameter: nn.Parameter, use: LinearUse | EmbeddingUse | Tensor) -> None:
        if self.phase not in ("record", "norms", "sum"):
            raise PrivacyError(
                "backward through a model with an attached ClippingEngine, outside engine.backward or engine.batch: its "
                "gradients would not be clipped; use engine.backward(loss_fn, batch), or engine.detach() first"
            )
        if self.phase == "sum":
            assert self._factors is not None
            factors = self._factors[:, self._groups[parameter]]
            if isinstance(use, Tensor):
                add_per_unit_(self._sums[parameter], use, factors)
            else:
                use.add_clipped_sum_(self._sums[parameter], factors)
            return
        if parameter in self._spent:
            raise PrivacyError("a parameter was used more often than when its layer was first observed; use strategy='auto'")
        record = self.records.setdefault(parameter, GradientRecord(parameter.shape, self.units.n))
        if isinstance(use, Tensor):
            record.add_per_unit(use)
        else:
            record.add(use)
        if self.phase == "norms" and self._calls.get(parameter) == 1:  # no cross terms to come: the records may go
            self._add_norms(parameter, self.records.pop(parameter))
            self._spent.add(parameter)

    def _learn(self, module: nn.Module, x: Tensor, lead: tuple[int, ...]) -> None:
        x = _one_number_per_row(x, len(lead))
        if self.phase == "observe":
            self._seen.setdefault(module, []).append(x)
            for parameter in module.parameters(recurse=False):
                self._calls[parameter] = self._calls.get(parameter, 0) + 1
            return
        number = self._met.get(module, 0)
        self._met[module] = number + 1
        seen = self._seen.get(module, [])
        if number >= len(seen) or seen[number].dim() != x.dim():
            self._refuse(module)
            self._found[(module, x.dim())] = None
        elif self.phase == "disturb":
            if seen[number].shape != x.shape:
                self._refuse(module)
        else:
            key, place = (module, x.dim()), self._place(x, seen[number])
            old = self._found.setdefault(key, place)
            if place is None or old is None or place.dims != old.dims:
                self._found[key] = None
            else:
                old.rows_per_item |= place.rows_per_item

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
