"""A private training whose parts are called in any order: weights change by what was released, once each, and by nothing else.

Noise is exchanged for a number that tells which step's it is, so every value that shows up anywhere says where it is from.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import default_collate

from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.integrations.accelerate import LoopAdapter
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.session import PrivateTraining
from tests.support.engines import STRATEGIES
from tests.support.fuzz import examples, unchecked
from tests.support.oracle import clipped_sum, each_row, unit_gradients
from tests.support.trainers import config

N, EXPECTED, STEPS, PARTS, C, RATE = 8, 2, 9, 2, 0.7, 0.5
ROUNDING = 1e-12  # of float64

Gradient = dict[str, Tensor]
ROWS = [
    {"x": row, "y": row.sum()} for row in torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
]


class Line(nn.Module):
    """A linear model with a frozen parameter and a buffer."""

    moved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("moved", torch.zeros(1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x) * self.frozen + self.moved
        return y.squeeze(1)

    @staticmethod
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return mse_loss(model(batch["x"]), batch["y"])


@dataclass(eq=False)
class Saved:
    """A checkpoint: weights, the state of the account, and what the machine knows of both."""

    weights: Gradient
    state: dict[str, Any]
    taken: int


class Training(RuleBasedStateMachine):
    """One folder, in which a training begins, goes on, dies and is resumed."""

    saves = Bundle("saves")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.drawn: list[int] = []
        self.counted = self.taken = self.released = 0
        self.patch.setattr(PoissonSampler, "draw", lambda *_: torch.tensor(self.drawn, dtype=torch.long))
        self.patch.setattr("dp_flash_hf.training.dp_sgd.add_gaussian_noise_", self._mark)

    def _mark(self, tensors: list[Tensor], **settings: Any) -> None:
        """In place of noise: the step's number, times a thousand."""
        for tensor in tensors:
            tensor.add_(1000.0 * self.counted_then)

    def teardown(self) -> None:
        self.training.stop()
        self.patch.undo()
        shutil.rmtree(self.folder)

    # Beginning, and beginning again.

    @initialize(strategy=st.sampled_from(STRATEGIES))
    def begin(self, strategy: Any) -> None:
        self.strategy = strategy
        torch.manual_seed(0)
        self._start({name: value.clone() for name, value in Line().state_dict().items()}, None, 0)

    def _start(self, weights: Gradient, state: dict[str, Any] | None, taken: int) -> None:
        self.model = Line()
        self.model.load_state_dict(weights)
        self.optimizer: Any = torch.optim.SGD(self.model.line.parameters(), lr=RATE)
        self.training = PrivateTraining(
            config(max_grad_norm=C),
            ROWS,
            adapter := LoopAdapter(self.model, Accelerator(cpu=True), Line.loss),
            expected_batch_size=EXPECTED,
            steps=STEPS,
            epochs=0.0,
            max_examples=2,
            max_tokens=None,
            strategy=self.strategy,
        )
        self.mechanism = self.training.mechanism
        self.training.open_spend_log(self.folder / "spend.jsonl", state)
        self.training.start(self.model, self.optimizer)
        with unchecked(UnitLoss(adapter.model_loss, "mean", "rows")):
            self.training.check(self._loader())
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.taken = taken
        self.parts: list[dict[str, Any]] = []
        self.old: list[dict[str, Any]] = []
        self.arrived: dict[int, Gradient] = {}
        self.made: Gradient | None = None  # what was released, and waits for the optimizer
        self.waits = False  # whether something was released, and not used
        self.failed = False  # whether a part could not be computed
        self.usable = True  # whether it is still as it was
        self.logging = True  # whether steps can be written
        self.moved = False  # weights, or other state

    def _loader(self) -> Any:
        return self.training.loader(ROWS, default_collate, steps=1, first_step=self.mechanism.account.taken, splits=PARTS)

    @rule(saved=saves)
    def killed_and_resumed(self, saved: Saved) -> None:
        """Nothing is closed but what the system closes; the checkpoint may be of any age."""
        log = self.mechanism.account.spend_log
        assert isinstance(log, SpendLog)
        if log._file is not None:
            os.close(log._file)
            log._file = None
        self._start(saved.weights, saved.state, saved.taken)

    @rule(saved=saves)
    def stopped_and_resumed(self, saved: Saved) -> None:
        self.training.stop()
        assert all(p.grad is None for p in self.model.parameters())
        self._refused(self.mechanism.release)
        self._start(saved.weights, saved.state, saved.taken)

    @rule(target=saves)
    def save(self) -> Saved:
        return self._saved()

    def _saved(self) -> Saved:
        state = json.loads(json.dumps(self.mechanism.state_dict()))
        return Saved({name: value.clone() for name, value in self.model.state_dict().items()}, state, self.taken)

    @rule(saved=saves)
    def load(self, saved: Saved) -> None:
        """Of the account alone, as where weights were loaded before."""
        self.mechanism.load_state_dict(copy.deepcopy(saved.state))
        self.taken, self.moved = saved.taken, False

    # A step.

    @rule(drawn=st.sets(st.integers(0, N - 1), max_size=5))
    def draw(self, drawn: set[int]) -> None:
        self.old += self.parts
        self.drawn = sorted(drawn)
        self.parts = list(self._loader())

    @rule(part=st.integers(0, PARTS - 1))
    def add(self, part: int) -> None:
        if not self.parts:
            return
        batch = self.parts[part]
        if part in self.arrived or batch["dp_draw"][0] != self.taken:
            self._refused(lambda: self.training.add(batch), "was given where")
            return
        if any(p.grad is not None for p in self.model.parameters()) and len(batch["dp_units"]):
            self._refused(lambda: self.training.add(batch), "not made by the engine|was changed")
            self.arrived[part], self.failed = {}, True
            return
        wanted = self._sum(batch)
        self.training.add(batch)
        self.arrived[part] = wanted
        self.gradients_hold_noise()

    def _sum(self, batch: dict[str, Any]) -> Gradient:
        named = dict(self.model.line.named_parameters(prefix="line"))
        zero = {name: torch.zeros_like(p) for name, p in named.items()}
        if not len(batch["dp_units"]):
            return zero
        rows = each_row({name: batch[name] for name in ("x", "y")})
        kept = {name: p.grad for name, p in named.items()}
        gradients = unit_gradients(self.model, lambda row: Line.loss(self.model, row), rows)
        for name, p in named.items():
            p.grad = kept[name]
        return clipped_sum(gradients, C)[0]

    @rule(target=saves, draws=st.lists(st.sets(st.integers(0, N - 1), max_size=5), min_size=1, max_size=3), steps=st.booleans())
    def go_on(self, draws: list[set[int]], steps: bool) -> Saved:
        """What a loop does, as far as it can; what could be saved before the last step."""
        for drawn in draws:
            saved = self._saved()
            if not self.arrived and not self.waits:
                self.draw(drawn)
            for part in set(range(len(self.parts))) - self.arrived.keys():
                self.add(part)
            self.release("")
            if steps or drawn is not draws[-1]:
                self.step(False)
                self.zero_grad()
        return saved

    @rule(number=st.integers(0, 20), what=st.sampled_from(["old", "changed", "untagged"]))
    def add_what_was_not_drawn_for_this_step(self, number: int, what: str) -> None:
        if not (self.old if what == "old" else self.parts):
            return
        if what == "old":
            batch = self.old[number % len(self.old)]
            if batch["dp_draw"][0] == self.taken:
                return
        else:
            batch = dict(self.parts[number % PARTS])
            if what == "untagged":
                del batch["dp_draw"]
            elif "x" in batch:
                batch["x"] = batch["x"] * 2
            else:
                batch["dp_units"] = torch.tensor([0])
        self._refused(lambda: self.training.add(batch), "was given where|was changed|was not drawn")

    @rule(fails=st.sampled_from(["", "", "", "", "log", "interrupt"]))
    def release(self, fails: str) -> None:
        account = self.mechanism.account
        possible = (
            self.logging
            and not self.moved
            and not self.waits
            and not self.failed
            and account.steps_left > 0
            and len(self.arrived) == PARTS
            and all(p.grad is None for p in self.model.parameters())  # where all parts are empty, those of before may be there
        )
        self.counted_then = self.counted + 1
        if not possible:
            self._refused(self.mechanism.release)
        elif fails == "log":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", _full)
                self._refused(self.mechanism.release, "could not be written")
            self.logging = False
        elif fails == "interrupt":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ClippingEngine, "take_sums", _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    self.mechanism.release()
            self.counted += 1
        else:
            self.mechanism.release()
            self.counted += 1
            self.released += 1
            self.taken += 1
            parts = list(self.arrived.values())
            self.made = {
                name: (torch.stack([part[name] for part in parts]).sum(0) + 1000.0 * self.counted) / EXPECTED
                for name in parts[0]
            }
            self.arrived, self.waits, self.usable = {}, True, True

    @rule(closure=st.booleans())
    def step(self, closure: bool) -> None:
        if closure and self.waits:
            self._refused(lambda: self.optimizer.step(lambda: 0.0), "closure|changed")
        elif not self.waits or not self.usable:
            self._refused(self.optimizer.step, "without noise|gradients changed")
        else:
            assert self.made is not None
            self.optimizer.step()
            self.weights = {
                name: value - RATE * self.made[name] if name in self.made else value for name, value in self.weights.items()
            }
            self.waits = False

    @rule()
    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.usable, self.made = False, None

    @rule()
    def drop_step(self) -> None:
        self.training.drop_step()
        self.arrived, self.failed = {}, False
        self.usable, self.made = False, None

    @rule(drawn=st.sets(st.integers(0, N - 1), min_size=2, max_size=5))
    def give_up(self, drawn: set[int]) -> None:
        """A draw, when some of it was added."""
        self.draw(drawn)
        self.add(0)
        self.drop_step()

    # What nobody may do.

    @rule(how=st.sampled_from(["data", "in place", "other"]))
    def change_what_was_released(self, how: str) -> None:
        weight = self.model.line.weight
        if not self.waits or not self.usable or weight.grad is None:
            return
        assert self.made is not None
        if how == "data":
            weight.grad.data.mul_(2.0)
        elif how == "in place":
            weight.grad.mul_(2.0)
        else:
            weight.grad = weight.grad * 2.0
        self.made = {**self.made, "line.weight": self.made["line.weight"] * 2.0}
        self.usable = False
        self._refused(self.optimizer.step, "gradients changed")

    @rule(what=st.sampled_from(["line.weight", "frozen", "moved"]))
    def move(self, what: str) -> None:
        """Weights or other state, while a draw is computed."""
        if not self.arrived:
            return
        state = self.model.state_dict()[what]
        state.add_(1.0)
        if what in self.weights:
            self.weights[what] = self.weights[what] + 1.0
        self.moved = True
        self._refused(self.mechanism.release)

    @rule()
    def change_the_plan(self) -> None:
        account = self.mechanism.account
        plan = account.plan
        account.plan = replace(plan, steps=plan.steps + 1)
        self._refused(self.mechanism.release)
        account.plan = plan

    def _refused(self, operation: Callable[[], Any], match: str | None = None) -> None:
        """What is refused changes nothing that can be seen."""
        self.counted_then = self.counted + 1
        before = self._seen()
        with pytest.raises(PrivacyError, match=match):
            operation()
        after = self._seen()
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other

    def _seen(self) -> list[Any]:
        account = self.mechanism.account
        tensors = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters())]
        return [account.steps, account.taken, account.steps_left, *(t if t is None else t.clone() for t in tensors)]

    # What always holds.

    @invariant()
    def weights_moved_by_what_was_released(self) -> None:
        for name, p in self.model.named_parameters():
            torch.testing.assert_close(p.detach(), self.weights[name], rtol=ROUNDING, atol=1e-9)

    @invariant()
    def gradients_hold_noise(self) -> None:
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                assert self.made is not None
                torch.testing.assert_close(p.grad, self.made[name], rtol=ROUNDING, atol=1e-9)

    @invariant()
    def steps_count(self) -> None:
        account = self.mechanism.account
        assert account.steps == self.counted >= self.released
        assert account.taken == self.taken
        assert account.steps_left >= 0


def _full(file: int) -> None:
    raise OSError("no space left")


def _interrupted(self: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("n", "steps"), [(20, 25), pytest.param(100, 80, marks=pytest.mark.complete)])
def test_weights_change_by_what_was_released_once_each(n: int, steps: int) -> None:
    run_state_machine_as_test(Training, settings=examples(n, steps=steps))
