"""How `dp-flash bench` measures: methods take turns on the clock, and each shows its peak memory in a process of its own.

The order rotates from round to round, so that whatever else the machine does reaches all methods alike.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dp_flash_hf.benchmarks.methods import BASELINE, BY_NAME, Step, Work

_OURS = (BASELINE, "dp_flash")  # whose failure is an error; a peer's leaves a note


def take_turns(
    makers: Mapping[str, Callable[[], Step]],
    timed: Callable[[Step, int], float],
    turn_seconds: float,
    *,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every method in every round, each beginning with the method after the one before began with.

    Args:
        makers: What makes each method's step, by its name.
        timed: Takes a step and a count; runs it so often and returns seconds per step.
        turn_seconds: How long a turn lasts at least: it has as many steps as that takes.
        repeats: Rounds.
        advance: Called after each turn, and once after each method was made.

    Returns:
        Seconds per step of each method in each round; and for each peer that does not run, why.

    Raises:
        Exception: Whatever a method of this package, or the one without privacy, raises.
    """
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for name, make in makers.items():
        try:
            step = make()
            step()
            steps[name] = step
        except ImportError as error:
            if name.startswith(_OURS):
                raise
            notes[name] = f"not installed: {error.name}" if error.name else "not installed"
        except Exception as error:
            if name.startswith(_OURS):
                raise
            notes[name] = f"failed: {' '.join(str(error).split())[:60]}"
        advance()
    counts = {name: math.ceil(turn_seconds / timed(step, 1)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(repeats):
        for name in order:
            steps[name]()  # untimed: caches and the allocator still hold what the method before left there
            seconds[name].append(timed(steps[name], counts[name]))
            advance()
        order = order[1:] + order[:1]
    for _ in range(repeats * len(notes)):
        advance()
    return seconds, notes


def timed(work: Work, step: Step, count: int) -> float:
    """Seconds per step of `count` steps, until the device has finished them."""
    _synchronize(work)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _synchronize(work)
    return (time.perf_counter() - start) / count


def _synchronize(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()


def peak_memory(work: Work, length: int, method: str, advance: Callable[[], None] = lambda: None) -> int | None:
    """Bytes that two steps of a method need at their peak; None if it fails.

    On the GPU it is what torch allocates. On the CPU it is what a process of their own holds at its peak beyond the imported
    libraries, and what it frees goes back at once: what glibc would keep for later depends on the sizes and the order of all
    that was freed before.

    Args:
        work: The model and its batches.
        length: Tokens per row.
        method: A key of `methods.BY_NAME`.
        advance: Called at the end.
    """
    try:
        if work.device == "cuda":
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            _two_steps(work, length, method)
            return torch.cuda.max_memory_allocated() - before
        command = [sys.executable, "-m", "dp_flash_hf.benchmarks.timing", json.dumps(asdict(work)), str(length), method]
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16), **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return int(done.stdout) if done.returncode == 0 else None
    except Exception:  # the same method's turn says why
        return None
    finally:
        advance()


def _print_peak_memory(work: Work, length: int, method: str) -> None:
    torch.set_num_threads(work.threads)
    if method.startswith("Opacus"):
        importlib.import_module("opacus")  # its own memory is not the step's
    if work.lora:
        importlib.import_module("peft")
    before = resident_peak()
    _two_steps(work, length, method)
    print(resident_peak() - before)


def _two_steps(work: Work, length: int, method: str) -> None:
    _, step = BY_NAME[method](work, length)
    step()
    step()


def resident_peak() -> int:
    """Bytes of memory that this process held at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at what the parent process held
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work_from_json(text: str) -> Work:
    """What `json.dumps(asdict(work))` was made of."""
    values: dict[str, Any] = json.loads(text)
    return replace(Work(**values), lengths=tuple(values["lengths"]))


def require_device(device: str, remedy: str) -> None:
    """Raise ValueError, with this remedy, where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: no CUDA device here; {remedy}")


if __name__ == "__main__":
    _print_peak_memory(work_from_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
