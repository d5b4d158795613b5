"""Neighbouring datasets, made at random: whatever is trained and however it is batched, their sums are C apart at most.

One unit is taken out of the data, everybody else is drawn as before, and noise is off. What is released then may differ by that
unit's clipped gradient and by nothing else; and it is the sum over single units, computed one by one, not padded, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.accelerator import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.integrations.accelerate import LoopAdapter
from dp_flash_hf.mechanisms.config import Clipping
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.training.losses import Counted, UnitLoss
from dp_flash_hf.training.session import PrivateTraining
from tests.support.engines import STRATEGIES
from tests.support.fuzz import examples, unchecked
from tests.support.models import VOCABULARY, loss_of, tiny
from tests.support.oracle import apart, clipped_sum, grads, total_norm, unit_gradients
from tests.support.ranks import fresh, noise_if, world
from tests.support.trainers import Example, config, without_dropout

ROUNDING = 1e-5
LONGEST = 5  # of the collator that truncates

Sums = dict[str, Tensor]


class Plain(nn.Module):
    """Two layers of width 16, the first of which attends to what is not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.keys, self.out = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        keys = self.keys(x)
        shares = (keys @ keys.mT).masked_fill(attention_mask.unsqueeze(1) == 0, -torch.inf).softmax(-1)
        logits: Tensor = self.out(torch.tanh(x + shares @ x))
        return logits

    @staticmethod
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """A mean over labels, each with the weight of its row."""
        logits = model(batch["input_ids"], batch["attention_mask"])
        each = F.cross_entropy(logits.mT, batch["labels"], reduction="none") * batch["weight"].unsqueeze(1)
        labelled = batch["labels"] != -100
        total: Tensor = torch.where(labelled, each, 0.0).sum() / labelled.sum()
        return total


@dataclass(frozen=True)
class Collate:
    """Pads, after cutting each text to its own first tokens; `weight` is passed on.

    A causal model needs more to be padded on the left: positions that do not count padding, and no label for a first token,
    which would be predicted from padding where there is some.
    """

    left: bool = False
    most: int | None = None
    weights: bool = False
    causal: bool = False

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        cut = [{**row, **{name: row[name][: self.most] for name in ("input_ids", "attention_mask", "labels")}} for row in rows]
        length = max(len(row["input_ids"]) for row in cut)

        def padded(name: str, value: int) -> Tensor:
            gaps = [[value] * (length - len(row[name])) for row in cut]
            return torch.tensor([gap + row[name] if self.left else row[name] + gap for gap, row in zip(gaps, cut, strict=True)])

        mask = padded("attention_mask", 0)
        batch = {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}
        if self.weights:
            batch["weight"] = torch.tensor([row["weight"] for row in cut], dtype=torch.float64)
        if self.left and self.causal:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            batch["labels"] = batch["labels"].masked_fill(mask.cumsum(1) == 1, -100)
        return batch


@dataclass(frozen=True)
class Way:
    """A model, its loss, and collators that are honest with it."""

    build: Callable[[], Any]
    loss: UnitLoss
    collators: tuple[Callable[[Any], Any], ...]


def _unit_loss(divides: Any, counted: Counted) -> UnitLoss:
    return UnitLoss(lambda batch, num_items: torch.zeros(()), divides, counted)


def plain() -> nn.Module:
    torch.manual_seed(1)
    return Plain().double()


def flash_gpt2() -> Any:
    return without_dropout(tiny("gpt2", attention="dp_flash"))


CUT = Collate(most=LONGEST)
WAYS: dict[str, Way] = {
    "plain": Way(
        plain,
        _unit_loss("mean", "labels"),
        tuple(Collate(left=left, most=most, weights=True) for left in (False, True) for most in (None, LONGEST)),
    ),
    "gpt2": Way(
        flash_gpt2,
        _unit_loss("sum", "shifted labels"),
        (
            Collate(),
            CUT,
            Collate(left=True, causal=True),
            hf.DataCollatorWithFlattening(return_position_ids=True),  # type: ignore[no-untyped-call]
        ),
    ),
    "bert": Way(lambda: without_dropout(tiny("bert")), _unit_loss("mean", "labels"), (Collate(), CUT)),
    "t5": Way(lambda: without_dropout(tiny("t5")), _unit_loss("mean", "labels"), (Collate(), CUT)),
}
model_of = cache(lambda name: WAYS[name].build())


@dataclass(frozen=True)
class Case:
    """Data, who is drawn of them, and how they are computed.

    rows: of the data with all units; `user` names the unit where `by_user`. neighbour: the unit that is drawn in the one and
    does not exist in the other, the first row's number where every row is one. drawn: the others, of those that are drawn.
    """

    model: str
    collator: int
    rows: tuple[Example, ...]
    by_user: bool
    neighbour: int
    drawn: frozenset[int]
    clipping: Clipping
    strategy: Strategy
    bound: float
    max_examples: int
    max_tokens: int | None
    splits: int


def unit_of(case: Case, row: int) -> int:
    user: int = case.rows[row]["user"]
    return user if case.by_user else row


@st.composite
def cases(draw: Any, models: Sequence[str]) -> Case:
    model = draw(st.sampled_from(models))
    n = draw(st.integers(2, 9))
    by_user = draw(st.booleans())
    rows = []
    for row in range(n):
        length = draw(st.integers(0, 8))
        ids = [3 + (7 * row + 11 * place * place + draw(st.integers(0, 3))) % (VOCABULARY - 3) for place in range(length)]
        masked = draw(st.integers(0, length))
        weights = [1.0, 1.0, 0.0, 1e-9, 1e3, 1e9, 1e200, math.inf, math.nan]
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": [-100] * masked + ids[masked:],
                "weight": draw(st.sampled_from(weights)) if model == "plain" else 1.0,
                "user": row if row < 2 else draw(st.integers(0, n // 2)),
            }
        )
    units = sorted({row["user"] for row in rows}) if by_user else list(range(n))
    neighbour = draw(st.sampled_from(units))
    return Case(
        model=model,
        collator=draw(st.integers(0, len(WAYS[model].collators) - 1)),
        rows=tuple(rows),
        by_user=by_user,
        neighbour=neighbour,
        drawn=frozenset(draw(st.sets(st.sampled_from([unit for unit in units if unit != neighbour])))),
        clipping=draw(st.sampled_from(["flat", "automatic", "per_layer"])),
        # Of T5 some batches are computed unit by unit, which a strategy asked for by name refuses.
        strategy=draw(st.sampled_from(("auto", "microbatch") if model == "t5" else STRATEGIES)),
        bound=draw(st.sampled_from([1e-3, 0.5, 30.0])),
        max_examples=draw(st.integers(1, 6)),
        max_tokens=draw(st.sampled_from([None, 4, 20])),
        splits=draw(st.integers(1, 3)),
    )


def released(case: Case, *, neighbour: bool, checked: bool = False) -> Sums:
    """What one step releases, with the neighbour in the data and drawn, or neither; checks of the data only if wanted."""
    way, model = WAYS[case.model], model_of(case.model)
    kept = [row for row in range(len(case.rows)) if neighbour or unit_of(case, row) != case.neighbour]
    order = list(dict.fromkeys(unit_of(case, row) for row in kept))
    drawn = sorted(order.index(unit) for unit in case.drawn | ({case.neighbour} if neighbour else set()))
    adapter = LoopAdapter(model, Accelerator(cpu=True), Plain.loss if case.model == "plain" else None)
    training = PrivateTraining(
        config(
            max_grad_norm=case.bound,
            clipping=case.clipping,
            **({"privacy_unit": "user", "max_examples_per_unit": len(case.rows)} if case.by_user else {}),
        ),
        data := [case.rows[row] for row in kept],
        adapter,
        expected_batch_size=1,
        steps=1,
        epochs=0.0,
        max_examples=case.max_examples,
        max_tokens=case.max_tokens,
        strategy=case.strategy,
    )
    loss = replace(way.loss, model_loss=adapter.model_loss)
    with pytest.MonkeyPatch.context() as patch, noise_if(False), nullcontext() if checked else unchecked(loss):
        patch.setattr(PoissonSampler, "draw", lambda self, *_: torch.tensor(drawn, dtype=torch.long))
        training.start(model, torch.optim.SGD(model.parameters(), lr=0.0))
        try:
            loader = training.loader(data, way.collators[case.collator], steps=1, first_step=0, splits=case.splits)
            training.check(loader)
            for part in loader:
                training.add(part)
            training.mechanism.release()
            return grads(model)
        finally:
            training.stop()
            model.zero_grad()


def one_by_one(case: Case) -> tuple[Sums, Sums]:
    """(the drawn units' clipped sum without the neighbour, the neighbour's clipped gradient), from one text at a time."""
    model, collator = model_of(case.model), WAYS[case.model].collators[case.collator]
    most = collator.most if isinstance(collator, Collate) else None
    gradients = {unit: _gradient(case, model, unit, most) for unit in (case.neighbour, *sorted(case.drawn))}
    zero = {name: torch.zeros_like(g) for name, g in gradients[case.neighbour].items()}
    finite = {unit: g if math.isfinite(total_norm(g)) else zero for unit, g in gradients.items()}
    others = [finite[unit] for unit in sorted(case.drawn)] or [zero]
    return clipped_sum(others, case.bound, case.clipping)[0], clipped_sum([finite[case.neighbour]], case.bound, case.clipping)[
        0
    ]


def _gradient(case: Case, model: Any, unit: int, most: int | None) -> Sums:
    """Of the mean over all labels of a unit, as a sum over its texts."""
    texts = [case.rows[row] for row in range(len(case.rows)) if unit_of(case, row) == unit and case.rows[row]["input_ids"]]
    shift = int(case.model == "gpt2")
    n_labels = sum(label != -100 for text in texts for label in text["labels"][:most][shift:])

    def loss(text: Example) -> Tensor:
        one = Collate(most=most)([text])
        if case.model == "plain":
            logits = model(one["input_ids"], one["attention_mask"])
            total: Tensor = F.cross_entropy(logits[0], one["labels"][0], reduction="sum") * text["weight"]
        else:
            total = loss_of(case.model, model)(one)
        return total.div(n_labels)

    of_texts = unit_gradients(model, loss, texts if n_labels else [])
    named = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    return {name: sum((g[name] for g in of_texts), zero) for name, zero in named.items()}


def check(case: Case, found: tuple[Sums, Sums]) -> None:
    with_it, without = found
    others, own = one_by_one(case)
    allowed = ROUNDING * case.bound
    assert apart(with_it, without) <= case.bound * (1 + ROUNDING)
    assert apart(without, others) <= allowed * max(1, len(case.drawn))
    assert apart(with_it, {name: without[name] + own[name] for name in own}) <= allowed * (1 + len(case.drawn))


def both(case: Case, *, checked: bool = False) -> tuple[Sums, Sums]:
    return released(case, neighbour=True, checked=checked), released(case, neighbour=False, checked=checked)


@pytest.mark.parametrize("n", [15, pytest.param(400, marks=pytest.mark.complete)])
def test_one_unit_of_a_small_model_moves_what_is_released_by_its_clipped_gradient(n: int) -> None:
    @examples(n)
    @given(cases(["plain"]))
    def holds(case: Case) -> None:
        check(case, both(case))

    holds()


@pytest.mark.parametrize("n", [6, pytest.param(120, marks=pytest.mark.complete)])
def test_one_unit_of_a_transformer_moves_what_is_released_by_its_clipped_gradient(n: int) -> None:
    @examples(n)
    @given(cases(["gpt2", "bert", "t5"]))
    def holds(case: Case) -> None:
        check(case, both(case))

    holds()


def both_here(case: Case) -> tuple[Sums, Sums]:
    fresh()
    return both(case)


@pytest.mark.complete
@pytest.mark.parametrize("ranks", [2, 3])
def test_also_over_several_ranks(ranks: int) -> None:
    @examples(100)
    @given(cases(["plain", "gpt2"]))
    def holds(case: Case) -> None:
        found = world(ranks).run(both_here, case)
        for of_rank in found:
            check(case, of_rank)

    holds()
