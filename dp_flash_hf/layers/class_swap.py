"""How a module gets other methods and keeps everything else: its class is swapped for a derived one, and swapped back.

Parameters, buffers, hooks and names stay, because the module itself stays. Rules of layers, the variants of layers in compiled
models and attention patches all take this way, each by a `ClassSwap` of its own, so that one may lie on top of another: a
layer's rule on a patched attention class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

_MADE = "_dp_swap"  # of a derived class: the ClassSwap that made it, and the class it was made from


class ClassSwap:
    """One reason to swap the classes of modules; modules that are swapped for it can be recognised and restored.

    Derived classes are made once for each pair of an original class and what is added to it. They carry the original's name and
    module, so that a model prints as before.

    Example:
        >>> class Doubled:
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> doubled, layer = ClassSwap(), nn.Identity()
        >>> doubled.put_on(layer, Doubled)
        >>> layer(3), layer
        (6, Identity())
        >>> doubled.take_off(layer)
        >>> layer(3), type(layer) is nn.Identity
        (3, True)

    Args:
        front: Mixins that every derived class begins with.
        revive: Called with the original class, returns an instance of the derived one without attributes. It must be a function
            that pickle finds by its name. With it, copies and pickles of a swapped module name the original class, which is
            found where they are loaded; without, swapped modules can be copied but not pickled.
    """

    def __init__(self, front: tuple[type, ...] = (), revive: Callable[[type], Any] | None = None) -> None:
        self._front, self._revive = front, revive
        self._derived: dict[tuple[type, type | None], type] = {}

    def derived(self, original: type, added: type | None = None) -> type:
        """The class that takes the place of `original`.

        Args:
            original: A module's class.
            added: None, or what the derived class adds, in one of three ways. A subclass of `original` is the new class. A
                subclass of one of `original`'s bases stands behind `original`, whose own methods come first and reach it by
                `super()`. A mixin, which is no module, stands in front.
        """
        if (original, added) not in self._derived:
            body: dict[str, Any] = {_MADE: (self, original), "__module__": original.__module__}
            if self._revive is not None:
                body["__reduce_ex__"] = lambda module, protocol: self._reduce(module, protocol)
            self._derived[original, added] = type(original.__name__, (*self._front, *_bases(original, added)), body)
        return self._derived[original, added]

    def put_on(self, module: nn.Module, added: type | None = None) -> None:
        """Swap the class of a module; arguments as of `derived`."""
        module.__class__ = self.derived(type(module), added)

    def take_off(self, module: nn.Module) -> None:
        """Give a module the class back that `put_on` found."""
        original = self.original_of(module)
        assert original is not None
        module.__class__ = original

    @contextmanager
    def instead(self, classes: Mapping[nn.Module, type]) -> Iterator[None]:
        """Within the context modules have these classes, which `derived` made, whatever other swaps had made of theirs."""
        before = {module: type(module) for module in classes}
        try:
            for module, derived in classes.items():
                module.__class__ = derived
            yield
        finally:
            for module, own in before.items():
                module.__class__ = own

    def is_on(self, module: nn.Module) -> bool:
        """Whether the module's class was swapped, also where another swap lies on top."""
        return self.original_of(module) is not None

    def original_of(self, module: nn.Module) -> type | None:
        """The class from before the swap, None if there was none."""
        for base in type(module).__mro__:
            made: tuple[ClassSwap, type] | None = vars(base).get(_MADE)
            if made is not None and made[0] is self:
                return made[1]
        return None

    def _reduce(self, module: Any, protocol: Any) -> Any:
        swap, original = vars(type(module)).get(_MADE, (None, None))
        if swap is not self:  # another swap lies on top, perhaps of FSDP2, and copies keep its class
            return object.__reduce_ex__(module, protocol)
        return self._revive, (original,), module.__getstate__()


def take_off_mixin(module: nn.Module, mixin: type) -> None:
    """Give a module the class back that others, as FSDP2, had swapped for a subclass of `mixin` and of that class."""
    bases = type(module).__mro__
    module.__class__ = bases[bases.index(mixin) + 1]


def _bases(original: type, added: type | None) -> tuple[type, ...]:
    if added is None:
        return (original,)
    if issubclass(added, original):
        return (added,)
    return (original, added) if issubclass(added, nn.Module) else (added, original)
