"""The loss a Transformers model computes: what it is called with, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.engine.model_loss import model_loss, takes
from dp_flash_hf.errors import UnsupportedError


class Model(nn.Module):
    """Returns what it was called with; its loss is their number."""

    def forward(self, labels: Tensor, use_cache: bool = True) -> Any:
        self.given = {"labels": labels, "use_cache": use_cache}
        return SimpleNamespace(loss=torch.tensor(float(len(self.given))))


class Counting(Model):
    def forward(self, labels: Tensor, use_cache: bool = True, **kwargs: Any) -> Any:
        self.given = {"labels": labels, "use_cache": use_cache, **kwargs}
        return SimpleNamespace(loss=torch.tensor(float(len(self.given))))


class Adapted(nn.Module):
    """As PEFT's models: its own forward takes anything."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, **kwargs: Any) -> Any:
        return self.base(**kwargs)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("cls", [Model, Counting])
def test_the_count_is_given_where_it_is_taken(cls: type[Model], adapted: bool) -> None:
    inner = cls()
    model = Adapted(inner) if adapted else inner
    count, labels = torch.tensor(2.0), torch.ones(1)
    assert float(model_loss(model, {"labels": labels}, count)) == 2 + (cls is Counting)
    assert inner.given == {"labels": labels, "use_cache": False, **({"num_items_in_batch": count} if cls is Counting else {})}
    model_loss(model, {"labels": labels})
    assert "num_items_in_batch" not in inner.given


def test_a_cache_that_was_asked_for_is_kept() -> None:
    model = Model()
    model_loss(model, {"labels": torch.ones(1), "use_cache": True})
    assert model.given["use_cache"] is True


def test_a_model_without_a_loss_is_refused() -> None:
    class Headless(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(loss=None)

    with pytest.raises(UnsupportedError, match=r"Headless returned no loss for the inputs \['input_ids'\].*return labels"):
        model_loss(Headless(), {"input_ids": torch.ones(1)})


def test_what_a_function_takes() -> None:
    assert takes(lambda a, num_items_in_batch=None: a, "num_items_in_batch")
    assert takes(lambda **anything: anything, "num_items_in_batch")
    assert not takes(lambda a: a, "num_items_in_batch")
