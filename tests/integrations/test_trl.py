"""TRL's own trainers, private: their losses, their layouts of rows, their logs; and what of them couples units."""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as hf
import trl
from torch import Tensor

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.integrations.logs import PrivateLogs
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.units import Units
from tests.support.attributes import attributes, differing
from tests.support.oracle import apart, clipped_sum, distance
from tests.support.trainers import attached, config
from tests.support.trl_trainers import (
    DRAWN,
    adapter,
    alone,
    chats,
    completions,
    cpo,
    dpo,
    error_of,
    gkd,
    kto,
    llama,
    margins,
    orpo,
    pairs,
    randomized,
    reward,
    sft,
    shape,
    sums_of,
    table,
    texts,
    tpo,
)

ROUNDING = 2e-5  # of float32 models, summed in another order


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


# Supervised fine-tuning.


SFT: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "LoRA": {"peft_config": adapter()},
    "padding-free LoRA": {"padding_free": True, "max_length": None, "peft_config": adapter()},
    "trained head and embedding": {"peft_config": adapter(modules_to_save=["lm_head", "embed_tokens"])},
    "completions": {"data": completions()},
    "completions, padding-free": {"data": completions(), "padding_free": True, "max_length": None},
    "prompts too": {"data": completions(), "completion_only_loss": False},
    "assistant turns": {"data": chats(), "assistant_only_loss": True},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "truncated": {"max_length": 9},
    "no checkpointing": {"gradient_checkpointing": False},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "tied": {"model": {"tie_word_embeddings": True}},
    "sdpa": {"model": {"attention": "sdpa"}},
}


def sft_of(name: str, path: Path) -> Callable[[], Any]:
    def make() -> Any:
        changes = dict(SFT[name])
        return sft(path, llama(**changes.pop("model", {})), **changes)

    return make


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", SFT)
def test_sft_sums_are_those_of_single_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of(sft_of(name, tmp_path), monkeypatch) <= ROUNDING


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["padded", "padding-free"])
def test_sft_by_a_token_budget(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of(sft_of(name, tmp_path), monkeypatch, max_tokens_per_device=32) <= ROUNDING


def test_padding_free_is_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded, flat = (
        sums_of(sft_of(name, tmp_path), monkeypatch, DRAWN, [], [5], max_grad_norm=2.0)[0]
        for name in ("padded", "padding-free")
    )
    assert distance(flat[0], padded[0]) <= ROUNDING
    assert distance(flat[2], padded[2]) <= ROUNDING
    assert not any(float(value.abs().max()) for value in flat[1].values())


@pytest.mark.complete
def test_padding_free_users_are_padded_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = {"privacy_unit": "user", "max_examples_per_unit": 3, "max_grad_norm": 1.0}
    (padded,), (flat,) = (
        sums_of(sft_of(name, tmp_path), monkeypatch, [0, 2, 5, 7], **users)[0] for name in ("padded", "padding-free")
    )
    assert distance(flat, padded) <= ROUNDING


class Forwards(hf.TrainerCallback):
    """The model's forward, after every step."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, list[Any]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.model.forward)


@pytest.mark.complete
def test_a_trained_head_is_called_and_a_frozen_one_stays_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While training. With the fused kernel a trained head is exact too, but one unit at a time."""
    single = alone(sft_of("padded", tmp_path), DRAWN)
    for frozen in (False, True):
        caplog.clear()
        trainer = sft_of("LoRA" if frozen else "padded", tmp_path)()
        model = trainer.model.get_base_model() if frozen else trainer.model
        before, during = model.forward, Forwards(model)
        trainer.add_callback(during)
        attached(trainer)
        with caplog.at_level(logging.INFO):
            trainer.train()
        assert (during.seen == [before]) == frozen
        assert ("fused head is off" in caplog.text) != frozen
        assert model.forward == before
    monkeypatch.setattr(trl_trainers, "call_the_head", lambda undo, trainer: None)
    with pytest.warns(UserWarning, match=r"lm_head\.weight.*computed by itself"):
        (got,), dp, _ = sums_of(sft_of("padded", tmp_path), monkeypatch, DRAWN, max_grad_norm=1.0)
    assert set(dp.engine.norm_methods().values()) == {"microbatch"}
    assert distance(got, clipped_sum(single, 1.0)[0]) <= ROUNDING


HELD_OUT = "mmm "  # what no training text begins with


@pytest.mark.complete
def test_the_called_head_evaluates_as_the_fused_one(tmp_path: Path) -> None:
    for make in (sft, dpo):
        held_out = (texts(HELD_OUT) if make is sft else pairs(HELD_OUT)).select(range(5))
        trainer = make(
            tmp_path / make.__name__, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, **REFERENCE[make is dpo]
        )
        wanted, fused, during = trainer.evaluate(), trainer.model.forward, Forwards(trainer.model)
        trainer.add_callback(during)
        attached(trainer)
        trainer.train()
        assert len(during.seen) == 1
        assert during.seen != [fused]
        got = next(logs for logs in trainer.state.log_history if "eval_loss" in logs)
        for name in wanted:
            if not any(word in name for word in ("runtime", "second", "num_tokens", "epoch", "preparation")):
                assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


REFERENCE: dict[bool, dict[str, Any]] = {False: {}, True: {"ref_model": llama(7)}}


@pytest.mark.complete
@pytest.mark.parametrize("name", ["padded", "padding-free", "LoRA"])
def test_trls_own_defaults_train(name: str, tmp_path: Path) -> None:
    """bfloat16 and gradient checkpointing; the budget is spent and the model moved."""
    changes = {**SFT[name], "bf16": None, "max_steps": 3, "learning_rate": 1e-2, "optim": "adamw_torch"}
    trainer = sft(tmp_path, **changes)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    dp = attached(trainer, target_epsilon=8.0, noise_multiplier=None, accountant="pld")
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert dp.report().steps == dp.report().planned_steps == 3
    assert 0.99 * 8.0 < dp.report().epsilon <= 8.0
    assert dp.report().unit == "one training example"


@pytest.mark.complete
def test_a_checkpoint_continues(tmp_path: Path) -> None:
    """From the first of two steps: the second is taken again, and counts twice."""
    for resume, steps in ((None, 2), (str(tmp_path / "checkpoint-1"), 3)):
        trainer = dpo(tmp_path, peft_config=adapter(), max_steps=2, save_strategy="steps", save_steps=1)
        dp = attached(trainer)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 2
        assert dp.report().steps == steps


# Pairs.


def test_pairs_are_rows_i_and_i_plus_b(tmp_path: Path) -> None:
    """How TRL's collators lay them out, which everything below rests on."""
    for trainer in (dpo(tmp_path, ref_model=llama(7)), reward(tmp_path)):
        data = trainer._remove_unused_columns(trainer.train_dataset)
        batch = trainer.data_collator([data[row] for row in range(3)])
        assert len(batch["input_ids"]) == 6
        for row in range(3):
            single = trainer.data_collator([data[row]])["input_ids"]
            for half in (0, 1):
                ids = single[half][single[half] != 0]
                assert batch["input_ids"][row + 3 * half][: len(ids)].tolist() == ids.tolist()


REWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "margins": {"data": margins()},
    "centred": {"center_rewards_coefficient": 0.1},
    "LoRA": {"peft_config": adapter(task_type="SEQ_CLS")},
}
LOSSES = sorted(trl_trainers._LOSSES["DPOTrainer"])
DPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name]} for name in LOSSES},
    **{name: {"loss_type": [name], "label_smoothing": 0.1} for name in ("exo_pair", "robust")},
    "two losses": {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.3]},
    "ld_alpha": {"ld_alpha": 0.5},
    "weighting": {"use_weighting": True},
    **{kind: {"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence", "alpha_divergence")},
    "precomputed": {"precompute_ref_log_probs": True, "ref_model": llama(7)},
    "truncated": {"max_length": 12},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "LoRA": {"peft_config": adapter()},
    "LoRA and a trained head": {"peft_config": adapter(modules_to_save=["lm_head"])},
    "LoRA, precomputed": {"peft_config": adapter(), "precompute_ref_log_probs": True},
    "LoRA and a copy of it": {"model": lambda: peft.get_peft_model(llama(), adapter())},
}


def dpo_of(name: str, path: Path) -> Callable[[], Any]:
    def make() -> Any:
        changes = dict(DPO[name])
        reference = {} if "LoRA" in name else {"ref_model": llama(7)}
        torch.manual_seed(0)  # of adapters
        return dpo(path, changes.pop("model", llama)(), **{**reference, **changes})

    return make


# One loss of each shape, and every way to hold a reference; the other losses for `make test-all`.
_SOME_DPO = {"sigmoid", "hinge", "robust", "two losses", "ld_alpha", "weighting", "precomputed", "truncated", "accumulation"}


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _SOME_DPO or "LoRA" in name else pytest.mark.complete) for name in DPO]
)
def test_dpo_sums_are_those_of_single_pairs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of(dpo_of(name, tmp_path), monkeypatch) <= 5 * ROUNDING


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changes", REWARD.values(), ids=REWARD)
def test_reward_sums_are_those_of_single_pairs(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_of(lambda: reward(tmp_path, **changes), monkeypatch) <= ROUNDING


OTHERS: dict[str, Callable[[Path], Any]] = {
    "KTO": kto,
    "CPO": cpo,
    "TPO": tpo,
    "GKD": gkd,
    "KTO, LoRA": partial(kto, peft_config=adapter(), ref_model=None),
    "CPO, LoRA": partial(cpo, peft_config=adapter()),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OTHERS)
def test_sums_of_others_are_those_of_single_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them and of their losses in tests/frameworks/test_trl.py."""
    assert error_of(lambda: OTHERS[name](tmp_path), monkeypatch) <= 5 * ROUNDING


def test_cpo_is_laid_out_as_dpo_and_back(tmp_path: Path) -> None:
    trainer = cpo(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    rows = trl_trainers.as_rows(trainer, batch)
    assert {name: len(value) for name, value in rows.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "completion_mask"), 6
    )
    given, again = (
        trainer.concatenated_inputs(one, padding_value=0) for one in (batch, trl_trainers.as_collated(trainer, rows))
    )
    assert given.keys() == again.keys()
    assert all(torch.equal(given[name], again[name]) for name in given)


@pytest.mark.complete
@pytest.mark.parametrize(
    "make", [dpo_of("LoRA", Path()), dpo_of("precomputed", Path()), lambda: reward(Path(), data=margins())]
)
def test_pairs_by_a_token_budget(make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(make, monkeypatch, max_tokens_per_device=60) <= 5 * ROUNDING


def test_the_report_says_that_a_unit_is_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dp, _ = sums_of(lambda: reward(tmp_path), monkeypatch, [1, 2])
    assert dp.report().unit == "one pair of texts"
    assert dp.report().n_units == 24
    assert "one pair of texts" in dp.report().to_text()


C = 0.05  # below the norm of every unit's gradient, so that each is clipped


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [dpo_of("sigmoid", Path()), dpo_of("LoRA", Path()), lambda: reward(Path())])
def test_one_pair_moves_the_sum_by_at_most_the_bound(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by exactly as much here, where it is clipped."""
    monkeypatch.chdir(tmp_path)
    sums, _, _ = sums_of(make, monkeypatch, [1, 2, 7], [1, 2, 3, 7], [1, 2, 7, 11], max_grad_norm=C)
    for more in sums[1:]:
        assert apart(more, sums[0]) <= C * (1 + 1e-5)
        assert apart(more, sums[0]) == pytest.approx(C, rel=1e-4)


def test_with_rows_as_units_one_pair_would_move_it_by_more(tmp_path: Path) -> None:
    """Negative: the same trainer, loss and batch, each row clipped by itself; with pairs as units the bound holds.

    Only embeddings are trained, and the texts of a pair share no letter, so that their gradients do not cancel.
    """
    data = table(lambda row: {"chosen": "abcdefgh"[row % 5 :], "rejected": "stuvwxyz"[row % 3 :]})
    trainer = reward(tmp_path, data=data)
    model, data = trainer.model.eval(), trainer._remove_unused_columns(trainer.train_dataset)
    model.requires_grad_(False).model.embed_tokens.requires_grad_(True)
    engine = ClippingEngine(model, max_grad_norm=C, strategy="bookkeeping")

    def sum_of(rows: Sequence[int], units: Units) -> dict[str, Tensor]:
        batch = trainer.data_collator([data[row] for row in rows])
        engine.backward(lambda part: model(**part).logits.sum(), batch)  # learns the layouts, on rows that can be alone
        model.zero_grad()
        engine.backward(lambda part: 1e3 * trainer.compute_loss(model, dict(part)), batch, units)
        gradient = model.model.embed_tokens.weight.grad.double().clone()
        model.zero_grad()
        return {"embed_tokens": gradient}

    def moved(of_pairs: Callable[[int], Units]) -> float:
        return apart(sum_of((1, 2, 7, 3), of_pairs(4)), sum_of((1, 2, 7), of_pairs(3)))

    assert moved(lambda n: Units.of(torch.arange(n).repeat(2), (2 * n,))) <= C * (1 + 1e-5)
    assert moved(lambda n: Units.rows(2 * n)) > 1.1 * C


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [sft, dpo, reward])
def test_one_user_moves_the_sum_by_at_most_the_bound_and_rows_as_units_by_more(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = REFERENCE[make is dpo]
    users, steps = {"privacy_unit": "user", "max_examples_per_unit": 3}, ([1, 2], [1, 2, 5])
    sums, dp, _ = sums_of(lambda: make(tmp_path, **reference), monkeypatch, *steps, max_grad_norm=C, **users)
    assert apart(*sums) == pytest.approx(C, rel=1e-4)
    assert dp.report().unit == "all rows with the same 'user'"
    rows = ([3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8, 15, 16, 17])  # the same users' rows
    sums, _, _ = sums_of(lambda: make(tmp_path / "rows", **reference), monkeypatch, *rows, max_grad_norm=C)
    assert apart(*sums) > 1.5 * C


@pytest.mark.complete
def test_users_with_several_pairs_are_clipped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against each user's mean over their pairs, computed pair by pair."""
    make = dpo_of("sigmoid", tmp_path)
    single = alone(make, range(15))
    of_user = [
        {name: torch.stack([single[3 * user + k][name] for k in range(3)]).mean(0) for name in single[0]} for user in (0, 2, 4)
    ]
    bound = float(clipped_sum(of_user, 1.0)[1].median())
    users = {"privacy_unit": "user", "max_examples_per_unit": 3}
    (got,), _, _ = sums_of(make, monkeypatch, [0, 2, 4], max_grad_norm=bound, **users)
    assert distance(got, clipped_sum(of_user, bound)[0]) <= 5 * ROUNDING


@pytest.mark.complete
def test_sums_over_pairs_are_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = dpo_of("sigmoid", tmp_path)
    (got,), _, _ = sums_of(make, monkeypatch, DRAWN, max_grad_norm=1e6, unit_loss="sum")
    assert distance(got, clipped_sum(alone(make, DRAWN), 1e6)[0]) <= 5 * ROUNDING


# Logs.


PUBLIC = {
    "learning_rate",
    "epoch",
    "step",
    "privacy/epsilon",
    "privacy/spent_epsilon",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


def logged(make: Callable[..., Any], path: Path, **changes: Any) -> tuple[list[dict[str, float]], Any]:
    everything: list[dict[str, float]] = []

    class Reporter(hf.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            everything.append(dict(logs))

    data = (texts(HELD_OUT) if make is sft else pairs(HELD_OUT)).select(range(6))
    trainer = make(
        path, max_steps=3, eval_dataset=data, eval_strategy="steps", eval_steps=2, **REFERENCE[make is dpo], **changes
    )
    trainer.add_callback(Reporter())
    attached(trainer)
    result = trainer.train()
    return [*everything, *trainer.state.log_history, result.metrics], trainer


def unmarked(everything: list[dict[str, float]]) -> set[str]:
    names = {name for logs in everything for name in logs} - PUBLIC
    return {name for name in names if not name.startswith(("not_private/", "eval_"))}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [sft, dpo, reward])
def test_nothing_without_noise_is_logged_unmarked(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, trainer = logged(make, tmp_path)
    assert unmarked(everything) == set()
    marked = {name for logs in everything for name in logs if name.startswith("not_private/")}
    assert {"not_private/loss", "not_private/train_loss", "not_private/num_tokens"} < marked
    assert any("reward" in name or "entropy" in name for name in marked)
    # Metrics of held-out data are of those alone, whatever the engine tried in evaluation mode.
    during = next(logs for logs in everything if "eval_loss" in logs)
    after = trainer.evaluate()
    for name in after:
        if not any(word in name for word in ("runtime", "second", "num_tokens", "epsilon", "epoch")):
            assert during[name] == pytest.approx(after[name], rel=1e-4, abs=1e-5), name  # with the head called, and fused
    assert "eval_num_tokens" not in {name for logs in everything for name in logs}
    monkeypatch.setattr(PrivateLogs, "mark_added", lambda self, *entries: None)
    assert unmarked(logged(make, tmp_path)[0]) >= {"num_tokens"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", [sft, dpo, reward, cpo])
def test_what_is_logged_unmarked_is_the_same_whatever_the_training_data(make: Callable[..., Any], tmp_path: Path) -> None:
    """With weights that stay: metrics of held-out data are of those alone, by what they are and not by what they are called."""
    build = texts if make is sft else pairs
    found = []
    for name, times in (("one", 1), ("other", 2)):
        data = build().map(lambda row, times=times: {k: v * times for k, v in row.items() if k != "user"})
        everything, _ = logged(make, tmp_path / name, data=data)
        found.append([{k: v for k, v in logs.items() if "not_private/" not in k and "second" not in k} for logs in everything])
    for one, other in zip(*found, strict=True):
        assert {k: v for k, v in one.items() if "runtime" not in k} == {k: v for k, v in other.items() if "runtime" not in k}
    assert any("eval_loss" in logs for logs in found[0])


@pytest.mark.parametrize("make", [sft, dpo, cpo])
def test_metrics_of_training_data_in_evaluation_are_marked_too(make: Callable[..., Any], tmp_path: Path) -> None:
    """Those that TRL's `log` adds, in an evaluation of training data; what `predict` left behind of them is dropped."""
    data = texts() if make is sft else pairs()
    held_out = (texts(HELD_OUT) if make is sft else pairs(HELD_OUT)).select(range(6))
    trainer = make(tmp_path, data=data, eval_dataset=held_out, **REFERENCE[make is dpo])
    attached(trainer)
    wanted = trainer.evaluate()
    assert any(name in wanted for name in ("eval_entropy", "eval_rewards/chosen"))
    returned = trainer.evaluate(trainer.train_dataset)
    logs = trainer.state.log_history[-1]
    assert {name for name in logs if not name.startswith(("not_private/", "privacy/"))} == {"step"} | {"epoch"} & logs.keys()
    assert {name for name in returned if name.startswith("eval_")} >= set(wanted) - {"not_private/eval_num_tokens"} - PUBLIC
    trainer.predict(trainer.train_dataset)
    after = trainer.evaluate()
    for name in wanted.keys() - PUBLIC:
        if not any(word in name for word in ("runtime", "second")):
            assert after[name] == pytest.approx(wanted[name]), name


def test_cpo_logs_what_it_stored_in_training(tmp_path: Path) -> None:
    """Its `log` adds that to logs with a `loss`, which has another name here."""
    trainer = cpo(tmp_path, max_steps=2)
    attached(trainer)
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "not_private/loss" in logs]
    assert all(math.isfinite(one["not_private/rewards/chosen"]) for one in logs)
    assert not trainer._stored_metrics["train"]


def test_looks_at_training_data_would_be_logged_as_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative: what is learnt on training data in evaluation mode must be forgotten."""
    monkeypatch.setattr(trl_trainers, "without_metrics", lambda trainer: nullcontext())
    monkeypatch.setattr(trl_trainers, "forget_evaluations", lambda trainer: None)
    everything, trainer = logged(sft, tmp_path)
    during = next(logs for logs in everything if "eval_loss" in logs)
    assert during["eval_entropy"] != pytest.approx(trainer.evaluate()["eval_entropy"], rel=1e-4, abs=1e-5)


# What couples units.


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**shape(num_local_experts=2, experts_implementation="eager")))


class OwnLoss(trl.SFTTrainer):  # type: ignore[misc]
    power = 1

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) ** self.power


class OwnName(trl.SFTTrainer):  # type: ignore[misc]
    pass


def other(cls: type) -> Callable[[Path], Any]:
    """An object of another of TRL's trainers, which need more than a line to build."""

    def make(path: Path) -> Any:
        trainer = sft(path)
        trainer.__class__ = cls
        return trainer

    return make


def changed(make: Callable[..., Any], **attributes: Any) -> Callable[[Path], Any]:
    def build(path: Path) -> Any:
        trainer = make(path, **REFERENCE[make is dpo])
        for name, value in attributes.items():
            setattr(trainer.args if hasattr(trainer.args, name) else trainer, name, value)
        return trainer

    return build


def trainers_of_trl() -> set[str]:
    """Each trainer that TRL defines, and its folder: read, since some cannot be imported without more installed."""
    root, found = Path(trl.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Trainer") for base in node.bases):
                found.add(f"{node.name} of {path.parent.name}")
    return found


EXAMINED = {
    "A2POTrainer of a2po",
    "AsyncDistillationTrainer of async_distillation",
    "AsyncGRPOTrainer of async_grpo",
    "CPOTrainer of cpo",
    "DPOTrainer of bema_for_ref_model",
    "DPOTrainer of trainer",
    "DistillationTrainer of distillation",
    "DistillationTrainer of trainer",
    "GKDTrainer of gkd",
    "GMPOTrainer of gmpo",
    "GOLDTrainer of gold",
    "GRPOTrainer of trainer",
    "IWOPDTrainer of iw_opd",
    "KTOTrainer of kto",
    "KTOTrainer of trainer",
    "ORPOTrainer of orpo",
    "OnlineDPOTrainer of online_dpo",
    "RLOOTrainer of trainer",
    "RewardTrainer of trainer",
    "SDFTTrainer of sdft",
    "SDPOTrainer of sdpo",
    "SFTTrainer of trainer",
    "ServerDistillationTrainer of server_distillation",
    "TPOTrainer of tpo",
}


def test_every_trainer_of_trl_was_examined() -> None:
    """Fails where a new version brings another: try whether its loss is a mean over units, and add it to trl.py."""
    assert trainers_of_trl() - {"_BaseTrainer of trainer"} == EXAMINED
    names = {name.split()[0] for name in EXAMINED}
    assert trl_trainers._ROWS.keys() | trl_trainers._REFUSED.keys() == names
    assert not trl_trainers._ROWS.keys() & trl_trainers._REFUSED.keys()


def named(name: str) -> type:
    """A class as it is called in TRL, which may need what is not installed."""
    return type(name, (trl.SFTTrainer,), {"__module__": "trl.somewhere"})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{name: (other(named(name)), rf"{name}: .*; .*(DPOTrainer|GKDTrainer|CPOTrainer)") for name in trl_trainers._REFUSED},
    "KTO": (
        partial(kto, loss_type="kto", train_sampling_strategy="sequential"),
        r"loss_type=\['kto'\]: it sorts or averages.*use one of \['apo_zero_unpaired'\]",
    ),
    "CPO": (partial(cpo, cpo_alpha=1.0), r"cpo_alpha: .*share a denominator; set cpo_alpha=0\.0"),
    "TPO": (partial(tpo, tpo_alpha=1.0), r"tpo_alpha: .*share a denominator; set tpo_alpha=0\.0"),
    "GKD": (partial(gkd, lmbda=0.01), r"lmbda: the student writes answers.*set lmbda=0\.0"),
    "GKD, answers of the teacher": (partial(gkd, seq_kd=True), r"seq_kd: the teacher writes answers.*set seq_kd=False"),
    "ORPO": (orpo, r"ORPOTrainer: beside a mean over pairs.*use CPOTrainer with loss_type='simpo' and cpo_alpha=0\.0"),
    "one that is new": (
        other(named("NewTrainer")),
        "NewTrainer: whether its loss couples units was not examined; .*use SFTTrainer",
    ),
    **{
        name: (
            partial(dpo, loss_type=[name, "hinge"], **REFERENCE[True]),
            rf"loss_type=\['{name}'\]: it sorts",
        )
        for name in ("aot", "aot_unpaired", "sft")
    },
    "packing": (lambda path: sft(path, packing=True, max_length=32), "packing: .*set packing=False and padding_free=True"),
    "experts": (lambda path: sft(path, mixtral()), r"router_aux_loss_coef: .*set it to 0\.0"),
    "sync": (changed(dpo, sync_ref_model=True), "sync_ref_model"),
    "liger": (changed(sft, use_liger_kernel=True), "use_liger_kernel"),
    "offloading": (changed(sft, activation_offloading=True), "activation_offloading"),
    "selective": (changed(sft, gradient_checkpointing_kwargs={"selective": True}), "selective"),
    "images": (changed(sft, _is_vision_dataset=True), "images: pictures of all rows"),
    "collator": (changed(dpo, data_collator=hf.default_data_collator), "data_collator function: how it pairs rows"),
    "prefix": (
        lambda path: sft(path, peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "prompt learning",
    ),
    "loss function": (changed(sft, compute_loss_func=lambda *args, **kwargs: 0), "compute_loss_func"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_couples_units_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, match = REFUSED[name]
    trainer = make(tmp_path)
    methods = dict(vars(trainer))
    with pytest.raises(UnsupportedError, match=match):
        attached(trainer)
    assert vars(trainer) == methods  # nothing changed


@pytest.mark.parametrize("power", [1, 2])
def test_a_loss_of_their_own_is_judged_by_what_it_computes(power: int, tmp_path: Path) -> None:
    trainer = sft(tmp_path, cls=OwnLoss)
    trainer.power = power
    dp = attached(trainer)
    with nullcontext() if power == 1 else pytest.raises(UnsupportedError, match="neither a mean"):
        trainer.train()
    assert (dp.report().steps > 0) == (power == 1)


def test_packed_rows_are_refused_whatever_the_settings_say(tmp_path: Path) -> None:
    packed = sft(tmp_path, packing=True, max_length=32).train_dataset
    with pytest.raises(UnsupportedError, match=r"packed rows.*padding_free=True"):
        attached(sft(tmp_path, data=packed, dataset_kwargs={"skip_prepare_dataset": True}))


@pytest.mark.parametrize("make", [sft, dpo, reward])
def test_choices_by_results_on_the_training_data_are_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    """TRL prepares both datasets, so that the evaluation's is no longer the object that was given."""
    data = texts() if make is sft else pairs()
    trainer = make(tmp_path, data=data, eval_dataset=data, **REFERENCE[make is dpo])
    assert trainer.eval_dataset is not trainer.train_dataset
    trainer.args.load_best_model_at_end = True
    with pytest.raises(UnsupportedError, match="eval_dataset is train_dataset"):
        attached(trainer)
    trainer.eval_dataset = trainer.eval_dataset.select(range(5))
    with pytest.raises(UnsupportedError, match="5 of 5 rows of eval_dataset that were read are rows of train_dataset"):
        attached(trainer)


def test_a_subclass_that_changes_nothing_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dp, _ = sums_of(lambda: sft(tmp_path, cls=OwnName), monkeypatch, [1, 2])
    assert dp.mechanism.account.steps == 1


def test_experts_train_without_the_load_balancing_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = alone(lambda: sft(tmp_path, randomized(mixtral(), 3), router_aux_loss_coef=0.0), DRAWN)
    (got,), _, _ = sums_of(
        lambda: sft(tmp_path, randomized(mixtral(), 3), router_aux_loss_coef=0.0), monkeypatch, DRAWN, max_grad_norm=1.0
    )
    assert distance(got, clipped_sum(single, 1.0)[0]) <= 5 * ROUNDING


@pytest.mark.parametrize("name", ["aot_unpaired", "sft"])
def test_the_checks_find_such_losses_without_their_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = trl_trainers._LOSSES
    monkeypatch.setattr(trl_trainers, "_LOSSES", {**known, "DPOTrainer": known["DPOTrainer"] | {name}})
    trainer = dpo(tmp_path, loss_type=[name], **REFERENCE[True])
    dp = attached(trainer)
    with pytest.raises((PrivacyError, UnsupportedError), match="units"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_attention_that_ignores_boundaries_is_refused(tmp_path: Path) -> None:
    """OPT looks for them with a varlen attention only."""
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 260, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0}
    for attention in ("sdpa", "dp_flash"):
        model = randomized(hf.OPTForCausalLM(hf.OPTConfig(**sizes)), 2)
        model.set_attn_implementation(attention)
        trainer = sft(tmp_path, model, padding_free=True, max_length=None)
        dp = attached(trainer)
        if attention == "sdpa":
            with pytest.raises(PrivacyError, match=r"see each other.*attn_implementation='dp_flash'"):
                trainer.train()
        else:
            trainer.train()
        assert dp.mechanism.account.steps == (attention == "dp_flash")


def test_other_trainers_are_left_alone(tmp_path: Path) -> None:
    trainer = hf.Trainer(model=llama(), args=hf.TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=[{"margin": 1}])
    batch = {"margin": torch.ones(2)}
    assert trl_trainers.examined(trainer) is None
    assert trl_trainers.rows_per_example(trainer) == 1
    assert trl_trainers.refusals(trainer) == {}
    assert trl_trainers.as_rows(trainer, batch)["margin"] is batch["margin"]
    assert trl_trainers.as_collated(trainer, batch)["margin"] is batch["margin"]
    with trl_trainers.without_metrics(trainer), trl_trainers.on_one_rank(trainer):
        assert not hasattr(trainer, "_metrics")
    trl_trainers.forget_evaluations(trainer)
    assert trl_trainers.stored_metrics(trainer) == {}
    assert math.isfinite(DPCallback(config()).config.max_grad_norm)


# Detaching.


def wrapping(forward: Any) -> list[str]:
    """The modules of all functions that a forward is wrapped in, the outermost first."""
    function, found = forward, []
    while function is not None:
        found.append(str(getattr(function, "__globals__", {}).get("__name__")))
        function = getattr(function, "__wrapped__", getattr(function, "__func__", None))
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [sft, dpo, reward])
@pytest.mark.parametrize("bf16", [False, True])
def test_detach_undoes_attach_and_training(make: Callable[..., Any], bf16: bool, tmp_path: Path) -> None:
    """In bfloat16 Accelerate wraps the forward that TRL replaced; the head of SFT and DPO is trained."""
    settings: dict[str, Any] = {**REFERENCE[make is dpo], "bf16": bf16, "learning_rate": 1e-2}
    settings["gradient_checkpointing"] = False  # with it, each loss of TRL's DPO leaves one hook more on the embedding
    twin, trainer = (make(tmp_path / name, **settings) for name in ("twin", "private"))
    before_twin, before = attributes(twin), attributes(trainer)
    dp = attached(trainer)
    dp.detach()
    assert differing(before, attributes(trainer)) == set()
    dp.attach(trainer)
    during = Forwards(trainer.model)
    trainer.add_callback(during)
    twin.train()
    trainer.train()
    trainer.remove_callback(during)
    dp.detach()
    left = differing(before, attributes(trainer)) - differing(before_twin, attributes(twin))
    assert {name for name in left if not name.startswith("state.log_history[")} == set()
    assert ("dp_flash_hf.integrations.trl" in wrapping(during.seen[0])) == (make is not reward)
    assert wrapping(trainer.model.forward) == wrapping(twin.model.forward)
    trainer.train()
    assert "loss" in trainer.state.log_history[0]
    assert not {name for logs in trainer.state.log_history for name in logs if name.startswith(("privacy/", "not_private/"))}
