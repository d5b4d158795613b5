"""DP-SGD as one object: what was planned, what was spent, and the only door through which a gradient reaches the optimizer."""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers.utils import logging

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.spend_log import RecordElsewhere, SpendRecord
from dp_flash_hf.distributed import Ranks, as_gradient, local, part_of
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.gaussian_noise import add_gaussian_noise_, fresh_generator
from dp_flash_hf.reporting.report import PrivacyReport

logger = logging.get_logger(__name__)

_STATE = ("books", "checksum", "config", "noise_multiplier", "sampler", "steps", "taken")  # what a checkpoint holds
_FIXED = ("privacy_unit", "seed")  # of the configuration: what differs in these cannot be composed


class DPSGD:
    """Turns the clipped sums of an engine into noisy gradients, one a step, and accounts for each (Abadi et al. 2016).

        mechanism = DPSGD(config, plan)
        mechanism.start(engine, optimizer)
        for every step:
            engine.backward(...)        # any number of times, also never: an empty draw takes a noisy step like any other
            mechanism.release()         # .grad = (clipped sum + N(0, (sigma C)^2)) / expected batch size
            optimizer.step(); optimizer.zero_grad()

    `optimizer.step()` without `release()`, and a `release()` beyond the planned steps, raise PrivacyError.

    Where torch.distributed runs several ranks, all of them do the same: each runs `engine.backward` on its own share of a draw,
    and `release` adds their sums up, once a step, before it puts the same noise on the same parameters everywhere. Parameters
    are compared between ranks when training starts and after its first step, and one of them after each further step.

    `keep(record)` writes every step to disk before it is released; `load_state_dict` continues a checkpoint. After either, the
    plan is made anew: what was spent already counts, and with target_epsilon nothing is planned beyond the budget.
    """

    def __init__(self, config: PrivacyConfig, plan: PrivacyPlan) -> None:
        self.config = config
        self.taken = 0  # steps of this training that are in the weights: those lost in a crash are not
        self.wanted = plan.steps  # how long this training is to be
        self.record: SpendRecord | RecordElsewhere | None = None
        self._plan, self._continued = plan, False
        self._before: dict[str, Any] | None = None  # state of the last plan, if there was one before this one
        # Who took how many steps. A writer is one run, in one process or one group of ranks, and only ever counts up: of two
        # copies of its count the higher is right, and checkpoints and records of any age and origin can be put together.
        self._writer = secrets.token_hex(8)
        self._books: dict[str, Ledger] = {self._writer: Ledger(plan.accountant)}
        self._engine: ClippingEngine | None = None
        self._handles: list[Any] = []
        self._gradient: Literal["clipped", "released", "used"] = "clipped"
        self._released: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}  # what release() made, and its version
        self._generators: dict[tuple[torch.device, str], torch.Generator] = {}
        self._ranks = Ranks()
        self._steps_here = 0  # since start()

    @property
    def plan(self) -> PrivacyPlan:
        """What this training will do to the data. Raises ValueError if no noise keeps the budget after what was spent."""
        if self._continued:
            self._plan = self._planned_after(self.ledger)
            self._continued = False
            self._tell()
            self._begin()
        return self._plan

    @property
    def ledger(self) -> Ledger:
        """All noisy steps so far: of this run, of those it resumed, and those on record that were lost."""
        return Ledger.total(self._books.values(), self._plan.accountant)

    @property
    def steps(self) -> int:
        """Noisy steps taken so far, in this run, those it resumed and those that were lost."""
        return self.ledger.steps

    @property
    def steps_left(self) -> int:
        """Steps that may still be taken."""
        return self.plan.steps - self.ledger.count(self.plan.sampler, self.plan.noise_multiplier)

    @property
    def recorded(self) -> bool:
        """Whether every step so far was written to disk before it was released."""
        # Of another folder, or of a copy of this one, it is not known what was lost after the checkpoint that was resumed here.
        written = {} if self.record is None else self.record.written
        return self.record is not None and all(own.steps <= written.get(name, 0) for name, own in self._books.items())

    def keep(self, record: SpendRecord | RecordElsewhere) -> None:
        """Write every step to this record before it is released, and count what it holds already.

        Raises PrivacyError where what it holds cannot be put together with this training.
        """
        if record.last is not None:
            self._require_composable(record.last, record.ledgers, f"earlier runs of {record.path}")
        books = {name: own for name, own in self._books.items() if own.steps}
        for name, own in record.ledgers.items():
            books.setdefault(name, Ledger()).raise_to(own)
        books.setdefault(record.name, Ledger())
        self.record, self._writer, self._books = record, record.name, books
        self._before = record.last or self._before
        self._continued = True

    def start(self, engine: ClippingEngine, optimizer: torch.optim.Optimizer) -> None:
        """Guard this optimizer.

        Raises PrivacyError unless it updates exactly the engine's parameters, and the engine clips as the configuration says.
        """
        with Ranks().all_ranks_or_none():
            inner = self._require_fitting(engine, optimizer)
        self.stop()
        self._ranks, self._steps_here, self._generators = Ranks(), 0, {}
        writer = self._ranks.shared(self._writer)  # one name for one training, also where no record gives it
        self._books[writer] = self._books.pop(self._writer)
        self._writer = writer
        described = (
            self.config.to_dict(),
            self.plan.sampler.to_dict(),
            self.plan.noise_multiplier,
            self.plan.steps,
            self.steps,
        )
        if any(other != described for other in self._ranks.gathered(described)):
            raise PrivacyError("ranks have different privacy parameters or books: give all of them the same configuration")
        self._ranks.require_equal([(part_of(p), local(p)) for p in engine.model.parameters()], "parameters")
        self._engine = engine
        self._gradient = "clipped"
        self._handles = [inner.register_step_pre_hook(self._before_step), inner.register_step_post_hook(self._after_step)]

    def _require_fitting(self, engine: ClippingEngine, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer itself, where accelerate wraps it."""
        for name in ("max_grad_norm", "clipping"):
            if getattr(engine, name) != getattr(self.config, name):
                raise PrivacyError(
                    f"the engine clips with {name}={getattr(engine, name)!r} and the configuration says "
                    f"{getattr(self.config, name)!r}, which the report would repeat: make the engine with config.{name}"
                )
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        updated = {p for group in inner.param_groups for p in group["params"] if p.requires_grad}
        if updated != set(engine.parameters):
            missing = [name for p, name in engine.parameters.items() if p not in updated]
            raise PrivacyError(
                f"the optimizer must update exactly the trained parameters: {len(updated - set(engine.parameters))} are not "
                f"the model's, and it lacks {missing[:5]}; create it after freezing and wrapping the model"
            )
        return inner

    def stop(self) -> None:
        """Let go of engine and optimizer; what was spent stays on the books."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._engine, self._released = [], None, {}

    @property
    def released(self) -> bool:
        """Whether gradients with noise wait for `optimizer.step()`."""
        return self._gradient == "released"

    def require_next(self) -> None:
        """Raise PrivacyError where `release` may not be called now."""
        if self._engine is None:
            raise PrivacyError("release() before start(): there is no engine to release gradients of")
        if self._gradient == "released":
            raise PrivacyError("release() twice in one step: call optimizer.step() in between")
        if self.steps_left <= 0:
            raise PrivacyError(f"the {self.plan.steps} planned steps are spent: one more would exceed the privacy budget")

    def release(self) -> None:
        """Noise the clipped sums, once, and make them the gradients of one optimizer step.

        Raises PrivacyError, with nothing released, where the step cannot be put on record.
        """
        sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        with self._ranks.all_ranks_or_none():  # what one rank refuses, no rank releases
            self.require_next()
            assert self._engine is not None
            if self.record is not None:
                self.record.append()
            self._books[self._writer].record(self.plan.sampler, self.plan.noise_multiplier)  # counted before it can be seen
            sums = self._engine.take_sums()
        if self.config.seed is not None:
            self._generators = {}  # a stream for every step
        split = [total for parameter, total in sums.items() if part_of(parameter)]
        part = next((part_of(parameter) for parameter in sums if part_of(parameter)), "")
        self._add_noise(split, part)  # added up already
        for bucket in self._ranks.added_up([total for parameter, total in sums.items() if not part_of(parameter)]):
            self._add_noise(bucket, "")
        for parameter in list(sums):
            total = sums.pop(parameter)
            # A public constant: the drawn size would reveal how many units took part.
            total.div_(self.plan.sampler.expected_batch_size)
            parameter.grad, _ = as_gradient(parameter, total)
            self._released[parameter] = (parameter.grad, local(parameter.grad)._version)
        self._gradient = "released"
        self.taken += 1

    def epsilon(self) -> float:
        """Spent so far, at the plan's delta."""
        return self.ledger.epsilon(self.plan.target_delta)

    def report(self, unit: str | None = None) -> PrivacyReport:
        """What was spent and on which assumptions. unit: see `PrivacyReport.of`."""
        return PrivacyReport.of(
            self.config, self.plan, self.ledger, unit=unit, lost_steps=self.steps - self.taken, recorded=self.recorded
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: public numbers only, no random state."""
        state = {
            **self._plan_state(),
            "taken": self.taken,
            "books": {name: own.state_dict() for name, own in self._books.items() if own.steps},
        }
        return {**state, "checksum": _checksum(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped; what is on this object's books or record beyond that stays spent.

        Raises PrivacyError, with nothing changed, when the state is damaged, or its steps cannot be put together with these:
        those of another privacy unit or number of units, or of a fixed seed.
        """
        if not isinstance(state, dict) or (lacking := sorted(set(_STATE) - state.keys())):
            raise PrivacyError(
                f"the checkpoint's privacy state lacks {lacking if isinstance(state, dict) else 'everything'}, so what was "
                "spent is unknown; start afresh"
            )
        if state["checksum"] != _checksum(state):
            raise PrivacyError(
                "the checkpoint's privacy state is damaged: it is not as it was saved; resume an older checkpoint"
            )
        saved = {name: Ledger() for name in state["books"]}
        for name, own in state["books"].items():
            saved[name].load_state_dict(own)
        self._require_composable(state, saved, "the checkpoint")
        for name, own in saved.items():
            self._books.setdefault(name, Ledger()).raise_to(own)
        self.taken = state["taken"]
        if self.record is None or self.record.last is None:
            self._before = state
        self._continued = True

    def _plan_state(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "config": self.config.to_dict(),
            "sampler": plan.sampler.to_dict(),
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.steps,
        }

    def _require_composable(self, state: dict[str, Any], books: dict[str, Ledger], where: str) -> None:
        mine, units = self.config.to_dict(), self._plan.sampler.n_units
        changed = [(name, state["config"].get(name), mine[name]) for name in _FIXED if state["config"].get(name) != mine[name]]
        theirs = {sampler.n_units for own in books.values() for (sampler, _), _ in own.entries}
        changed += [("n_units", n, units) for n in sorted({state["sampler"]["n_units"], *theirs} - {units})]
        if changed:
            told = ", ".join(f"{name}: {old!r} in {where}, {new!r} now" for name, old, new in changed)
            raise PrivacyError(
                f"what was spent then and what will be cannot be added up ({told}); resume with the same ones, or start afresh "
                "in another folder"
            )
        kinds = {self._plan.sampler.kind} | {sampler.kind for own in books.values() for (sampler, _), _ in own.entries}
        if self.config.accountant != "pld" and kinds != {"poisson"}:
            raise PrivacyError(
                f"accountant {self.config.accountant!r} cannot add up steps of {' and '.join(sorted(kinds))} sampling, some of "
                f"them in {where}; set accountant='pld'"
            )

    def _planned_after(self, spent: Ledger) -> PrivacyPlan:
        """The plan for the rest of this training."""
        plan, before, left = self._plan, self._before, self.wanted - self.taken
        if not spent.steps and before is None:
            return plan
        if left <= 0 and not spent.count(plan.sampler, plan.noise_multiplier):
            # Everything was taken, with other parameters: there is nothing to plan, and what was taken stands for it.
            (sampler, noise_multiplier), _ = spent.entries[-1]
            return replace(plan, sampler=sampler, noise_multiplier=noise_multiplier).after(spent, 0)
        if self.config.target_epsilon is None:
            return plan.after(spent, max(left, 0))
        if before is not None and before["config"] == self.config.to_dict() and before["sampler"] == plan.sampler.to_dict():
            plan = replace(plan, noise_multiplier=before["noise_multiplier"])
            taken = spent.count(plan.sampler, plan.noise_multiplier)
            continued = plan.after(spent, max(0, min(before["steps"] - taken, left)))
            if continued.epsilon() <= self.config.target_epsilon:
                return continued
        sampler = plan.sampler
        return PrivacyPlan.from_config(
            self.config,
            n_units=sampler.n_units,
            expected_batch_size=sampler.expected_batch_size,
            steps=max(left, 1),
            spent=spent,
        )

    def _tell(self) -> None:
        """Say what was found on the books and what follows from it."""
        plan, lost, left = self._plan, self.steps - self.taken, self.wanted - self.taken
        if self.steps:
            logger.info(f"continuing after {self.steps} noisy steps: noise multiplier {plan.noise_multiplier:.4g}")
        if not lost or left <= 0:
            return
        source = "" if self.record is None else f" ({self.record.path})"
        found = (
            f"{lost} noisy steps on the books{source} are not in this model: lost after a checkpoint, or of an earlier training"
        )
        if self.config.target_epsilon is None:
            logger.warning(f"{found}. They count: epsilon will be {plan.epsilon():.4g} at delta {plan.target_delta:g}")
        elif self.steps_left < left:
            logger.warning(f"{found}. They count, so training ends {left - self.steps_left} of {self.wanted} steps early")
        else:
            logger.warning(f"{found}. They count, and the noise of the remaining steps is higher for it")

    def _begin(self) -> None:
        """Tell the record of what kind the next steps are."""
        if self.record is not None:
            known = {name: own.entries for name, own in self.record.ledgers.items()}
            others = {name: own for name, own in self._books.items() if own.entries != known.get(name, ())}
            self.record.begin(self._plan_state(), others)

    def _add_noise(self, sums: Sequence[torch.Tensor], part: str) -> None:
        """Noise on sums of one part of their parameters: the same wherever that part is held, independent on all others."""
        assert self._engine is not None
        std = self.plan.noise_multiplier * self._engine.max_grad_norm
        for device in sorted({total.device for total in sums}, key=str):
            here = [total for total in sums if total.device == device]
            add_gaussian_noise_(here, std=std, generator=self._generator(device, part))

    def _generator(self, device: torch.device, part: str) -> torch.Generator:
        if (device, part) not in self._generators:
            stream = f"noise {part}"
            if self.config.seed is not None:
                made = fresh_generator(device, seed=self.config.seed, stream=f"{stream} step {self.taken + 1} {device.type}")
            else:
                made = self._ranks.generator(device, stream=stream)
            self._generators[device, part] = made
        return self._generators[device, part]

    @staticmethod
    def _only_zeros(optimizer: torch.optim.Optimizer) -> bool:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and all(bool((local(g) == 0).all()) for g in gradients)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._engine is not None
        if self._gradient != "released" and not self._engine.holds_sums and self._only_zeros(optimizer):
            return  # as torch's distributed checkpoints set up an optimizer that they are about to load
        if self._gradient != "released":
            raise PrivacyError("optimizer.step() on gradients without noise: call release() first; nothing was updated")
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise PrivacyError(
                "optimizer.step(closure) computes gradients anew, without noise: use an optimizer without a closure"
            )
        if any(p.grad is not g or local(g)._version != version for p, (g, version) in self._released.items()):
            raise PrivacyError(
                "gradients changed between release() and optimizer.step(), by a backward pass without noise for all that is "
                "known; nothing was updated. Run every backward through the engine, before release()"
            )
        updated = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if foreign := len(updated - set(self._engine.parameters)):
            raise PrivacyError(
                f"{foreign} parameters of the optimizer have gradients without noise: they were unfrozen or added after "
                "training began; nothing was updated. Choose what is trained before trainer.train()"
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._gradient != "released":
            return
        self._gradient, self._released = "used", {}
        assert self._engine is not None
        parameters = list(self._engine.parameters)
        one = parameters[self._steps_here % len(parameters)]
        compared = parameters if self._steps_here == 0 else [one]
        self._ranks.require_equal([(part_of(p), local(p)) for p in compared], "parameters after a step")
        self._steps_here += 1


def _checksum(state: dict[str, Any]) -> int:
    rest = {name: value for name, value in state.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())
