"""Settings of Accelerate and data that no loop can train on privately."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import DistributedType

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.training.refusals import accelerator_refusals, refuse_data, takes_metrics

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("way", ["tp", "cp", "sp"])
def test_other_parallelism_is_refused_by_name(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    assert not any(accelerator_refusals(accelerator).values())
    parallel = types.SimpleNamespace(**{"dp_shard_size": 2, f"{way}_size": 2})
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda self: parallel))
    assert [text for text, found in accelerator_refusals(accelerator).items() if found and "FSDP2 or HSDP" in text]


class Streaming(torch.utils.data.IterableDataset[Any]):
    """With a length, and still read in order only."""

    def __iter__(self) -> Iterator[Any]:
        return iter([])

    def __len__(self) -> int:
        return 3


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    pass


class AnothersPlateau:
    """As of a library of its own, where a metric may be left out."""

    def step(self, epoch: int, metric: float | None = None) -> None: ...


class Wrapped:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self, *args: Any, **kwargs: Any) -> None: ...


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def ring(n: int, *beside: Any) -> Any:
    """Wrappers of which each holds the next one, and the last the first."""
    wrappers = [Wrapped(None) for _ in range(n)]
    for number, wrapper in enumerate(wrappers):
        wrapper.scheduler = [wrappers[(number + 1) % n], *beside]
    return wrappers[0]


class Endless:
    @property
    def scheduler(self) -> Any:
        return Endless()


SCHEDULES: dict[str, tuple[Callable[[], Any], bool]] = {
    "a subclass": (lambda: Plateau(optimizer()), True),
    "of Transformers": (lambda: hf.optimization.GreedyLR(optimizer()), True),
    "of another library": (AnothersPlateau, True),
    "wrapped twice": (lambda: Wrapped(Wrapped(Plateau(optimizer()))), True),
    "one of several": (lambda: Wrapped([torch.optim.lr_scheduler.ConstantLR(optimizer()), Plateau(optimizer())]), True),
    "a chain by steps": (
        lambda: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(optimizer())]),
        False,
    ),
    "one by epochs": (lambda: Wrapped(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), 3)), False),
    "none": (lambda: None, False),
    "wrapped by itself": (lambda: ring(1), False),
    "wrapped by one that it wraps": (lambda: ring(3), False),
    "that, and one of them by results": (lambda: ring(3, Plateau(optimizer())), True),
    "another wrapper whenever it is asked": (Endless, True),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_that_step_by_results_are_known(kind: str) -> None:
    make, takes = SCHEDULES[kind]
    assert takes_metrics(make()) == takes


PACKED = [{"input_ids": [1, 2], "seq_lengths": [1, 1]}]


@pytest.mark.parametrize("data", [iter([1]), Streaming()], ids=["iterator", "stream with a length"])
def test_data_without_random_access_are_refused(data: Any) -> None:
    with pytest.raises(UnsupportedError, match="a length and random access: load it whole"):
        refuse_data(data)


@pytest.mark.parametrize("kind", [dict, datasets.DatasetDict])
def test_several_data_sets_are_refused_with_how_to_make_them_one(kind: Any) -> None:
    one = datasets.Dataset.from_list([{"input_ids": [1]}])
    several = kind(news=one, mail=one)
    with pytest.raises(UnsupportedError, match=r"2 data sets by name \(news, mail\).*concatenate_datasets"):
        refuse_data(several)
    refuse_data(datasets.concatenate_datasets(list(several.values())))


@pytest.mark.parametrize("data", [PACKED, datasets.Dataset.from_list(PACKED)], ids=["list", "datasets"])
def test_rows_of_several_units_are_refused(data: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"packed rows.*one text per row"):
        refuse_data(data)


@pytest.mark.parametrize("data", [[], [3], [{"input_ids": [1]}]], ids=str)
def test_other_data_are_accepted(data: Any) -> None:
    refuse_data(data)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("distributed_type", DistributedType.MEGATRON_LM, "its engine owns backward"),
        ("distributed_type", DistributedType.MULTI_SDAA, "not supported; use DDP or FSDP2"),
        ("mixed_precision", "fp8", "its scaling depends on other units; use 'bf16'"),
    ],
)
def test_a_setting_of_accelerate_is_one_reason(name: str, value: Any, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, name, property(lambda self: value))
    (reason,) = (text for text, found in accelerator_refusals(accelerator).items() if found)
    assert match in reason
