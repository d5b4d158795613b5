"""What an engine and its layers share in a batch: layers ask how their input is laid out and hand over what backward saw.

The engine reads per-unit norms from it, and has it compute the clipped sums once the clip factors are known (book-keeping, Bu
et al. 2023, arXiv 2210.00038), or at once in a second backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dp_flash_hf.distributed import device_of
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.kernels.clipped_sum import add_per_unit_
from dp_flash_hf.layers.gradient_records import EmbeddingUse, GradientRecord, HeadUse, LinearUse, full_precision, linear_norms
from dp_flash_hf.layers.layout_inference import Layouts
from dp_flash_hf.layers.unit_layout import Layout
from dp_flash_hf.units import Units

# Logits of fewer bytes than this, in float32, are formed at once: deferring them would cost time and save little.
MAX_LOGIT_BYTES = 2**28

Phase = Literal["idle", "learn", "record", "norms", "sum"]


ATTRIBUTE = "_dp_recorder"  # of an attached module: its recorder


def recorder_of(module: nn.Module) -> Recorder:
    """The recorder that an attached module reports to."""
    recorder: Recorder = vars(module)[ATTRIBUTE]
    return recorder


class _Selected(NamedTuple):
    """What `Recorder.selected` was asked for and returned. `source` is kept, lest other values come to the same memory."""

    source: Tensor
    version: int
    source_layout: Layout
    rows: Tensor
    x: Tensor
    layout: Layout


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


class TwoPassError(PrivacyError):
    """This model cannot be computed in two passes, before anything was added."""


class Recorder:
    """What an engine and the layers attached to it share.

    Layers ask `tracks` and `layout`, and record in backward by `linear`, `embedding`, `head` and `per_unit`; rules do so
    through `rules.layout_of`, `record_product`, `record_bias` and `record`. The engine calls `start`, reads `squared_norms`,
    `reached` and `left_over`, and takes `records`.

    One record of a parameter holds all its uses in a batch, since a norm is that of their sum. What the phases mean:

    - idle: layers behave as without the library.
    - learn: layouts are being learnt, and nothing is recorded.
    - record: what backward saw is kept until clip factors are known.
    - norms: only norms are kept; a record goes as soon as its parameter's last use has come by.
    - sum: clip factors are known, and what backward sees is added to the sums at once.

    Attributes:
        phase: One of the above.
        units: The units of the present batch.
        layouts: What has been learnt about layers' inputs.
        records: By parameter, what was recorded in phase "record".
        norm_methods: By parameter, how its gradient's norm was last computed, in words for people.
        unplaced: Parameters whose gradients layers of a compiled model could not record in this batch.
        left_over: Of parameters that FSDP2 sharded, those that autograd took a gradient of by itself.
        max_logit_bytes: See below.

    Args:
        groups: The clipping group, 0, 1, ..., of every parameter that is trained.
        max_logit_bytes: Logits of at least so many bytes, in float32, are deferred (`layers.logits`).
    """

    def __init__(self, groups: dict[nn.Parameter, int], max_logit_bytes: int = MAX_LOGIT_BYTES) -> None:
        self.phase: Phase = "idle"
        self.units = Units.rows(0)
        self.layouts = Layouts()
        self.records: dict[nn.Parameter, GradientRecord] = {}
        self.norm_methods: dict[nn.Parameter, str] = {}
        self.max_logit_bytes = max_logit_bytes
        # Of a compiled model, see `layers.compiled`. token: what taps give their gradients to, while it records. taps: how many
        # did since `start`. unplaced: parameters whose gradients they could not record. kept: the last input that was copied.
        self._token: Tensor | None = None
        self._taps = 0
        self.unplaced: set[nn.Parameter] = set()
        self._kept: Tensor | None = None
        self._selected: _Selected | None = None  # what `selected` returned last, and for what
        self._groups = groups
        self._n_groups = max(groups.values(), default=-1) + 1
        self._waiting: dict[nn.Parameter, GradientRecord] = {}  # in phase "norms": complete, and the next may share their input
        self._norms: Tensor | None = None
        self._spent: set[nn.Parameter] = set()
        self._deferred: set[nn.Parameter] = set()
        self._read: set[nn.Parameter] = set()
        self._factors: Tensor | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        # Of parameters that FSDP2 sharded: by module and name, because something else stands there while the module runs, ...
        self._sharded: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._gathered: dict[nn.Parameter, nn.Parameter] = {}  # ... the whole parameter, and whose it is
        self.left_over: set[nn.Parameter] = set()  # of these, what autograd took a gradient of by itself

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        # A copied model is not attached: its parameters are unknown here, and its layers behave as without the library.
        return self

    # What layers ask and tell.

    def tracks(self, parameter: nn.Parameter, place: tuple[nn.Module, str] | None = None) -> bool:
        """Whether the gradient of this parameter is to be recorded now. place: the module that hands it out, and its name."""
        original = None if place is None else self._sharded.get(place)
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
        if self.phase != "idle" and gathered.grad is not None:  # autograd calls this without a gradient too
            self.left_over.add(self.whose(gathered))  # type: ignore[arg-type]
            gathered.grad = None  # else FSDP2 would keep it, or add it up over ranks

    def layout(self, module: nn.Module, x: Tensor, feature_dims: int = 1) -> Layout | None:
        """How the input x ``(*lead, *features)`` of a layer is laid out, or None when that is not certain.

        None makes the layer compute as without the library; the gradient that autograd then leaves tells the engine.
        """
        lead = tuple(x.shape[: x.dim() - feature_dims])
        if self.phase == "idle":
            return None
        if self.phase == "learn":
            self.layouts.visit(module, x, len(lead))
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
        """Record y = a W^T, whose gradient is the sum of g_t a_t^T over a unit's rows.

        Args:
            parameter: W, or what W is a part of.
            a: ``(*lead, d)``, any floating dtype.
            g: ``(*lead, p)``, the gradient of y, any floating dtype.
            layout: Of the leading dimensions.
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

    def selected(self, x: Tensor, layout: Layout, rows: Tensor) -> tuple[Tensor, Layout]:
        """Some rows of a layer's input ``(*lead, d)``, and how they are laid out.

        Layers with the very same input, as q, k and v, get the same copy, so that their norms are computed in one go.

        Args:
            x: The input. It has to be the same until the batch is over, but for changes that autograd counts.
            layout: Of its leading dimensions.
            rows: int64, as of `Layout.of_rows`.
        """
        last = self._selected
        alike = last is not None and last.source_layout.equals(layout) and torch.equal(last.rows, rows)
        if last is None or not alike:
            last = _Selected(x, x._version, layout, rows, _rows_of(x, rows), layout.of_rows(rows))
        elif not x.is_set_to(last.source) or x._version != last.version:
            last = last._replace(source=x, version=x._version, x=_rows_of(x, rows))
        self._selected = last
        return last.x, last.layout

    def defers(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether a result made with these parameters is to be deferred: not where one before was read and had to be formed.

        If it is, one call with them may leave several records, or none: it is not known yet what becomes of the result.
        """
        if not self._read.isdisjoint(parameters) or not self._gathered.keys().isdisjoint(parameters):
            return False  # what FSDP2 gathered may be gone when the result is formed
        self._deferred.update(parameters)
        return True

    def read(self, parameters: Sequence[nn.Parameter]) -> None:
        """A result made with these parameters was deferred in vain."""
        self._read.update(parameters)

    def head(self, parameter: nn.Parameter, use: HeadUse) -> None:
        """Record y = x W^T whose gradient is that of a cross entropy."""
        self._add(parameter, use)

    def embedding(
        self, parameter: nn.Parameter, ids: Tensor, g: Tensor, layout: Layout, padding_idx: int | None = None
    ) -> None:
        """Record y = E[ids]. ids: int64 ``(*lead,)``, g: ``(*lead, d)``; rows at `padding_idx` get no gradient."""
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
        arranged = layout.arrange(ids.unsqueeze(-1)).squeeze(-1)
        self._add(parameter, EmbeddingUse(arranged, layout.arrange(g), layout.sizes))

    def per_unit(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Record per-unit gradients ``(units, *parameter.shape)``, float32 or float64, formed by the layer itself."""
        self._add(parameter, gradients)

    # What layers of a compiled model tell.

    def count_tap(self) -> None:
        """A tap is about to record."""
        self._taps += 1

    def add_unplaced(self, parameters: Iterable[nn.Parameter]) -> None:
        """These gradients could not be recorded, and autograd leaves none: how the input is laid out is not certain."""
        self.unplaced.update(parameters)

    def kept_input(self, x: Tensor) -> Tensor:
        """A copy of an input where it is kept: compiled code writes other values to the same memory afterwards.

        Layers with the very same input, as q, k and v, share one.
        """
        if self.phase == "sum":
            return x
        last = self._kept
        if last is None or last.shape != x.shape or last.dtype != x.dtype or not torch.equal(last, x):
            self._kept = last = x.clone(memory_format=torch.contiguous_format)
        return last

    @contextmanager
    def tapped(self, token: Tensor) -> Iterator[None]:
        """Within the context taps give their gradients to this token, see `all_taps_recorded`."""
        self._token = token
        try:
            yield
        finally:
            self._token = None

    # What the engine does.

    def add_sharded(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """FSDP2 sharded this parameter, and while the module runs something else, the whole of it, stands at this name."""
        self._sharded[module, name] = parameter

    @property
    def all_taps_recorded(self) -> bool:
        """Whether backward passed as many taps as were recorded."""
        if self._token is None or self._token.grad is None:
            return self._taps == 0
        return bool((self._token.grad == self._taps).all())

    def start(
        self, phase: Phase, units: Units, factors: Tensor | None = None, sums: dict[nn.Parameter, Tensor] | None = None
    ) -> None:
        """Enter a phase for one physical batch. `factors` (units, groups) belong to phase "sum", which adds to `sums`."""
        self.phase, self.units, self.records = phase, units, {}
        self._norms, self._spent, self._waiting, self._deferred = None, set(), {}, set()
        self._factors, self._sums = factors, {} if sums is None else sums
        self.left_over = set()
        self._taps, self.unplaced, self._kept, self._selected = 0, set(), None, None
        if self._token is not None:
            self._token.grad = None

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
        """Add the norms of these records; those of layers that share an input in one go."""
        sharing: dict[object, list[tuple[nn.Parameter, LinearUse]]] = {}
        for parameter, record in records.items():
            use = record.only_linear
            if use is None:
                squared = record.squared_norms()
                self._add_squares(parameter, squared, record.norm_method)
            else:
                sharing.setdefault(use.input_key, []).append((parameter, use))
        for group in sharing.values():
            squares, method = linear_norms([use for _, use in group])
            for (parameter, _), squared in zip(group, squares, strict=True):
                self._add_squares(parameter, squared, method)

    def _add_squares(self, parameter: nn.Parameter, squared: Tensor, method: str) -> None:
        self.norm_methods[parameter] = method
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
