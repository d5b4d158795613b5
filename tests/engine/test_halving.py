"""Batches that do not fit in memory."""

from __future__ import annotations

import contextlib
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.gradient_buffer import GradientBuffer, _Sum
from dp_flash_hf.engine.strategy_selection import StrategySelector
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.units import select_items
from tests.support.engines import interrupted_at
from tests.support.forks import start
from tests.support.models import Toy, toy_batch, toy_loss
from tests.support.oracle import distance, grads


def limited(model: nn.Module, rows: int, error: Callable[[], BaseException], *, layer: str = "head") -> Any:
    """A hook in which batches of more than so many rows do not fit."""

    def refuse(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(output) > rows:
            raise error()

    return model.get_submodule(layer).register_forward_hook(refuse)


def cuda_error() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cpu_error() -> BaseException:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate")


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass", "auto"])
@pytest.mark.parametrize("error", [cuda_error, cpu_error])
@pytest.mark.parametrize("before", [False, True], ids=["first", "added to"])
def test_a_batch_that_does_not_fit_is_computed_in_parts(strategy: Any, error: Any, before: bool) -> None:
    """Down to single units, all of them, users whole; norms stay in the order of the units, and nothing is counted twice."""
    users = torch.tensor([0, 2, 1, 2, 4, 0, 5])  # unit 3 has no rows
    batch = toy_batch(7)
    batch["input_ids"][2] = 1
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1, 3.0])
    outcomes = []
    for rows in (7, 2):
        torch.manual_seed(0)
        model = Toy()
        engine = ClippingEngine(model, max_grad_norm=0.3, strategy=strategy)
        if before:
            engine.backward(toy_loss(model), toy_batch(2, seed=8))
        with torch.no_grad():  # a unit that is dropped, and counted
            handle = model.table.register_forward_hook(lambda m, a, out: torch.where(a[0][..., None] == 1, torch.nan, out))
        engine.backward(toy_loss(model), toy_batch(2), torch.tensor([0, 1]))  # layouts are learnt while there is room
        hook = limited(model, rows, error)
        dropped_before = engine.dropped_units
        with contextlib.nullcontext() if rows == 7 else pytest.warns(UserWarning, match="computed again in two halves"):
            loss = engine.backward(toy_loss(model), batch, users, scale)
        hook.remove()
        handle.remove()
        outcomes.append((grads(model), engine.norms, engine.dropped_units - dropped_before, loss))
    (wanted, norms, dropped, loss), (found, found_norms, found_dropped, found_loss) = outcomes
    assert distance(found, wanted) < 1e-12
    torch.testing.assert_close(found_norms, norms, equal_nan=True)
    assert found_dropped == dropped
    torch.testing.assert_close(found_loss, loss, equal_nan=True)


def test_one_unit_that_does_not_fit_is_an_error() -> None:
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    limited(model, 1, cuda_error)
    with pytest.raises(torch.OutOfMemoryError):
        engine.backward(toy_loss(model), toy_batch(4), torch.tensor([0, 0, 0, 0]))
    assert all(p.grad is None for p in model.parameters())


def test_half_a_batch_is_never_left_in_the_sums() -> None:
    """The last unit does not fit even alone; the halves before it do, and are in."""
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    loss, batch = toy_loss(model), toy_batch(4)
    engine.backward(loss, batch)  # layouts are learnt while there is room
    model.zero_grad()
    last = batch["input_ids"][3]

    def refuse(module: nn.Module, args: Any, output: Tensor) -> None:
        if any(torch.equal(row, last) for row in args[0]):
            raise cuda_error()

    model.table.register_forward_hook(refuse)
    with pytest.warns(UserWarning, match="two halves"), pytest.raises(PrivacyError, match="whole step's sums were dropped"):
        engine.backward(loss, batch)
    assert not engine.holds_sums
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("before", [False, True], ids=["first", "added to"])
def test_no_room_while_sums_are_added_up(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing there before, it is computed again; else half a batch would be in the sums, which are dropped as a whole."""
    torch.manual_seed(0)
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=0.3, strategy="bookkeeping")
    loss, batch = toy_loss(model), toy_batch(4)
    engine.backward(loss, batch)
    wanted = grads(model)
    if not before:
        model.zero_grad()
    calls = iter([None, None, cuda_error()])
    owner: Any = _Sum if before else GradientBuffer
    name = "publish" if before else "_hold"
    method = getattr(owner, name)

    def failing(self: Any, *args: Any) -> Any:
        error = next(calls, None)
        if error is not None:
            raise error
        return method(self, *args)

    monkeypatch.setattr(owner, name, failing)
    if before:
        with pytest.raises(PrivacyError, match="nothing was released"):
            engine.backward(loss, batch)
        assert all(p.grad is None for p in model.parameters())
    else:
        with pytest.warns(UserWarning, match="two halves"):
            engine.backward(loss, batch)
        assert distance(grads(model), wanted) < 1e-12


def scarce() -> None:
    """One batch with 700 MB to spare, then with all there is: how often it was halved, and the norm of a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1 << 16), nn.ReLU(), nn.Linear(1 << 16, 2))
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy="bookkeeping")

    def loss(batch: Any) -> Tensor:
        out: Tensor = model(batch["x"]).square().sum()
        return out

    engine.backward(loss, {"x": torch.randn(3, 16, 8)})  # what is needed once, and layouts
    model.zero_grad()
    batch = {"x": torch.randn(96, 16, 8)}  # 400 MB in each of the hidden activations
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
    for most in (used + 700_000_000, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.backward(loss, batch)
        halved = sum("two halves" in str(w.message) for w in caught)
        print(halved, float(next(iter(grads(model).values())).norm()), flush=True)
        model.zero_grad()


@pytest.mark.complete
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell how much memory is used")
def test_a_real_shortage_of_memory(tmp_path: Path) -> None:
    process = start(scarce, output=tmp_path / "printed")
    process.join()
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 0, printed
    limited, free = (line.split() for line in printed.splitlines())
    assert int(limited[0]) >= 1
    assert int(free[0]) == 0
    assert float(limited[1]) == pytest.approx(float(free[1]), rel=1e-5)


def test_halves_of_a_batch_that_fail_between_each_other_drop_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Toy(), toy_batch()
    engine, loss = ClippingEngine(model, max_grad_norm=0.7, strategy="bookkeeping"), toy_loss(model)
    engine.backward(loss, batch)
    wanted = grads(model)
    model.zero_grad()
    once = interrupted_at(1, MemoryError, StrategySelector.add)
    with monkeypatch.context() as patch:
        patch.setattr("dp_flash_hf.engine.physical_batch.select_items", interrupted_at(2, MemoryError, select_items))
        patch.setattr(StrategySelector, "add", lambda *args: once(*args))
        with pytest.warns(UserWarning, match="two halves"), pytest.raises(PrivacyError, match="whole step's sums were dropped"):
            engine.backward(loss, batch)
    assert not grads(model)
    engine.backward(loss, batch)
    assert distance(grads(model), wanted) == 0.0
