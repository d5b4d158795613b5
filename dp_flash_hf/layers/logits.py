"""Deferred logits: they are not formed before something reads them.

The output layer of a large vocabulary makes more values than the rest of a model, and nearly always one cross entropy is all
that becomes of them. Where it would be large, the product of hidden states and a trained matrix is therefore deferred: the
model gets a `Logits` tensor without values. Casts, scales, a soft-cap and other ways to look at the same rows only make a note;
a cross entropy is computed in blocks (`kernels.linear_cross_entropy`). Whatever else is done to it forms the values, as if
they had been there from the start.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.kernels.linear_cross_entropy import Gradients, LogitGradients, gradients, linear_cross_entropy
from dp_flash_hf.kernels.types import Head
from dp_flash_hf.layers.chain import once, record
from dp_flash_hf.layers.gradient_records import HeadUse, full_precision
from dp_flash_hf.layers.tracking import Tracked, autocast_dtype, replaced
from dp_flash_hf.layers.unit_layout import Layout

Step = Callable[[Tensor], Tensor]
Values = tuple[Tensor, Tensor | None]  # of weight and bias
Origins = tuple[Tracked | None, Tracked | None]
OfHead = tuple[Tracked, Tracked | None]


def deferred(x: Tensor, values: Values, origins: Origins, layout: Layout | None, compute: Step) -> Tensor:
    """x W^T + b, deferred where that saves much: from `Recorder.max_logit_bytes` on.

    Not where a result made with these parameters was deferred and read before: from then on it is formed at once.

    Args:
        x: ``(*lead, d)``, any floating dtype.
        values: W (V, d) and b (V,), or None.
        origins: Where these come from, each None if it is not trained.
        layout: Of the leading dimensions; None while layouts are learnt, when nothing is recorded.
        compute: x -> the product ``(*lead, V)``, as the model would have got it.

    Returns:
        ``(*lead, V)``: a `Logits`, or what `compute` returns.
    """
    (weight, bias), (w, b) = values, origins
    autocast = autocast_dtype(x.device)
    size = math.prod(x.shape[:-1]) * len(weight) * torch.float32.itemsize
    alike = x.shape[-1] == weight.shape[1] and (
        autocast is not None or all(t.dtype == x.dtype for t in (weight, bias) if t is not None)
    )
    if not alike or w is None or w.how is not None or size < w.recorder.max_logit_bytes:
        return compute(x)
    if not w.recorder.defers(_parameters(origins)):
        return compute(x)
    product = Product(x, values, (w, b), layout, autocast, compute)
    outline = torch.empty(*x.shape[:-1], len(weight), dtype=autocast or x.dtype, device="meta")
    places = torch.arange(math.prod(x.shape[:-1]), device=x.device).view(x.shape[:-1])
    return Logits.of(product, None, product.compute, Note(outline, places))


def _parameters(origins: Origins) -> list[nn.Parameter]:
    return [parameter for origin in origins if origin is not None for parameter in origin.parameters]


class Product:
    """x W^T + b that was deferred, and what looks at it. Arguments as of `deferred`."""

    def __init__(
        self, x: Tensor, values: Values, origins: OfHead, layout: Layout | None, autocast: torch.dtype | None, compute: Step
    ) -> None:
        self.x, (self.weight, self.bias) = x, values
        self.origins, self.layout, self.autocast = origins, layout, autocast
        self._compute = compute
        self._before = self._state()
        self._members: list[weakref.ref[Logits]] = []
        self._formed: list[tuple[Tensor, int]] = []  # and how often it had been changed in place then
        self.in_blocks = False  # whether a cross entropy was computed without the values

    def compute(self, x: Tensor) -> Tensor:
        """The product of x, as autograd knows it if it is asked to. Raises PrivacyError when its values are no more."""
        self._require_unchanged()
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            return self._compute(x)

    def compute_in_blocks(self) -> None:
        """A cross entropy will be computed without the values. Raises PrivacyError when they are no more."""
        self._require_unchanged()
        self.in_blocks = True

    def _require_unchanged(self) -> None:
        if self._state() != self._before:
            raise PrivacyError(
                "logits were read after the weights they come from had changed, and had not been formed before: read them (any "
                "operation does) before the optimizer's step"
            )

    def join(self, member: Logits) -> None:
        """One more tensor looks at this product."""
        self._members = [*(ref for ref in self._members if ref() is not None), weakref.ref(member)]

    def form_all(self) -> None:
        """Form everything that looks at this product, so that it shares memory, and changes, as torch would have it."""
        if not self.in_blocks and torch.is_grad_enabled():
            self.origins[0].recorder.read(_parameters(self.origins))
        with torch.inference_mode(False), torch.enable_grad():  # whoever reads them first, others may need their gradients
            formed = [member.values_now() for member in [ref() for ref in self._members] if member is not None]
        self._formed = [(t, t._version) for t in formed]

    @property
    def changed(self) -> bool:
        """Whether something was changed in place since it was formed."""
        return any(t._version != version for t, version in self._formed)

    def _state(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in (self.x, self.weight, self.bias) if t is not None]


class Note(NamedTuple):
    """The values f(x W^T + b), some rows of them, in some shape.

    outline: a tensor without values (meta) of this shape, layout and dtype. places: int64, the row of the product that stands
    where; in the same shape without the last dimension. scale, softcap: f, as in `Head`.
    """

    outline: Tensor
    places: Tensor
    scale: float = 1.0
    softcap: float | None = None


class Logits(Tensor):
    """What a `Note` says, to be formed once something reads it.

    parent, step: what this was made of, and how; no parent for the product itself. again: x -> the values for hidden states x.
    formed: the values, once they are there.
    """

    product: Product
    parent: Logits | None
    step: Step
    note: Note
    again: Step
    formed: Tensor | None

    @staticmethod
    def of(product: Product, parent: Logits | None, step: Step, note: Note) -> Logits:
        """Without values; the arguments are attributes."""

        def again(x: Tensor) -> Tensor:
            return step(x if parent is None else parent.again(x))

        def make() -> Logits:
            shape, strides, dtype = note.outline.shape, note.outline.stride(), note.outline.dtype
            out = Tensor._make_wrapper_subclass(Logits, shape, strides=strides, dtype=dtype, device=product.x.device)
            out.product, out.parent, out.step, out.note, out.again, out.formed = product, parent, step, note, again, None
            return out

        out: Logits = _Unformed.apply(product.x, product.weight, make, product, again)  # type: ignore[no-untyped-call]
        product.join(out)
        return out

    def later(self, step: Step) -> Logits:
        """The same, but for `step` once it is formed; the cross entropy does without."""
        return Logits.of(self.product, self, step, self.note)

    def values_now(self) -> Tensor:
        """The values, by ordinary operations, and only once. For `Product.form_all`."""
        if self.formed is None:
            self.formed = self.step(self.product.x if self.parent is None else self.parent.values_now())
        return self.formed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Logits) and first.formed is None:
            # Without autograd, a copy would be cut off from where it came from.
            rule = _RULES.get(func) if torch.is_grad_enabled() else None
            with torch._C.DisableTorchFunctionSubclass():
                if func in _DESCRIBE:
                    return func(*args, **kwargs)
                out = None if rule is None else rule(first, func, *args[1:], **kwargs)
            if out is not None:
                return out

        if isinstance(first, Logits) and first.product.in_blocks and getattr(func, "__name__", "") in _HOOKS:
            raise PrivacyError(
                f"{func.__name__} of logits whose cross entropy is already computed, without them: no gradient would be "
                "recorded; call it before the loss, or use strategy='microbatch'"
            )

        def values(value: Any) -> Any:
            if not isinstance(value, Logits):
                return value
            if value.formed is None:
                value.product.form_all()
            return value.formed

        args, kwargs = replaced(values, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Only code below torch functions arrives here: another tensor class, the engine of autograd.
        if func._schema.is_mutable:
            raise PrivacyError(f"{func} would change logits that are not formed; use strategy='microbatch'")

        def values(value: Any) -> Any:
            if not isinstance(value, Logits):
                return value
            return value.again(value.product.x.detach()) if value.formed is None else value.formed.detach()

        with torch.no_grad():
            args, kwargs = replaced(values, args, kwargs or {})
            return func(*args, **kwargs)


class _Unformed(torch.autograd.Function):
    """Ties logits without values to the hidden states: what autograd brings back to them is not lost, whoever used them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, make: Callable[[], Logits], product: Product, again: Step) -> Logits:
        ctx.save_for_backward(x, weight)
        ctx.product, ctx.again = product, again
        return make()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        once(ctx)
        if ctx.product.changed:  # for those who hold it, and no one knows who that was
            raise PrivacyError(
                "logits were changed in place, and then used by other than torch functions; use strategy='microbatch'"
            )
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(ctx.needs_input_grad[0])
            of = [t for t in (leaf, weight) if t.requires_grad]
            found = iter(torch.autograd.grad(ctx.again(leaf), of, g, allow_unused=True))
        return (*(next(found) if t.requires_grad else None for t in (leaf, weight)), None, None, None)


# --- what only makes a note ----------------------------------------------------------------------------------------------


def _view(logits: Logits, func: Any, *args: Any, **kwargs: Any) -> Logits | None:
    """Other shapes of the leading dimensions."""
    if any(isinstance(value, (Tensor, torch.dtype)) for value in (*args, *kwargs.values())):
        return None
    outline = func(logits.note.outline, *args, **kwargs)
    if outline.dim() == 0 or outline.shape[-1] != logits.note.outline.shape[-1]:
        return None
    places = logits.note.places.reshape(outline.shape[:-1])
    note = logits.note._replace(outline=outline, places=places)
    return Logits.of(logits.product, logits, lambda t: func(t, *args, **kwargs), note)


def _index(logits: Logits, func: Any, index: Any) -> Logits | None:
    """Some of the rows."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) is int or isinstance(part, slice) for part in parts):
        return None
    outline = logits.note.outline[index]
    # Every element of a row is at the same place, so that a step of 0 shows that the last dimension is what it was.
    places = logits.note.places.unsqueeze(-1).expand(logits.note.outline.shape)[index]
    if outline.dim() == 0 or outline.shape[-1] != logits.note.outline.shape[-1] or places.stride(-1) != 0:
        return None
    note = logits.note._replace(outline=outline, places=places[..., 0])
    return Logits.of(logits.product, logits, lambda t: t[index], note)


def _cast(logits: Logits, func: Any, *args: Any, **kwargs: Any) -> Logits | None:
    """A wider dtype, or the device it is on."""
    values = [*args, *(value for name, value in kwargs.items() if name != "non_blocking" and (name != "copy" or value))]
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    devices = [value for value in values if isinstance(value, torch.device) and value == logits.product.x.device]
    if len(dtypes) + len(devices) < len(values):
        return None
    dtype = {Tensor.float: torch.float32, Tensor.double: torch.float64}.get(
        func, dtypes[0] if dtypes else logits.note.outline.dtype
    )
    if not dtype.is_floating_point or torch.promote_types(dtype, logits.note.outline.dtype) != dtype:
        return None
    return Logits.of(logits.product, logits, lambda t: t.to(dtype), logits.note._replace(outline=logits.note.outline.to(dtype)))


def _scaled(logits: Logits, func: Any, factor: Any, **kwargs: Any) -> Logits | None:
    """One factor for all."""
    if kwargs or type(factor) not in (int, float) or factor == 0:
        return None
    scale, softcap = logits.note.scale, logits.note.softcap
    if func in _DIVISIONS:
        scale, softcap = scale / factor, None if softcap is None else softcap / factor
    else:
        scale, softcap = scale * factor, None if softcap is None else softcap * factor
    if not all(math.isfinite(value) and value != 0 for value in (scale, softcap or 1.0)):
        return None
    return Logits.of(logits.product, logits, lambda t: func(t, factor), logits.note._replace(scale=scale, softcap=softcap))


def _tanh(logits: Logits, func: Any, **kwargs: Any) -> Logits | None:
    """A soft-cap, if a scale comes before and after."""
    if kwargs or logits.note.softcap is not None:
        return None
    return Logits.of(logits.product, logits, func, logits.note._replace(softcap=1.0))


_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_sparse", "is_meta", "is_quantized")
_DESCRIBE: set[Any] = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES}
_DESCRIBE |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous, Tensor.__len__}
_DESCRIBE |= {Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel}
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_DIVISIONS = (Tensor.__truediv__, Tensor.div, Tensor.true_divide, torch.div, torch.true_divide)

_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten, Tensor.contiguous), _view),
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.float, Tensor.double, Tensor.to), _cast),
    **dict.fromkeys((Tensor.__mul__, Tensor.__rmul__, Tensor.mul, torch.mul), _scaled),
    **dict.fromkeys(_DIVISIONS, _scaled),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
}


# --- what is computed in blocks ------------------------------------------------------------------------------------------


class _Loss(NamedTuple):
    """What every row's loss is made of besides the hidden states, and where it is recorded."""

    origins: OfHead
    layout: Layout | None
    autocast: torch.dtype | None
    labels: Tensor  # (rows,)
    ignore_index: int
    scale: float
    softcap: float | None


def _cross_entropy(
    logits: Logits,
    func: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **others: Any,
) -> Tensor | None:
    if others or weight is not None or size_average is not None or reduce is not None or label_smoothing != 0.0:
        return None
    if type(target) is not Tensor or target.dtype != torch.int64 or target.device != logits.product.x.device:
        return None
    if logits.dim() != 2 or target.shape != logits.shape[:1] or reduction not in ("none", "sum", "mean"):
        return None
    product = logits.product
    product.compute_in_blocks()
    labels = target.new_full((product.x.shape[:-1].numel(),), ignore_index).index_copy_(0, logits.note.places, target)
    loss = _Loss(
        product.origins, product.layout, product.autocast, labels, ignore_index, logits.note.scale, logits.note.softcap
    )
    every: Tensor = RecordedCrossEntropy.apply(product.x, product.weight, product.bias, loss)  # type: ignore[no-untyped-call]
    out = every.index_select(0, logits.note.places)
    if reduction != "none":
        out = out.sum()
    if reduction == "mean":
        out = out / (target != ignore_index).sum()
    # Autocast computes cross entropies in float32.
    return out.to(logits.dtype if autocast_dtype(out.device) is None else torch.promote_types(logits.dtype, torch.float32))


_RULES[F.cross_entropy] = _cross_entropy


class RecordedCrossEntropy(torch.autograd.Function):
    """Every row's loss, whose backward gives the gradient of x and records those of W (V, d) and b (V,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, loss: _Loss) -> Tensor:
        """x: ``(*lead, d)``. Returns (rows,), 0 where the label is ignored."""
        hidden = x.reshape(-1, x.shape[-1]).to(loss.autocast or x.dtype)
        with full_precision(x.device):
            losses, lse = linear_cross_entropy(
                hidden, Head(weight, bias, loss.scale, loss.softcap), loss.labels, loss.ignore_index
            )
        ctx.save_for_backward(x, weight, bias, lse)
        ctx.loss = loss
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """upstream: (rows,)."""
        once(ctx)
        x, weight, bias, lse = ctx.saved_tensors
        loss: _Loss = ctx.loss
        (w, b), layout = loss.origins, loss.layout
        weights = upstream.to(lse.dtype).masked_fill(loss.labels == loss.ignore_index, 0.0)
        hidden = x.reshape(-1, x.shape[-1]).to(loss.autocast or x.dtype)
        hidden = hidden.masked_fill((weights == 0).unsqueeze(1), 0.0)  # padding may hold NaN, and 0 * NaN is NaN
        every = LogitGradients(hidden, Head(weight, bias, loss.scale, loss.softcap), loss.labels, lse, weights)
        with full_precision(x.device):
            back = _recorded(every, w, b, layout, ctx.needs_input_grad[0])
        return (None if back is None else back.view(x.shape).to(x.dtype), None, None, None)


def _recorded(every: LogitGradients, w: Tracked, b: Tracked | None, layout: Layout | None, back: bool) -> Tensor | None:
    """Record the gradients of W and b, and return those of the hidden states (rows, d), if `back`."""
    recorder, rows = w.recorder, len(every.hidden)
    if layout is None:  # learning
        return gradients(every, (rows,), hidden=back, norms=False).hidden
    g, in_order = every, layout.arrange(torch.arange(rows).view(*layout.lead, 1)).squeeze(1)
    order = None if torch.equal(in_order, torch.arange(rows)) else in_order.to(every.hidden.device)
    if order is not None:
        g = _rows(every, order)
    # Stored, they need not be formed a third time. They may take what the gradient itself will take, in float32.
    keep = recorder.phase == "record" and rows * every.hidden.element_size() <= 4 * every.hidden.shape[1]
    found = gradients(g, layout.sizes, hidden=back, norms=recorder.phase != "sum", bias=b is not None, keep=keep)
    recorder.head(w.parameters[0], HeadUse(replace(g, kept=found.kept), layout.sizes, found.squared_norms))
    if b is not None and found.bias is not None:
        record(b, found.bias)
    return found.hidden if order is None or found.hidden is None else _put_back(every, order, found.hidden)


def _rows(g: LogitGradients, rows: Tensor) -> LogitGradients:
    return LogitGradients(g.hidden[rows], g.head, g.labels[rows], g.lse[rows], g.weights[rows])


def _put_back(every: LogitGradients, order: Tensor, back: Tensor) -> Tensor:
    """Gradients of hidden states in unit order -> where they stand, with those of rows that have no unit."""
    out = torch.empty(len(every.hidden), back.shape[1], dtype=back.dtype, device=back.device)
    out[order] = back
    left = torch.ones(len(out), dtype=torch.bool, device=out.device)
    left[order] = False
    rest = left.nonzero().squeeze(1)
    if len(rest):
        found: Gradients = gradients(_rows(every, rest), (len(rest),), hidden=True, norms=False)
        assert found.hidden is not None
        out[rest] = found.hidden
    return out
