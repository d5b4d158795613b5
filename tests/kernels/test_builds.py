"""Every Triton kernel compiles for the GPUs it is meant for, without spilling registers and within their shared memory.

Nothing here needs a GPU. `pytest tests/kernels/test_builds.py -m complete -s` prints what the compilers made of each kernel;
with `-m slow`, of every configuration, head width, dtype and feature.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.builds import CHIPS, Build

pytest.importorskip("triton")

# Bytes of a block: CUDA C++ programming guide, "Technical specifications per compute capability".
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Kernels of matrix products; the others add, scale and compare.
PRODUCTS = (
    *("attention_forward_kernel", "key_value_grad_kernel", "query_grad_kernel"),
    *("gram_kernel", "direct_kernel", "unit_gradients_kernel", "linear_sum_kernel"),
    *("log_sum_exp_kernel", "logit_gradients_kernel"),
)


def compile_all(cache: Path, *options: str) -> tuple[set[str], list[Build]]:
    """The names of all kernels, and every build."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.builds", *options],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, *rest = done.stdout.splitlines()
    return set(json.loads(first)), [Build(**json.loads(line)) for line in rest]


def table(builds: Sequence[Build]) -> str:
    heading = ("call", "kernel", "configuration", "chip", "regs", "stack", "spills", "shared", "matrix unit")
    cells = [
        (b.call, b.kernel, b.configuration, CHIPS[b.chip], b.registers, b.stack, b.spills, b.shared, b.units) for b in builds
    ]
    rows = [[str(cell) for cell in row] for row in (heading, *cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def too_large(builds: Sequence[Build]) -> list[Build]:
    return [build for build in builds if build.shared > SHARED_MEMORY[build.chip]]


@pytest.mark.slow
def test_default_configurations(pytestconfig: pytest.Config) -> None:
    """Head widths 64 and 128 in bfloat16, exact and privatised; norms, clipped sums, and cross entropies."""
    assert pytestconfig.cache is not None
    names, builds = compile_all(pytestconfig.cache.mkdir("kernels"))  # a kernel that did not change is not built again
    print(f"\n{table(builds)}")
    assert {build.kernel for build in builds} == names, "a kernel that no call in builds.py launches"
    assert not too_large(builds)
    spilling = [build for build in builds if build.default and build.spills]
    assert not spilling, f"registers spilled to local memory:\n{table(spilling)}"
    without = [b for b in builds if b.kernel in PRODUCTS and "fp32" not in b.call and not b.units]
    assert not without, f"products without matrix instructions:\n{table(without)}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_configuration(tmp_path: Path) -> None:
    """One that does not fit a chip is left out by Triton's tuner there, so long as the default one fits everywhere."""
    _, builds = compile_all(tmp_path, "--all")
    print(f"\n{table(builds)}")
    defaults = [build for build in builds if build.default]
    assert not too_large(defaults)
    spilling = [build for build in defaults if build.spills and "fp32" not in build.call]
    assert not spilling, f"registers spilled to local memory:\n{table(spilling)}"
