"""Every architecture of Transformers: exact, or refused. `make coverage` runs all and writes docs/coverage.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from dp_flash_hf.records import Recorder
from tests.coverage_table import render
from tests.examination import Examination, examine
from tests.zoo import NOT_BUILT, TASKS, class_names

EVERY = [(task, name) for task in TASKS for name in class_names(task)]

# (method of Recorder that records a gradient, a class that uses it)
RECORDING = [
    ("linear", "causal-lm", "LlamaForCausalLM"),
    ("embedding", "causal-lm", "LlamaForCausalLM"),
    ("bias", "causal-lm", "GPT2LMHeadModel"),
    ("per_unit", "causal-lm", "LlamaForCausalLM"),
]


@pytest.mark.coverage
@pytest.mark.parametrize(("task", "name"), EVERY, ids=[f"{task}-{name}" for task, name in EVERY])
def test_exact_or_refused(task: str, name: str, record_property: Callable[[str, object], None]) -> None:
    row = examine(task, name)
    record_property("coverage", asdict(row))
    assert not row.problem, row
    assert bool(row.not_built) == (name in NOT_BUILT), row


@pytest.mark.parametrize(("method", "task", "name"), RECORDING, ids=[method for method, _, _ in RECORDING])
def test_a_thousandth_off_is_found(method: str, task: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error planted into what a single parameter records, however small its share of the gradient."""
    original = getattr(Recorder, method)
    signature = inspect.signature(original)
    gradient = "gradients" if "gradients" in signature.parameters else "g"
    chosen: list[Any] = []

    def planted(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        if len(bound.arguments["self"]._groups) > 2:  # else a layer being tried by itself, which would lose its rule
            chosen.append(bound.arguments["parameter"])
            if chosen[0] is chosen[-1]:
                bound.arguments[gradient] = bound.arguments[gradient] * 1.001
        original(*bound.args, **bound.kwargs)

    assert examine(task, name).verdict == "fast"
    monkeypatch.setattr(Recorder, method, planted)
    assert examine(task, name).verdict == "inexact"
    assert chosen


def test_padding_that_nothing_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    felt = ("question-answering", "BertForQuestionAnswering")  # its softmax runs over the padding too
    assert examine(*felt).verdict == "one length"
    monkeypatch.setattr("tests.examination.check_padding", lambda *args, **kwargs: None)
    assert examine(*felt).verdict == "inexact"


def test_the_table_counts_and_sorts() -> None:
    rows = [
        Examination("masked-lm", "BertForMaskedLM", slow="a.weight"),
        Examination("causal-lm", "OPTForCausalLM", refused="why"),
        Examination("causal-lm", "GPT2LMHeadModel"),
    ]
    table = render(rows)
    assert table == render(reversed(rows))
    assert "| all | 3 of" in table
    assert re.search(r"GPT2LMHeadModel .* fast \|\n\| OPTForCausalLM .* refused: why \|", table)
    assert "| microbatch: a.weight |" in table
