"""Peak memory is that of the work, and of nothing else that a process holds."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from dp_flash_hf.benchmarks.methods import BASELINE, Work, model_of
from dp_flash_hf.benchmarks.timing import peak_memory

TINY = Work(device="cpu", autocast=False, layers=1, width=64, vocabulary=50, batch=3, lengths=(7,), threads=1)


@pytest.mark.complete
def test_peak_memory_is_that_of_the_work() -> None:
    """Weights, gradients and AdamW's two moments at least; and not what this test process or the libraries hold."""
    method = BASELINE if find_spec("opacus") is None else "Opacus ghost"
    work = replace(TINY, width=512, vocabulary=4096)
    parameters = sum(p.numel() for p in model_of(work, 7, "sdpa").parameters())
    held = torch.ones(300 * 2**20, dtype=torch.uint8)
    peak = peak_memory(work, 7, method)
    assert peak is not None
    assert 4 * 4 * parameters <= peak < held.nbytes


@pytest.mark.slow
def test_two_passes_with_checkpointing_take_the_memory_of_training_without_privacy() -> None:
    work = replace(TINY, layers=6, width=384, vocabulary=4096, batch=4, checkpointing=True)
    usual, two_pass, bookkeeping = (
        peak_memory(work, 128, f"{name}, checkpointing") for name in (BASELINE, "dp_flash two_pass", "dp_flash")
    )
    assert usual is not None
    assert two_pass is not None
    assert bookkeeping is not None
    assert two_pass <= 1.10 * usual < bookkeeping
