"""`dp-flash bench --preset attention`: attention by itself, beside torch's kernels and flash-attn's, and under its ceilings.

A step is a forward and a backward pass, causal, of queries, keys and values as models lay them out (rows, length, heads,
width). Methods take turns as in `bench`. On a GPU its own clock times them, with the launches already waiting, so that
what Python takes between them is not in the figures.
"""

from __future__ import annotations

import functools
import math
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dp_flash_hf.benchmarks.methods import Step
from dp_flash_hf.benchmarks.timing import require_device, take_turns
from dp_flash_hf.errors import invalid
from dp_flash_hf.kernels.attention import flash_attention
from dp_flash_hf.kernels.types import Release, SegmentTable

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value and result: (rows, length, heads, width)
_TURN_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """What attention is measured on.

    Attributes:
        device: "cuda"; anything else is refused where figures are printed.
        dtype: Of queries, keys and values: a name in torch.
        batch: Tokens: as many rows as make them up at a length.
        width: As many heads as make it up at a head width.
        head_widths: Each is measured at every length.
        lengths: Tokens per row.
    """

    device: str
    dtype: str
    batch: int
    width: int
    head_widths: tuple[int, ...]
    lengths: tuple[int, ...]


WORK = AttentionWork(
    device="cuda",
    dtype="bfloat16",
    batch=16384,
    width=2048,
    head_widths=(64, 128),
    lengths=(512, 1024, 2048, 4096, 8192, 16384),
)


class Ceilings(NamedTuple):
    """What this machine does at best: bytes per second, read and written, and floating-point operations per second."""

    bytes: float
    operations: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one method at one length.

    Attributes:
        head_width: Width of a head.
        length: Tokens per row.
        method: Its name.
        seconds: Of a forward and a backward pass; None, as all that follows, where it did not run.
        operations_per_second: Floating-point operations.
        ratio: Its time over that of dp_flash.
        of_ceiling: The least time that the ceilings allow, over its time.
        note: Why it did not run.
    """

    head_width: int
    length: int
    method: str
    seconds: float | None = None
    operations_per_second: float | None = None
    ratio: float | None = None
    of_ceiling: float | None = None
    note: str = ""


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Ours."""
    return _ours(query, key, value, None)


def privatised(query: Tensor, key: Tensor, value: Tensor, *, words: int) -> Tensor:
    """Ours, with values clipped to what about half of them exceed, and noise.

    Args:
        query: (rows, length, heads, width), as key and value.
        key: What queries are compared with.
        value: What is clipped, weighted and noised.
        words: Of the noise's key: 2 for Philox, 8 for ChaCha20.
    """
    heads, width = query.shape[2:]
    release = Release(
        clip_norms=torch.full((heads,), width**0.5, device=query.device),
        noise_std=torch.ones(heads, device=query.device),
        key=tuple(secrets.randbits(32) for _ in range(words)),
    )
    return _ours(query, key, value, release)


def _ours(query: Tensor, key: Tensor, value: Tensor, release: Release | None) -> Tensor:
    rows, length = query.shape[:2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    segments = SegmentTable.whole(rows, length, length, query.device)
    return flash_attention(query, key, value, segments=segments, causal=True, release=release).transpose(1, 2)


def torchs(query: Tensor, key: Tensor, value: Tensor, *, backend: SDPBackend) -> Tensor:
    """One of the kernels behind `scaled_dot_product_attention`, and no other."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def _flash_attn_2() -> Attention:
    from flash_attn import flash_attn_func

    return functools.partial(flash_attn_func, causal=True)


def _flash_attn_3() -> Attention:
    from flash_attn_interface import flash_attn_func

    return lambda *qkv: _first(flash_attn_func(*qkv, causal=True))


def _flash_attn_4() -> Attention:
    from flash_attn.cute import flash_attn_func

    return lambda *qkv: _first(flash_attn_func(*qkv, causal=True))


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too


METHODS: Mapping[str, Callable[[], Attention]] = {  # ratios are to the first
    "dp_flash": lambda: exact,
    "dp_flash privatised, Philox": lambda: functools.partial(privatised, words=2),
    "dp_flash privatised, ChaCha20": lambda: functools.partial(privatised, words=8),
    "torch flash": lambda: functools.partial(torchs, backend=SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": lambda: functools.partial(torchs, backend=SDPBackend.CUDNN_ATTENTION),
    "flash-attn 2": _flash_attn_2,
    "flash-attn 3": _flash_attn_3,
    "flash-attn 4": _flash_attn_4,
}


def shape_of(work: AttentionWork, head_width: int, length: int) -> tuple[int, int, int, int]:
    """(rows, length, heads, head_width)."""
    return max(1, work.batch // length), length, max(1, work.width // head_width), head_width


def tensors_of(work: AttentionWork, head_width: int, length: int) -> list[Tensor]:
    """Query, key, value and the gradient of the result, (rows, length, heads, head_width) each; the same at every call."""
    generator = torch.Generator(work.device).manual_seed(0)
    shape = shape_of(work, head_width, length)
    dtype: torch.dtype = getattr(torch, work.dtype)
    return [torch.randn(shape, generator=generator, device=work.device, dtype=dtype) for _ in range(4)]


def step_of(method: Callable[[], Attention], work: AttentionWork, head_width: int, length: int) -> Step:
    """A forward and a backward pass."""
    attention = method()
    *inputs, gradient = tensors_of(work, head_width, length)
    for x in inputs:
        x.requires_grad_()

    def step() -> None:
        torch.autograd.grad(attention(*inputs), inputs, gradient)

    return step


def operations(work: AttentionWork, head_width: int, length: int) -> float:
    """Floating-point operations of a step: two products forward and five backward, of the half that is not masked."""
    rows, _, heads, _ = shape_of(work, head_width, length)
    return 7 * 2 * rows * heads * length**2 / 2 * head_width


def least_bytes(work: AttentionWork, head_width: int, length: int) -> float:
    """Bytes of a step that reads its inputs once and writes its results once: q, k, v, o; then these, do, dq, dk and dv."""
    size: int = getattr(torch, work.dtype).itemsize
    return 12 * math.prod(shape_of(work, head_width, length)) * size


def ceilings(device: str, *, copied: int = 2**31, side: int = 8192) -> Ceilings:
    """Measured: a copy of so many bytes on the device, and a product of two bfloat16 matrices with sides of this length."""
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = []
    steps: tuple[Callable[[], object], ...] = (lambda: target.copy_(source), lambda: left @ right)
    for step in steps:
        for _ in range(3):
            step()
        seconds.append(statistics.median(timed(device, step, 3) for _ in range(5)))
    return Ceilings(2 * copied / seconds[0], 2 * side**3 / seconds[1])


def timed(device: str, step: Callable[[], object], count: int) -> float:
    """Seconds per step. On a GPU by its own clock, behind a pause in which the steps are launched."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    launch = time.perf_counter() - begin
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * min(1.0, 1.5 * launch * count)))  # cycles, of at most 2 GHz
    first.record()
    for _ in range(count):
        step()
    last.record()
    torch.cuda.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1000 / count


def measure(
    work: AttentionWork,
    limits: Ceilings,
    *,
    repeats: int,
    methods: Mapping[str, Callable[[], Attention]] = METHODS,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for every head width, length and method, in that order."""
    rows = []
    first = next(iter(methods))
    for head_width, length in product(work.head_widths, work.lengths):
        makers = {name: functools.partial(step_of, method, work, head_width, length) for name, method in methods.items()}
        seconds, notes = take_turns(
            makers, functools.partial(timed, work.device), _TURN_SECONDS, repeats=repeats, advance=advance
        )
        count = operations(work, head_width, length)
        floor = max(count / limits.operations, least_bytes(work, head_width, length) / limits.bytes)
        for method in methods:
            if method in notes:
                rows.append(Row(head_width=head_width, length=length, method=method, note=notes[method]))
                continue
            own = statistics.median(seconds[method])
            rows.append(
                Row(
                    head_width=head_width,
                    length=length,
                    method=method,
                    seconds=own,
                    operations_per_second=count / own,
                    ratio=statistics.median(s / b for b, s in zip(seconds[first], seconds[method], strict=True)),
                    of_ceiling=floor / own,
                )
            )
    return rows


def print_table(work: AttentionWork, *, repeats: int) -> None:
    """Measure, and print one table with what was measured under it.

    Args:
        work: What it is measured on.
        repeats: Rounds.

    Raises:
        ValueError: Where there is no CUDA device, or `work` names another.
    """
    require_device("cuda", "attention is measured on one")
    if work.device != "cuda":
        raise invalid(
            "device", expected="cuda", actual=work.device, remedy="attention is measured on a GPU; leave --device out"
        )
    limits = ceilings(work.device)
    total = len(work.head_widths) * len(work.lengths) * len(METHODS) * (1 + repeats)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=total)
        rows = measure(work, limits, repeats=repeats, advance=lambda: progress.advance(task))
    Console().print(table_of(rows))
    bound = {
        (d, n): "memory" if least_bytes(work, d, n) / limits.bytes > operations(work, d, n) / limits.operations else "products"
        for d, n in product(work.head_widths, work.lengths)
    }
    memory = ", ".join(f"{d}/{n}" for (d, n), what in bound.items() if what == "memory")
    print(
        f"Causal, {work.dtype}, {work.batch} tokens, heads that make up a width of {work.width}; "
        f"{torch.cuda.get_device_name() if work.device == 'cuda' else 'CPU'}, torch {torch.__version__}.\n"
        f"Forward and backward pass; medians of {repeats} rounds, methods taking turns; the device's own clock.\n"
        "TFLOP/s: 7 products of the half that is not masked. time: over that of dp_flash in the same round.\n"
        f"Ceilings, measured here: {limits.bytes / 1e12:.2f} TB/s copying, {limits.operations / 1e12:.0f} TFLOP/s in bfloat16 "
        "products. of ceiling: the least time that they allow, over the time it took.\n"
        f"Memory is the limit at head width/length: {memory or 'none of these'}; for the others, products are."
    )


def table_of(rows: list[Row]) -> Table:
    """The table that is printed."""
    table = Table()
    for column in ("head", "length", "method", "ms", "TFLOP/s", "time", "of ceiling"):
        table.add_column(column, justify="left" if column == "method" else "right")
    case = None
    for row in rows:
        if case not in (None, (row.head_width, row.length)):
            table.add_section()
        case = (row.head_width, row.length)
        figures = (
            f"{1000 * row.seconds:.3f}" if row.seconds is not None else row.note,
            f"{row.operations_per_second / 1e12:,.0f}" if row.operations_per_second is not None else "",
            f"{row.ratio:.3f}" if row.ratio is not None else "",
            f"{row.of_ceiling:.2f}" if row.of_ceiling is not None else "",
        )
        table.add_row(str(row.head_width), str(row.length), row.method, *figures)
    return table
