"""What layers leave behind in a backward pass, until the clip factors are known.

A `Recorder` is shared by an engine and the layers it attached: layers ask it how their input is laid out and hand it what their
backward saw; the engine reads per-unit norms from it and has it form the clipped sums (book-keeping, Bu et al. 2023,
arXiv 2210.00038).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dp_flash_hf import planner
from dp_flash_hf.distributed import device_of
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.kernels.clipped_sum import add_embedding_, add_linear_, add_per_unit_, linear_clipped_sum
from dp_flash_hf.kernels.ghost_norm import (
    embedding_squared_norms,
    hidden_by_rounding,
    linear_squared_norms,
    tied_cross_terms,
    unit_gradients,
    upcast,
)
from dp_flash_hf.kernels.linear_cross_entropy import LogitGradients, add_cross_entropy_, head_cross_terms
from dp_flash_hf.layouts import Layout, Layouts
from dp_flash_hf.units import Units

# idle: layers behave as without the library. learn: layouts are being learnt, nothing is recorded.
# record: keep what backward saw. norms: keep norms only. sum: clip factors are known, add to the sums at once.
Phase = Literal["idle", "learn", "record", "norms", "sum"]


class TwoPassError(PrivacyError):
    """This model cannot be computed in two passes, before anything was added."""


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
    """Inputs a (rows, d) and output gradients g (rows, p) of one call, in unit order; the gradient is sum_t g_t a_t^T (p, d).

    The parameter may have that many numbers in another shape (p, ...), as convolutions do.
    part: which rows along the parameter's first dimension hold these numbers, as one expert of many; None for all.
    """

    a: Tensor
    g: Tensor
    sizes: tuple[int, ...]
    part: tuple[int, int] | None = None

    @property
    def keeps_gradients(self) -> bool:
        """Whether to keep per-unit gradients in place of this."""
        return planner.keeps_gradients(self.sizes, self.a.shape[1], self.g.shape[1], self.a.dtype)

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
        """gradients (units, *shape) += this use's per-unit gradients."""
        unit_gradients(self.a, self.g, self.sizes, self._own(gradients, 1))

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (*shape) += sum over units of factors (units,) times the unit's gradient."""
        add_linear_(self._own(out, 0), self.a, self.g, factors, self.sizes)

    def squared_norms(self) -> tuple[Tensor, str]:
        """(units,) squared norms of the per-unit gradients, and how they are computed, in words."""
        (norms,), form = linear_norms([self])
        return norms, form

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

    squared: (units,), what the backward pass that had the blocks at hand made of them; None where nobody will ask.
    """

    g: LogitGradients
    sizes: tuple[int, ...]
    squared: Tensor | None
    part = None

    def formed(self) -> LinearUse:
        """The same with all of g there, to be one of several uses."""
        return LinearUse(self.g.hidden, self.g.whole(), self.sizes)

    def add_to_units_(self, gradients: Tensor) -> None:
        """gradients (units, V, d) += this use's per-unit gradients."""
        self.formed().add_to_units_(gradients)

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (V, d) += sum over units of factors (units,) times the unit's gradient."""
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
    """Looked-up ids (rows,) and output gradients g (rows, d) of one call, in unit order."""

    ids: Tensor
    g: Tensor
    sizes: tuple[int, ...]

    def add_to_units_(self, gradients: Tensor) -> None:
        """gradients (units, V, d) += this use's per-unit gradients."""
        for out, ids_u, g_u in zip(gradients, self.ids.split(self.sizes), upcast(self.g).split(self.sizes), strict=True):
            out.index_add_(0, ids_u, g_u)

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (V, d) += sum over units of factors (units,) times the unit's gradient."""
        add_embedding_(out, self.ids, self.g, factors, self.sizes)


def linear_norms(uses: Sequence[LinearUse]) -> tuple[tuple[Tensor, ...], str]:
    """Squared norms (units,) of each of these uses, which share an input, and how they are computed, in words."""
    a, gs, sizes = uses[0].a, [use.g for use in uses], uses[0].sizes
    limit = planner.longest_gram(a.shape[1], [g.shape[1] for g in gs], planner.speed_of(a.device, a.dtype))
    ways = ("Gram",) * (min(sizes, default=0) <= limit) + ("direct",) * (max(sizes, default=0) > limit)
    return linear_squared_norms(a, gs, sizes, limit).unbind(), f"ghost norm ({' and '.join(ways)})"


class GradientRecord:
    """All uses of one parameter in one backward pass: one gradient, so cross terms between its uses count."""

    def __init__(self, shape: torch.Size, n_units: int) -> None:
        self.shape, self.n_units = shape, n_units
        self.linear: list[LinearUse | HeadUse] = []  # a HeadUse is the only one
        self.embedding: list[EmbeddingUse] = []
        self.per_unit: Tensor | None = None  # (units, *shape)
        self.form = ""  # how `squared_norms` last computed them, in words

    def add(self, use: LinearUse | HeadUse | EmbeddingUse) -> None:
        """Keep one more use, as it is or as per-unit gradients, as the planner says."""
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
        """Add per-unit gradients (units, *shape) formed by the layer itself."""
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
        """(units,) squared L2 norms."""
        if self.per_unit is not None:
            self.form = "per-unit gradient"
            # `vector_norm` adds up one square after the other, of millions too, which loses up to a hundredth of the sum; `sum`
            # adds in pairs, and rows of a matrix are short.
            rows = torch.linalg.vector_norm(self.per_unit.flatten(1, -2), dim=-1) if len(self.shape) > 1 else self.per_unit
            return rows.reshape(self.n_units, -1).square().sum(1)
        if any(use.part is not None for use in self.linear):
            return self._squared_norms_of_parts()
        linear, embedding = _merge_linear(self.linear), _merge_embedding(self.embedding)
        if embedding is None:
            assert linear is not None
            norms, self.form = linear.squared_norms()
            return norms
        table = embedding_squared_norms(embedding.ids, embedding.g, embedding.sizes)
        self.form = "embedding rows"
        if linear is None:
            return table
        head, form = linear.squared_norms()
        self.form = f"{form} + {self.form}"
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
        if self.embedding or any(stop > start for (_, stop), (start, _) in pairwise(ends)):  # they share numbers
            like = upcast(self.linear[0].of_unit(0).g)
            self.add_per_unit(torch.zeros(self.n_units, *self.shape, dtype=like.dtype, device=like.device))
            return self.squared_norms()
        total: Tensor | int = 0
        for own in uses.values():
            merged = _merge_linear(own)
            assert merged is not None
            norms, self.form = merged.squared_norms()
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
        """(*shape): sum over units of factors (units,) times the unit's gradient."""
        if self.per_unit is None and not self.embedding and len(self.linear) == 1:
            (use,) = self.linear  # a product of its own is one pass over memory less than zeros and a sum
            if isinstance(use, LinearUse) and use.part is None:
                return linear_clipped_sum(use.a, use.g, factors, use.sizes).view(self.shape)
        out = torch.zeros(self.shape, dtype=factors.dtype, device=factors.device)
        self.add_clipped_sum_(out, factors)
        return out

    def add_clipped_sum_(self, out: Tensor, factors: Tensor) -> None:
        """out (*shape) += sum over units of factors (units,) times the unit's gradient."""
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


class Recorder:
    """Shared by an engine and its layers. Layers use `tracks`, `layout` and what records."""

    def __init__(self, groups: dict[nn.Parameter, int]) -> None:
        self.phase: Phase = "idle"
        self.units = Units.rows(0)
        self.layouts = Layouts()
        self.records: dict[nn.Parameter, GradientRecord] = {}
        self.forms: dict[nn.Parameter, str] = {}  # how the norm of each parameter was last computed
        # Of a compiled model, see `layers.compiled`. token: what taps give their gradients to, while it records. taps: how many
        # did since `start`. unplaced: parameters whose gradients they could not record. kept: the last input that was copied.
        self.token: Tensor | None = None
        self.taps = 0
        self.unplaced: set[nn.Parameter] = set()
        self.kept: Tensor | None = None
        self._groups = groups
        self._n_groups = max(groups.values(), default=-1) + 1
        self._waiting: dict[nn.Parameter, GradientRecord] = {}  # in phase "norms": complete, and the next may share their input
        self._norms: Tensor | None = None
        self._spent: set[nn.Parameter] = set()
        self._deferred: set[nn.Parameter] = set()
        self._read: set[nn.Parameter] = set()
        self._factors: Tensor | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        # Of parameters that FSDP2 split up: by module and name, because something else stands there while the module runs, ...
        self.sharded: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._gathered: dict[nn.Parameter, nn.Parameter] = {}  # ... the whole parameter, and whose it is
        self.left_over: set[nn.Parameter] = set()  # of these, what autograd took a gradient of by itself

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        # A copied model is not attached: its parameters are unknown here, and its layers behave as without the library.
        return self

    # What layers ask and tell.

    def tracks(self, parameter: nn.Parameter, place: tuple[nn.Module, str] | None = None) -> bool:
        """Whether the gradient of this parameter is to be recorded now. place: the module that hands it out, and its name."""
        original = None if place is None else self.sharded.get(place)
        if original is parameter:
            return False  # used outside its module's forward, where no rank has all of it
        if original is not None and parameter not in self._gathered:
            self._gathered[parameter] = original
            parameter.register_post_accumulate_grad_hook(self._note_left_over)
        return self.phase != "idle" and self.whose(parameter) in self._groups and parameter.requires_grad

    def whose(self, parameter: nn.Parameter) -> nn.Parameter:
        """The model's own parameter where this is what FSDP2 gathered of it, else itself."""
        return self._gathered.get(parameter, parameter)

    @property
    def reduces_precision(self) -> bool:
        """Whether FSDP2 gathers some parameters in less than float32."""
        return any(gathered.dtype.itemsize < 4 for gathered in self._gathered)

    def _note_left_over(self, gathered: Tensor) -> None:
        if self.phase != "idle" and gathered.grad is not None:  # autograd comes by without a gradient too
            self.left_over.add(self.whose(gathered))  # type: ignore[arg-type]
            gathered.grad = None  # else FSDP2 would keep it, or add it up over ranks

    def layout(self, module: nn.Module, x: Tensor, feature_dims: int = 1) -> Layout | None:
        """How the input x (*lead, *features) of a layer is laid out, or None when that is not certain.

        None makes the layer compute as without the library; the gradient that autograd then leaves tells the engine.
        """
        lead = tuple(x.shape[: x.dim() - feature_dims])
        if self.phase == "idle":
            return None
        if self.phase == "learn":
            self.layouts.meet(module, x, len(lead))
            for parameter in module.parameters(recurse=False):
                self.layouts.count(parameter)
            return None
        if not torch.is_grad_enabled():
            return None
        if self.units.is_single:
            return Layout(self.units, lead, ())
        dims = self.layouts.dims(module, lead, self.units)
        return Layout(self.units, lead, dims) if dims else None

    def linear(
        self, parameter: nn.Parameter, a: Tensor, g: Tensor, layout: Layout, part: tuple[int, int] | None = None
    ) -> None:
        """Record y = x W^T with gradient sum g_t a_t^T. a: (*lead, d), g: (*lead, p).

        part: W is these rows, start and stop, of the parameter's first dimension; None: all of it.
        """
        if part == (0, len(parameter)):
            part = None
        self.linear_rows(parameter, layout.arrange(a), layout.arrange(g), layout.sizes, part)

    def linear_rows(
        self, parameter: nn.Parameter, a: Tensor, g: Tensor, sizes: tuple[int, ...], part: tuple[int, int] | None
    ) -> None:
        """As `linear`, with a (rows, d) and g (rows, p) in unit order already, `sizes` rows for each unit."""
        self._add(parameter, LinearUse(a, g, sizes, part))

    def defers(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether a result made with these parameters is to be put off: not where one before was read and had to be formed.

        If it is, one call with them may leave several records, or none: nobody knows yet what becomes of the result.
        """
        if not self._read.isdisjoint(parameters) or not self._gathered.keys().isdisjoint(parameters):
            return False  # what FSDP2 gathered may be gone when the result is formed
        self._deferred.update(parameters)
        return True

    def read(self, parameters: Sequence[nn.Parameter]) -> None:
        """A result made with these parameters was put off in vain."""
        self._read.update(parameters)

    def head(self, parameter: nn.Parameter, use: HeadUse) -> None:
        """Record y = x W^T whose gradient is that of a cross entropy."""
        self._add(parameter, use)

    def embedding(
        self, parameter: nn.Parameter, ids: Tensor, g: Tensor, layout: Layout, padding_idx: int | None = None
    ) -> None:
        """Record y = E[ids]. ids: LongTensor (*lead,), g: (*lead, d); rows at `padding_idx` get no gradient."""
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
        arranged = layout.arrange(ids.unsqueeze(-1)).squeeze(-1)
        self._add(parameter, EmbeddingUse(arranged, layout.arrange(g), layout.sizes))

    def per_unit(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Record per-unit gradients (units, *parameter.shape), float32 or float64, formed by the layer itself."""
        self._add(parameter, gradients)

    # What the engine does.

    @property
    def all_taps_recorded(self) -> bool:
        """Whether backward passed as many taps as were recorded."""
        if self.token is None or self.token.grad is None:
            return self.taps == 0
        return bool((self.token.grad == self.taps).all())

    def start(
        self, phase: Phase, units: Units, factors: Tensor | None = None, sums: dict[nn.Parameter, Tensor] | None = None
    ) -> None:
        """Enter a phase for one physical batch. `factors` (units, groups) belong to phase "sum", which adds to `sums`."""
        self.phase, self.units, self.records = phase, units, {}
        self._norms, self._spent, self._waiting, self._deferred = None, set(), {}, set()
        self._factors, self._sums = factors, {} if sums is None else sums
        self.left_over = set()
        self.taps, self.unplaced, self.kept = 0, set(), None
        if self.token is not None:
            self.token.grad = None

    def stop(self) -> None:
        """Back to idle; every record is dropped."""
        self.start("idle", Units.rows(0))

    @property
    def reached(self) -> set[nn.Parameter]:
        """Parameters that the backward pass since `start` recorded."""
        return self._spent | set(self.records)

    @torch.no_grad()
    def squared_norms(self, like: Tensor) -> Tensor:
        """(units, groups) squared norms of everything recorded since `start`. like: a tensor giving dtype and device."""
        with full_precision(like.device):
            self._add_norms({**self._waiting, **self.records})
            self._waiting = {}
        return self._norms if self._norms is not None else like.new_zeros(self.units.n, self._n_groups)

    def _add_norms(self, records: dict[nn.Parameter, GradientRecord]) -> None:
        """Add the norms of these records; layers that share an input are computed together."""
        sharing: dict[object, list[tuple[nn.Parameter, GradientRecord, LinearUse]]] = {}
        for parameter, record in records.items():
            use = record.only_linear
            if use is None:
                self._add_squares(parameter, record, record.squared_norms())
            else:
                sharing.setdefault(use.input_key, []).append((parameter, record, use))
        for group in sharing.values():
            squares, form = linear_norms([use for _, _, use in group])
            for (parameter, record, _), squared in zip(group, squares, strict=True):
                record.form = form
                self._add_squares(parameter, record, squared)

    def _add_squares(self, parameter: nn.Parameter, record: GradientRecord, squared: Tensor) -> None:
        self.forms[parameter] = record.form
        if self._norms is None:
            self._norms = squared.new_zeros(self.units.n, self._n_groups)
        self._norms[:, self._groups[parameter]] += squared

    @torch.no_grad()
    def _add(self, parameter: nn.Parameter, use: LinearUse | HeadUse | EmbeddingUse | Tensor) -> None:
        with full_precision(parameter.device):
            self._add_use(parameter, use)

    def _add_use(self, parameter: nn.Parameter, use: LinearUse | HeadUse | EmbeddingUse | Tensor) -> None:
        if self.phase not in ("record", "norms", "sum"):
            raise PrivacyError(
                "backward through a model with an attached ClippingEngine, outside engine.backward or engine.batch: its "
                "gradients would not be clipped; use engine.backward(loss_fn, batch), or engine.detach() first"
            )
        calls = self.layouts.calls.get(parameter)
        deferred, parameter = parameter in self._deferred, self.whose(parameter)
        if self.phase == "sum":
            self._add_to_sum(parameter, use)
            return
        if parameter in self._spent:
            raise TwoPassError("a parameter was used more often than when its layer was first observed; use strategy='auto'")
        record = self.records.setdefault(parameter, GradientRecord(parameter.shape, self.units.n))
        if isinstance(use, Tensor):
            record.add_per_unit(use)
        else:
            record.add(use)
        whole = not deferred and (not isinstance(use, LinearUse) or use.part is None)
        if self.phase == "norms" and whole and calls == 1:  # nothing to come: the records may go
            self._spent.add(parameter)
            self._add_when_alone(parameter, self.records.pop(parameter))

    def _add_to_sum(self, parameter: nn.Parameter, use: LinearUse | HeadUse | EmbeddingUse | Tensor) -> None:
        assert self._factors is not None
        factors = self._factors[:, self._groups[parameter]]
        if parameter not in self._sums:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self._sums[parameter] = torch.zeros(parameter.shape, dtype=wide, device=device_of(parameter))
        if isinstance(use, Tensor):
            add_per_unit_(self._sums[parameter], use, factors)
        else:
            use.add_clipped_sum_(self._sums[parameter], factors)

    def _add_when_alone(self, parameter: nn.Parameter, record: GradientRecord) -> None:
        """Add the norms of complete records as soon as no more of their input are coming."""
        use = record.only_linear
        if use is None:
            self._add_norms({parameter: record})
            return
        waiting = next(iter(self._waiting.values()), None)
        if waiting is not None and waiting.only_linear is not None and waiting.only_linear.input_key != use.input_key:
            self._add_norms(self._waiting)
            self._waiting = {}
        self._waiting[parameter] = record
