"""Every architecture of Transformers: exact, or refused. `make coverage` runs all and writes docs/coverage.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.layers import tracking
from dp_flash_hf.layers.experts import Experts, RecordedExperts
from dp_flash_hf.testing import check_exact
from tests.support.coverage_table import render
from tests.support.examination import Examination, examine
from tests.support.zoo import NOT_BUILT, TASKS, class_names

EVERY = [(task, name) for task in TASKS for name in class_names(task)]

# A class that uses the rule, for every rule there is.
RULES = {
    "linear": ("causal-lm", "LlamaForCausalLM"),
    "matmul": ("causal-lm", "FalconForCausalLM"),
    "addmm": ("causal-lm", "GPT2LMHeadModel"),
    "embedding": ("causal-lm", "LlamaForCausalLM"),
    "getitem": ("causal-lm", "WhisperForCausalLM"),
    "layer_norm": ("causal-lm", "GPT2LMHeadModel"),
    "rms_norm": ("", "no class of Transformers"),
    "conv": ("causal-lm", "MambaForCausalLM"),
    "attention": ("image-classification", "SwinForImageClassification"),
    "broadcast": ("causal-lm", "LlamaForCausalLM"),
    "any_operation": ("causal-lm", "GptOssForCausalLM"),
    "Experts": ("causal-lm", "MixtralForCausalLM"),
}


@pytest.mark.coverage
@pytest.mark.parametrize(("task", "name"), EVERY, ids=[f"{task}-{name}" for task, name in EVERY])
def test_exact_or_refused(task: str, name: str, record_property: Callable[[str, object], None]) -> None:
    row = examine(task, name)
    record_property("coverage", asdict(row))
    assert not row.problem, row
    assert bool(row.not_built) == (name in NOT_BUILT), row


class Off:
    """A recorder for which the gradients of one parameter come out a thousandth too large."""

    def __init__(self, recorder: Any, chosen: list[Any]) -> None:
        self.recorder, self.chosen = recorder, chosen

    def __getattr__(self, name: str) -> Any:
        record = getattr(self.recorder, name)
        if name not in ("linear", "linear_rows", "embedding", "per_unit"):
            return record
        signature = inspect.signature(record)
        gradient = "gradients" if name == "per_unit" else "g"

        def off(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            self.chosen.append(bound.arguments["parameter"])
            if self.chosen[0] is self.chosen[-1]:
                bound.arguments[gradient] = bound.arguments[gradient] * 1.001
            record(*bound.args, **bound.kwargs)

        return off


def plant(rule: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make one rule wrong by a thousandth for a single parameter; returns the parameters it has recorded, that one first."""
    chosen: list[Any] = []

    def wrong(tracked: Any) -> None:
        for t in tracked:
            if t is not None:
                t.recorder = Off(t.recorder, chosen)

    def operation(original: Any) -> Any:
        def planted(call: Any, *args: Any, **kwargs: Any) -> Any:
            wrong(call.tracked)
            return original(call, *args, **kwargs)

        return planted

    if rule == "Experts":
        apply = RecordedExperts.apply

        def planted(*args: Any) -> Any:
            wrong(args[4])
            return apply(*args)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(RecordedExperts, "apply", planted)
    for table in (tracking._RULES, tracking._BY_NAME):
        for key, original in list(table.items()):
            if original.__name__ == rule:
                monkeypatch.setitem(table, key, operation(original))  # type: ignore[misc]
    default = [operation(original) if original.__name__ == rule else original for original in tracking._DEFAULT]
    monkeypatch.setattr(tracking, "_DEFAULT", default)
    return chosen


def test_every_rule_has_its_turn() -> None:
    rules = (*tracking._RULES.values(), *tracking._BY_NAME.values(), *tracking._DEFAULT, Experts)
    assert {rule.__name__ for rule in rules} == set(RULES)


@cache
def verdict_of(task: str, name: str) -> str:
    """As it is: several rules are planted in one class."""
    return examine(task, name).verdict


@pytest.mark.sampled(6)
@pytest.mark.parametrize("rule", [rule for rule, (task, _) in RULES.items() if task])
def test_a_thousandth_off_in_one_rule_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the parameter's share of the gradient."""
    assert verdict_of(*RULES[rule]) == "fast"
    chosen = plant(rule, monkeypatch)
    assert examine(*RULES[rule]).verdict == "inexact"
    assert chosen


def test_a_thousandth_off_in_torchs_rms_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3))
    check_exact(model, {"input": torch.randn(4, 5, 6)})
    chosen = plant("rms_norm", monkeypatch)
    with pytest.raises(PrivacyError, match=r"0\.weight \(off by"):
        check_exact(model, {"input": torch.randn(4, 5, 6)})
    assert chosen


def test_padding_that_nothing_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    felt = ("question-answering", "BertForQuestionAnswering")  # its softmax runs over the padding too
    assert examine(*felt).verdict == "one length"
    monkeypatch.setattr("tests.support.examination.check_alone", lambda *args, **kwargs: None)
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
    assert re.search(r"GPT2LMHeadModel \| fast \|.*\|\n\| OPTForCausalLM \| refused: why \|", table)
    assert "| microbatch: a.weight |" in table
