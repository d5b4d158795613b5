"""Everything that only a GPU shows, in one command: `python -m tests.gpu`, with whatever Python has torch and our dependencies.

Runs the tests that need a GPU, the kernels' own tests compiled instead of interpreted, and all presets of `dp-flash bench`, and
writes one markdown file. Every part has a time-out, and the file is written again after each, so that one that fails or hangs
loses nothing but itself. All time-outs add up to under nine minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

BENCH = ("-m", "dp_flash_hf.cli", "bench", "--repeats", "3", "--preset")
TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations", "5", "--tb", "short")


class Part(NamedTuple):
    """A heading, the command under it (arguments of Python), and how many seconds it may take."""

    title: str
    command: Sequence[str]
    seconds: float


PARTS = (
    Part("Attention", (*BENCH, "attention"), 100),
    Part("Full fine-tuning", (*BENCH, "full"), 60),
    Part("LoRA", (*BENCH, "lora"), 60),
    Part("Large vocabulary", (*BENCH, "vocab"), 50),
    Part("Tests that need a GPU", (*TESTS, "-m", "gpu", "tests"), 140),
    Part("Tests of the kernels, compiled", (*TESTS, "tests/kernels", "--ignore", "tests/kernels/test_builds.py"), 120),
)


def machine() -> list[str]:
    """GPU, driver, versions and date, a line each."""
    import torch

    asked = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader")
    try:
        gpu = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    names = ("torch", "triton", "transformers", "peft", "opacus", "flash-attn", "flash-attn-3")
    versions = [f"{name} {found}" for name in names if (found := _version(name)) is not None]
    return [
        f"- GPU (name, driver, memory, power limit): {gpu}",
        f"- Python {platform.python_version()}, CUDA {torch.version.cuda}, {', '.join(versions)}",
        f"- {os.cpu_count()} CPU cores, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def run(part: Part) -> tuple[bool, str]:
    """Whether a part came to its end without an error, and its section of the file."""
    start = time.monotonic()
    environment = {**os.environ, "COLUMNS": "140", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it started ends with it
    ) as process:
        try:
            printed, _ = process.communicate(timeout=part.seconds)
            ended = "" if process.returncode == 0 else f"**Failed** with status {process.returncode}. "
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            ended = f"**Stopped** after {part.seconds:.0f} seconds. "
    lines = printed.rstrip().splitlines()[-250:]
    command = " ".join(("python", *part.command))
    took = f"{ended}Took {time.monotonic() - start:.0f} s."
    return not ended, "\n".join([f"## {part.title}", "", f"`{command}`. {took}", "", "```text", *lines, "```", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts, or those named, and exit with status 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks_gpu.md", help="the file to write")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="parts whose titles begin like one of these")
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if options.only is None or part.title.startswith(tuple(options.only))]
    sections, failed = [], []
    head = ["# On a GPU", "", "Written by `make gpu` (or `python -m tests.gpu`).", "", *machine(), ""]
    for part in parts:
        fine, section = run(part)
        sections.append(section)
        failed += [] if fine else [part.title]
        options.out.write_text("\n".join([*head, *sections]))
        print(section, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
