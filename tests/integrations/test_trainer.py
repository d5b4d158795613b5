"""`DPCallback(config).attach(trainer)`: two lines, and the stock trainer trains privately."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from torch import Tensor

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.reporting.report import N_UNITS_NOT_COVERED
from dp_flash_hf.training.batches import PoissonBatches
from tests.support.attributes import attributes, differing
from tests.support.forks import exit_code
from tests.support.models import loss_of, tiny
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import Pad, attached, config, draws, texts, trainer_for, watch, without_dropout

ROUNDING = 4 * float(torch.finfo(torch.float32).eps)  # of factors 1 / labels and of causal models' losses, both float32
C = 3.5  # about the median norm of these units' gradients


# Attaching.


def test_attach_returns_the_callback_and_adds_it_once(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    dp = DPCallback(config())
    trainer.add_callback(dp)
    assert dp.attach(trainer) is dp
    assert trainer.callback_handler.callbacks.count(dp) == 1
    with pytest.raises(UnsupportedError, match="attached already"):
        dp.attach(trainer)
    with pytest.raises(UnsupportedError, match="another DPCallback"):
        attached(trainer)


def test_a_training_that_does_not_begin_with_train_is_an_error(tmp_path: Path) -> None:
    """The callback, which would have attached itself, has seen no beginning."""

    class OwnBeginning(hf.Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return self._inner_training_loop(args=self.args)

    trainer = trainer_for("gpt2", tmp_path, cls=OwnBeginning)
    before = trainer.model.lm_head.weight.clone()
    trainer.add_callback(DPCallback(config()))
    with pytest.raises(PrivacyError, match=r"did not begin with Trainer\.train: call DPCallback\(config\)\.attach\(trainer\)"):
        trainer.train()
    assert torch.equal(before, trainer.model.lm_head.weight)
    with pytest.raises(PrivacyError, match="not attached"):
        DPCallback(config()).report()


def test_a_removed_callback_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    dp = attached(trainer)
    trainer.remove_callback(dp)
    with pytest.raises(PrivacyError, match="add it again"):
        trainer.train()


def test_another_loader_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    attached(trainer)
    trainer.get_train_dataloader = lambda: hf.Trainer.get_train_dataloader(trainer)
    with pytest.raises(PrivacyError, match="not the one DPCallback installed"):
        trainer.train()


@pytest.mark.parametrize("unit", [None, "user"])
def test_a_dataset_exchanged_after_attach_is_an_error(unit: str | None, tmp_path: Path) -> None:
    """Even one of the same size: its users own other rows."""
    data = [{**example, "user": row // 3} for row, example in enumerate(texts())]
    trainer = trainer_for("gpt2", tmp_path, data)
    attached(trainer, privacy_unit=unit, max_examples_per_unit=None if unit is None else 2)
    trainer.train_dataset = [{**example, "user": row % 8} for row, example in enumerate(texts())]
    with pytest.raises(PrivacyError, match="changed since attach"):
        trainer.train()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config: expected a PrivacyConfig"):
        DPCallback({"target_epsilon": 8.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected_batch_size: expected at most the 24 units"):
        attached(trainer_for("gpt2", tmp_path, per_device_train_batch_size=25))
    with pytest.raises(ValueError, match="target_delta: expected 0 < delta < 1 / 24"):
        attached(trainer_for("gpt2", tmp_path), target_delta=0.5)
    table = datasets.Dataset.from_list(texts())
    with pytest.raises(ValueError, match=r"privacy_unit: expected a column of train_dataset \(input_ids"):
        attached(trainer_for("gpt2", tmp_path, table), privacy_unit="user", max_examples_per_unit=1)


# Training.


def test_two_lines_train_to_the_budget(tmp_path: Path) -> None:
    """A stock run with AdamW, epochs and accumulation reaches its target epsilon and not more."""
    trainer = trainer_for(
        "gpt2",
        tmp_path,
        max_steps=-1,
        num_train_epochs=1.5,
        learning_rate=1e-2,
        optim="adamw_torch",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        logging_steps=9,
    )
    before = trainer.model.lm_head.weight.clone()
    dp = DPCallback(PrivacyConfig(target_epsilon=8.0, target_delta=1e-3)).attach(trainer)
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    report = dp.report()
    assert report.steps == report.planned_steps == trainer.state.global_step == 9
    assert 0.998 * 8.0 <= report.epsilon <= 8.0
    assert (report.private, report.n_units, report.expected_batch_size) == (True, 24, 4)
    assert trainer.state.log_history[-1]["privacy/epsilon"] == report.epsilon


@pytest.mark.sampled(4)
@pytest.mark.parametrize("units", [1117, 23])
@pytest.mark.parametrize("budget", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.1}], ids=str)
def test_with_a_public_estimate_the_true_number_of_units_is_told_nowhere(
    units: int, budget: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """More units than estimated, or fewer: rate, divisor, steps, logs, report and checkpoint follow from the estimate alone."""
    hf.utils.logging.set_verbosity_info()  # type: ignore[no-untyped-call]
    hf.utils.logging.enable_propagation()
    try:
        with caplog.at_level("DEBUG"):
            trainer = trainer_for("gpt2", tmp_path, texts(units), save_strategy="steps", save_steps=1, **budget)
            dp = attached(trainer, public_n_units=80)
            result = trainer.train()
    finally:
        hf.utils.logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
        hf.utils.logging.disable_propagation()
    report = dp.report()
    assert (report.n_units, report.sampling_rate, report.steps) == (80, 4 / 80, 2)
    assert "80 units, a public estimate" in report.to_text()
    assert N_UNITS_NOT_COVERED not in report.not_covered
    assert "Num examples = 80" in caplog.text
    saved = (tmp_path / "checkpoint-1" / "trainer_state.json").read_text()
    everything = (caplog.text, str(result), str(trainer.state.log_history), saved, report.to_json(), report.to_text())
    told = re.compile(
        rf"(?<![\d.:]){units // 1000},?{units % 1000}(?![\d.])" if units > 1000 else r"\b23 (units|examples)|= 23\b"
    )
    assert not [text for text in (*everything, *capfd.readouterr()) if told.search(text)]


def test_every_unit_of_more_than_were_estimated_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("gpt2", tmp_path, texts(40), per_device_train_batch_size=10, max_steps=1)
    dp = attached(trainer, public_n_units=10)
    loader = trainer.get_train_dataloader()
    assert sorted(row for row, _ in next(iter(loader.batch_sampler))) == list(range(40))  # at a rate of 1
    assert dp.mechanism.account.plan.sampler.expected_batch_size == 10


def sums_of(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, *steps: list[int], bound: float = C, **settings: Any
) -> list[dict[str, Tensor]]:
    """The clipped sums of these draws."""
    with monkeypatch.context() as patch:
        seen = watch(patch)
        draws(patch, *steps)
        ours = ("unit_loss", "privacy_unit", "max_examples_per_unit", "max_tokens_per_device")
        changes = {name: settings.pop(name) for name in ours if name in settings}
        trainer = trainer_for(model, path, settings.pop("data", texts()), max_steps=len(steps), **settings)
        attached(trainer, max_grad_norm=bound, **changes)
        trainer.train()
    return seen.sums


DRAWS: tuple[list[int], ...] = ([0, 3, 4, 9, 11, 17, 20], [], [5])
PaddedSums = Callable[[str, str | None], list[dict[str, Tensor]]]


def with_attention(name: str, attention: str | None) -> Any:
    model = without_dropout(tiny(name))
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> PaddedSums:
    """The sums of DRAWS in ordinary padded batches, of a family with an attention: computed once for all tests."""

    @cache
    def sums(name: str, attention: str | None) -> list[dict[str, Tensor]]:
        with pytest.MonkeyPatch.context() as patch:
            return sums_of(with_attention(name, attention), tmp_path_factory.mktemp("padded"), patch, *DRAWS)

    return sums


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"max_tokens_per_device": 20, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        *(
            pytest.param(settings, marks=pytest.mark.complete)
            for settings in (
                {"seed": 7, "data_seed": 3, "full_determinism": False},
                {"torch_empty_cache_steps": 1},
                {"accelerator_config": {"split_batches": True, "dispatch_batches": True}},
                {"optim": "adamw_torch_fused"},
                {"max_tokens_per_device": 1},
            )
        ),
    ],
    ids=str,
)
def test_settings_that_change_nothing(
    settings: dict[str, Any], padded: PaddedSums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the drawn units are computed, the sums are the same."""
    for wanted, got in zip(padded("gpt2", None), sums_of("gpt2", tmp_path, monkeypatch, *DRAWS, **settings), strict=True):
        if any(float(value.abs().max()) for value in wanted.values()):
            assert distance(got, wanted) <= ROUNDING
        else:
            assert not any(float(value.abs().max()) for value in got.values())


def test_evaluation_between_steps_sees_the_model_and_changes_nothing(tmp_path: Path) -> None:
    held_out = texts(5, seed=9)
    trainer = trainer_for("gpt2", tmp_path, evaluation=held_out, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    wanted = trainer.evaluate()["eval_loss"]
    attached(trainer)
    trainer.train()
    losses = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    assert losses == [pytest.approx(wanted)] * 3
    assert not [name for logs in trainer.state.log_history for name in logs if name.startswith("not_private/eval")]


def test_unit_loss_sum_does_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_dropout(tiny("bert"))
    data = texts()
    got = sums_of(model, tmp_path, monkeypatch, DRAWS[0], unit_loss="sum", bound=15.0)[0]
    singles = unit_gradients(model.eval(), loss_of("bert", model), [Pad()([data[row]]) for row in DRAWS[0]])
    wanted, norms = clipped_sum(singles, 15.0)
    assert norms.min() < 15.0 < norms.max()
    assert distance(got, wanted) <= ROUNDING


FLATTENING: tuple[dict[str, bool], ...] = (
    {},
    {"return_flash_attn_kwargs": True},
    {"return_seq_idx": True},
    {"return_position_ids": False, "return_flash_attn_kwargs": True},
)


def flattening(**options: Any) -> Any:
    return hf.DataCollatorWithFlattening(**options)  # type: ignore[no-untyped-call]


_SPLIT = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
_COMPUTED: tuple[dict[str, int], ...] = ({}, _SPLIT, {"max_tokens_per_device": 20}, {**_SPLIT, "max_tokens_per_device": 1})
_ATTENTION = ("sdpa", "eager", "dp_flash")


def pairwise() -> Iterator[Any]:
    """Every attention with every collator, in one of the ways to compute a draw; in the other ways for sweeps."""
    for a, o, c in product(*(range(len(values)) for values in (_ATTENTION, FLATTENING, _COMPUTED))):
        attention, options = _ATTENTION[a], FLATTENING[o]
        if attention == "dp_flash" or options.get("return_position_ids", True):  # the others read boundaries off positions
            marks = () if (a + o + c) % len(_COMPUTED) == 0 else pytest.mark.coverage
            yield pytest.param(attention, options, _COMPUTED[c], marks=marks)


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("attention", "options", "settings"), pairwise(), ids=str)
def test_flattened_batches_equal_padded_ones(
    attention: str,
    options: dict[str, bool],
    settings: dict[str, int],
    padded: PaddedSums,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DataCollatorWithFlattening makes one packed row of the drawn texts: the same units, the same sums."""
    model, wanted = with_attention("llama", attention), padded("llama", attention)
    flat = sums_of(model, tmp_path, monkeypatch, *DRAWS, collator=flattening(**options), **settings)
    assert distance(flat[0], wanted[0]) <= ROUNDING
    assert distance(flat[2], wanted[2]) <= ROUNDING


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flattened_batches_need_positions_or_dp_flash(attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, collator = with_attention("llama", attention), flattening(**FLATTENING[3])
    with pytest.raises(PrivacyError, match=r"texts of a flattened batch see each other.*attn_implementation='dp_flash'"):
        sums_of(model, tmp_path, monkeypatch, *DRAWS, collator=collator)


def test_hf_datasets_keep_their_column_removal(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(
        [{**example, "user": f"user {row % 9}", "note": "x"} for row, example in enumerate(texts())]
    )
    columns: set[str] = set()

    def collate(examples: Any) -> Any:
        columns.update(*examples)
        return Pad()(examples)

    trainer = trainer_for("gpt2", tmp_path, table, collator=collate, remove_unused_columns=True)
    dp = attached(trainer, privacy_unit="user", max_examples_per_unit=2)
    trainer.train()
    assert columns <= {"input_ids", "labels", "label"}
    assert dp.report().n_units == 9
    assert dp.report().unit == "all rows with the same 'user'"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", [False, True])
def test_grouping_by_length_orders_each_draw_and_no_more(
    lengths: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [{**example, "length": len(example["input_ids"])} if lengths else example for example in texts()]
    trainer = trainer_for(
        "gpt2",
        tmp_path,
        datasets.Dataset.from_list(data),
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=2,
    )
    attached(trainer, seed=0)
    seen = watch(monkeypatch)
    parts = [[row for row, _ in part] for part in trainer.get_train_dataloader().batch_sampler]
    steps = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    assert [sorted(step) for step in steps] == seen.drawn
    for step in steps:
        sizes = [len(data[row]["input_ids"]) for row in step]
        assert sizes == sorted(sizes)
    assert steps != seen.drawn
    trainer.train()


def test_model_init_makes_the_model_anew(tmp_path: Path) -> None:
    trainer = hf.Trainer(
        model_init=lambda: without_dropout(tiny("gpt2")),
        args=trainer_for("gpt2", tmp_path).args,
        train_dataset=texts(),
        data_collator=Pad(),
    )
    dp = attached(trainer)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert dp.mechanism.account.steps == 2
    with pytest.raises(PrivacyError, match="2 planned steps are spent"):  # as a second trial of a hyper-parameter search
        trainer.train()


@pytest.mark.complete
def test_seq2seq_trainer_evaluates_by_generating(tmp_path: Path) -> None:
    data = [{k: example[k] for k in ("input_ids", "labels")} for example in texts()]
    trainer = trainer_for("t5", tmp_path, data, cls=hf.Seq2SeqTrainer, predict_with_generate=True, generation_max_length=4)
    dp = attached(trainer)
    trainer.train()
    assert trainer.evaluate(texts(3, seed=4))["eval_loss"] > 0
    assert dp.mechanism.account.steps == 2


def test_truncated_poisson_never_draws_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("gpt2", tmp_path, per_device_train_batch_size=6, max_steps=2, logging_steps=100)
    dp = attached(trainer, sampling="truncated_poisson", max_batch_size=7, accountant="pld")
    sizes = [len(part) for part in trainer.get_train_dataloader().batch_sampler]
    assert max(sizes) <= 7
    trainer.train()
    assert dp.report().max_batch_size == 7


class StepsAgain(hf.TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer.step()


def test_a_callback_that_steps_the_optimizer_is_stopped(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    trainer.add_callback(StepsAgain())
    attached(trainer)
    with pytest.raises(PrivacyError, match="without noise"):
        trainer.train()


def test_an_interrupted_run_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """No gradient without noise, no rule attached, no guard on the optimizer."""

    class Interrupt(hf.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = trainer_for("gpt2", tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=10)
    batch = {k: v for k, v in Pad()(texts()).items() if k != "labels"}
    logits = trainer.model(**batch).logits
    trainer.add_callback(Interrupt())
    attached(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(trainer.model.eval()(**batch).logits, logits)
    trainer.model(**batch).logits.sum().backward()
    trainer.optimizer.step()


# Users.


def owners() -> list[dict[str, Any]]:
    """24 rows of 9 users, who own one to five rows, scattered."""
    names = [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 3, 4, 4, 5, 6]
    return [{**example, "user": names[row]} for row, example in enumerate(texts())]


def test_all_rows_of_a_user_are_clipped_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over users; each user's loss is the mean over all labels of all of their rows."""
    data, drawn = owners(), [0, 2, 3, 7, 8]
    model = without_dropout(tiny("bert"))
    settings: dict[str, Any] = {
        "data": data,
        "privacy_unit": "user",
        "max_examples_per_unit": 5,
        "per_device_train_batch_size": 2,
    }
    got = sums_of(model, tmp_path, monkeypatch, drawn, **settings)[0]
    parts = [Pad()([example for example in data if example["user"] == user]) for user in drawn]
    loss = loss_of("bert", model.eval())
    scale = [1 / int((part["labels"] != -100).sum()) for part in parts]
    gradients = unit_gradients(model, loss, parts)
    wanted, norms = clipped_sum(gradients, C, scale=scale)
    assert norms.min() < C < norms.max()
    assert distance(got, wanted) <= ROUNDING


def test_a_user_contributes_at_most_max_examples_per_unit(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, owners(), per_device_train_batch_size=3)
    dp = attached(trainer, privacy_unit="user", max_examples_per_unit=2)
    assert dp.mechanism.account.plan.sampler.n_units == 9
    sampler = trainer.get_train_dataloader().batch_sampler
    assert isinstance(sampler, PoissonBatches)
    rows_of_user_0: set[int] = set()
    for _ in range(60):
        for part in sampler:
            owner_of = {unit: {owners()[row]["user"] for row, u in part if u == unit} for _, unit in part}
            assert all(len(owner) == 1 for owner in owner_of.values())
            assert len(set.union(set(), *owner_of.values())) == len(owner_of)
            assert all(sum(u == unit for _, u in part) <= 2 for unit in owner_of)
            rows_of_user_0 |= {row for row, _ in part if owners()[row]["user"] == 0}
    assert rows_of_user_0 == {0, 9, 12, 15, 18}  # a new choice at every draw
    trainer.train()
    assert dp.report().max_examples_per_unit == 2


# Stopping and going on.


def budgeted(path: Path) -> tuple[Any, DPCallback]:
    trainer = trainer_for(
        "gpt2",
        path,
        max_steps=8,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    return trainer, attached(trainer, target_epsilon=4.0, noise_multiplier=None)


class Kill(hf.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(path: Path) -> None:
    trainer, _ = budgeted(path)
    trainer.add_callback(Kill())
    trainer.train()


def resumed_in_a_new_process(path: Path) -> None:
    trainer, dp = budgeted(path)
    trainer.train(resume_from_checkpoint=True)
    (path / "report.json").write_text(dp.report().to_json())


def test_a_killed_run_resumes_in_a_new_process_and_counts_the_step_it_lost(tmp_path: Path) -> None:
    assert exit_code(killed, tmp_path) == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "report.json").exists()
    assert exit_code(resumed_in_a_new_process, tmp_path) == 0
    resumed = json.loads((tmp_path / "report.json").read_text())
    trainer, dp = budgeted(tmp_path / "uninterrupted")
    trainer.train()
    assert resumed == {**dp.report().to_dict(), "lost_steps": 1}  # the fifth, after the last checkpoint
    assert resumed["steps"] == 8
    assert json.loads((tmp_path / "checkpoint-7" / "trainer_state.json").read_text())["global_step"] == 7  # saved at the end
    assert resumed["epsilon"] <= 4.0


@pytest.mark.complete
def test_a_run_may_be_resumed_more_than_once_and_across_epochs(tmp_path: Path) -> None:
    for start, stop in ((None, 5), (5, 7), (7, 14)):
        trainer = trainer_for("gpt2", tmp_path, max_steps=14, save_strategy="steps", save_steps=1)
        dp = attached(trainer)

        class Stop(hf.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, last: int = stop, **kwargs: Any) -> None:
                control.should_training_stop = control.should_training_stop or state.global_step >= last

        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=None if start is None else str(tmp_path / f"checkpoint-{start}"))
        assert trainer.state.global_step == dp.report().steps == stop
    assert dp.report().epsilon == dp.mechanism.account.plan.epsilon(14)


# Detaching.


def stock(cls: type[hf.Trainer], path: Path, **settings: Any) -> Any:
    data = [{k: example[k] for k in ("input_ids", "labels")} for example in texts()]
    settings = {"learning_rate": 1e-2, **settings}
    return trainer_for("t5" if issubclass(cls, hf.Seq2SeqTrainer) else "gpt2", path, data, cls=cls, **settings)


@pytest.mark.parametrize("cls", [hf.Trainer, hf.Seq2SeqTrainer])
def test_detach_undoes_attach_attribute_by_attribute(cls: type[hf.Trainer], tmp_path: Path) -> None:
    trainer = stock(cls, tmp_path)
    trainer.log = log = partial(cls.log, trainer)  # an attribute of its own, which must not be lost
    before = attributes(trainer)
    dp = attached(trainer)
    assert {"trainer.train", "trainer.log", "trainer.training_step"} < differing(before, attributes(trainer))
    assert trainer.callback_handler.callbacks[0] is dp
    dp.detach()
    assert differing(before, attributes(trainer)) == set()
    assert trainer.log is log
    dp.detach()  # nothing is attached


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cls", [hf.Trainer, hf.Seq2SeqTrainer])
def test_detach_after_training_leaves_what_training_leaves(cls: type[hf.Trainer], tmp_path: Path) -> None:
    """Nothing differs but what differs in a twin that was trained without privacy, and the history."""
    twin, trainer = (stock(cls, tmp_path / name, save_strategy="steps", save_steps=1) for name in ("twin", "private"))
    before_twin, before = attributes(twin), attributes(trainer)
    dp = attached(trainer)
    twin.train()
    trainer.train()
    steps = dp.report().steps
    dp.detach()
    left = differing(before, attributes(trainer)) - differing(before_twin, attributes(twin))
    assert {name for name in left if not name.startswith("state.log_history[")} == set()
    assert dp.report().steps == steps == 2


@pytest.mark.complete
def test_a_detached_trainer_trains_without_privacy_and_can_be_attached_again(tmp_path: Path) -> None:
    never, trainer = (stock(hf.Trainer, tmp_path / name) for name in ("never", "private"))
    dp = attached(trainer)
    dp.detach()
    for each in (never, trainer):
        each.train()
    for name, value in never.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert "loss" in trainer.state.log_history[0]
    assert "privacy/epsilon" not in trainer.state.log_history[0]
    for again in (trainer, stock(hf.Trainer, tmp_path / "another")):
        assert dp.attach(again) is dp
        again.train()
        assert again.state.log_history[0]["privacy/epsilon"] > 0
        assert dp.report().steps == 2
        dp.detach()


def test_detach_keeps_what_others_did_to_the_callbacks(tmp_path: Path) -> None:
    trainer = stock(hf.Trainer, tmp_path)
    mine, theirs = DPCallback(config()), hf.TrainerCallback()
    trainer.add_callback(mine)
    trainer.add_callback(hf.EarlyStoppingCallback)
    names = [type(callback) for callback in trainer.callback_handler.callbacks]
    mine.attach(trainer)
    trainer.add_callback(theirs)
    mine.detach()
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [*names, hf.TrainerCallback]
    trainer.remove_callback(hf.EarlyStoppingCallback)
    trainer.remove_callback(mine)
    trainer.train()
    assert "privacy/epsilon" not in trainer.state.log_history[-1]


class Detaches(hf.TrainerCallback):
    def __init__(self, dp: DPCallback) -> None:
        self.dp = dp

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dp.detach()


def test_detach_during_training_is_an_error_and_after_it_is_none(tmp_path: Path) -> None:
    trainer = stock(hf.Trainer, tmp_path)
    dp = attached(trainer)
    trainer.add_callback(Detaches(dp))
    with pytest.raises(PrivacyError, match="remaining steps would be without noise"):
        trainer.train()
    assert dp.report().steps == 1
    dp.detach()
    assert "train" not in vars(trainer)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("failing", ["put_first", "refuse_settings", "PrivateTraining"])
def test_an_attach_that_fails_leaves_nothing_behind(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("in the test")

    trainer = stock(hf.Trainer, tmp_path)
    before, dp = attributes(trainer), DPCallback(config())
    with monkeypatch.context() as patch:
        patch.setattr(f"dp_flash_hf.integrations.trainer.{failing}", fail)
        with pytest.raises(MemoryError, match="in the test"):
            dp.attach(trainer)
    assert differing(before, attributes(trainer)) == set()
    dp.attach(trainer)
    trainer.train()


def test_a_train_method_that_was_kept_from_before_does_not_train(tmp_path: Path) -> None:
    """It would go around the spend log, and everything else that DPCallback does before the first step."""
    trainer = trainer_for("gpt2", tmp_path)
    kept = trainer.train
    DPCallback(config()).attach(trainer)
    with pytest.raises(PrivacyError, match="is not the one DPCallback installed"):
        kept()


def test_a_callback_that_would_see_gradients_first_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    dp = DPCallback(config()).attach(trainer)
    trainer.remove_callback(dp)
    trainer.add_callback(dp)  # behind all others
    with pytest.raises(PrivacyError, match="no longer the first"):
        trainer.train()
    dp.detach()
    DPCallback(config()).attach(trainer)
    trainer.train()


def test_a_unit_column_that_rows_lack_is_an_error_that_names_theirs(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    with pytest.raises(ValueError, match=r"privacy_unit: expected a column of train_dataset \(.*input_ids.*got 'user_id'"):
        attached(trainer, privacy_unit="user_id", max_examples_per_unit=1)
