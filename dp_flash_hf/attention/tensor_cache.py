"""What was found out about a tensor, kept while the tensor lives unchanged: all layers of a forward are given the same mask."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_T = TypeVar("_T")
_RESULTS: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()  # {(work, args): (version of the tensor, result)} of each


def once(tensor: Tensor, work: Callable[..., _T], *args: Any) -> _T:
    """`work(tensor, *args)`, computed once while the tensor lives unchanged.

    A change in place is noticed by the tensor's version. Tensors made in inference mode have none: for these, `work` is called
    every time.

    Args:
        tensor: What all layers of a forward share: a mask, positions, boundaries.
        work: A function of module level, by which the result is found again. Its result must not hold a view of the tensor,
            which would keep it alive for ever.
        args: Hashable further arguments.
    """
    if tensor.is_inference():
        return work(tensor, *args)
    known = _RESULTS.setdefault(tensor, {})
    if (work, args) not in known or known[work, args][0] != tensor._version:
        known[work, args] = (tensor._version, work(tensor, *args))
    result: _T = known[work, args][1]
    return result


def size() -> int:
    """Of how many tensors anything is known at present."""
    return len(_RESULTS)
