"""Every trainer of TRL: exact, or refused for a reason that is true, with a remedy that works."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.integrations.trainer import DPCallback
from tests.support.frameworks import STEPS, TOLERANCE, difference, trained
from tests.support.trainers import config

pytest.importorskip("trl")

import trl
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMADPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.support.trl_trainers import (
    adapter,
    built,
    chats,
    completions,
    cpo,
    dpo,
    gkd,
    kto,
    llama,
    orpo,
    reward,
    sft,
    table,
    tpo,
    written,
)

FRAMEWORK = "trl"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def bema(path: Path, every: int = 400, **changes: Any) -> Any:
    """The reference becomes an average of the weights, which are released, at every so many steps."""
    trainer = dpo(path, cls=BEMADPOTrainer, ref_model=llama(7), **changes)
    trainer.add_callback(BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=every))
    return trainer


BETA = 0.01  # so that no pair keeps the margin of a hinge, where its gradient would be 0
EXACT: dict[str, Callable[..., Any]] = {
    "SFTTrainer": sft,
    "SFTTrainer, padding_free": partial(sft, padding_free=True, max_length=None),
    "SFTTrainer, loss_type='dft', on completions": partial(sft, data=completions(), loss_type="dft"),
    "SFTTrainer, assistant_only_loss": partial(sft, data=chats(), assistant_only_loss=True),
    "DPOTrainer": partial(dpo, ref_model=llama(7)),
    "DPOTrainer, LoRA": partial(dpo, peft_config=adapter()),
    "DPOTrainer of bema_for_ref_model": bema,
    "RewardTrainer": reward,
    "KTOTrainer, loss_type='apo_zero_unpaired'": kto,
    "KTOTrainer, the same, precompute_ref_log_probs": partial(kto, precompute_ref_log_probs=True),
    **{
        f"CPOTrainer, loss_type='{loss}', cpo_alpha=0.0": partial(cpo, loss_type=loss, beta=BETA)
        for loss in ("simpo", "sigmoid", "hinge", "ipo")
    },
    "CPOTrainer, the same, alpha=0.2 (AlphaPO)": partial(cpo, alpha=0.2),
    **{
        f"TPOTrainer, loss_type='{loss}', tpo_alpha=0.0": partial(tpo, loss_type=loss, beta=BETA)
        for loss in ("sigmoid", "hinge", "ipo", "tpo-l")
    },
    **{f"GKDTrainer, beta={beta}, lmbda=0.0": partial(gkd, beta=beta) for beta in (0.0, 0.5, 1.0)},
}


@pytest.mark.parametrize("name", EXACT)
def test_sums_are_those_of_single_units(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    """Three steps; then from the first one's checkpoint, which counts the steps that were lost."""
    found, dp = difference(
        lambda: EXACT[name](tmp_path, max_steps=len(STEPS), save_strategy="steps", save_steps=1), monkeypatch
    )
    assert found < TOLERANCE
    assert 0 < dp.report().epsilon < 100
    first = tmp_path / "checkpoint-1"
    again = EXACT[name](tmp_path, max_steps=len(STEPS))
    resumed = DPCallback(dp.config).attach(again)
    again.train(resume_from_checkpoint=str(first))
    assert again.state.global_step == len(STEPS)
    assert resumed.report().steps == 2 * len(STEPS) - 1
    row(
        name,
        "exact",
        f"epsilon {dp.report().epsilon:.3g} after three steps, {resumed.report().epsilon:.3g} with those resumed",
        figure=found,
    )


def test_a_reference_may_follow_the_weights(tmp_path: Path) -> None:
    trainer = bema(tmp_path, every=1, max_steps=3, learning_rate=0.1)
    before = [parameter.clone() for parameter in trainer.ref_model.parameters()]
    assert trained(trainer).report().steps == 3
    assert not any(map(torch.equal, before, trainer.ref_model.parameters()))


def prompts() -> datasets.Dataset:
    return table(lambda number: {"prompt": written(number, 1 + number % 3)})


def by_length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def online(cls: Any, arguments: Any, path: Path, **changes: Any) -> Any:
    settings = {"max_completion_length": 4, "num_generations": 2, "beta": 0.0, **changes}
    return built(partial(cls, reward_funcs=by_length), arguments, path, llama(), prompts(), settings)


def online_dpo(path: Path, **changes: Any) -> Any:
    return built(
        partial(OnlineDPOTrainer, reward_funcs=by_length),
        OnlineDPOConfig,
        path,
        llama(),
        prompts(),
        {"max_new_tokens": 4, **changes},
    )


def distillation(path: Path, **changes: Any) -> Any:
    return built(
        trl.DistillationTrainer,
        trl.DistillationConfig,
        path,
        llama(),
        prompts(),
        {"max_completion_length": 4, "teacher_model": llama(7), **changes},
    )


# What is refused, the words that say so, and what it is told to use instead.
REFUSED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "ORPOTrainer": (orpo, "ORPOTrainer: beside a mean over pairs", "CPOTrainer, loss_type='simpo', cpo_alpha=0.0"),
    "CPOTrainer, cpo_alpha=1.0": (
        partial(cpo, cpo_alpha=1.0),
        "set cpo_alpha=0.0",
        "CPOTrainer, loss_type='simpo', cpo_alpha=0.0",
    ),
    "TPOTrainer, tpo_alpha=1.0": (
        partial(tpo, tpo_alpha=1.0),
        "set tpo_alpha=0.0",
        "TPOTrainer, loss_type='sigmoid', tpo_alpha=0.0",
    ),
    "KTOTrainer, loss_type='kto'": (
        partial(kto, loss_type="kto", train_sampling_strategy="sequential"),
        "use one of ['apo_zero_unpaired']",
        "KTOTrainer, loss_type='apo_zero_unpaired'",
    ),
    **{
        f"DPOTrainer, loss_type=['{loss}']": (
            partial(dpo, loss_type=[loss], ref_model=llama(7)),
            f"loss_type=['{loss}']",
            "DPOTrainer",
        )
        for loss in ("aot", "aot_unpaired", "sft")
    },
    "GKDTrainer, lmbda=0.5": (partial(gkd, lmbda=0.5), "set lmbda=0.0", "GKDTrainer, beta=0.5, lmbda=0.0"),
    "GKDTrainer, seq_kd": (partial(gkd, seq_kd=True), "set seq_kd=False", "GKDTrainer, beta=0.5, lmbda=0.0"),
    "SFTTrainer, packing": (partial(sft, packing=True, max_length=32), "padding_free=True", "SFTTrainer, padding_free"),
    "GRPOTrainer": (partial(online, trl.GRPOTrainer, trl.GRPOConfig), "GRPOTrainer: a completion is rewarded", "DPOTrainer"),
    "RLOOTrainer": (partial(online, trl.RLOOTrainer, trl.RLOOConfig), "RLOOTrainer: a completion is rewarded", "DPOTrainer"),
    "GMPOTrainer": (partial(online, GMPOTrainer, GMPOConfig), "GMPOTrainer: a completion is rewarded", "DPOTrainer"),
    "OnlineDPOTrainer": (online_dpo, "OnlineDPOTrainer: the model writes answers", "DPOTrainer"),
    "DistillationTrainer": (distillation, "DistillationTrainer: the model writes answers", "GKDTrainer, beta=0.5, lmbda=0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mean_over_units_is_refused(name: str, tmp_path: Path, row: Callable[..., None]) -> None:
    make, words, remedy = REFUSED[name]
    with pytest.raises(UnsupportedError) as refusal:
        trained(make(tmp_path / "refused"))
    said = str(refusal.value)
    assert words in said
    trained(EXACT[remedy](tmp_path / "remedy"))
    row(name, "refused", said.partition("private training is not possible with ")[2])


# Of the trainers that need a server or a library more, the class is enough to be refused.
BY_CLASS: tuple[str, ...] = (
    "AsyncGRPOTrainer",
    "A2POTrainer",
    "SDPOTrainer",
    "ServerDistillationTrainer",
    "AsyncDistillationTrainer",
)
BY_CLASS += ("IWOPDTrainer", "SDFTTrainer", "GOLDTrainer")


@pytest.mark.parametrize("name", BY_CLASS)
def test_what_needs_more_is_refused_by_its_class(name: str, tmp_path: Path, row: Callable[..., None]) -> None:
    trainer = sft(tmp_path)
    trainer.__class__ = type(name, (trl.SFTTrainer,), {"__module__": "trl.experimental"})
    with pytest.raises(UnsupportedError, match=f"{name}: .*; have (answers|the teacher)") as refusal:
        trained(trainer)
    row(name, "refused", str(refusal.value).partition("private training is not possible with ")[2])


def test_all_trainers_have_a_row() -> None:
    tried = {name.split(",")[0].split(" ")[0] for name in (*EXACT, *REFUSED, *BY_CLASS)}
    assert tried == trl_trainers._ROWS.keys() | trl_trainers._REFUSED.keys()


COUPLED: tuple[str, ...] = (
    "ORPOTrainer",
    "CPOTrainer, cpo_alpha=1.0",
    "KTOTrainer, loss_type='kto'",
    "GRPOTrainer",
    "RLOOTrainer",
    "OnlineDPOTrainer",
)
COUPLED += ("DistillationTrainer", "DPOTrainer, loss_type=['aot_unpaired']", "DPOTrainer, loss_type=['sft']")


REFUSALS = (PrivacyError, UnsupportedError)


@pytest.mark.parametrize("name", COUPLED)
def test_the_checks_refuse_them_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody knew these trainers and losses: no step is taken, whatever is said above."""
    rows = dict.fromkeys(trl_trainers._REFUSED, 1) | {"ORPOTrainer": 2, **trl_trainers._ROWS}
    monkeypatch.setattr(trl_trainers, "_ROWS", rows)
    monkeypatch.setattr(trl_trainers, "_APART", ("CPOTrainer", "ORPOTrainer"))
    known = trl_trainers.refusals
    monkeypatch.setattr(trl_trainers, "refusals", lambda trainer: dict.fromkeys(known(trainer), False))
    trainer = REFUSED[name][0](tmp_path)
    trainer.args.train_sampling_strategy = "random"
    if name == "ORPOTrainer":
        trainer.pad_token_id = trainer.padding_value
    dp = DPCallback(config())
    trainer.add_callback(dp)
    with pytest.raises(REFUSALS):
        trainer.train()
    assert not dp.planned or dp.report().steps == 0
