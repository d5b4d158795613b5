"""Layers inside a model that `torch.compile` traced, where no Python code follows a tensor.

While a compiled model records, the layers of the common families compute with their parameters as constants, and tap their
output: an operation of no effect, whose backward hands (input, output gradient) to `record`, an operator the compiler cannot
look into. A tap's gradient of the token is 1 at each of its elements, so none may be left out, and if the compiler merges
two of them, or replays one without Python, the gradients of the token say more than were recorded.

Autograd leaves no gradient on a parameter that was tapped. Whatever else the model does with it leaves one, as everywhere.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.layers import rules
from dp_flash_hf.layers.class_swap import ClassSwap
from dp_flash_hf.layers.layout_inference import Layouts
from dp_flash_hf.layers.operations import record_bias, record_product
from dp_flash_hf.layers.recorder import Recorder
from dp_flash_hf.layers.tracking import Call, Tracked, derived
from dp_flash_hf.layers.unit_layout import Layout

_PRODUCTS = {"mul", "__mul__", "__rmul__"}
_SWAP = ClassSwap()
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to a model, its forward, or a part of it."""
    return any(
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or is_compiled_function(module.forward)
        for module in model.modules()
    )


def is_compiled_function(function: Callable[..., Any]) -> bool:
    """Whether a function is what `torch.compile` made of another."""
    return hasattr(function, "_torchdynamo_orig_callable")


# --- what the compiler sees of a tap --------------------------------------------------------------------------------------


class _Taps:
    """Which layers have taps, and what these give their gradients to while a model records.

    There is one for the process. An operator that the compiler cannot look into is handed tensors only, so it finds a layer by
    a number; and where a layer held the token, a tensor, traced code would fix its shape.
    """

    token: Tensor  # (items,), while a model records

    def __init__(self) -> None:
        self._layers: weakref.WeakValueDictionary[int, _TappedLayer] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def add(self, layer: _TappedLayer) -> Tensor:
        """Returns the layer's number. It is found by this number as long as something else keeps it alive."""
        number = next(self._numbers)
        self._layers[number] = layer
        return torch.tensor(number)

    def find(self, number: Tensor) -> _TappedLayer | None:
        return self._layers.get(int(number))

    @contextmanager
    def giving_to(self, token: Tensor) -> Iterator[None]:
        """Within the context taps give their gradients to this token."""
        self.token = token
        try:
            yield
        finally:
            del self.token


_TAPS = _Taps()


class _TappedLayer:
    """A layer with taps, and the number by which compiled code knows it: a tensor, so that layers can share code."""

    def __init__(self, module: nn.Module, variant: type[CompiledVariant], recorder: Recorder) -> None:
        self.module, self.variant, self.recorder = module, variant, recorder
        self.number = _TAPS.add(self)


@torch.library.custom_op("dp_flash_hf::record", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def record(x: Tensor, g: Tensor, token: Tensor, number: Tensor) -> Tensor:
    """Record what backward saw at a tap. x: what the layer needs of its input. g: the output's gradient. Returns ones."""
    layer = _TAPS.find(number)
    if layer is None:
        raise PrivacyError(
            "backward through a compiled model whose ClippingEngine is gone: its gradients would not be clipped; use the "
            "new engine's backward(loss_fn, batch)"
        )
    recorder = layer.recorder
    if recorder.phase not in ("record", "norms", "sum"):
        raise PrivacyError(
            "backward through a compiled model with an attached ClippingEngine, outside engine.backward: its gradients would "
            "not be clipped; use engine.backward(loss_fn, batch), or engine.detach() first"
        )
    recorder.count_tap()
    layer.variant.record(layer.module, recorder, x, g)
    return torch.ones_like(token)


@record.register_fake
def _(x: Tensor, g: Tensor, token: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(token)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, token: Tensor, number: Tensor) -> Tensor:
        ctx.save_for_backward(x, token, number)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, token, number = ctx.saved_tensors
        return g, None, torch.ops.dp_flash_hf.record(x, g, token, number), None


class _Copies(torch.autograd.Function):
    """A vector (d,) for each item, (items, 1, ..., 1, d), whose gradient is then each item's own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, token: Tensor, dims: int, number: Tensor) -> Tensor:
        ctx.save_for_backward(token, number)
        return weight.expand(token.shape[0], *(1,) * (dims - 2), *weight.shape).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        token, number = ctx.saved_tensors
        return None, torch.ops.dp_flash_hf.record(g, g, token, number), None, None


# --- layers ---------------------------------------------------------------------------------------------------------------


class CompiledVariant:
    """What a layer computes while a compiled model records: the same, with its parameters as constants and a tap on its output.

    Attributes of the layer: `_dp_number`, of its `_TappedLayer`, and `_dp_detail`, see `fits`.
    """

    _dp_number: Tensor
    _dp_detail: int

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:
        """None if the variant does not compute what the layer does, else what it has to know of the layer: `_dp_detail`."""
        raise NotImplementedError

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:
        """Record the gradients of the layer's parameters."""
        raise NotImplementedError

    def put_tap(self, number: Tensor, detail: int) -> None:
        """The layer has just become its variant; the arguments are its attributes."""
        vars(self).update(_dp_number=number, _dp_detail=detail)

    def take_off_tap(self) -> None:
        """The layer will be itself again."""
        vars(self).pop("_dp_number", None)
        vars(self).pop("_dp_detail", None)

    def _tap(self, out: Tensor, x: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(out, x, _TAPS.token, self._dp_number)  # type: ignore[no-untyped-call]
        return tapped


class LinearVariant(CompiledVariant, nn.Linear):
    """nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self._tap(F.linear(x, self.weight.detach(), None if self.bias is None else self.bias.detach()), x)

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:  # noqa: D102
        return 0

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:  # noqa: D102
        x = x.to(g.dtype)  # autocast multiplied what it had rounded
        weight, bias = _tracked(module, recorder)
        _record_affine(weight, bias, x, g, _layout(recorder, module, Call(F.linear, (x, weight, bias), {}), x))


class Conv1DVariant(CompiledVariant):
    """Conv1D of Transformers, a product with a matrix stored the other way round."""

    weight: nn.Parameter
    bias: nn.Parameter
    nf: int

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        rows = x.view(-1, x.size(-1))
        out = self._tap(torch.addmm(self.bias.detach(), rows, self.weight.detach()), rows)
        return out.view((*x.size()[:-1], self.nf))

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:  # noqa: D102
        return 0

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:  # noqa: D102
        x = x.to(g.dtype)
        weight, bias = _tracked(module, recorder)
        layout = _layout(recorder, module, Call(torch.addmm, (bias, x, weight), {}), x)
        _record_affine(derived(torch.transpose, weight, -1, -2), bias, x, g, layout)


class EmbeddingVariant(CompiledVariant, nn.Embedding):
    """nn.Embedding. `_dp_detail` is 1 where all items look up the same, as positions: each then looks up its own."""

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        if self._dp_detail:
            ids = ids.expand(_TAPS.token.shape[0], ids.shape[-1])
        return self._tap(F.embedding(ids, self.weight.detach(), self.padding_idx), ids)

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:  # noqa: D102
        if module.scale_grad_by_freq or module.max_norm is not None:
            return None
        found = layouts.observations(module.weight)
        lookups = [each for each in found if each.func is F.embedding]
        if all(each.dims != () for each in lookups):
            return 0
        # Looked up once for all items, and added to what is laid out by items: so many copies add up to the same.
        sums = [each for each in found if each.func is not F.embedding]
        alike = len(lookups) == len(sums) == 1 and sums[0].is_elementwise(_SUMS, {"embedding"}) and sums[0].sizes == (3, 3)
        return 1 if alike else None

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:  # noqa: D102
        weight, _ = _tracked(module, recorder)
        if module._dp_detail:
            layout: Layout | None = Layout(recorder.units, tuple(x.shape), (0,))
        else:
            layout = _layout(recorder, module, Call(F.embedding, (x, weight), {}), x, feature_dims=0)
        if layout is not None:
            recorder.embedding(module.weight, recorder.kept_input(x), _copy(g), layout, module.padding_idx)


class LayerNormVariant(CompiledVariant, nn.LayerNorm):
    """nn.LayerNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        bias = None if self.bias is None else self.bias.detach()
        return self._tap(F.layer_norm(x, self.normalized_shape, self.weight.detach(), bias, self.eps), x)

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:  # noqa: D102
        return 0 if len(module.normalized_shape) == 1 and module.weight is not None else None

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:  # noqa: D102
        weight, bias = _tracked(module, recorder)
        call = Call(F.layer_norm, (x, module.normalized_shape, weight, bias, module.eps), {})
        layout = _layout(recorder, module, call, x)
        if layout is None:
            return
        if isinstance(weight, Tracked):
            record_bias(weight, g * F.layer_norm(upcast(x), module.normalized_shape, eps=module.eps), layout)
        if isinstance(bias, Tracked):
            record_bias(bias, g, layout)


class RMSNormVariant(CompiledVariant, nn.RMSNorm):
    """nn.RMSNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self._tap(F.rms_norm(x, self.normalized_shape, self.weight.detach(), self.eps), x)

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:  # noqa: D102
        return 0 if len(module.normalized_shape) == 1 and module.weight is not None else None

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:  # noqa: D102
        weight, _ = _tracked(module, recorder)
        layout = _layout(recorder, module, Call(F.rms_norm, (x, module.normalized_shape, weight, module.eps), {}), x)
        if layout is not None:
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            record_bias(weight, g * F.rms_norm(upcast(x), module.normalized_shape, eps=eps), layout)


class ScaleVariant(CompiledVariant):
    """A layer that multiplies every item by its weight (d,), or by values made of it: the RMS norms of most decoders.

    Its own `forward` runs, with a copy of the weight for each item. `_dp_detail`: dimensions of what is multiplied.
    """

    _parameters: dict[str, nn.Parameter]

    @property
    def weight(self) -> Tensor:  # noqa: D102
        weight = self._parameters["weight"].detach()
        copies: Tensor = _Copies.apply(weight, _TAPS.token, self._dp_detail, self._dp_number)  # type: ignore[no-untyped-call]
        return copies

    @staticmethod
    def fits(module: Any, layouts: Layouts) -> int | None:  # noqa: D102
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or [p for p in module._parameters.values() if p is not None] != [weight]:
            return None
        found = layouts.observations(weight)
        alike = len(found) == 1 and found[0].is_elementwise(_PRODUCTS) and found[0].sizes[0] == 1
        return found[0].sizes[1] if alike else None

    @staticmethod
    def record(module: Any, recorder: Recorder, x: Tensor, g: Tensor) -> None:  # noqa: D102
        weight, units = module._parameters["weight"], recorder.units
        own = Layout(units, tuple(g.shape), (0,)).sums(g)
        recorder.per_unit(weight, own.reshape(units.n, *weight.shape))


# By class or, so as not to import it, by name.
_VARIANTS: tuple[tuple[type[nn.Module] | str, type[CompiledVariant]], ...] = (
    (nn.Linear, LinearVariant),
    ("transformers.pytorch_utils.Conv1D", Conv1DVariant),
    (nn.Embedding, EmbeddingVariant),
    (nn.LayerNorm, LayerNormVariant),
    (nn.RMSNorm, RMSNormVariant),
    (nn.Module, ScaleVariant),
)


def _tracked(module: Any, recorder: Recorder) -> tuple[Any, Any]:
    """Weight and bias of a layer, tracked if they are trained."""
    found = (module._parameters.get(name) for name in ("weight", "bias"))
    weight, bias = (Tracked.of(p, recorder) if p is not None and recorder.tracks(p) else p for p in found)
    return weight, bias


def _layout(recorder: Recorder, module: nn.Module, call: Call, x: Tensor, feature_dims: int = 1) -> Layout | None:
    """How the input of a layer is laid out. If that is not certain the recorder notes it, for autograd left no gradient."""
    layout = call.layout(x, feature_dims)
    if layout is None:
        recorder.add_unplaced(p for p in module.parameters(recurse=False) if recorder.tracks(p))
    return layout


def _record_affine(weight: Any, bias: Any, x: Tensor, g: Tensor, layout: Layout | None) -> None:
    """Record y = x W^T + b."""
    if layout is None:
        return
    if isinstance(bias, Tracked):
        record_bias(bias, g, layout)
    if isinstance(weight, Tracked):
        record_product(weight, weight.recorder.kept_input(x), _copy(g), layout)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# --- a model --------------------------------------------------------------------------------------------------------------


def _variant_of(original: type[nn.Module]) -> tuple[type[CompiledVariant], type[nn.Module]]:
    """The variant for layers of a class, and the class among its bases that it is made for."""
    bases = original.__mro__
    return next(
        (variant, base)
        for kind, variant in _VARIANTS
        for base in bases
        if kind in (base, f"{base.__module__}.{base.__qualname__}")
    )


def _class_of(original: type[nn.Module]) -> type:
    """A layer's class with its variant: in front of the class that it is made for, behind subclasses' own `forward`."""
    variant, base = _variant_of(original)
    if base in (nn.Module, original) or issubclass(variant, base):
        return _SWAP.derived(original, variant)
    return _SWAP.derived(original, _SWAP.derived(base, variant))


class CompiledLayers:
    """The attached layers of a compiled model, and what they become while it records.

    Args:
        modules: The attached ones.
        recorder: Theirs.
    """

    def __init__(self, modules: Sequence[nn.Module], recorder: Recorder) -> None:
        self._modules, self._recorder = modules, recorder
        self._variants: dict[Any, tuple[_TappedLayer, int]] = {}
        self._learnt = -1

    def uncovered(self) -> set[nn.Parameter]:
        """Trained parameters that no variant covers, as far as layouts are learnt."""
        layouts = self._recorder.layouts
        if layouts.learnt != self._learnt:
            self._learnt = layouts.learnt
            before, self._variants = self._variants, {}
            for module in self._modules:
                variant, _ = _variant_of(rules.original_class(module))
                detail = variant.fits(module, layouts)
                if detail is not None:
                    tapped = before[module][0] if module in before else _TappedLayer(module, variant, self._recorder)
                    self._variants[module] = (tapped, detail)
        covered = {p for module in self._variants for p in module.parameters(recurse=False)}
        return {p for module in self._modules for p in module.parameters(recurse=False) if p.requires_grad} - covered

    @contextmanager
    def recording(self, items: int, like: Tensor) -> Iterator[None]:
        """Within the context the layers are their compiled variants. items: of a batch. like: dtype and device of the token."""
        token = torch.zeros(items, dtype=like.dtype, device=like.device, requires_grad=True)
        classes = {module: _class_of(rules.original_class(module)) for module in self._variants}
        with _SWAP.instead(classes):
            try:
                for module, (tapped, detail) in self._variants.items():
                    module.put_tap(tapped.number, detail)
                with self._recorder.tapped(token), _TAPS.giving_to(token), torch.compiler.set_stance("default"):
                    yield
            finally:
                for module in classes:
                    module.take_off_tap()
