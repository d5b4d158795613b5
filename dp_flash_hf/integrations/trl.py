"""TRL's trainers: how they lay out examples, which of their settings couple units, and the head and metrics of their losses.

Every function takes any `Trainer`, and does nothing to those that are not TRL's. What is changed of a trainer is changed for a
while only: see `replacing`.
"""

from __future__ import annotations

import functools
import logging
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from dp_flash_hf.integrations.replacing import replace_attribute

logger = logging.getLogger(__name__)

# Rows that one example becomes, for the trainers that were examined (TRL 1.16). A pair's are row i and row i + pairs.
_ROWS = {"SFTTrainer": 1, "DPOTrainer": 2, "RewardTrainer": 2}
# Losses of DPOTrainer that are means over pairs, of terms that each depend on one pair.
_DPO_LOSSES = {
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "exo_pair",
    "hinge",
    "ipo",
    "nca_pair",
    "robust",
    "sigmoid",
    "sigmoid_norm",
    "sppo_hard",
}
_COUPLED = {
    "KTOTrainer": "it sets the completions of some rows against the prompts of others",
    "GRPOTrainer": "a completion is rewarded relative to others",
    "RLOOTrainer": "a completion is rewarded relative to others",
}
_PER_PAIR = ("margin", "ref_chosen_logps", "ref_rejected_logps")  # what a batch of pairs holds once for each of them


def examined(trainer: Trainer) -> type | None:
    """TRL's class of this trainer if it is one of those examined, else None."""
    base = _trl_class(trainer)
    return base if base is not None and base.__name__ in _ROWS and base.__module__.startswith("trl.trainer.") else None


def rows_per_example(trainer: Trainer) -> int:
    """Rows that the trainer's collator makes of an example."""
    base = examined(trainer)
    return 1 if base is None else _ROWS[base.__name__]


@contextmanager
def on_one_rank(trainer: Any) -> Iterator[None]:
    """Within the context the trainer's loss and metrics are this rank's own.

    Losses are multiplied by the number of ranks, so that their mean over ranks is a sum, and metrics are gathered from all
    ranks. Some ranks compute more physical batches than others, which would then wait for them.
    """
    accelerator = trainer.accelerator
    with ExitStack() as undo:
        if accelerator.num_processes > 1:
            replace_attribute(undo, trainer.args, "average_tokens_across_devices", False)
            for name in ("gather", "gather_for_metrics"):
                replace_attribute(undo, accelerator, name, _ungathered)
        yield


def _ungathered(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def refusals(trainer: Any) -> dict[str, bool]:
    """What cannot be private and why, and whether this trainer has it."""
    found = _trl_class(trainer)
    if found is None:
        return {}
    name, args = found.__name__, trainer.args
    if examined(trainer) is None:
        why = _COUPLED.get(name, "whether its loss couples units was not examined")
        return {f"{name}: {why}; of TRL's trainers, use {', '.join(_ROWS)}": True}
    losses = sorted(set(getattr(trainer, "loss_types", ())) - _DPO_LOSSES)
    adapters = getattr(trainer.model, "peft_config", {}).values()
    return {
        "packing: a packed row holds texts of several units; set packing=False and padding_free=True, which flattens the units "
        "that were drawn": getattr(args, "packing", False),
        f"loss_type={losses}: it sorts or averages over all pairs of a batch; use one of {sorted(_DPO_LOSSES)}": bool(losses),
        "router_aux_loss_coef: the load-balancing loss is computed over all units; set it to 0.0 in the trainer's config": (
            getattr(trainer, "aux_loss_enabled", False)
        ),
        "sync_ref_model: not examined; set it to False": getattr(args, "sync_ref_model", False),
        "use_liger_kernel: its layers were not examined; set it to False": args.use_liger_kernel,
        "activation_offloading: not examined; set it to False": args.activation_offloading,
        "gradient_checkpointing_kwargs={'selective': True}: not examined; leave it out": bool(
            (args.gradient_checkpointing_kwargs or {}).get("selective")
        ),
        "images: pictures of all rows lie in one tensor, which was not examined; use text": (
            getattr(trainer, "_is_vision_dataset", False)
        ),
        f"data_collator {type(trainer.data_collator).__name__}: how it pairs rows is not known; use TRL's own": (
            _ROWS[name] == 2 and not type(trainer.data_collator).__module__.startswith("trl.trainer.")
        ),
        "prompt learning (prefix or prompt tuning): its virtual tokens were not examined; use LoRA": any(
            getattr(adapter, "is_prompt_learning", False) for adapter in adapters
        ),
    }


def as_rows(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A collated batch in which every tensor has an entry for each row, so that the rows of a unit can be selected."""
    if rows_per_example(trainer) == 1:
        return dict(batch)
    return {name: torch.cat([value, value]) if name in _PER_PAIR else value for name, value in batch.items()}


def as_collated(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `as_rows`, for the batch or some of its pairs."""
    if rows_per_example(trainer) == 1:
        return dict(batch)
    return {name: value[: len(value) // 2] if name in _PER_PAIR else value for name, value in batch.items()}


def call_the_head(undo: ExitStack, trainer: Any) -> None:
    """Where the language model's head is trained, let losses call it, instead of taking its weight for a kernel of their own.

    That kernel is exact in a frozen head, and stays. In a trained one the gradient would not pass through the head's layer, and
    every unit would be computed by itself.

    Args:
        undo: when it is closed, losses use TRL's kernel again.
        trainer: after it has prepared its model, so that this is the outermost of what replaces the model's forward.
    """
    if examined(trainer) is None:
        return
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    head = model.get_output_embeddings()
    if "forward" not in vars(model) or head is None or not any(p.requires_grad for p in head.parameters()):
        return
    replace_attribute(undo, model, "forward", types.MethodType(_calling_the_head(model.forward), model))
    logger.info(f"{type(trainer).__name__}'s fused head is off: the head is trained, and clipped as a layer of the model")


def _calling_the_head(given: Any) -> Any:
    """A forward that returns of `fused_lm_head=True` what TRL's does, computed from the logits of the head's own layer."""
    from trl.trainer.utils import FusedCausalLMOutput

    @functools.wraps(getattr(given, "__func__", given))
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return given(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        logits = given(*args, **kwargs).logits[:, :-1]
        logits, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].to(logits.device)
        mask = labels != -100
        every = logits.log_softmax(-1)
        with torch.no_grad():
            shown = {
                "entropy": -(every.exp() * every).sum(-1),
                "log_sum_sq_probs": (2 * every).logsumexp(-1),
                "mean_logits": logits.mean(-1),
                "is_top1": logits.argmax(-1) == labels,
            }
        log_probs = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0)
        return FusedCausalLMOutput(
            log_probs=log_probs, label_mask=mask, **{name: value.masked_fill(~mask, 0) for name, value in shown.items()}
        )

    return forward


@contextmanager
def without_metrics(trainer: Any) -> Iterator[None]:
    """Within the context losses note no metrics: afterwards there are those that were noted before."""
    with ExitStack() as undo:
        if examined(trainer) is not None:
            replace_attribute(undo, trainer, "_metrics", {mode: defaultdict(list) for mode in trainer._metrics})
            replace_attribute(undo, trainer, "_total_train_tokens", trainer._total_train_tokens)
        yield


def mark_metrics(trainer: Any) -> None:
    """Name the metrics of training, which hold no noise, as what they are: `log` of TRL's trainers adds them to the logs."""
    if examined(trainer) is not None and trainer.model.training:  # as `log` asks: else it adds those of an evaluation
        metrics = trainer._metrics["train"]
        for name in [name for name in metrics if not name.startswith("not_private/")]:
            metrics[f"not_private/{name}"] = metrics.pop(name)


def _trl_class(trainer: Trainer) -> type | None:
    return next((base for base in type(trainer).__mro__ if base.__module__.startswith("trl.")), None)
