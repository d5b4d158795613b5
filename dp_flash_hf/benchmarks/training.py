"""`dp-flash bench`: speed and memory of private training beside non-private training and its peers, measured in one run.

A preset is a model, its batches and the methods that train it. With `--padding-free` the batches are texts as long as real
ones, padded to the longest or flattened into one row. Figures are medians over the rounds, and ratios are medians of each
round's ratio. `benchmarks.attention` measures attention by itself.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dp_flash_hf.benchmarks.methods import (
    COMPILE,
    FULL,
    LORA,
    MEMORY,
    METHODS,
    ON_TEXTS,
    RAGGED,
    VOCABULARY,
    Method,
    Methods,
    Step,
    Work,
    dp_flash,
    model_of,
    non_private,
    text_lengths,
)
from dp_flash_hf.benchmarks.timing import peak_memory, require_device, take_turns, timed
from dp_flash_hf.distributed import Ranks
from dp_flash_hf.kernels.keystream import Keystream
from dp_flash_hf.mechanisms import gaussian_noise

# For scripts that measure one method their own way, its parts go with the presets.
__all__ = [
    "ON_TEXTS",
    "PRESETS",
    "TEXTS",
    "Preset",
    "Row",
    "Work",
    "dp_flash",
    "measure",
    "non_private",
    "print_table",
    "turns",
]

TEXTS = 32  # with --padding-free: enough for a long one among them
LOGICAL = 512  # rows expected in a logical batch, of whose time the noise is said to take a share
_MEASURED_SECONDS = {"cpu": 3.0, "cuda": 0.5}  # a turn has as many steps as it takes to last this long


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one method at one length.

    Attributes:
        length: Tokens per row.
        method: Its name.
        tokens_per_second: None, as all that follows, where it did not run.
        ratio: Speed over that of the first method.
        memory: Bytes at the peak, beyond those of the imported libraries.
        memory_ratio: Memory over that of the first method.
        note: Why it did not run.
    """

    length: int
    method: str
    tokens_per_second: float | None = None
    ratio: float | None = None
    memory: int | None = None
    memory_ratio: float | None = None
    note: str = ""


class Preset(NamedTuple):
    """What is trained, and how."""

    work: Work
    methods: Methods


_CUDA = Work(
    device="cuda",
    autocast=True,
    layers=8,
    width=2048,
    vocabulary=32000,
    batch=8,
    lengths=(512, 2048),
    threads=os.cpu_count() or 1,
)
PRESETS = {
    "cpu": Preset(replace(_CUDA, device="cpu", autocast=False, width=512, vocabulary=8192, lengths=(128, 512)), METHODS),
    "memory": Preset(
        replace(_CUDA, device="cpu", autocast=False, layers=12, width=768, vocabulary=8192, batch=4, lengths=(256,)), MEMORY
    ),
    "cuda": Preset(_CUDA, METHODS),
    "full": Preset(replace(_CUDA, batch=16, lengths=(512,)), FULL),
    "lora": Preset(replace(_CUDA, batch=16, lengths=(512,), lora=16), LORA),
    "compile": Preset(replace(_CUDA, device="cpu", autocast=False, width=512, vocabulary=8192, lengths=(128,)), COMPILE),
    **{
        family: Preset(
            replace(_CUDA, device="cpu", autocast=False, layers=4, width=256, vocabulary=8192, lengths=(120,), family=family),
            RAGGED,
        )
        for family in ("t5", "bart")
    },
    "vocab": Preset(replace(_CUDA, layers=2, vocabulary=2**17, lengths=(1024,)), VOCABULARY),
}


def measure(work: Work, methods: Methods, *, repeats: int, advance: Callable[[], None] = lambda: None) -> list[Row]:
    """Measure every method at every length.

    Args:
        work: The model and its batches.
        methods: What trains it, by name; ratios are to the first.
        repeats: Rounds.
        advance: Called after each of `turns(work, methods, repeats)` turns, for a progress bar.

    Returns:
        A row for every length and method, in that order. A peer that does not run has its reason in `note`.

    Raises:
        Exception: Whatever a method of this package, or the one without privacy, raises.
    """
    torch.set_num_threads(work.threads)
    rows = []
    first = next(iter(methods))
    for length in work.lengths:
        tokens = _tokens(work, methods, length)
        memory = {method: peak_memory(work, length, method, advance) for method in methods}
        makers = {name: functools.partial(_step_of, make, work, length) for name, make in methods.items()}
        seconds, notes = take_turns(
            makers, functools.partial(timed, work), _MEASURED_SECONDS[work.device], repeats=repeats, advance=advance
        )
        for method in methods:
            if method in notes:
                rows.append(Row(length=length, method=method, note=notes[method]))
                continue
            own, base = memory[method], memory[first]
            rows.append(
                Row(
                    length=length,
                    method=method,
                    tokens_per_second=tokens / statistics.median(seconds[method]),
                    ratio=statistics.median(b / s for b, s in zip(seconds[first], seconds[method], strict=True)),
                    memory=own,
                    memory_ratio=own / base if own is not None and base else None,
                )
            )
    return rows


def _tokens(work: Work, methods: Methods, length: int) -> int:
    """Of a physical batch, on average."""
    if methods is ON_TEXTS:
        return sum(text_lengths(work))
    if methods is RAGGED:
        return work.batch * (length // 6 + length)  # of texts and labels
    return work.batch * length


def turns(work: Work, methods: Methods, repeats: int) -> int:
    """How often `measure` calls `advance`."""
    return len(work.lengths) * len(methods) * (2 + repeats)


def _step_of(make: Method, work: Work, length: int) -> Step:
    return make(work, length)[1]


def release_milliseconds(work: Work, length: int) -> float:
    """What one logical batch takes besides, whatever its size: noise on every gradient, and the division by the batch size."""
    gradients = [torch.zeros_like(p) for p in model_of(work, length, "sdpa").parameters() if p.requires_grad]
    spacing = gaussian_noise.spacing(sum(gradient.numel() for gradient in gradients), max_grad_norm=1.0, std=1.0)

    def release() -> None:
        words = Keystream(Ranks().secret(), work.device)
        gaussian_noise.add_gaussian_noise_(gradients, std=1.0, spacing=spacing, words=words)
        for gradient in gradients:
            gradient.div_(work.batch)

    return 1000 * statistics.median(timed(work, release, 1) for _ in range(3))


def print_table(preset: Preset, *, repeats: int) -> None:
    """Measure a preset, and print one table with what was measured under it.

    Args:
        preset: The model, its batches and the methods.
        repeats: Rounds.

    Raises:
        ValueError: If the preset's device is not here.
    """
    work, methods = preset
    if methods is ON_TEXTS:
        work = replace(work, lengths=(max(text_lengths(work)),))
    require_device(work.device, "use --preset cpu, or --device cpu with --layers, --width and --vocabulary that suit it")
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=turns(work, methods, repeats))
        rows = measure(work, methods, repeats=repeats, advance=lambda: progress.advance(task))
    first = next(iter(methods))
    Console().print(_table(rows, first))
    print(_conditions(work, repeats, first, _release_line(work, methods, rows)))
    if methods is ON_TEXTS:
        lengths = text_lengths(work)
        print(
            f"Texts: {len(lengths)} of {min(lengths)} to {max(lengths)} tokens, as long as BANKING77's; tokens/s counts their "
            f"{sum(lengths)} tokens, not the {len(lengths) * max(lengths) - sum(lengths)} of padding."
        )


def _table(rows: list[Row], first: str) -> Table:
    """One row per length and method; `first` is the method that each length begins with."""
    table = Table()
    for column in ("length", "method", "tokens/s", "ratio", "peak MiB", "ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        if row.method == first and row is not rows[0]:
            table.add_section()
        figures = (
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else row.note,
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            f"{row.memory / 2**20:,.0f}" if row.memory is not None else "",
            f"{row.memory_ratio:.2f}" if row.memory_ratio is not None else "",
        )
        table.add_row(str(row.length), row.method, *figures)
    return table


_FAMILIES = {
    "llama": "Llama decoder, untied head",
    "t5": "T5, encoder and decoder each",
    "bart": "BART, encoder and decoder each",
}


def _release_line(work: Work, methods: Methods, rows: list[Row]) -> str:
    """What noise takes, and its share of a logical batch of `LOGICAL` rows that is made of such physical batches."""
    milliseconds = release_milliseconds(work, work.lengths[0])
    line = f"Not in it: noise and division, done once per logical batch whatever its size; they take {milliseconds:.0f} ms"
    ours = [row for row in rows if row.method.startswith("dp_flash") and row.tokens_per_second is not None]
    if not ours:
        return f"{line}."
    seconds = _tokens(work, methods, ours[0].length) / (ours[0].tokens_per_second or math.inf)
    share = milliseconds / (milliseconds + 1000 * seconds * LOGICAL / work.batch)
    return f"{line}:\n{100 * share:.2g} % of a logical batch of {LOGICAL} rows, {ours[0].method} at length {ours[0].length}."


def _conditions(work: Work, repeats: int, first: str, release: str) -> str:
    """What was measured, and what was not: the lines under the table."""
    model = model_of(work, work.lengths[0], "sdpa")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    adapters = f", {trained:.1f} M of them adapters of rank {work.lora}, which are trained" if work.lora else ""
    where = f"{work.threads} CPU threads" if work.device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{_FAMILIES[work.family]}: {work.layers} layers of width {work.width}, vocabulary {work.vocabulary}, "
        f"{size:.1f} M parameters{adapters}.\n"
        f"Batch {work.batch}, {'bfloat16 autocast' if work.autocast else 'float32'}, {where}, torch {torch.__version__}.\n"
        "Timed: forward, backward, clipping and AdamW step of one physical batch; medians of "
        f"{repeats} rounds, methods taking turns.\n"
        f"{release}\n"
        "Peak memory: of two steps, "
        f"{'as allocated by torch' if work.device == 'cuda' else 'in a process of their own, beyond the imported libraries'}.\n"
        f"Ratios: to {first}."
    )
