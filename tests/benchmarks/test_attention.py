"""The benchmark of attention: every method computes the same attention, and the figures follow from what was timed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from dp_flash_hf.benchmarks import attention as bench
from dp_flash_hf.benchmarks.attention import METHODS, AttentionWork, Ceilings
from dp_flash_hf.kernels.reference import attention

TINY = AttentionWork(device="cpu", dtype="float32", batch=16, width=32, head_widths=(16, 32), lengths=(8,))


@pytest.mark.parametrize("method", [name for name in METHODS if "privatised" not in name])
def test_every_method_computes_the_same_attention(method: str, device: str) -> None:
    work = replace(TINY, device=device, dtype="bfloat16" if device == "cuda" else "float32", lengths=(64,), batch=64)
    query, key, value, _ = bench.tensors_of(work, 16, 64)
    try:
        found = METHODS[method]()(query, key, value)
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")
    except RuntimeError as error:
        if method.startswith("dp_flash"):
            raise
        pytest.skip(f"not on this machine: {error}")
    wanted = attention(*(x.transpose(1, 2) for x in (query, key, value)), causal=True).transpose(1, 2)
    # Weights of one row sum to 1, so the result has at most the size of the largest value; a few roundings of it remain.
    allowed = 8 * torch.finfo(found.dtype).eps * float(value.abs().max())
    assert float((found.double() - wanted).abs().max()) < allowed


@pytest.mark.parametrize("words", [2, 8])
def test_privatised_attention_clips_about_half_of_the_values_and_adds_fresh_noise(words: int, device: str) -> None:
    work = replace(TINY, device=device)
    query, key, value, _ = bench.tensors_of(work, 32, 8)
    clipped = float((value.norm(dim=-1) > 32**0.5).float().mean())
    assert 0 < clipped < 1
    first, second = (bench.privatised(query, key, value, words=words) for _ in range(2))
    noise = (first - second).double()
    # The difference of two standard normals; 512 of them.
    assert float(noise.square().mean()) == pytest.approx(2, rel=5 * math.sqrt(2 / noise.numel()))


def test_figures_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("no such thing", name="flash_attn")

    def failing() -> Any:
        raise RuntimeError("no kernel for this")

    # Once to see how many steps a turn has, then two rounds; the second begins with the second method.
    order = iter([0.25, 0.5, 0.25, 0.5, 0.5, 0.25])
    monkeypatch.setattr(bench, "timed", lambda device, step, count: next(order))
    work = replace(TINY, head_widths=(16,))
    methods = {"dp_flash": METHODS["dp_flash"], "torch flash": METHODS["torch flash"], "a": missing, "b": failing}
    turns: list[None] = []
    rows = bench.measure(work, Ceilings(1e4, 1e6), repeats=2, methods=methods, advance=lambda: turns.append(None))
    count = 3.5 * (2 * 2 * 2 * 2 * 8 * 8 * 16) / 2  # rows 2, heads 2; 2 products of 2 n^2 d, forward; half of it
    assert bench.operations(work, 16, 8) == count
    assert bench.least_bytes(work, 16, 8) == 12 * 2 * 2 * 8 * 16 * 4
    assert [row.seconds for row in rows] == [0.25, 0.5, None, None]
    assert [row.ratio for row in rows] == [1.0, 2.0, None, None]
    assert rows[0].operations_per_second == count / 0.25
    assert rows[1].of_ceiling == 12 * 2 * 2 * 8 * 16 * 4 / 1e4 / 0.5  # memory takes longer than the products
    assert [row.note for row in rows] == ["", "", "not installed: flash_attn", "failed: no kernel for this"]
    assert len(turns) == len(methods) * (1 + 2)
    console = Console(width=120)
    with console.capture() as printed:
        console.print(bench.table_of(rows))
    lines = [line for line in printed.get().splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in lines[1].split("│")[1:-1]] == ["16", "8", "torch flash", "500.000", "0", "2.000", "4.92"]


def test_the_clock_and_the_ceilings(device: str) -> None:
    x = torch.randn(200, 200, device=device)
    assert 0 < bench.timed(device, lambda: x.mul_(1.0), 3) < 1
    limits = bench.ceilings(device, copied=2**16, side=64)
    assert limits.bytes > 0
    assert limits.operations > 0


def test_a_device_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is measured on"):
        bench.print_table(TINY, repeats=1)
