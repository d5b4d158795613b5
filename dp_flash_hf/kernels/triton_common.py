"""What the Triton kernels share: the product of two tiles, how launches find their device, options, and tables of units' rows.

Launch options are tables by bytes per element, and are compiled for compute capability 8.0, 9.0 and 10.0 without spilling
registers (`tests/kernels/test_builds.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from itertools import accumulate
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of products g^T a in tiles (P_BLOCK, D_BLOCK), ROWS at a time. ROWS of 32 make float32 products spill.
PRODUCT_OPTIONS = {
    2: {"P_BLOCK": 128, "D_BLOCK": 128, "ROWS": 64, "num_warps": 8, "num_stages": 3},
    4: {"P_BLOCK": 64, "D_BLOCK": 64, "ROWS": 16, "num_warps": 8, "num_stages": 3},
}
# Largest blocks where rows do not all begin at 16 bytes: the address of every element is then held in registers.
OUT_OF_STEP = {2: 64, 4: 32}
SUM_OPTIONS = {"ROWS": 32, "D_BLOCK": 128, "num_warps": 4, "num_stages": 2}  # of kernels that add rows

_P = ParamSpec("_P")
_T = TypeVar("_T")

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on CPU, for tests


@triton.jit
def dot(left, right, sums):
    """left right + sums, float32. 16-bit values go to the matrix units as they are, of float32 nothing is cut off."""
    if INTERPRETED or left.dtype != right.dtype:  # the interpreter cannot multiply bfloat16; the products are the same
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


def on_its_device(launches: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator: what this launches runs on the device and stream of its first tensor, not on those that are current.

    Backward passes run where their tensors are; norms and clipped sums are formed after them, by whoever called.
    """

    @wraps(launches)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        first = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            return launches(*args, **kwargs)

    return launched


def on_device(device: torch.device, *columns: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
    """int32 tensors on the device, copied in one piece and without waiting for it."""
    here = torch.cat([torch.as_tensor(column, dtype=torch.int32) for column in columns])
    there = (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)
    parts: tuple[Tensor, ...] = there.split([len(column) for column in columns])
    return parts


@lru_cache(maxsize=16)
def unit_offsets(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 (units + 1,): where each unit's rows begin, and where the last one's end. Kept, as all layers of a batch ask."""
    return on_device(device, [0, *accumulate(sizes)])[0]


def rowwise(x: Tensor) -> Tensor:
    """x (rows, d) with the elements of a row adjacent, which is what kernels read."""
    return x if x.stride(1) == 1 else x.contiguous()


def fitted(choices: dict[int, dict[str, int]], records: Sequence[Tensor], **widths: int) -> dict[str, int]:
    """Launch options for records (rows, d) and for blocks no wider than what they are of: name of the block, and that width.

    Blocks are powers of two, and at least 16, which is what matrix units take.
    """
    size = max(x.element_size() for x in records)
    options = dict(choices[size])
    in_step = all(x.data_ptr() % 16 == x.stride(0) % 16 == x.shape[1] % 16 == 0 for x in records)
    for name, width in widths.items():
        largest = options[name] if in_step else min(options[name], OUT_OF_STEP[size])
        options[name] = min(largest, max(16, triton.next_power_of_2(width)))
    return options


def product_options(a: Tensor, g: Tensor, choices: dict[int, dict[str, int]] = PRODUCT_OPTIONS) -> dict[str, int]:
    """Launch options for tiles of g^T a. a: (rows, d), g: (rows, p)."""
    return fitted(choices, [a, g], P_BLOCK=g.shape[1], D_BLOCK=a.shape[1])


def product_tiles(a: Tensor, g: Tensor) -> int:
    """How many tiles of g^T a there are."""
    options = product_options(a, g)
    tiles: int = triton.cdiv(g.shape[1], options["P_BLOCK"]) * triton.cdiv(a.shape[1], options["D_BLOCK"])
    return tiles


def run_ends(sorted_keys: Tensor) -> Tensor:
    """int32 (n,): for each of the sorted keys, where the run of its like ends."""
    return torch.searchsorted(sorted_keys, sorted_keys, right=True, out_int32=True)


def unit_of_row(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 (rows,): the unit of each row in unit order."""
    rows = torch.arange(sum(sizes), dtype=torch.int32, device=device)
    return torch.searchsorted(unit_offsets(sizes, device)[1:], rows, right=True, out_int32=True)
