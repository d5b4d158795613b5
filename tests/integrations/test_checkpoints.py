"""Which checkpoint is resumed, and what becomes of one that is not whole; runs that are killed are in tests/end_to_end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.run_account import known_logs
from dp_flash_hf.accounting.spend_log import FILE_NAME, SpendLog
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.integrations.checkpoints import (
    STATE_FILE,
    by_age,
    manifest,
    privacy_states,
    to_resume,
    whole,
    whole_or_removed,
)
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from tests.support.trainers import attached, texts, trainer_for


def saved(output_dir: Path, step: int, *, private: bool = True) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * step)
    attributes = {"privacy": {"taken": step}, "files": manifest(folder)}
    callbacks = {"DPCallback": {"attributes": attributes}} if private else {}
    (folder / STATE_FILE).write_text(json.dumps({"global_step": step, "stateful_callbacks": callbacks}))
    return folder


def resumed(output_dir: Path, resume: str | bool | None) -> int | None:
    found = to_resume(resume, str(output_dir), output_dir / "spend", callback="DPCallback")
    assert found is None or found.privacy == {"taken": found.step}
    return None if found is None else found.step


@pytest.mark.parametrize("resume", [None, False])
def test_nothing_is_resumed_unless_asked(resume: bool | None, tmp_path: Path) -> None:
    saved(tmp_path, 2)
    assert resumed(tmp_path, resume) is None


def test_the_newest_whole_checkpoint_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 10, 9):
        saved(tmp_path, step)
    assert [path.name for path in by_age(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert resumed(tmp_path, True) == 10
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"other")
    (tmp_path / "checkpoint-9" / STATE_FILE).write_text("{")
    assert resumed(tmp_path, True) == 2
    assert caplog.text.count("is skipped, because it is incomplete") == 2
    with pytest.raises(PrivacyError, match=r"weights is damaged.*resume another checkpoint, or resume_from_checkpoint=True"):
        resumed(tmp_path, str(tmp_path / "checkpoint-10"))


def test_without_a_checkpoint_a_spend_log_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PrivacyError, match="no whole checkpoint and no spend log"):
        resumed(tmp_path, True)
    (tmp_path / "spend").touch()
    assert resumed(tmp_path, True) is None
    assert "what was spent counts" in caplog.text


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_without_privacy_state_is_never_skipped(named: bool, tmp_path: Path) -> None:
    saved(tmp_path, 2)
    folder = saved(tmp_path, 4, private=False)
    with pytest.raises(PrivacyError, match="checkpoint-4 holds no privacy state"):
        resumed(tmp_path, str(folder) if named else True)


@pytest.mark.parametrize("writes", [False, True])
def test_a_checkpoint_that_fails_is_removed_by_who_writes_it(writes: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)

    def failing() -> None:
        with whole_or_removed(folder, writes=writes):
            raise OSError("no space left on device")

    with pytest.raises(RuntimeError, match=r"could not be written \(no space left on device\)"):
        failing()
    assert folder.exists() != writes


def test_what_is_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)
    assert whole(folder, "DPCallback") == (folder, 2, {"taken": 2})
    (folder / "weights").unlink()
    with pytest.raises(ValueError, match="weights is missing"):
        whole(folder, "DPCallback")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    trainer = trainer_for("gpt2", path, max_steps=2, save_strategy="steps", save_steps=1)
    attached(trainer)
    trainer.train()
    return path / "checkpoint-1"


def continued(checkpoint: Path, path: Path, data: Any = None, *, batch: int = 4, **changes: Any) -> DPCallback:
    trainer = trainer_for("gpt2", path, data, per_device_train_batch_size=batch, max_steps=2)
    dp = attached(trainer, **changes)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return dp


def without_privacy(checkpoint: Path, path: Path) -> Path:
    """The same checkpoint as a trainer without DPCallback would have written it."""
    target = path / "checkpoint-1"
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    state = json.loads((target / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["DPCallback"]
    (target / "trainer_state.json").write_text(json.dumps(state))
    return target


@pytest.mark.complete
def test_a_checkpoint_continues_the_same_books(checkpoint: Path, tmp_path: Path) -> None:
    """Promise 10: state is saved with the checkpoint, public values only."""
    dp = continued(checkpoint, tmp_path)
    assert dp.report().steps == 2
    assert dp.report().epsilon == dp.mechanism.account.plan.epsilon(2)
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["DPCallback"]
    (ledger,) = saved["attributes"]["privacy"]["ledgers"].values()
    assert ledger["entries"][0]["steps"] == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": texts(25)}, "n_units: 24 in the checkpoint, 25 now"),
        ({"seed": 3}, "seed: None in the checkpoint, 3 now"),
        ({"sampling": "truncated_poisson", "max_batch_size": 9, "accountant": "pld"}, "no privacy filter is known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_privacy_parameters_that_cannot_be_composed_are_an_error(
    changes: dict[str, Any], match: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=match):
        continued(checkpoint, tmp_path, **changes)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.5},
        {"max_grad_norm": 2.0},
        {"target_delta": 1e-4},
        {"clipping": "automatic"},
        {"unit_loss": "sum"},
        {"batch": 3},
    ],
    ids=lambda value: next(iter(value)),
)
def test_other_privacy_parameters_are_composed(changes: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    """Two steps: one before the checkpoint, one with the new parameters. Both are in the report."""
    dp = continued(checkpoint, tmp_path, **changes)
    plan = dp.mechanism.account.plan
    both = Ledger(plan.accountant)
    both.record(PoissonSampler(24, 4), 1.0)
    both.record(plan.sampler, plan.noise_multiplier)
    report = dp.report()
    assert report.spent_epsilon == both.epsilon(plan.target_delta)
    assert report.epsilon == plan.epsilon() >= report.spent_epsilon
    assert (report.steps, report.planned_steps, report.lost_steps) == (2, 2, 0)
    assert (len(report.parts) == 2) == bool({"noise_multiplier", "batch"} & changes.keys())


def test_a_checkpoint_without_privacy_state_is_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stripped = without_privacy(checkpoint, tmp_path)
    with pytest.raises(PrivacyError, match=r"holds no privacy state.*train from the beginning"):
        continued(stripped, tmp_path)


def test_a_checkpoint_partly_trained_without_privacy_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    target = without_privacy(checkpoint, tmp_path)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["global_step"] = 2  # one more than its ledgers hold
    (target / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(PrivacyError, match="took 2 steps but accounts for 1"):
        continued(target, tmp_path / "elsewhere")


def cut(log: Path) -> None:
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))


def cut_and_gone_on(log: Path) -> None:
    cut(log)
    own = SpendLog(log)
    assert own.last is not None
    own.begin(own.last, {})
    own.append()
    own.append()
    own.close()


@pytest.mark.parametrize("resume", [True, None, "checkpoint-1"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut, r"steps are missing from .*checkpoint-2 knows 3 lines of it, and it has 2\..*Put back the file"),
        (cut_and_gone_on, r"checkpoint-2 knows 3 lines of it, and they are not the same\."),
        (Path.unlink, r"is missing, and .*checkpoint-2 is of a run that wrote one: it was deleted"),
    ],
    ids=["cut", "cut and gone on", "deleted"],
)
def test_all_checkpoints_of_a_folder_know_its_spend_log(
    damage: Any, match: str, resume: str | bool | None, checkpoint: Path, tmp_path: Path
) -> None:
    """Also an older one is not resumed beside a log that lost lines, and training does not begin there anew."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint.parent, folder)
    damage(folder / FILE_NAME)
    trainer = trainer_for("gpt2", folder, max_steps=3)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=match):
        trainer.train(resume_from_checkpoint=str(folder / resume) if isinstance(resume, str) else resume)
    assert dp.mechanism.account.steps == 0
    assert dp.mechanism.account.spend_log is None


def test_a_checkpoint_whose_log_is_lost_continues_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """As the message says."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint.parent, folder)
    (folder / FILE_NAME).unlink()
    assert continued(folder / "checkpoint-1", tmp_path / "elsewhere").report().steps == 2


def test_states_that_cannot_be_read_or_trusted_know_nothing(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint.parent, folder)
    (folder / "checkpoint-2" / STATE_FILE).write_text("{")
    assert [path.name for path in privacy_states(folder, "DPCallback")] == ["checkpoint-1"]
    (state,) = privacy_states(folder, "DPCallback").values()
    assert [lines for lines, _ in known_logs(state).values()] == [2]
    assert known_logs({**state, "taken": 7}) == {}
    assert privacy_states(folder, "Another") == {}
