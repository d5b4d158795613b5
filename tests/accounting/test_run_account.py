"""What was spent is never forgotten, counted once, and decides what may follow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.privacy_filter import filter_epsilon
from dp_flash_hf.accounting.run_account import _checksum
from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.reporting.report import CHANGED_NOT_COVERED, EXTENDED_NOT_COVERED, PrivacyReport
from tests.support.gates import STEPS, dpsgd, logged, read, run, started, step, steps_in, taken
from tests.support.models import Toy
from tests.support.trainers import attached, trainer_for


def test_state_is_public_json_and_continues() -> None:
    mechanism, _, optimizer = started(Toy())
    mechanism.release()
    optimizer.step()
    state = json.loads(json.dumps(mechanism.state_dict(), sort_keys=True))  # in another order
    plan = {"config", "sampler", "noise_multiplier", "steps", "extended"}
    assert state.keys() == plan | {"ledgers", "taken", "spend_logs", "checksum"}
    again = dpsgd()
    again.load_state_dict(state)
    assert (again.account.steps, again.account.steps_left, again.spent_epsilon()) == (1, STEPS - 1, mechanism.spent_epsilon())


def test_loading_never_forgets_what_was_spent() -> None:
    mechanism, _, optimizer = started(Toy())
    state = mechanism.state_dict()
    mechanism.release()
    optimizer.step()
    mechanism.load_state_dict(state)  # going back to an earlier checkpoint does not take a step back
    assert mechanism.account.steps == 1


def test_a_calibrated_plan_is_continued_with_its_own_noise() -> None:
    """Resumed with more steps, a run would otherwise be calibrated again, and the two parts exceed the budget in all."""
    first = dpsgd(target_epsilon=2.0, noise_multiplier=None)
    again = dpsgd(steps=5 * STEPS, target_epsilon=2.0, noise_multiplier=None)
    assert again.account.plan.noise_multiplier > 1.1 * first.account.plan.noise_multiplier
    again.load_state_dict(first.state_dict())
    assert (again.account.plan.noise_multiplier, again.account.plan.steps) == (first.account.plan.noise_multiplier, STEPS)
    assert again.account.plan.epsilon() <= 2.0


def test_a_calibrated_plan_keeps_its_noise_when_it_loads_a_checkpoint_of_its_own(path: Path) -> None:
    """With a log that was new when it began, and so knew of no plan."""
    mechanism, optimizer = logged(path, target_epsilon=2.0, noise_multiplier=None)
    plan = mechanism.account.plan
    step(mechanism, optimizer)
    state = mechanism.state_dict()
    step(mechanism, optimizer)
    mechanism.load_state_dict(state)
    assert (mechanism.account.plan, mechanism.account.steps_left) == (plan, STEPS - 2)


def test_a_calibrated_plan_that_continues_a_checkpoint_is_kept_by_a_new_log(path: Path) -> None:
    first = taken(dpsgd(target_epsilon=2.0, noise_multiplier=None), 1)
    again = dpsgd(steps=5 * STEPS, target_epsilon=2.0, noise_multiplier=None).account
    again.load_state_dict(first.state_dict())
    plan, log = again.plan, SpendLog(path)
    again.open_spend_log(log)
    log.close()
    assert (again.plan, again.steps_left, plan.noise_multiplier) == (plan, STEPS - 1, first.account.plan.noise_multiplier)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n": 60}, "n_units: 50 in the checkpoint, 60 now"),
        ({"sampling": "truncated_poisson", "max_batch_size": 20}, "cannot add up steps of .*truncated.*set accountant='pld'"),
        (
            {"sampling": "truncated_poisson", "max_batch_size": 20, "accountant": "pld"},
            "truncated_poisson sampling.*no privacy filter is known.*start afresh",
        ),
        ({"privacy_unit": "user", "max_examples_per_unit": 2}, "privacy_unit: None in the checkpoint, 'user' now"),
        ({"seed": 1}, "seed: None in the checkpoint, 1 now"),
    ],
    ids=str,
)
def test_what_cannot_be_added_up_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(PrivacyError, match=match):
        dpsgd(**changes).load_state_dict(taken(dpsgd(), 1).state_dict())


def test_truncated_draws_go_on_as_they_were_or_not_at_all() -> None:
    truncated: dict[str, Any] = {"sampling": "truncated_poisson", "max_batch_size": 20, "accountant": "pld"}
    state = taken(dpsgd(**truncated), 1).state_dict()
    again = dpsgd(**truncated).account
    again.load_state_dict(state)
    assert (again.steps, again.steps_left) == (1, STEPS - 1)
    for changes in ({"expected": 6}, {"max_grad_norm": 3.0}, {"sampling": "poisson", "max_batch_size": None}):
        with pytest.raises(PrivacyError, match="no privacy filter is known"):
            dpsgd(**{**truncated, **changes}).load_state_dict(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"expected": 6},
        {"noise_multiplier": 2.0},
        {"max_grad_norm": 3.0},
        {"unit_loss": "sum"},
        {"target_delta": 1e-4},
    ],
    ids=str,
)
def test_steps_of_other_kinds_are_added_up(changes: dict[str, Any]) -> None:
    """Both parts of a training count, and it goes on for the steps that were wanted."""
    first = taken(dpsgd(accountant="pld"), 2)
    again = dpsgd(steps=5, accountant="pld", **changes)
    delta = again.config.target_delta
    alone = again.account.plan.epsilon(3)
    again.load_state_dict(first.state_dict())
    assert (again.account.steps, again.account.steps_left) == (2, 3)
    assert again.spent_epsilon() == first.account.ledger.epsilon(delta)
    report = taken(again, 3).report()
    assert (report.steps, report.planned_steps, report.lost_steps) == (5, 5, 0)
    by_hand = Ledger.total([first.account.ledger], "pld")
    by_hand.record(again.account.plan.sampler, again.account.plan.noise_multiplier, 3)
    assert report.spent_epsilon == by_hand.epsilon(delta) > max(alone, first.account.ledger.epsilon(delta))
    assert report.epsilon == again.epsilon() == again.account.plan.epsilon()
    if len(by_hand.entries) == 1:  # clipping and delta are no parameters of how steps add up
        assert report.epsilon == report.spent_epsilon
    else:  # changed by what may have been seen: the promise is that of a filter, and more than that of fixed steps
        assert report.epsilon == pytest.approx(filter_epsilon(by_hand.entries, delta), rel=1e-3)
        assert report.epsilon > report.spent_epsilon
        assert (report.accountant, CHANGED_NOT_COVERED in report.not_covered) == ("pld, filter", True)
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        again.release()


def test_the_noise_of_the_rest_keeps_a_changed_budget() -> None:
    first = taken(dpsgd(target_epsilon=2.0, noise_multiplier=None), 2)
    more = dpsgd(steps=10, target_epsilon=6.0, noise_multiplier=None)
    alone = more.account.plan.noise_multiplier
    more.load_state_dict(first.state_dict())
    assert more.account.steps_left == 8
    assert more.account.plan.noise_multiplier > alone
    assert 0.999 * 6.0 <= taken(more, 8).epsilon() <= 6.0
    less = dpsgd(steps=10, target_epsilon=0.9 * first.spent_epsilon(), noise_multiplier=None)
    with pytest.raises(ValueError, match="target_epsilon: expected a budget that some noise keeps"):
        less.load_state_dict(first.state_dict())
    assert (less.account.steps, less.account.steps_left) == (2, 0)  # what was spent counts, and nothing may follow


def test_a_run_that_stops_early_promises_what_it_planned() -> None:
    """Killed, or stopped by what was seen: what it released is a part of what the whole run would have released."""
    for took in (0, 1, STEPS - 1, STEPS):
        mechanism = taken(dpsgd(accountant="pld"), took)
        report = mechanism.report()
        assert report.epsilon == mechanism.epsilon() == mechanism.account.plan.epsilon(STEPS)
        assert report.spent_epsilon == mechanism.spent_epsilon() == mechanism.account.plan.epsilon(took)
        assert (report.spent_epsilon < report.epsilon) == (took < STEPS)


def test_a_plan_made_longer_afterwards_is_said() -> None:
    first = taken(dpsgd(), 2)
    longer = dpsgd(steps=STEPS + 4)
    longer.load_state_dict(first.state_dict())
    again = dpsgd(steps=STEPS + 4)
    again.load_state_dict(taken(longer, 1).state_dict())
    same, not_begun = dpsgd(), dpsgd(steps=STEPS + 4)
    same.load_state_dict(first.state_dict())
    not_begun.load_state_dict(dpsgd().state_dict())
    said = [EXTENDED_NOT_COVERED in m.report().not_covered for m in (first, longer, again, same, not_begun)]
    assert said == [False, True, True, False, False]


def test_a_plan_made_longer_by_a_run_that_is_lost_is_said_too(path: Path) -> None:
    """The log has it, and the checkpoint before it, from which a plan goes on that is no longer than the first, has not."""
    first = taken(dpsgd(), 1)
    longer, optimizer = logged(path, steps=STEPS + 4)
    longer.load_state_dict(first.state_dict())
    run(longer, optimizer, 1)
    again = dpsgd(steps=STEPS - 1).account
    log = SpendLog(path)
    again.begin(log, first.state_dict())
    assert again.plan.steps == STEPS
    log.close()
    assert (first.account.extended, longer.account.extended, again.extended) == (False, True, True)


@pytest.mark.parametrize("changes", [{"noise_multiplier": 2.0}, {"target_epsilon": 50.0, "noise_multiplier": None}])
def test_a_training_that_is_done_is_not_planned_anew(changes: dict[str, Any]) -> None:
    done = taken(dpsgd(), STEPS)
    again = dpsgd(**changes)
    again.load_state_dict(done.state_dict())
    assert (again.account.steps_left, again.epsilon(), again.spent_epsilon()) == (0, done.epsilon(), done.epsilon())
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        taken(again, 1)


@pytest.mark.parametrize("noise", [{"noise_multiplier": 1.0}, {"noise_multiplier": None, "target_epsilon": 2.0}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"steps": STEPS - 1}, {"max_grad_norm": 3.0}, {"unit_loss": "sum"}], ids=str)
def test_a_training_that_is_done_has_no_step_left_whatever_else_is_changed(
    changes: dict[str, Any], noise: dict[str, Any]
) -> None:
    """Nor is one looked for: where noise is calibrated, to what it was, one step more would not keep the budget."""
    done = taken(dpsgd(**noise), STEPS)
    again = dpsgd(**noise, **changes)
    again.load_state_dict(done.state_dict())
    assert (again.account.steps_left, again.epsilon()) == (0, done.epsilon())


def test_what_is_left_has_the_noise_that_was_asked_for_whatever_was_loaded_before() -> None:
    done = taken(dpsgd(), 1)
    early, late = done.state_dict(), taken(done, STEPS - 1).state_dict()
    again = dpsgd(noise_multiplier=2.0)
    again.load_state_dict(late)
    assert again.account.steps_left == 0
    again.load_state_dict(early)  # of whose training two steps are still to be taken, now with other noise
    assert (again.account.steps, again.account.steps_left) == (STEPS, STEPS - 1)
    assert again.account.plan.noise_multiplier == 2.0


def test_ledgers_of_several_origins_are_merged_once() -> None:
    """A checkpoint that is loaded twice does not count twice; steps taken since, and in other runs, are not forgotten."""
    first = taken(dpsgd(steps=20), 2)
    early = first.state_dict()
    late = taken(first, 1).state_dict()
    other = taken(dpsgd(steps=20), 4)
    for state in (late, early, late):
        other.load_state_dict(state)
    assert other.account.steps == 4 + 3
    assert other.account.taken == 3
    assert other.report().lost_steps == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("taken", 7),
        ("taken", "x"),
        ("steps", 0),
        ("noise_multiplier", -1.0),
        ("sampler", {"kind": "other"}),
        ("config", {}),
        ("ledgers", [1]),
        ("checksum", 5),
    ],
)
def test_damaged_state_is_refused_and_nothing_changed(key: str, value: Any) -> None:
    mechanism = taken(dpsgd(), 1)
    before = mechanism.state_dict()
    with pytest.raises(PrivacyError, match=r"damaged.*resume an older checkpoint"):
        mechanism.load_state_dict({**taken(dpsgd(), 2).state_dict(), key: value})
    assert mechanism.state_dict() == before


@pytest.mark.parametrize("missing", ["config", "sampler", "noise_multiplier", "steps", "ledgers", "taken", "checksum"])
def test_incomplete_state_is_refused(missing: str) -> None:
    state = dpsgd().state_dict()
    del state[missing]
    with pytest.raises(PrivacyError, match=rf"lacks \['{missing}'\].*train from the start"):
        dpsgd().load_state_dict(state)


def test_a_fresh_start_continues_the_spend_log(path: Path) -> None:
    """With noise given, all steps that are wanted are taken, and epsilon is that of all."""
    mechanism, optimizer = logged(path)
    run(mechanism, optimizer, 2)
    again, optimizer = logged(path)
    assert again.account.steps_left == 3
    run(again, optimizer, 3)
    report = again.report()
    assert (report.steps, report.lost_steps, report.planned_steps) == (5, 2, 5)
    assert report.epsilon == again.account.plan.epsilon(5) > mechanism.account.plan.epsilon(3)
    assert not any("lost in a crash" in gap.lower() for gap in report.not_covered)
    assert any("lost in a crash" in gap for gap in dpsgd().report().not_covered)


def test_with_a_budget_lost_steps_are_not_taken_again(path: Path) -> None:
    budget: dict[str, Any] = {"target_epsilon": 2.0, "noise_multiplier": None}
    mechanism, optimizer = logged(path, steps=8, **budget)
    run(mechanism, optimizer, 5)
    again, optimizer = logged(path, steps=8, **budget)
    assert again.account.plan == mechanism.account.plan
    assert again.account.steps_left == 3
    run(again, optimizer, 3)
    assert again.epsilon() == mechanism.account.plan.epsilon() <= 2.0
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        again.release()


def test_a_checkpoint_does_not_count_twice_beside_its_spend_log(path: Path) -> None:
    mechanism, optimizer = logged(path, steps=20)
    run(mechanism, optimizer, 2)
    early = mechanism.state_dict()
    again, optimizer = logged(path, steps=20)
    again.load_state_dict(early)
    assert (again.account.steps, again.account.taken) == (2, 2)
    run(again, optimizer, 3)
    late, optimizer = logged(path, steps=20)
    late.load_state_dict(early)
    assert (late.account.steps, late.account.taken, late.report().lost_steps) == (5, 2, 3)
    run(late, optimizer, 0)


def test_steps_of_another_folder_are_carried_over(path: Path, tmp_path: Path) -> None:
    """Resumed in another folder, its spend log knows what came before, also when all that followed is lost."""
    mechanism, optimizer = logged(path, steps=20)
    run(mechanism, optimizer, 4)
    other_folder = tmp_path / "other"
    moved, optimizer = logged(other_folder, steps=20)
    moved.load_state_dict(mechanism.state_dict())
    run(moved, optimizer, 3)
    fresh, optimizer = logged(other_folder, steps=20)
    assert fresh.account.steps == 7
    fresh.load_state_dict(mechanism.state_dict())
    assert fresh.account.steps == 7
    run(fresh, optimizer, 1)
    assert steps_in(other_folder) == 8
    assert steps_in(path) == 4


MISSING = r"steps are missing from the spend log .*spend.jsonl: (the checkpoint|this training) knows {} lines of it, and {}\."


@pytest.mark.parametrize("order", ["log, then state", "state, then log", "both at once"])
@pytest.mark.parametrize("lines", [1, 3, 4, 6], ids="{} of 7 lines left".format)
def test_whole_lines_cut_off_the_spend_log_are_missed(lines: int, order: str, path: Path, tmp_path: Path) -> None:
    """Be it two runs of two and three steps with a line each before: an older copy of the log is one that was cut."""
    mechanism, optimizer = logged(path, steps=20)
    run(mechanism, optimizer, 2)
    again, optimizer = logged(path, steps=20)
    again.load_state_dict(mechanism.state_dict())
    run(again, optimizer, 3)
    state = json.loads(json.dumps(again.state_dict()))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))

    account = dpsgd(steps=20).account
    if order == "state, then log":
        account.load_state_dict(state)
    log = SpendLog(path)
    if order == "log, then state":
        account.open_spend_log(log)
    before = (account.plan, account.ledger.entries, account.taken, account.state_dict())
    combine: dict[str, Callable[[], None]] = {
        "log, then state": lambda: account.load_state_dict(state),
        "state, then log": lambda: account.open_spend_log(log),
        "both at once": lambda: account.begin(log, state),
    }
    with pytest.raises(PrivacyError, match=MISSING.format(7, f"it has {lines}") + r".*Put back the file.*another folder"):
        combine[order]()
    assert (account.plan, account.ledger.entries, account.taken, account.state_dict()) == before
    log.close()
    elsewhere, optimizer = logged(tmp_path / "elsewhere", steps=20)  # as the message says
    elsewhere.load_state_dict(state)
    run(elsewhere, optimizer, 1)
    assert (elsewhere.account.steps, steps_in(tmp_path / "elsewhere")) == (6, 6)


def test_a_cut_is_missed_after_steps_in_another_folder_too(path: Path, tmp_path: Path) -> None:
    """What is known of a log stays known where a checkpoint goes on beside another one, or beside none."""
    mechanism, optimizer = logged(path, steps=20)
    run(mechanism, optimizer, 3)
    elsewhere, optimizer = logged(tmp_path / "elsewhere", steps=20)
    elsewhere.load_state_dict(mechanism.state_dict())
    run(elsewhere, optimizer, 1)
    unlogged = dpsgd(steps=20)
    unlogged.load_state_dict(elsewhere.state_dict())
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    back, _ = logged(path, steps=20)
    with pytest.raises(PrivacyError, match=MISSING.format(4, "it has 3")):
        back.load_state_dict(unlogged.state_dict())


@pytest.mark.parametrize(("cut", "more"), [(1, 5), (2, 1)], ids=["and is longer now", "and is as long"])
def test_a_log_that_was_cut_and_went_on_is_seen(cut: int, more: int, path: Path) -> None:
    mechanism, optimizer = logged(path, steps=20)
    run(mechanism, optimizer, 3)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-cut]))
    again, optimizer = logged(path, steps=20)
    run(again, optimizer, more)  # nobody knows yet
    again, _ = logged(path, steps=20)
    with pytest.raises(PrivacyError, match=MISSING.format(4, "they are not the same")):
        again.load_state_dict(mechanism.state_dict())


def test_the_state_of_a_run_knows_the_log_as_it_is(path: Path) -> None:
    """Also before the first line, and of ranks that do not write; to load it again, now or later, is no cut."""
    mechanism, optimizer = logged(path, steps=20)
    states = [mechanism.state_dict()]
    assert states[0]["spend_logs"] == {}
    for _ in range(3):
        step(mechanism, optimizer)
        states.append(mechanism.state_dict())
        mechanism.load_state_dict(states[0])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert states[-1]["spend_logs"] == {lines[0]["hash"]: (len(lines), lines[-1]["hash"])}
    assert lines[0]["key"] not in json.dumps(states)  # or guesses at the data could be checked
    mechanism.account.close()

    log = SpendLog(path)
    other = dpsgd(steps=20).account
    other.begin(log.replica(), states[-1])
    log.close()
    other.count_step()
    other.load_state_dict(states[-1])
    assert other.state_dict()["spend_logs"] == states[-1]["spend_logs"]


def test_a_state_of_an_earlier_version_does_not_miss_lines_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mechanism, optimizer = logged(path, steps=20)
    run(mechanism, optimizer, 3)
    state = mechanism.state_dict()
    del state["spend_logs"], state["extended"]
    state["checksum"] = _checksum(state)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    again, optimizer = logged(path, steps=20)
    again.load_state_dict(state)
    assert (again.account.steps, again.account.recorded) == (3, False)
    assert "of an earlier version" in caplog.text
    assert "are not missed" in caplog.text
    elsewhere = dpsgd(steps=20).account
    elsewhere.load_state_dict(state)
    assert not elsewhere.extended


@pytest.mark.parametrize("alive", [False, True])
def test_copies_of_a_folder_that_both_went_on_are_merged(alive: bool, path: Path) -> None:
    """Both began with the same steps, and took others then. Neither log holds those of the other, and a third holds all."""
    first, first_optimizer = logged(path, steps=30)
    for _ in range(4):
        step(first, first_optimizer)
    if not alive:
        run(first, first_optimizer, 0)
    copy = path.parent.with_name("copy") / path.name
    shutil.copytree(path.parent, copy.parent)
    if alive:
        here = first
        run(here, first_optimizer, 3)
    else:
        here, optimizer = logged(path, steps=30)
        here.load_state_dict(first.state_dict())
        run(here, optimizer, 3)
    there, optimizer = logged(copy, steps=30)
    run(there, optimizer, 2)
    assert (here.account.steps, there.account.steps) == (4 + 3, 4 + 2)

    for place, brought in ((path, there), (copy, here)):
        merged, optimizer = logged(place, steps=30)
        with pytest.raises(PrivacyError, match=r"steps are missing from .*a copy of its folder went on by itself"):
            merged.load_state_dict(brought.state_dict())
        run(merged, optimizer, 0)
    third = path.parent.with_name("third") / path.name
    merged, optimizer = logged(third, steps=30)
    for brought in (there, here):
        merged.load_state_dict(brought.state_dict())
    assert merged.account.steps == 4 + 3 + 2
    run(merged, optimizer, 1)
    assert steps_in(third) == 4 + 3 + 2 + 1
    assert merged.report().parts == ({"steps": 10, "sampler": merged.account.plan.sampler.to_dict(), "noise_multiplier": 1.0},)


@pytest.mark.complete
def test_a_checkpoint_of_a_copied_output_folder(tmp_path: Path) -> None:
    """As `Trainer` resumes it: 2 steps in both folders, 2 more here, 1 more there, and then 1 in a folder of its own."""

    def trained(folder: Path, steps: int, resume: Path | None) -> PrivacyReport:
        trainer = trainer_for("gpt2", folder, max_steps=steps, save_strategy="steps", save_steps=1)
        dp = attached(trainer)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return dp.report()

    here, there = tmp_path / "here", tmp_path / "there"
    trained(here, 2, None)
    shutil.copytree(here, there)
    assert trained(here, 4, here / "checkpoint-2").steps == 4
    assert trained(there, 3, there / "checkpoint-2").steps == 3
    with pytest.raises(PrivacyError, match=r"steps are missing from .*/there/.*copy of its folder went on.*another folder"):
        trained(there, 5, here / "checkpoint-4")
    report = trained(tmp_path / "third", 5, here / "checkpoint-4")
    assert (report.steps, report.lost_steps) == (2 + 2 + 1, 0)


def test_what_was_taken_in_another_folder_is_not_on_record_here(path: Path) -> None:
    """What it lost there after its checkpoint is not known."""
    first, optimizer = logged(path, steps=30)
    run(first, optimizer, 2)
    other = path.parent.with_name("other") / path.name
    there, optimizer = logged(other, steps=30)
    there.load_state_dict(first.state_dict())
    assert (there.account.steps, there.account.recorded) == (2, False)
    run(there, optimizer, 1)
    later, _ = logged(other, steps=30)  # which the spend log carries over
    assert (later.account.steps, later.account.recorded) == (3, False)
    here, _ = logged(path, steps=30)
    assert (here.account.steps, here.account.recorded) == (2, True)
    here.load_state_dict(there.state_dict())
    assert (here.account.steps, here.account.recorded) == (3, False)


def test_ledgers_grow_by_one_name_for_each_run_that_took_a_step(path: Path) -> None:
    mechanism, optimizer = logged(path, steps=30)
    for runs in range(1, 4):
        run(mechanism, optimizer, 2)
        state = mechanism.state_dict()
        assert len(state["ledgers"]) == runs
        mechanism, optimizer = logged(path, steps=30)
        mechanism.load_state_dict(state)
        assert mechanism.state_dict()["ledgers"] == state["ledgers"]
        assert mechanism.account.recorded
    assert not any(json.loads(line).get("others") for line in path.read_text().splitlines())


def test_kinds_of_step_are_kept_apart(path: Path) -> None:
    mechanism, optimizer = logged(path)
    run(mechanism, optimizer, 2)
    again, optimizer = logged(path, noise_multiplier=2.0)
    run(again, optimizer, 3)
    ledger = Ledger.total(read(path).ledgers.values(), "rdp")
    assert {sigma: steps for (_, sigma), steps in ledger.entries} == {1.0: 2, 2.0: 3}
    assert again.spent_epsilon() == ledger.epsilon(1e-3)
    with pytest.raises(PrivacyError, match=r"seed: None in earlier runs of .*spend.jsonl, 1 now.*another folder"):
        logged(path, seed=1)


BUDGET: dict[str, Any] = {"target_epsilon": 2.0, "noise_multiplier": None}
COUNTS = "steps on record{} are not in this model: lost after a checkpoint, or of an earlier training. They count"


@pytest.mark.parametrize(
    ("changes", "now", "in_weights", "lost", "steps", "said"),
    [
        ({}, {}, 0, 0, 5, []),
        ({}, {}, 2, 0, 5, []),
        ({}, {}, 1, 2, 5, [": epsilon will be {epsilon:.4g} at delta 0.001"]),
        ({}, {}, 1, 2, 2, [": epsilon will be {epsilon:.4g} at delta 0.001"]),
        ({}, {}, 2, 2, 2, []),  # nothing of it is still to come
        (BUDGET, BUDGET, 3, 2, 8, [", so training ends 2 of 8 steps early"]),
        (BUDGET, {**BUDGET, "target_epsilon": 6.0}, 7, 1, 8, [", and the noise of the remaining steps is higher for it"]),
    ],
)
@pytest.mark.parametrize("beside_a_log", [True, False])
def test_what_was_found_of_earlier_runs_is_said(
    changes: dict[str, Any],
    now: dict[str, Any],
    in_weights: int,
    lost: int,
    steps: int,
    said: list[str],
    beside_a_log: bool,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """How many steps are lost, and what comes of it: for the length of the training, its noise, or its epsilon."""
    first, again = dpsgd(steps=steps, **changes).account, dpsgd(steps=steps, **now).account
    first.open_spend_log(SpendLog(path))
    for number in range(in_weights + lost):
        first.count_step()
        if number < in_weights:
            first.complete_step()
    first.close()
    caplog.set_level("INFO")
    caplog.clear()
    if beside_a_log:
        log = SpendLog(path)
        again.begin(log, first.state_dict())
        log.close()
    else:
        again.load_state_dict(first.state_dict())
    found = [f"continuing after {again.steps} noisy steps: noise multiplier {again.plan.noise_multiplier:.4g}"]
    where = f" ({path})" if beside_a_log else ""
    says = [f"{lost} noisy {COUNTS.format(where)}{what.format(epsilon=again.epsilon())}" for what in said]
    assert caplog.messages == (found if again.steps else []) + says


# A training that begins: with a spend log, and perhaps a checkpoint.


def spent_with_other_noise(path: Path) -> dict[str, Any]:
    """The state after all steps that were wanted, which the log holds too."""
    done, optimizer = logged(path)
    run(done, optimizer, STEPS)
    return done.state_dict()


def test_a_checkpoint_explains_what_the_log_alone_would_forbid(path: Path) -> None:
    """The log alone leaves no budget for the steps that are wanted; by the checkpoint, all of them are in the weights."""
    state = spent_with_other_noise(path)
    tight: dict[str, Any] = {"target_epsilon": 0.5 * dpsgd().account.plan.epsilon(), "noise_multiplier": None}
    alone = dpsgd(**tight).account
    log = SpendLog(path)
    with pytest.raises(ValueError, match="target_epsilon: expected a budget that some noise keeps"):
        alone.begin(log)
    assert (alone.steps, alone.steps_left) == (STEPS, 0)  # what was spent counts, and nothing may follow
    both = dpsgd(**tight).account
    both.begin(log, state)
    assert (both.steps, both.taken, both.lost_steps, both.steps_left) == (STEPS, STEPS, 0, 0)
    log.close()


def test_a_training_that_begins_is_planned_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = spent_with_other_noise(path)
    account = dpsgd(steps=10, target_epsilon=20.0, noise_multiplier=None).account
    calibrated: list[int] = []
    calibrate = PrivacyPlan.from_config

    def counted(*args: Any, **kwargs: Any) -> PrivacyPlan:
        calibrated.append(kwargs["steps"])
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(PrivacyPlan, "from_config", counted)
    log = SpendLog(path)
    account.begin(log, state)
    log.close()
    assert (account.plan.steps, account.steps_left, account.epsilon()) == (7, 7, account.plan.epsilon())
    assert calibrated == [10 - STEPS]


@pytest.mark.parametrize("in_the_log", [0, STEPS])
def test_a_training_that_begins_anew_has_no_steps_in_its_weights(in_the_log: int, path: Path) -> None:
    if in_the_log:
        spent_with_other_noise(path)
    account = taken(dpsgd(steps=9), 2).account
    assert (account.taken, account.lost_steps) == (2, 0)
    log = SpendLog(path)
    account.begin(log)
    log.close()
    assert (account.taken, account.lost_steps, account.steps) == (0, 2 + in_the_log, 2 + in_the_log)
    assert account.steps_left == 9


def test_a_training_that_cannot_begin_changes_nothing(path: Path) -> None:
    state = spent_with_other_noise(path)
    account = taken(dpsgd(steps=9), 2).account
    before, plan = account.state_dict(), account.plan
    log = SpendLog(path)
    for damaged in ({**state, "taken": 7}, {}):
        with pytest.raises(PrivacyError, match="privacy state"):
            account.begin(log, damaged)
    assert (account.state_dict(), account.spend_log) == (before, None)
    assert account.plan is plan
    log.close()
