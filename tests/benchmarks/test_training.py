"""The benchmark lets methods take turns, prints one table, and says so when one cannot run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_hf.benchmarks import training as bench
from dp_flash_hf.benchmarks.methods import BASELINE, COMPILE, LORA, METHODS, Step, Work, model_of, text_lengths
from dp_flash_hf.cli.main import main

TINY = Work(device="cpu", autocast=False, layers=1, width=64, vocabulary=50, batch=3, lengths=(7,), threads=1)


def test_the_memory_preset_is_of_the_size_it_says() -> None:
    work = bench.PRESETS["memory"].work
    model = model_of(replace(work, device="meta"), work.lengths[0], "sdpa")
    assert sum(p.numel() for p in model.parameters()) >= 100e6
    names = list(bench.PRESETS["memory"].methods)
    assert names[0] == f"{BASELINE}, checkpointing"  # ratios are to the first


def test_a_missing_or_failing_peer_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(work: Work, length: int) -> tuple[nn.Module, Step]:
        raise ImportError("No module named 'opacus'")

    def failing(work: Work, length: int) -> tuple[nn.Module, Step]:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    methods = {BASELINE: METHODS[BASELINE], "Opacus hooks": missing, "Opacus ghost": failing}
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: advance())
    turns: list[None] = []
    rows = bench.measure(TINY, methods, repeats=2, advance=lambda: turns.append(None))
    assert [row.note for row in rows] == ["", "not installed", "failed: out of memory"]
    assert rows[0].ratio == 1.0
    assert rows[1].tokens_per_second is rows[1].ratio is rows[1].memory is None
    assert len(turns) == bench.turns(TINY, methods, 2)


def test_our_own_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(work: Work, length: int) -> tuple[nn.Module, Step]:
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
    monkeypatch.setattr(bench, "timed", lambda work, step, count: (step(), 1.0)[1])
    bench.measure(TINY, methods, repeats=3)
    turns = [BASELINE, "dp_flash", "peer", "dp_flash", "peer", BASELINE, "peer", BASELINE, "dp_flash"]
    assert order[6:] == [name for turn in turns for name in (turn, turn)]  # each begins with an untimed step


def test_the_command_prints_one_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "99", "--lengths", "8,12", "--batch", "2"]
    main(["bench", *sizes, "--repeats", "1", "--threads", "1"])
    table, _, below = capsys.readouterr().out.rpartition("┘")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert [row[:2] for row in cells] == [[length, method] for length in ("8", "12") for method in METHODS]
    assert [row[3:] for row in cells if row[1] == BASELINE] == [["1.00", "3", "1.00"]] * 2
    assert "1 layers of width 64, vocabulary 99" in below
    assert "once per logical batch" in below
    assert " % of a logical batch of 512 rows, dp_flash at length 8." in below


def test_the_share_of_noise_is_that_of_a_logical_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "release_milliseconds", lambda work, length: 100.0)
    ours = bench.Row(length=7, method="dp_flash", tokens_per_second=210.0)  # 3 rows of 7 tokens in a tenth of a second
    others = [bench.Row(length=7, method=BASELINE, tokens_per_second=420.0), bench.Row(length=7, method="dp_flash", note="no")]
    share = 100 / (100 + 512 / 3 * 100)
    line = bench._release_line(TINY, METHODS, [*others, ours])
    assert line.endswith(f"they take 100 ms:\n{100 * share:.2g} % of a logical batch of 512 rows, dp_flash at length 7.")
    assert bench._release_line(TINY, METHODS, others).endswith("they take 100 ms.")


@pytest.mark.complete
def test_compiled_models_scaled_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "99", "--lengths", "8", "--batch", "2"]
    main(["bench", "--preset", "compile", *sizes, "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    assert all(f"│ {method} " in printed for method in COMPILE)


@pytest.mark.parametrize("preset", ["cuda", "full", "lora", "vocab", "attention"])
def test_cuda_without_a_device_is_refused(
    preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--preset", preset])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("dp-flash: bench: no CUDA device here; ")


def test_presets_for_a_gpu_run_scaled_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--device", "cpu", "--layers", "1", "--width", "64", "--vocabulary", "99", "--lengths", "8", "--batch", "2"]
    main(["bench", "--preset", "lora", *sizes, "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    assert all(f"│ {method} " in printed for method in LORA)
    assert "M of them adapters of rank 16, which are trained" in " ".join(printed.split())
    assert "bfloat16 autocast" in printed


def test_an_option_that_means_nothing_to_a_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--layers", "2"], ["--padding-free"]):
        with pytest.raises(SystemExit):
            main(["bench", "--preset", "attention", *option])
        assert f"{option[0]} is not an option of --preset attention" in capsys.readouterr().err


def test_the_table_of_texts_counts_no_padding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda work, length, method, advance: 3 * 2**20)
    monkeypatch.setitem(bench._MEASURED_SECONDS, "cpu", 0.01)
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "50", "--batch", "3"]
    main(["bench", "--padding-free", *sizes, "--repeats", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    lengths = text_lengths(replace(TINY, batch=3))
    assert "dp_flash, padding-free" in printed
    assert f"counts their {sum(lengths)} tokens, not the {3 * max(lengths) - sum(lengths)} of padding" in " ".join(
        printed.split()
    )
