"""How many bytes a computation on the meta device holds, storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


def _everywhere(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices whose masks are true everywhere."""
    masks = (i is not None and i.dtype is torch.bool for i in indices)
    made = (
        [i.new_empty(i.numel(), dtype=torch.long)] * i.dim() if m and i is not None else [i]
        for i, m in zip(indices, masks, strict=True)
    )
    return [i for each in made for i in each]


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages made within, while they live.

    What looks at values is answered as full rows would: masks hide nothing, and what is computed again is as it was.

    Args:
        known: not counted, see `know`.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.know(tensor)

    def know(self, tensor: Tensor | None) -> None:
        """Do not count this one."""
        if tensor is not None:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default and args[0].device.type == "meta":
            return True  # what is computed again
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return args[0].dtype is torch.bool or 1  # whether a mask hides nothing, rows are not packed, ...: full rows
        if func in _INDEXED and args[0].device.type == "meta":
            args = (args[0], _everywhere(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta" and type(tensor) in (Tensor, nn.Parameter):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
