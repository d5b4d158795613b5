"""Settings of a `Trainer` that cannot be private are refused by name, before anything happens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.data import IterableDataset

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations import trainer_settings
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import Pad, attached, draws, texts, trainer_for, watch


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(texts())


ARGUMENTS: dict[str, Any] = {
    "auto_find_batch_size": True,
    "dataloader_drop_last": True,
    "train_sampling_strategy": "batch_rebalance",
    "neftune_noise_alpha": 5.0,
    "include_num_input_tokens_seen": "all",
    "restore_callback_states_from_checkpoint": True,
}
FAKED: dict[str, Any] = {  # cannot be constructed on this machine
    "fp16": True,
    "_n_gpu": 2,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "debug": "underflow_overflow",
    "optim": "galore_adamw_layerwise",
}
NAMED = {"_n_gpu": "DataParallel.*FSDP2", "deepspeed": "DeepSpeed.*FSDP2", "neftune_noise_alpha": "neftune", "optim": "galore"}


def assert_refused(trainer: Any, match: str) -> None:
    methods = dict(vars(trainer))
    with pytest.raises(UnsupportedError, match=match):
        attached(trainer)
    assert vars(trainer) == methods  # nothing changed


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Promise 6: what cannot be private is named, with what to do, before anything happens."""
    assert_refused(trainer_for("gpt2", tmp_path, **{name: ARGUMENTS[name]}), NAMED.get(name, name))


@pytest.mark.parametrize("name", FAKED)
def test_arguments_of_other_machines_are_refused_by_name(name: str, tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    setattr(trainer.args, name, FAKED[name])
    assert_refused(trainer, NAMED.get(name, name))


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_update_weights_during_backward_are_refused(optim: str, tmp_path: Path) -> None:
    assert_refused(trainer_for("gpt2", tmp_path, optim=optim), f"optim={optim}")


@pytest.mark.parametrize(
    ("variable", "value", "match"), [("mixed_precision", "fp8", "fp8"), ("distributed_type", "MEGATRON_LM", "use FSDP2")]
)
def test_what_a_launcher_sets_behind_the_arguments_is_refused(
    variable: str, value: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), variable, property(lambda self: value))
    assert_refused(trainer, match)


def test_regional_compilation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    monkeypatch.setattr(trainer.accelerator.state.dynamo_plugin, "use_regional_compilation", True)
    assert_refused(trainer, "use_regional_compilation: not yet supported; compile the whole model")


def test_data_and_losses_are_refused_by_name(tmp_path: Path) -> None:
    assert_refused(trainer_for("gpt2", tmp_path, Stream()), "train_dataset with a length")
    trainer = trainer_for("gpt2", tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss
    assert_refused(trainer, "compute_loss_func")
    mixtral = trainer_for("mixtral", tmp_path)
    mixtral.model.config.output_router_logits = True
    assert_refused(mixtral, "output_router_logits")


def test_several_reasons_come_in_one_message(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, dataloader_drop_last=True, neftune_noise_alpha=5.0)
    assert_refused(trainer, "dataloader_drop_last.*; and neftune")


def test_trl_trainers_are_refused_by_name(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, cls=type("GRPOTrainer", (hf.Trainer,), {"__module__": "trl.trainer.grpo_trainer"}))
    assert_refused(trainer, "GRPOTrainer: a completion is rewarded relative to")


@pytest.mark.parametrize("settings", [{"lr_scheduler_type": "reduce_lr_on_plateau"}, {"load_best_model_at_end": True}], ids=str)
def test_choices_by_results_on_the_training_data_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    data = texts()
    trainer = trainer_for("gpt2", tmp_path, data)
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    trainer.eval_dataset = {"held out": texts(3, seed=9), "train": data}
    assert_refused(trainer, r"eval_dataset\['train'\] is train_dataset: .*hold data out")
    trainer.eval_dataset = texts(3, seed=9)
    attached(trainer)


class Own(torch.optim.lr_scheduler.ReduceLROnPlateau):
    pass


@pytest.mark.parametrize("scheduler", [torch.optim.lr_scheduler.ReduceLROnPlateau, hf.optimization.GreedyLR, Own])
def test_schedulers_that_look_at_results_are_known_as_objects_too(scheduler: Any, tmp_path: Path) -> None:
    data = texts()
    trainer = trainer_for("gpt2", tmp_path, data)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler(optimizer)  # as given in optimizers=
    trainer.eval_dataset = data
    assert_refused(trainer, "eval_dataset is train_dataset")
    trainer.eval_dataset = texts(3, seed=9)
    attached(trainer)


def test_wandb_must_not_watch_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    monkeypatch.setattr(hf.integrations.integration_utils, "is_wandb_available", lambda: True)
    reporter = object.__new__(hf.integrations.integration_utils.WandbCallback)
    trainer.callback_handler.callbacks.append(reporter)
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    assert_refused(trainer, "WANDB_WATCH")


def test_settings_changed_after_attach_are_refused_too(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    dp = attached(trainer)
    trainer.args.fp16 = True
    with pytest.raises(UnsupportedError, match="fp16"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_hyperparameter_search_is_refused_at_once_and_given_back(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=r"once for each trial.*Search on public data"):
        trainer.hyperparameter_search(n_trials=2)
    assert dp.mechanism.account.steps == 0
    dp.detach()
    assert "hyperparameter_search" not in vars(trainer)


class HeadBeside(hf.Trainer):
    """A loss with weights of its own, which the optimizer updates too."""

    head: torch.nn.Linear

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(self.head(model(**inputs).logits), labels)


def with_head(path: Path, *, frozen_bias: bool) -> Any:
    trainer = trainer_for("bert_classifier", path, cls=HeadBeside, max_steps=1)
    torch.manual_seed(3)
    trainer.head = torch.nn.Linear(3, 3).double()
    trainer.head.bias.requires_grad_(not frozen_bias)
    trainer.optimizer = torch.optim.SGD([*trainer.model.parameters(), *trainer.head.parameters()], lr=0.0)
    return trainer


@pytest.mark.parametrize("frozen_bias", [False, True])
def test_weights_that_a_loss_holds_beside_the_model_are_clipped_with_it(
    frozen_bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [0, 3, 4, 9, 11]
    alone = with_head(tmp_path, frozen_bias=frozen_bias)
    parts = [Pad(classes=True)([texts()[row]]) for row in drawn]
    both = torch.nn.ModuleDict({"model": alone.model, "head": alone.head}).eval()
    single = unit_gradients(both, lambda part: alone.compute_loss(alone.model, dict(part)), parts)
    bound = float(clipped_sum(single, 1.0)[1].median())
    seen = watch(monkeypatch)
    draws(monkeypatch, drawn)
    trainer = with_head(tmp_path, frozen_bias=frozen_bias)
    attached(trainer, max_grad_norm=bound)
    trainer.train()
    assert {"head.weight", "head.bias"} - seen.sums[0].keys() == ({"head.bias"} if frozen_bias else set())
    assert distance(seen.sums[0], clipped_sum(single, bound)[0]) < 1e-6


@pytest.mark.parametrize("why", ["processes", "compiled"])
def test_weights_beside_the_model_are_refused_where_they_were_not_tried(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    wrapped = torch.nn.Sequential(model)
    monkeypatch.setattr(trainer_settings, "is_compiled", lambda module: why == "compiled" and module is wrapped)
    trainer = SimpleNamespace(
        model=model, model_wrapped=wrapped, head=head, accelerator=SimpleNamespace(num_processes=1 + (why == "processes"))
    )
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with pytest.raises(UnsupportedError, match=r"trainer\.head \(a Linear\).*one process.*freeze"):
        trainer_settings.trained_module(trainer, optimizer)
    head.requires_grad_(False)  # as it says
    assert trainer_settings.trained_module(trainer, optimizer) is (wrapped if why == "compiled" else model)
