"""The benchmark measures the same work for every method, and says so when one cannot run."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.benchmarks import training as bench
from dp_flash_hf.benchmarks.training import BASELINE, FULL, LORA, MAX_GRAD_NORM, MEMORY, METHODS, VOCABULARY, Work
from dp_flash_hf.cli import main as cli
from dp_flash_hf.kernels.linear_cross_entropy import linear_cross_entropy

TINY = Work(device="cpu", autocast=False, layers=1, width=64, vocabulary=50, batch=3, lengths=(7,), threads=1)


def _row_gradients(model: Any, tokens: Tensor) -> list[list[Tensor]]:
    """Of each row: the gradient of its mean loss, one tensor per trained parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [list(torch.autograd.grad(model(input_ids=row[None], labels=row[None]).loss, trained)) for row in tokens]


@pytest.mark.parametrize(
    ("method", "lora"),
    [*((name, 0) for name in {**METHODS, **FULL, **VOCABULARY, **MEMORY}), *((name, 4) for name in LORA)],
    ids=str,
)
def test_each_method_steps_with_the_gradient_it_claims(method: str, lora: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are clipped to MAX_GRAD_NORM and averaged, except without privacy: a loop over single rows says how."""
    if method.startswith("Opacus"):
        pytest.importorskip("opacus")
    if lora:
        pytest.importorskip("peft")
    work, length = replace(TINY, lora=lora), 7
    if "logits" in method:
        length = 30  # logits larger than the head's gradient, or they are never put off
        formed = _blocks_counted(monkeypatch)
    rows = _row_gradients(bench.model_of(work, length, "sdpa"), bench.tokens_of(work, length))
    norms = [float(torch.cat([g.flatten() for g in row]).norm()) for row in rows]
    assert min(norms) > MAX_GRAD_NORM  # else clipping would change nothing
    factors = [1.0 if method.startswith(BASELINE) else MAX_GRAD_NORM / norm for norm in norms]
    expected = [sum(f * g for f, g in zip(factors, of_rows, strict=True)) / work.batch for of_rows in zip(*rows, strict=True)]

    model, step = {**METHODS, **FULL, **VOCABULARY, **MEMORY}[method](work, length)
    assert getattr(model, "is_gradient_checkpointing", False) == ("checkpointing" in method)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("lora" in name) == bool(lora) for name in trained)
    before = [parameter.detach().clone() for parameter in trained.values()]
    step()
    for (name, parameter), want, old in zip(trained.items(), expected, before, strict=True):
        assert parameter.grad is not None, name
        # float32 sums in another order; Opacus clips to MAX_GRAD_NORM / (norm + 1e-6)
        error = float((parameter.grad - want).norm() / want.norm())
        assert error < 100 * torch.finfo(torch.float32).eps, name
        assert not torch.equal(parameter, old), f"{name} was not updated"
    if "logits" in method:
        assert bool(formed) == (method == "dp_flash, logits in blocks")


def _blocks_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an item for every cross entropy that is computed in blocks."""
    found: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr("dp_flash_hf.layers.logits.linear_cross_entropy", counted)
    return found


def test_peak_memory_is_that_of_the_work() -> None:
    """Weights, gradients and AdamW's two moments at least; and not what this test process or the libraries hold."""
    method = BASELINE if find_spec("opacus") is None else "Opacus ghost"
    work = replace(TINY, width=512, vocabulary=4096)
    parameters = sum(p.numel() for p in bench.model_of(work, 7, "sdpa").parameters())
    held = torch.ones(300 * 2**20, dtype=torch.uint8)
    peak = bench.peak_memory(work, 7, method)
    assert peak is not None
    assert 4 * 4 * parameters <= peak < held.nbytes


def test_the_memory_preset_is_of_the_size_it_says() -> None:
    work = bench.PRESETS["memory"].work
    model = bench.model_of(replace(work, device="meta"), work.lengths[0], "sdpa")
    assert sum(p.numel() for p in model.parameters()) >= 100e6
    names = list(bench.PRESETS["memory"].methods)
    assert names[0] == f"{BASELINE}, checkpointing"  # ratios are to the first


@pytest.mark.slow
def test_two_passes_with_checkpointing_take_the_memory_of_training_without_privacy() -> None:
    work = replace(TINY, layers=6, width=384, vocabulary=4096, batch=4, checkpointing=True)
    usual, two_pass, books = (
        bench.peak_memory(work, 128, f"{name}, checkpointing") for name in (BASELINE, "dp_flash two_pass", "dp_flash")
    )
    assert usual is not None
    assert two_pass is not None
    assert books is not None
    assert two_pass <= 1.10 * usual < books


def test_a_missing_or_failing_peer_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(work: Work, length: int) -> tuple[nn.Module, bench.Step]:
        raise ImportError("No module named 'opacus'")

    def failing(work: Work, length: int) -> tuple[nn.Module, bench.Step]:
        raise RuntimeError("out of memory")

    methods = {BASELINE: METHODS[BASELINE], "Opacus hooks": missing, "Opacus ghost": failing}
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: advance())
    turns: list[None] = []
    rows = bench.measure(TINY, methods, repeats=2, advance=lambda: turns.append(None))
    assert [row.note for row in rows] == ["", "not installed", "failed: out of memory"]
    assert rows[0].ratio == 1.0
    assert rows[1].tokens_per_second is rows[1].ratio is rows[1].memory is None
    assert len(turns) == bench.turns(TINY, methods, 2)


def test_our_own_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(work: Work, length: int) -> tuple[nn.Module, bench.Step]:
        raise RuntimeError("ours")

    methods = {BASELINE: METHODS[BASELINE], "dp_flash": failing}
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: advance())
    with pytest.raises(RuntimeError, match="ours"):
        bench.measure(TINY, methods, repeats=1)


def test_methods_take_turns_in_a_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def logged(name: str) -> Any:
        return lambda work, length: (nn.Linear(1, 1), lambda: order.append(name))

    methods = {name: logged(name) for name in (BASELINE, "dp_flash", "peer")}
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: advance())
    monkeypatch.setattr(bench, "_timed", lambda work, step, count: (step(), 1.0)[1])
    bench.measure(TINY, methods, repeats=3)
    turns = [BASELINE, "dp_flash", "peer", "dp_flash", "peer", BASELINE, "peer", BASELINE, "dp_flash"]
    assert order[6:] == [name for turn in turns for name in (turn, turn)]  # each begins with an untimed step


def test_the_command_prints_one_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "99", "--lengths", "8,12", "--batch", "2"]
    cli.main(["bench", *sizes, "--repeats", "1", "--threads", "1"])
    table, _, below = capsys.readouterr().out.rpartition("┘")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert [row[:2] for row in cells] == [[length, method] for length in ("8", "12") for method in METHODS]
    assert [row[3:] for row in cells if row[1] == BASELINE] == [["1.00", "3", "1.00"]] * 2
    assert "1 layers of width 64, vocabulary 99" in below
    assert "once per logical batch" in below


@pytest.mark.slow
def test_compiled_models_scaled_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "99", "--lengths", "8", "--batch", "2"]
    cli.main(["bench", "--preset", "compile", *sizes, "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    assert all(f"│ {method} " in printed for method in bench.COMPILE)


@pytest.mark.parametrize("preset", ["cuda", "full", "lora", "vocab", "attention"])
def test_cuda_without_a_device_is_refused(
    preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--preset", preset])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("dp-flash: bench: no CUDA device here; ")


def test_presets_for_a_gpu_run_scaled_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--device", "cpu", "--layers", "1", "--width", "64", "--vocabulary", "99", "--lengths", "8", "--batch", "2"]
    cli.main(["bench", "--preset", "lora", *sizes, "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    assert all(f"│ {method} " in printed for method in LORA)
    assert "M are adapters of rank 16, and trained" in " ".join(printed.split())
    assert "bfloat16 autocast" in printed


def test_an_option_that_means_nothing_to_a_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--layers", "2"], ["--padding-free"]):
        with pytest.raises(SystemExit):
            cli.main(["bench", "--preset", "attention", *option])
        assert f"{option[0]} means nothing to --preset attention" in capsys.readouterr().err


@pytest.mark.parametrize("private", [True, False])
def test_padded_and_padding_free_texts_are_the_same_work(private: bool) -> None:
    """Same weights, same texts: the same gradient. Privately, of texts of which each is clipped."""
    work = replace(TINY, batch=6)
    lengths = bench.text_lengths(work)
    assert lengths == bench.text_lengths(work)
    assert len(set(lengths)) > 1
    assert min(bench.BANKING77) <= min(lengths) <= max(lengths) <= max(bench.BANKING77)
    found = []
    for name in ("padded", "padding-free"):
        model, step = bench.ON_TEXTS[f"{'dp_flash' if private else 'non-private'}, {name}"](work, max(lengths))
        step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    if private:
        assert float(found[0].norm()) <= MAX_GRAD_NORM
    assert float((found[0] - found[1]).norm()) < 100 * torch.finfo(torch.float32).eps * float(found[0].norm())


def test_the_table_of_texts_counts_no_padding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "50", "--batch", "3"]
    cli.main(["bench", "--padding-free", *sizes, "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    lengths = bench.text_lengths(replace(TINY, batch=3))
    assert "dp_flash, padding-free" in printed
    assert f"counts their {sum(lengths)} tokens, not the {3 * max(lengths) - sum(lengths)} of padding" in " ".join(
        printed.split()
    )
