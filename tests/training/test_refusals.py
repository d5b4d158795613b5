"""Settings of Accelerate and data that no loop can train on privately."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import DistributedType

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.training.refusals import accelerator_refusals, refuse_data

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


PACKED = [{"input_ids": [1, 2], "seq_lengths": [1, 1]}]


@pytest.mark.parametrize("data", [iter([1]), Streaming()], ids=["iterator", "stream with a length"])
def test_data_without_random_access_are_refused(data: Any) -> None:
    with pytest.raises(UnsupportedError, match="a length and random access: load it whole"):
        refuse_data(data)


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
