"""The passes that find out where each layer keeps which unit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from tests.support.engines import backward
from tests.support.models import Toy, batch_of, loss_of, tiny, toy_batch, toy_loss
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients


class LabelledOnly(nn.Module):
    """A head for labelled positions only, as ModernBERT's for sparse prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.table(input_ids))[labels != -100])
        return F.cross_entropy(logits, labels[labels != -100], reduction="sum")


def test_a_head_for_labelled_positions_is_not_cut_evenly() -> None:
    """Learnt where every row has two labels, and used where rows have three and one: the average says nothing."""
    model = LabelledOnly()
    engine = ClippingEngine(model, max_grad_norm=0.7)
    ids = torch.arange(20).reshape(4, 5) % 11
    even, uneven = torch.full((2, 4, 5), -100)
    even[:, :2], uneven[:, :1], uneven[::2, 1:3] = ids[:, :2], ids[:, :1], ids[::2, 1:3]
    with pytest.warns(UserWarning, match=r"head\.weight"):
        engine.backward(lambda batch: model(**batch), {"input_ids": ids, "labels": even})
    model.zero_grad()
    batch = {"input_ids": ids, "labels": uneven}
    engine.backward(lambda batch: model(**batch), batch)
    got = grads(model)
    engine.detach()
    wanted, _ = clipped_sum(unit_gradients(model, lambda batch: model(**batch), each_row(batch)), 0.7)
    assert distance(got, wanted) <= 1e-12


def test_probing_keeps_nothing_for_a_backward_pass() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    engine = ClippingEngine(model, max_grad_norm=0.7)
    loss = loss_of("llama", model)
    saved: list[int] = []

    def looked(part: Any) -> Tensor:
        out = loss(part)
        saved.append(sum(t is not None for t in _saved(out.grad_fn)))
        return out

    engine.backward(looked, batch)
    *probing, recording = saved
    assert probing
    assert not any(probing)
    assert recording > 20


def _saved(node: Any) -> list[Any]:
    """What the built-in operations of a graph keep for backward."""
    seen, left, found = set(), [node], []
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                with contextlib.suppress(RuntimeError):  # "a saved tensor was not kept"
                    found.append(getattr(node, name[4:], None))
    return [x for x in found if isinstance(x, Tensor)]


def test_a_loss_that_takes_gradients_is_learnt_with_graphs() -> None:
    model, batch = Toy(), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=0.7)

    def penalized(part: Any) -> Tensor:
        x = torch.ones(3, requires_grad=True)
        (g,) = torch.autograd.grad((x**2).sum(), x, create_graph=True)
        return toy_loss(model)(part) + 0 * g.sum()

    engine.backward(penalized, batch)
    assert not engine._probe.lean
    found = grads(model)
    engine.detach()
    model.zero_grad()
    assert distance(found, backward(model, toy_loss(model), batch, C=0.7)[0]) < 1e-12
