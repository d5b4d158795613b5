"""Which device and dtype a computation runs in, and what rounding may hide from a norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

# Below this fraction of its bound (sum_t |a_t| |g_t|)^2 a Gram sum has cancelled so far that float32 rounding (2^-24 of the
# bound per term) could hide a norm; such a unit is computed again from its gradient itself, whose squares cannot cancel.
CANCELLED = 2.0**-16

HIDDEN = 32  # see `hidden_by_rounding`


@cache
def has_triton(device: torch.device) -> bool:
    """Whether this CUDA device runs the Triton kernels: an NVIDIA GPU from Ampere on, with triton installed.

    Blackwell needs Triton 3.9; with an older one, as on every other device, torch computes the same.
    """
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < (8, 0) or find_spec("triton") is None:  # 8.0: bfloat16 in matrix units
        return False
    # Triton 3.6 fails to compile Gram matrices for tensor memory; 3.9 does not.
    return capability < (10, 0) or tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)


def runs_on_triton(*records: Tensor) -> bool:
    """Whether the Triton kernels take these records: bfloat16, float16 or float32, on a device with `has_triton`.

    Example:
        >>> runs_on_triton(torch.zeros(2, 3))  # on the CPU
        False
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return all(x.is_cuda and x.dtype in dtypes for x in records) and has_triton(records[0].device)


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype that sums run in: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def is_uniform(sizes: Sequence[int]) -> bool:
    """Whether all units have the same number of rows, at least one, so that they can be one batch.

    Example:
        >>> is_uniform((3, 3)), is_uniform((3, 2)), is_uniform((0, 0)), is_uniform(())
        (True, False, False, False)
    """
    return len(sizes) > 0 and sizes[0] > 0 and all(size == sizes[0] for size in sizes)


def nonzero_rows(x: Tensor) -> Tensor:
    """Which rows have a value other than zero; NaN is one.

    Example:
        >>> nonzero_rows(torch.tensor([[0.0, -0.0], [0.0, torch.nan], [1.0, 0.0]])).tolist()
        [False, True, True]

    Args:
        x: (rows, d), d at least 1.

    Returns:
        bool (rows,).
    """
    # Two reductions are faster than one comparison of every value. `amax` of a row with NaN is NaN.
    return (x.amax(1) != 0) | (x.amin(1) != 0)


def hidden_by_rounding(bound: Tensor, rows: int | Tensor) -> Tensor:
    """The square of the norm that rounding may hide in a sum.

    It is added to the squared norm of a sum that has cancelled: the clipped sum rounds in another order than its norm did, and
    a unit made to cancel would otherwise leave more than C there. sqrt(rows) eps is the usual growth of rounding (Higham and
    Mary 2019, doi 10.1137/18M1226312); the factor `HIDDEN` keeps what is left below 2 % of C.

    Args:
        bound: The norms of the terms, added up; float32 or float64, any shape. Its dtype is that of the sum.
        rows: How many terms there are; a number, or a tensor of the same shape.

    Returns:
        Shape and dtype of `bound`.
    """
    lost = HIDDEN * torch.finfo(bound.dtype).eps * bound
    return torch.as_tensor(rows, dtype=bound.dtype, device=bound.device) * lost.square()
