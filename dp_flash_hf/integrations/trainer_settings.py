"""Settings of a `Trainer` under which the guarantee would not hold: each is refused by name, with what to do instead."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.integrations.integration_utils import WandbCallback

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations import own_methods
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.integrations.evaluation import EvaluationData
from dp_flash_hf.layers.compiled import is_compiled
from dp_flash_hf.training.refusals import accelerator_refusals, refuse


def refuse_settings(trainer: Trainer, own: own_methods.Methods, evaluation: EvaluationData) -> None:
    """Raise UnsupportedError for everything under which the guarantee would not hold, all of it in one message.

    It is asked when `DPCallback` is attached and again when training begins. It knows settings, callbacks and TRL's trainers,
    and looks at methods that `DPCallback` takes the place of, unless TRL's are refused already; what code does inside
    `compute_loss`, a collator or the model, `preflight` finds out.

    Args:
        trainer: Transformers' or TRL's, as it is now.
        own: its `own_methods.methods_of` before `DPCallback` was attached.
        evaluation: knows which of its evaluation data are training data.
    """
    args = trainer.args
    callbacks = trainer.callback_handler.callbacks
    config = getattr(trainer.model, "config", None)
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    optim = str(getattr(args.optim, "value", args.optim))  # of an enumeration, whose own names are capitals
    by_trl = trl_trainers.refusals(trainer)
    refused = {
        **by_trl,
        "fp16: its loss scaling skips steps depending on the data; use bf16=True or float32": args.fp16,
        "auto_find_batch_size: retries depend on the data; set per_device_train_batch_size": args.auto_find_batch_size,
        "DataParallel: each replica sees part of a batch; launch one process for each device (torchrun), with DDP or FSDP2": (
            args.n_gpu > 1
        ),
        "DeepSpeed: its engine owns backward and adds gradients up before they are clipped; use FSDP2, or DDP": bool(
            args.deepspeed
        ),
        **accelerator_refusals(trainer.accelerator),
        "dataloader_drop_last: Poisson batches have no remainder to drop; set it to False": args.dataloader_drop_last,
        f"train_sampling_strategy={args.train_sampling_strategy!r} is not accounted; use 'random' or 'group_by_length'": (
            getattr(args, "train_sampling_strategy", "random") not in ("random", "group_by_length")
        ),
        "neftune_noise_alpha: its noise depends on the longest text of the batch; unset it": args.neftune_noise_alpha
        is not None,
        "include_num_input_tokens_seen: it logs how many tokens were drawn; set it to 'no'": (
            args.include_num_input_tokens_seen not in ("no", False)
        ),
        "restore_callback_states_from_checkpoint: it replaces DPCallback by a copy without a trainer; set it to False": (
            args.restore_callback_states_from_checkpoint
        ),
        "debug='underflow_overflow': it prints activations; unset it": bool(args.debug),
        "WANDB_WATCH: it logs gradients before noise; set it to 'false'": (
            os.environ.get("WANDB_WATCH") in ("all", "gradients") and any(isinstance(c, WandbCallback) for c in callbacks)
        ),
        **evaluation.refusals(trainer),
        f"optim={optim}: it updates weights during backward, before noise; use adamw_torch": any(
            name in optim for name in ("lomo", "layerwise")
        ),
        "compute_loss_func: how it couples units cannot be known; override Trainer.compute_loss": trainer.compute_loss_func
        is not None,
        "output_router_logits: the load-balancing loss is computed over all units; set config.output_router_logits=False": (
            getattr(text_config, "output_router_logits", False)
        ),
        **({} if any(by_trl.values()) else own_methods.refusals(trainer, own)),
    }
    refuse(refused)


class _Together(nn.ModuleDict):
    """A model and what is trained beside it; `config` is the model's."""

    def __init__(self, model: nn.Module, beside: dict[str, nn.Module]) -> None:
        super().__init__({"model": model, **beside})
        self.config = getattr(model, "config", None)


def trained_module(trainer: Any, optimizer: Any) -> nn.Module:
    """What the trainer trains: its model; or the model and what it holds beside, as one module, over which units are clipped.

    The latter where the optimizer also updates weights of modules that are attributes of the trainer: of a loss, say.

    Raises:
        UnsupportedError: there are such weights beside a model that is compiled, or on several processes.
    """
    # Only what wraps a model knows whether it is compiled.
    model: nn.Module = trainer.model_wrapped if is_compiled(trainer.model_wrapped) else trainer.model
    updated = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad} - set(model.parameters())
    beside = {
        name: module
        for name, module in vars(trainer).items()
        if isinstance(module, nn.Module) and not updated.isdisjoint(module.parameters())
    }
    if not beside:
        return model
    if model is not trainer.model or trainer.accelerator.num_processes > 1:
        names = [f"trainer.{owner} (a {type(module).__name__})" for owner, module in beside.items()]
        raise UnsupportedError(
            f"the optimizer also updates weights beside the model, of {', '.join(names)}, which is supported in one process "
            "and without torch_compile: leave that off, or freeze them with requires_grad_(False) before the trainer is made"
        )
    return _Together(model, beside)


def refuse_search(*args: Any, **kwargs: Any) -> None:
    """In place of `hyperparameter_search`: raise PrivacyError."""
    raise PrivacyError(
        "hyperparameter_search would train on the same data once for each trial, and choose one by results without noise: "
        "no epsilon of one training covers that, and this one's budget is planned for one. Search on public data, or "
        "without DPCallback on data that need no protection, and train privately once with what was found; or run every "
        "trial as a private training of its own, in an output_dir of its own, and count the epsilon of all of them"
    )
