"""What goes wrong on real machines, caused for real: each is a clear error, and nothing is left half-written."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.accelerator import Accelerator
from transformers.utils import logging as hf_logging

from dp_flash_hf.accounting.spend_log import FILE_NAME, SpendLog
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.loops import loop, run
from tests.support.trainers import attached, config, texts, trainer_for

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Transformers' loggers do not pass anything on by default."""
    hf_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield
    hf_logging.disable_propagation()


def training(path: Path, data: Any = None, *, steps: int = 4, **changes: Any) -> tuple[Any, DPCallback]:
    settings: dict[str, Any] = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    for name in ("save_strategy", "cls", "learning_rate"):
        if name in changes:
            settings[name] = changes.pop(name)
    trainer = trainer_for("gpt2", path, data, **settings)
    return trainer, attached(trainer, **changes)


def trained(path: Path, **changes: Any) -> DPCallback:
    trainer, dp = training(path, **changes)
    trainer.train()
    return dp


def steps_in(path: Path) -> int:
    record = SpendLog(path / FILE_NAME)
    record.close()
    return sum(ledger.steps for ledger in record.ledgers.values())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# Checkpoints.

DAMAGES: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("model.safetensors", flip),
    ("optimizer.pt", truncate),
    ("scheduler.pt", Path.unlink),
    ("rng_state.pth", flip),
    ("trainer_state.json", truncate),
    ("trainer_state.json", Path.unlink),
)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, steps=3)
    damage(tmp_path / "checkpoint-3" / name)
    record = (tmp_path / FILE_NAME).read_bytes()
    trainer, dp = training(tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(PrivacyError, match=rf"checkpoint-3/{name} is .*resume another checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / FILE_NAME).read_bytes() == record
    assert trainer.optimizer is None
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-3/{name} is" in caplog.text
    assert "1 noisy steps on record" in caplog.text
    report = dp.report()
    assert (trainer.state.global_step, report.steps, report.lost_steps) == (4, 5, 1)
    assert steps_in(tmp_path) == 5


@pytest.mark.complete
def test_without_a_whole_checkpoint_training_starts_anew_and_the_books_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, steps=2)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        flip(checkpoint / "model.safetensors")
    trainer, dp = training(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "training starts from the beginning, and what was spent counts" in caplog.text
    assert (trainer.state.global_step, dp.report().steps, dp.report().lost_steps) == (4, 6, 2)


def test_without_record_and_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    trainer, _ = training(tmp_path)
    with pytest.raises(PrivacyError, match="no whole checkpoint and no spend log"):
        trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / FILE_NAME).exists()


def test_a_finished_training_that_is_resumed_takes_no_step(tmp_path: Path) -> None:
    """Killed after its last step, before whatever was to follow."""
    budget: dict[str, Any] = {"target_epsilon": 4.0, "noise_multiplier": None}
    trained(tmp_path, **budget)
    trainer, dp = training(tmp_path, **budget)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == dp.report().steps == steps_in(tmp_path) == 4
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float64).state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in trainer.model.state_dict().items())
    trainer, _ = training(tmp_path, **budget)
    with pytest.raises(PrivacyError, match=rf"planned steps are spent.*{FILE_NAME}.*choose another output_dir"):
        trainer.train()


# Disks and folders.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, mounted again with other options at every call."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_while_saving(disk: Callable[[str], Path]) -> None:
    """What fitted of the checkpoint is gone, its step is in the spend log, and with space the training goes on."""
    folder = disk("size=40k")
    trainer, _ = training(folder)
    with pytest.raises(RuntimeError, match=r"checkpoint-1 could not be written .*removed; free space"):
        trainer.train()
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]
    assert steps_in(folder) == 1
    disk("size=64m")
    trainer, dp = training(folder)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.state.global_step, dp.report().steps) == (4, 5)


def test_a_read_only_folder(disk: Callable[[str], Path]) -> None:
    folder = disk("ro")
    trainer, dp = training(folder)
    before = trainer.model.lm_head.weight.clone()
    with pytest.raises(PrivacyError, match=r"cannot be opened .*Read-only file system.*choose a folder"):
        trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert dp.report().steps == 0


def test_a_damaged_record(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    flip(tmp_path / FILE_NAME)
    damaged = (tmp_path / FILE_NAME).read_bytes()
    trainer, _ = training(tmp_path)
    before = trainer.model.lm_head.weight.clone()
    with pytest.raises(PrivacyError, match=rf"{FILE_NAME}, line \d: damaged"):
        trainer.train(resume_from_checkpoint=True)
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert (tmp_path / FILE_NAME).read_bytes() == damaged


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    class Another(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            other, _ = training(tmp_path)
            with pytest.raises(PrivacyError, match="another run is writing"):
                other.train()

    trainer, dp = training(tmp_path, steps=1)
    trainer.add_callback(Another())
    trainer.train()
    assert dp.report().steps == steps_in(tmp_path) == 1
    assert trained(tmp_path, steps=1).report().steps == 2


@pytest.mark.parametrize("resume", [True, None])
def test_another_dataset(resume: bool | None, tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    other = texts()
    other[5]["input_ids"] = [*other[5]["input_ids"][:-1], 2]
    trainer, _ = training(tmp_path, other)
    with pytest.raises(PrivacyError, match="the dataset changed"):
        trainer.train(resume_from_checkpoint=resume)
    assert steps_in(tmp_path) == 2


# Values that are no numbers.


class Diverges(hf.TrainerCallback):
    """As a learning rate that is far too high would."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.inf)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("save", "outcome"), [("no", "nothing was released"), ("steps", "nothing was saved")])
def test_a_diverged_training_stops(save: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dp_flash_hf.mechanisms.sampling.PoissonSampler.draw", lambda *args: torch.tensor([1, 2, 5]))
    trainer, dp = training(tmp_path, save_strategy=save)
    trainer.add_callback(Diverges())
    with pytest.raises(PrivacyError, match=rf"training has diverged.*{outcome}"):
        trainer.train()
    assert dp.report().steps == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    with pytest.raises(PrivacyError, match=r"training has diverged.*nothing was trained"):
        trainer.train()


class NanForTokenOne(hf.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * torch.where((inputs["input_ids"] == 1).any(), torch.nan, 1.0)


@pytest.mark.parametrize("rows", [[0], list(range(24))])
def test_an_example_without_a_loss_is_found_before_training(rows: list[int], tmp_path: Path) -> None:
    data = texts()
    for row in rows:
        data[row]["input_ids"] = [1, *data[row]["input_ids"][1:]]
    trainer, dp = training(tmp_path, data, cls=NanForTokenOne)
    with pytest.raises(PrivacyError, match=r"the loss of (unit 0|the first example).* is nan.*look for NaN"):
        trainer.train()
    assert dp.report().steps == steps_in(tmp_path) == 0


# Loops of one's own.


def test_a_loop_counts_lost_steps(tmp_path: Path) -> None:
    record = tmp_path / "spend"
    accelerator = Accelerator(cpu=True)
    private, _, optimizer = loop(accelerator=accelerator, spend_log=record)
    accelerator.register_for_checkpointing(private)  # type: ignore[no-untyped-call]
    for step, batch in enumerate(private.loader):
        private.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            accelerator.save_state(str(tmp_path / "state"))
        if step == 1:
            break  # and then it is killed
    with pytest.raises(PrivacyError, match="another run is writing"):
        loop(spend_log=record)
    private.stop()

    another = Accelerator(cpu=True)
    again, _, optimizer = loop(accelerator=another, spend_log=record)
    another.register_for_checkpointing(again)  # type: ignore[no-untyped-call]
    another.load_state(str(tmp_path / "state"))
    assert (again.report().steps, again.report().lost_steps, again.steps_left) == (2, 1, 2)
    assert run(again, optimizer) == 2
    assert again.report().steps == 4
    again.stop()
    changed, _, _ = loop(spend_log=record, privacy=config(target_epsilon=50.0, noise_multiplier=None))
    assert changed.report().planned_steps == 4 + 3
    changed.stop()
    with pytest.raises(PrivacyError, match="the dataset changed"):
        loop(spend_log=record, train_dataset=texts(seed=1))


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_state_of_a_loop_is_an_error(cut: bool, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    private, _, optimizer = loop(accelerator=accelerator)
    accelerator.register_for_checkpointing(private)  # type: ignore[no-untyped-call]
    run(private, optimizer)
    accelerator.save_state(str(tmp_path))
    file = tmp_path / "custom_checkpoint_0.pkl"
    (writer,) = private.state_dict()["ledgers"]
    assert writer.encode() in file.read_bytes()
    if cut:
        truncate(file)
    else:
        file.write_bytes(file.read_bytes().replace(writer[:-1].encode(), b"0" * len(writer[:-1])))
    with pytest.raises(RuntimeError, match="central directory" if cut else "privacy state is damaged"):
        accelerator.load_state(str(tmp_path))
    assert private.report().steps == 3


def test_entropy_is_fresh_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth step of two trainings resumed from one checkpoint: other units, other noise."""
    trained(tmp_path, steps=3)
    noise: list[torch.Tensor] = []
    release = DPSGD.release

    def released(self: DPSGD) -> None:
        assert self._engine is not None
        (first, *_) = self._engine.parameters
        before = self._engine.clipped_sum(first).clone()
        release(self)
        assert first.grad is not None
        noise.append((first.grad * 4 - before).flatten())

    monkeypatch.setattr(DPSGD, "release", released)
    for _ in range(2):
        trainer, _ = training(tmp_path, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 6 / noise[0].numel() ** 0.5
