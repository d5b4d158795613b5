"""Parameters on their way to the operation that combines them with data.

While an engine records, a module hands out its trained parameters as `Tracked` tensors. Whatever a model computes from
parameters alone (slices, casts, exponentials, lookups that are the same for every row) stays tracked, and with it how it was
computed. The operation in which one of them is combined with data is where per-unit gradients arise: a rule for that operation
(`layers.operations`) records them, and `layers.chain` takes them back to the parameters.

An operation that nothing is known about is computed as without the library. Autograd then leaves a gradient behind, and the
engine finds it there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dp_flash_hf.layers.recorder import Recorder
from dp_flash_hf.layers.unit_layout import Layout

# Of their second argument they take the shape or the dtype, and no value.
_AS_ANOTHER = {"expand_as", "view_as", "reshape_as", "type_as"}
_HOOKS = {"register_hook", "retain_grad"}


class Origin(NamedTuple):
    """The call that made a tracked tensor of others.

    Args:
        func: A torch function.
        args: Its arguments, tracked tensors among them.
        kwargs: Likewise by name.
        part: Which item of the result it is, where that is a sequence.
        autocast: The dtype of autocast during the call, None if it was off.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None
    autocast: torch.dtype | None


class Tracked(Tensor):
    """A parameter that is being trained (`how` is None), or what was computed of such parameters alone.

    Attached modules hand out their trained parameters as these while an engine records, so a rule finds them where the layer
    has its weights. They behave as the tensors they are; an operation that combines one with data calls its rule.

    Attributes:
        recorder: Of the engine that records.
        plain: The same values as autograd knows them. Rules compute with these, lest an operation be recorded twice.
        how: The call that this is the result of; None for a parameter.
        version: How often the values had been changed in place, through whatever view, when they were what `how` says.
    """

    recorder: Recorder
    plain: Tensor
    how: Origin | None
    version: int

    @staticmethod
    def of(plain: Tensor, recorder: Recorder, how: Origin | None = None) -> Tracked:
        """Track these values. A use that goes unnoticed still leaves autograd's gradient on the parameter."""
        tracked: Tracked = plain.as_subclass(Tracked)
        tracked.recorder, tracked.plain, tracked.how, tracked.version = recorder, plain, how, plain._version
        return tracked

    def leave_to_autograd(self) -> None:
        """From now on, what this is used for is computed as without the library."""
        self.version = -1

    @property
    def is_stale(self) -> bool:
        """Whether its values are no longer what `how` says, or it was left to autograd."""
        return self.plain._version != self.version

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _dispatch(Call(func, args, kwargs or {}))

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters this was computed from."""
        if self.how is None:
            return (self.plain,)  # type: ignore[return-value]
        found = (p for t in _tensors(self.how.args, self.how.kwargs) if isinstance(t, Tracked) for p in t.parameters)
        return tuple(dict.fromkeys(found))

    @property
    def made_by(self) -> frozenset[str]:
        """Names of the functions that made this of parameters."""
        if self.how is None:
            return frozenset()
        own = getattr(self.how.func, "__name__", "")
        found = (t.made_by for t in _tensors(self.how.args, self.how.kwargs) if isinstance(t, Tracked))
        return frozenset((own,)).union(*found)

    @property
    def rows(self) -> tuple[int, int] | None:
        """Which rows (along its first dimension) of one parameter this is, as that parameter stores them; None if it is not."""
        if len(self.parameters) != 1:
            return None
        (whole,), plain = self.parameters, self.plain
        if whole.dim() < 2 or not whole.is_contiguous() or not (plain.is_contiguous() or plain.mT.is_contiguous()):
            return None
        if plain.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or plain.dtype != whole.dtype:
            return None
        size = int(whole.stride(0))
        start, rest = divmod(int(plain.storage_offset()) - int(whole.storage_offset()), size)
        rows, left = divmod(plain.numel(), size)
        return None if rest or left or rows == 0 else (start, start + rows)


def derived(func: Callable[..., Any], x: Any, *args: Any) -> Any:
    """``func(x, *args)``, tracked if x is."""
    if not isinstance(x, Tracked):
        return func(x, *args)
    return Tracked.of(func(x.plain, *args), x.recorder, Origin(func, (x, *args), {}, None, None))


class Call:
    """One call of a torch function with at least one tracked tensor among its arguments."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args, self.kwargs = replaced(lambda value: value, args, kwargs)  # the caller may go on with its lists
        self.tensors = list({id(t): t for t in _tensors(args, kwargs)}.values())  # each once, however often it is passed
        self.tracked = [t for t in self.tensors if isinstance(t, Tracked)]
        self.data = [t for t in self.tensors if not isinstance(t, Tracked) and not _is_frozen(t)]
        self.recorder = self.tracked[0].recorder

    def run(self, *replacements: tuple[Tensor, Tensor]) -> Any:
        """The function's result with some arguments replaced, tracked ones by plain tensors."""
        new = {id(old): value for old, value in replacements}

        def swap(value: Any) -> Any:
            if id(value) in new:
                return new[id(value)]
            return value.plain if isinstance(value, Tracked) else value

        args, kwargs = replaced(swap, self.args, self.kwargs)
        return self.func(*args, **kwargs)

    def emptied(self) -> Call:
        """The same call with meta tensors for its data, in the same order, so that it keeps none of them alive."""
        hollow = {id(x): torch.empty_like(x, device="meta", requires_grad=False) for x in self.data}
        return Call(self.func, *replaced(lambda value: hollow.get(id(value), value), self.args, self.kwargs))

    def run_once(self) -> tuple[Any, bool]:
        """The function's result, and whether it drew random numbers, so that it cannot be repeated, as backward would."""
        device = self.tracked[0].plain.device
        before = _random_state(device)
        out = self.run()
        return out, self.kwargs.get("generator") is not None or not torch.equal(before, _random_state(device))

    @cached_property
    def site(self) -> tuple[Any, ...]:
        """What all calls have in common whose operands are laid out alike."""
        parameters = tuple(p for t in self.tracked for p in t.parameters)
        return (self.func, parameters, tuple((isinstance(t, Tracked), t.dim()) for t in self.tensors))

    @property
    def varying(self) -> list[Tensor]:
        """The tensors in which items may stand: the data, and what was computed of parameters, which may repeat by row."""
        return [*self.data, *(t for t in self.tracked if t.how is not None)]

    def dims(self, x: Tensor) -> tuple[int, ...] | None:
        """Dimensions of an argument that run over items, () if it is the same for all; None if that is not certain."""
        if _is_frozen(x) or (isinstance(x, Tracked) and x.how is None):
            return ()
        if self.recorder.units.is_single:
            return ()
        place = next(i for i, t in enumerate(self.varying) if t is x)
        return self.recorder.layouts.dims((self.site, place), _lead(x), self.recorder.units)

    def output_dims(self, out: Tensor) -> tuple[int, ...] | None:
        """As `dims`, for the result."""
        if self.recorder.units.is_single:
            return ()
        return self.recorder.layouts.dims((self.site, "out"), _lead(out), self.recorder.units)

    def layout(self, x: Tensor, feature_dims: int = 1) -> Layout | None:
        """How an argument ``(*lead, *features)`` is laid out; None if that is not certain."""
        units, lead = self.recorder.units, tuple(x.shape[: x.dim() - feature_dims])
        if units.is_single:
            return Layout(units, lead, ())
        dims = self.dims(x)
        return Layout(units, lead, dims) if dims and max(dims) < len(lead) else None

    def broadcast_layout(self) -> Layout | None:
        """How the items stand in what all arguments are broadcast to; None if that is not certain."""
        units = self.recorder.units
        shape = torch.broadcast_shapes(*(t.shape for t in self.tensors))
        if units.is_single:
            return Layout(units, tuple(shape), ())
        found = {self._aligned(x, len(shape)) for x in self.data} - {()}
        if len(found) != 1 or None in found:
            return None
        (dims,) = found
        assert dims is not None
        sizes = [len(shape) - x.dim() for x in self.data if self._aligned(x, len(shape))]
        fits = all(dim >= offset for dim in dims for offset in sizes)
        return Layout(units, tuple(shape), dims) if fits else None

    def _aligned(self, x: Tensor, width: int) -> tuple[int, ...] | None:
        dims = self.dims(x)
        return None if dims is None else tuple(dim + width - x.dim() for dim in dims)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast as it is now, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# --- what becomes of a call -----------------------------------------------------------------------------------------------

Rule = Callable[..., Any]
_RULES: dict[Callable[..., Any], Rule] = {}
_BY_NAME: dict[str, Rule] = {}
_DEFAULT: list[Rule] = []
_LEARNING: dict[Callable[..., Any], Rule] = {}


def operation(*functions: Callable[..., Any] | str, default: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: the rule for these torch functions, or for functions of these names.

    A rule takes the `Call` and the call's arguments, and returns the result, or None where it does not apply.
    default: the rule for all functions that have none.
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            if isinstance(function, str):
                _BY_NAME[function] = rule
            else:
                _RULES[function] = rule
        if default:
            _DEFAULT.append(rule)
        return rule

    return register


def while_learning(function: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Decorator: how a torch function is computed while layouts are learnt, if not by itself; arguments as of `operation`."""

    def register(rule: Rule) -> Rule:
        _LEARNING[function] = rule
        return rule

    return register


def rules_for(func: Callable[..., Any]) -> list[Rule]:
    """Rules to try, in order."""
    found = _RULES.get(func) or _BY_NAME.get(getattr(func, "__name__", ""))
    return [*([found] if found else []), *_DEFAULT]


def _dispatch(call: Call) -> Any:
    recorder = call.recorder
    if recorder.phase == "idle" or not torch.is_grad_enabled() or any(t.is_stale for t in call.tracked):
        return call.run()
    if changes_its_argument(call.func) and isinstance(call.args[0], Tracked):
        return call.run()
    if getattr(call.func, "__name__", "") in _HOOKS:
        call.tracked[0].leave_to_autograd()  # what it asks for happens there only
        return call.run()
    if getattr(call.func, "__name__", "") in _AS_ANOTHER:
        return _derived(call) if isinstance(call.args[0], Tracked) else call.run()
    if not call.data:
        return _derived(call)
    layouts, units = recorder.layouts, recorder.units
    # Data that need a gradient come from parameters in a way that was not followed: as a constant, they would lose it.
    known = not units.is_single and all(
        not x.requires_grad and layouts.is_shared((call.site, i), _lead(x), units) for i, x in enumerate(call.data)
    )
    if recorder.phase == "learn":
        return _derived(_watched(call)) if known else _learn(call)
    if known:
        return _derived(call)
    for rule in rules_for(call.func):
        code = rule.__code__
        if code.co_flags & inspect.CO_VARKEYWORDS or call.kwargs.keys() <= set(code.co_varnames[: code.co_argcount]):
            out = rule(call, *call.args, **call.kwargs)
            if out is not None:
                return out
    return call.run()


def _derived(call: Call) -> Any:
    out, random = call.run_once()
    if random:
        return out
    autocast = autocast_dtype(call.tracked[0].device)

    def track(value: Any, part: int | None) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return Tracked.of(value, call.recorder, Origin(call.func, call.args, call.kwargs, part, autocast))
        return value

    if isinstance(out, (tuple, list)):
        kind: Any = type(out)  # of torch.return_types, perhaps, which take one sequence
        return kind([track(value, i) for i, value in enumerate(out)])
    return track(out, None)


def _watched(call: Call) -> Call:
    """A call whose data were the same for all items before: are they at these sizes?"""
    for place, x in enumerate(call.data):
        call.recorder.layouts.visit((call.site, place), x, _lead_dims(x))
    return call


def _learn(call: Call) -> Any:
    layouts = call.recorder.layouts
    before = [t.detach().clone() if changes_its_argument(call.func) else t for t in call.varying]
    rule = _LEARNING.get(call.func)
    out = call.run() if rule is None else rule(call, *call.args, **call.kwargs)
    if not isinstance(out, Tensor) or not out.requires_grad:
        return out
    for place, x in enumerate(before):
        layouts.visit((call.site, place), x.plain if isinstance(x, Tracked) else x, _lead_dims(x))
    if type(out) is Tensor:  # else it has no values yet, and belongs to an operation whose rule asks for its input only
        layouts.visit((call.site, "out"), out, _lead_dims(out))
    for parameter in call.site[1]:
        layouts.count(parameter)
    layouts.make(call.site, frozenset(name for t in call.tracked for name in t.made_by))
    return out


# --- arguments ------------------------------------------------------------------------------------------------------------


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, Tensor))


def replaced(f: Callable[[Any], Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with `f` applied to each, and to each of a list or tuple among them."""

    def within(value: Any) -> Any:
        return type(value)(f(x) for x in value) if type(value) in (list, tuple) else f(value)

    return tuple(map(within, args)), {name: within(value) for name, value in kwargs.items()}


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _is_frozen(t: Tensor) -> bool:
    return isinstance(t, nn.Parameter) and not t.requires_grad


def _lead_dims(x: Tensor) -> int:
    # One value stands for the last dimension, if there are more than two: all operands of all layers are kept for a while.
    return x.dim() if x.dim() < 3 else x.dim() - 1


def _lead(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[: _lead_dims(x)])


def changes_its_argument(func: Callable[..., Any]) -> bool:
    """Whether a torch function works in place."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
