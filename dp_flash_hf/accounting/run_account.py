"""What a training run has spent, also in earlier runs that it continues, and what it may still do."""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.spend_log import Heads, SpendLog, SpendLogReplica
from dp_flash_hf.distributed import logger_of_all_ranks
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.config import PrivacyConfig

logger = logger_of_all_ranks(__name__)

_STATE = ("checksum", "config", "ledgers", "noise_multiplier", "sampler", "steps", "taken")  # what a checkpoint holds
_FIXED = ("privacy_unit", "seed")  # of the configuration: what differs in these cannot be composed


class RunAccount:
    """Plan, ledgers and spend log of one training run, and of those that it continues.

    `open_spend_log` and `load_state_dict` add what earlier runs spent; `begin` does both, for a training that starts. Each
    makes `plan` again, once: what was spent already counts, and with target_epsilon nothing is planned beyond the budget.

    What is guaranteed:

    - A step that was counted is never forgotten: loading an older checkpoint, or a spend log, only ever adds steps.
    - A step is counted once, in whatever order checkpoints and logs of the same run are loaded, and how often.
    - With target_epsilon, `epsilon()` is at most target_epsilon, and holds whenever and for whatever reason the run ends.

    ==================================================== ==============================================================
    What was spent before                                The plan after it
    ==================================================== ==============================================================
    nothing                                              as it was
    steps of the same kind, noise_multiplier given       the steps that were wanted; epsilon is that of all
    steps of the same kind, target_epsilon given         the same noise, and as many fewer steps as were lost
    other noise, sampling, clipping or budget            with target_epsilon, the noise of the rest is calibrated again
    all wanted steps are in the weights                  no step left
    more than target_epsilon                             ValueError; it counts, and no step is left
    a spend log that a checkpoint knows with more lines  PrivacyError, nothing changed: see `SpendLog.require_continues`
    another privacy unit, number of units, or seed       PrivacyError, nothing changed: such steps cannot be added up
    ==================================================== ==============================================================

    >>> from dp_flash_hf.mechanisms.config import PrivacyConfig
    >>> config = PrivacyConfig(noise_multiplier=1.0, target_delta=1e-5)
    >>> plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=10, steps=5)
    >>> first, second = RunAccount(config, plan), RunAccount(config, plan)
    >>> first.count_step(); first.complete_step()
    >>> second.load_state_dict(first.state_dict())
    >>> second.steps, second.steps_left
    (1, 4)

    Args:
        config: The privacy parameters.
        plan: Of this training alone, before anything is known of earlier runs.

    Attributes:
        config: The privacy parameters.
        plan: What this training will do to the data, after what was spent.
        taken: Steps of this training that are in the weights; those lost in a crash are not.
        spend_log: Where steps are written before they are released; None if nowhere.
    """

    def __init__(self, config: PrivacyConfig, plan: PrivacyPlan) -> None:
        self.config = config
        self.plan = plan
        self.taken = 0
        self.spend_log: SpendLog | SpendLogReplica | None = None
        self._planned = self._plan_values()
        self._wanted = plan  # before anything was known of earlier runs
        self._before: dict[str, Any] | None = None  # state of the last plan, if there was one before this one
        self._extended = False
        self._heads: Heads = {}  # of spend logs, as checkpoints that were loaded know them
        # Who took how many steps. A writer is one run, in one process or one group of ranks, and only ever counts up: of two
        # copies of its count the higher is right, and checkpoints and spend logs of any age and origin can be merged.
        self._writer = secrets.token_hex(8)
        self._ledgers: dict[str, Ledger] = {self._writer: Ledger(plan.accountant)}

    @property
    def ledger(self) -> Ledger:
        """All noisy steps so far: of this run, of those it resumed, and those in the spend log that were lost."""
        return Ledger.total(self._ledgers.values(), self.plan.accountant)

    @property
    def steps(self) -> int:
        """Noisy steps taken so far, in this run, those it resumed and those that were lost."""
        return self.ledger.steps

    @property
    def steps_left(self) -> int:
        """Steps that may still be taken, of the plan's kind."""
        return self.plan.steps - self.ledger.count(self.plan.sampler, self.plan.noise_multiplier)

    @property
    def lost_steps(self) -> int:
        """Steps that count and are not in the weights."""
        return self.steps - self.taken

    @property
    def recorded(self) -> bool:
        """Whether every step so far was written to this spend log before it was released."""
        # Of another folder, or of a copy of this one, it is not known what was lost after the checkpoint that was resumed here.
        written = {} if self.spend_log is None else self.spend_log.written
        return self.spend_log is not None and all(own.steps <= written.get(name, 0) for name, own in self._ledgers.items())

    def begin(self, log: SpendLog | SpendLogReplica, state: dict[str, Any] | None = None) -> None:
        """A training starts, at step 0 or where the checkpoint with this state stopped.

        The plan is made once, from both: what the log alone says may leave no step where the checkpoint explains it.

        Args:
            log: As for `open_spend_log`.
            state: As for `load_state_dict`; None for a training from the beginning, for which all steps so far are lost ones.

        Raises:
            PrivacyError: As `open_spend_log` and `load_state_dict` do, with nothing changed.
            ValueError: Likewise.
        """
        self._continue(log, state, taken=0)

    def open_spend_log(self, log: SpendLog | SpendLogReplica) -> None:
        """Write every step to this log before it is released, and count what it holds already.

        Args:
            log: Open, on the rank that writes it; its replica on all others.

        Raises:
            PrivacyError: What it holds cannot be added up with this training, or it does not hold all that was known of it;
                nothing is changed then.
            ValueError: No noise keeps the budget after it. It is counted then, and no step is left.
        """
        self._continue(log, None, self.taken)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped; what this account or its spend log hold beyond that stays spent.

        Args:
            state: From `state_dict`, of this run or any other on the same data.

        Raises:
            PrivacyError: The state is damaged, or its steps cannot be added up with these: those of another privacy unit or
                number of units, or of a fixed seed; or the spend log does not hold all that the state knows of it. Nothing is
                changed then.
            ValueError: No noise keeps the budget after it. It is counted then, and no step is left.
        """
        self._continue(None, state, self.taken)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON data: public values only, no random state, and a checksum against damage.

        It knows how far the spend log goes, so that whole lines that are cut off it are missed.
        """
        state = {
            **self._plan_state(),
            "taken": self.taken,
            "ledgers": {name: own.state_dict() for name, own in self._ledgers.items() if own.steps},
            "spend_logs": self._known_logs(),
        }
        return {**state, "checksum": _checksum(state)}

    def epsilon(self) -> float:
        """What the plan promises, at its target_delta: also of a run that stops early, whatever it stops for."""
        return self.plan.epsilon()

    def spent_epsilon(self) -> float:
        """The epsilon of all steps so far, lost ones included, at the plan's target_delta; see `Ledger.epsilon`.

        It is a guarantee only if what was released could not decide when the run stopped, nor change its parameters.
        """
        return self.ledger.epsilon(self.plan.target_delta)

    @property
    def extended(self) -> bool:
        """Whether steps were added to a plan after some were taken."""
        return self._extended

    @property
    def writer(self) -> str:
        """The name under which this run counts its steps."""
        return self._writer

    def rename_writer(self, name: str) -> None:
        """Count under this name, also the steps so far: all ranks of a run use one."""
        self._ledgers[name] = self._ledgers.pop(self._writer)
        self._writer = name

    def count_step(self) -> None:
        """Count one step, in the spend log first; when this returns, and not before, its noise may be drawn.

        Raises:
            PrivacyError: The log cannot be written; nothing is counted then.
        """
        if self.spend_log is not None:
            self.spend_log.append()
        self._ledgers[self._writer].record(self.plan.sampler, self.plan.noise_multiplier)

    def complete_step(self) -> None:
        """The step that was counted is released, and goes into the weights."""
        self.taken += 1

    def require_as_planned(self, config: PrivacyConfig) -> None:
        """Raise PrivacyError where the plan, or the configuration, are not those that this account made and was given."""
        if self._planned != self._plan_values() or config.to_dict() != self._planned[0]:
            raise PrivacyError(
                "the plan or the configuration were changed after they were made, and epsilon is that of the old ones: make a "
                "new PrivacyConfig, and a new DPCallback or make_private with it; what was spent counts through the spend log"
            )

    def _plan_values(self) -> tuple[Any, ...]:
        return (self.config.to_dict(), repr(self.plan))

    def close(self) -> None:
        """Let another run write the spend log; this one can release nothing more."""
        if self.spend_log is not None:
            self.spend_log.close()

    def _continue(self, log: SpendLog | SpendLogReplica | None, state: dict[str, Any] | None, taken: int) -> None:
        """Count what a log and a checkpoint's state hold, once both are known to be good, and plan what follows."""
        if log is not None and log.last is not None:
            self._require_composable(log.last, log.ledgers, f"earlier runs of {log.path}")
        saved = {} if state is None else self._ledgers_in(state)
        known, current = {} if state is None else known_logs(state), log or self.spend_log
        if current is not None:
            current.require_continues(self._known_logs(), "this training")
            current.require_continues(known, "the checkpoint")
            if state is not None and "spend_logs" not in state:
                logger.warning(
                    "the checkpoint is of an earlier version, which did not keep in it how far the spend log goes: whole lines "
                    f"that were cut off the end of {current.path} since are not missed"
                )
        self._heads = _furthest(self._known_logs(), known)
        if log is not None:
            self._ledgers = {name: own for name, own in self._ledgers.items() if own.steps}
            self._merge(log.ledgers)
            self._ledgers.setdefault(log.name, Ledger())
            self.spend_log, self._writer = log, log.name
            self._before = log.last or self._before
        self._merge(saved)
        if state is not None and (self._before is None or self.spend_log is None or self.spend_log.last is None):
            self._before = state
        self.taken = taken if state is None else state["taken"]
        self._replan()

    def _known_logs(self) -> Heads:
        return _furthest(self._heads, {} if self.spend_log is None else self.spend_log.head)

    def _ledgers_in(self, state: dict[str, Any]) -> dict[str, Ledger]:
        """The ledgers in a checkpoint's state. Raises PrivacyError unless they are whole, and can be added up with these."""
        if not isinstance(state, dict) or (lacking := sorted(set(_STATE) - state.keys())):
            raise PrivacyError(
                f"the checkpoint's privacy state lacks {lacking if isinstance(state, dict) else 'everything'}, so what was "
                "spent is unknown; resume another checkpoint, or train from the start"
            )
        if state["checksum"] != _checksum(state):
            raise PrivacyError(
                "the checkpoint's privacy state is damaged: it is not as it was saved; resume an older checkpoint"
            )
        saved = {name: Ledger() for name in state["ledgers"]}
        for name, own in state["ledgers"].items():
            saved[name].load_state_dict(own)
        self._require_composable(state, saved, "the checkpoint")
        return saved

    def _require_composable(self, state: dict[str, Any], ledgers: Mapping[str, Ledger], where: str) -> None:
        mine, units = self.config.to_dict(), self.plan.sampler.n_units
        changed = [(name, state["config"].get(name), mine[name]) for name in _FIXED if state["config"].get(name) != mine[name]]
        theirs = {sampler.n_units for own in ledgers.values() for (sampler, _), _ in own.entries}
        changed += [("n_units", n, units) for n in sorted({state["sampler"]["n_units"], *theirs} - {units})]
        if changed:
            differences = ", ".join(f"{name}: {old!r} in {where}, {new!r} now" for name, old, new in changed)
            raise PrivacyError(
                f"what was spent then and what will be cannot be added up ({differences}); resume with the old values, or "
                "start a new training in another folder, whose epsilon adds to this one's"
            )
        kinds = {self._wanted.sampler.kind, state["sampler"]["kind"]} | {
            sampler.kind for own in ledgers.values() for (sampler, _), _ in own.entries
        }
        as_before = state["config"] == mine and state["sampler"] == self._wanted.sampler.to_dict()
        if "truncated_poisson" in kinds and not as_before and self.config.accountant == "pld":
            raise PrivacyError(
                f"parameters differ from those of {where}, and for truncated_poisson sampling, theirs or now, no privacy "
                "filter is known, which such a change needs; keep all privacy parameters, or start afresh in another folder"
            )
        if self.config.accountant != "pld" and kinds != {"poisson"}:
            raise PrivacyError(
                f"accountant {self.config.accountant!r} cannot add up steps of {' and '.join(sorted(kinds))} sampling, some of "
                f"them in {where}; set accountant='pld'"
            )

    def _merge(self, ledgers: Mapping[str, Ledger]) -> None:
        for name, own in ledgers.items():
            self._ledgers.setdefault(name, Ledger()).merge_max(own)

    def _replan(self) -> None:
        spent = self.ledger
        try:
            self.plan = self._planned_after(spent)
        except ValueError:
            self.plan = self._nothing_after(spent)
            raise
        finally:
            self._planned = self._plan_values()
        before = self._before
        if before is not None and spent.steps:
            self._extended = before.get("extended", False) or self.plan.steps > before["steps"]
        self._report_continuation()
        if self.spend_log is not None:
            known = {name: own.entries for name, own in self.spend_log.ledgers.items()}
            others = {name: own for name, own in self._ledgers.items() if own.entries != known.get(name, ())}
            self.spend_log.begin(self._plan_state(), others)

    def _planned_after(self, spent: Ledger) -> PrivacyPlan:
        """The plan for the rest of this training. Raises ValueError where no noise keeps the budget."""
        plan, before, left = self._wanted, self._before, self._wanted.steps - self.taken
        if not spent.steps and before is None:
            return plan
        if left <= 0 and not spent.count(plan.sampler, plan.noise_multiplier):
            return self._nothing_after(spent)  # everything was taken, with other parameters
        if self.config.target_epsilon is None:
            return plan.after(spent, max(left, 0))
        if before is not None and before["config"] == self.config.to_dict() and before["sampler"] == plan.sampler.to_dict():
            plan = replace(plan, noise_multiplier=before["noise_multiplier"])
            taken = spent.count(plan.sampler, plan.noise_multiplier)
            continued = plan.after(spent, max(0, min(before["steps"] - taken, left)))
            if continued.epsilon() <= self.config.target_epsilon:
                return continued
        elif left <= 0:
            return self._nothing_after(spent)  # likewise, and what differs is not the noise
        sampler = plan.sampler
        return PrivacyPlan.from_config(
            self.config,
            n_units=sampler.n_units,
            expected_batch_size=sampler.expected_batch_size,
            steps=max(left, 1),
            spent=spent,
        )

    def _nothing_after(self, spent: Ledger) -> PrivacyPlan:
        """A plan without further steps: what was taken last stands for it, for a plan has at least one step."""
        (sampler, noise_multiplier), _ = spent.entries[-1]
        return replace(self._wanted, sampler=sampler, noise_multiplier=noise_multiplier).after(spent, 0)

    def _plan_state(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "config": self.config.to_dict(),
            "sampler": plan.sampler.to_dict(),
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.steps,
            "extended": self._extended,
        }

    def _report_continuation(self) -> None:
        """Log what was found of earlier runs and what follows from it."""
        plan, lost, left = self.plan, self.lost_steps, self._wanted.steps - self.taken
        if self.steps:
            logger.info(f"continuing after {self.steps} noisy steps: noise multiplier {plan.noise_multiplier:.4g}")
        if not lost or left <= 0:
            return
        source = "" if self.spend_log is None else f" ({self.spend_log.path})"
        found = (
            f"{lost} noisy steps on record{source} are not in this model: lost after a checkpoint, or of an earlier training"
        )
        if self.config.target_epsilon is None:
            logger.warning(f"{found}. They count: epsilon will be {plan.epsilon():.4g} at delta {plan.target_delta:g}")
        elif self.steps_left < left:
            logger.warning(
                f"{found}. They count, so training ends {left - self.steps_left} of {self._wanted.steps} steps early"
            )
        else:
            logger.warning(f"{found}. They count, and the noise of the remaining steps is higher for it")


def known_logs(state: dict[str, Any]) -> Heads:
    """What a checkpoint's state knows of spend logs; {} where it is damaged, or of a version that kept nothing of them."""
    if state.get("checksum") != _checksum(state):
        return {}
    return {first: (lines, last) for first, (lines, last) in state.get("spend_logs", {}).items()}


def _furthest(some: Heads, others: Heads) -> Heads:
    return {first: max(heads[first] for heads in (some, others) if first in heads) for first in some | others}


def _checksum(state: dict[str, Any]) -> int:
    rest = {name: value for name, value in state.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())
