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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from dp_flash_hf.integrations.replacing import replace_attribute
from dp_flash_hf.units import IGNORED

logger = logging.getLogger(__name__)

# Rows that one example becomes, where losses are means over units (examined in TRL 1.16). A pair's are row i and row i + pairs.
_ROWS = {
    "SFTTrainer": 1,
    "GKDTrainer": 1,
    "KTOTrainer": 1,
    "DPOTrainer": 2,
    "RewardTrainer": 2,
    "CPOTrainer": 2,
    "TPOTrainer": 2,
}
# Losses that are means over units, of terms that each depend on one of them; a trainer that is not here has no others.
_LOSSES = {
    "DPOTrainer": {
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
    },
    "KTOTrainer": {"apo_zero_unpaired"},
}
_ANSWERS = "have answers written and judged once, and give them to DPOTrainer, or KTOTrainer with loss_type='apo_zero_unpaired'"
_TEACHERS = "have the teacher write answers once, and give them to GKDTrainer with lmbda=0.0 and seq_kd=False, or to SFTTrainer"
_GROUPS = f"a completion is rewarded relative to the rows beside it, which a Poisson draw may not hold; {_ANSWERS}"
_WRITES = "the model writes answers while it trains, to all prompts of its own sampler's batch, which is no draw of units"
# Why the others are refused, and what to use instead.
_REFUSED = {
    "ORPOTrainer": "beside a mean over pairs its loss has a mean over the tokens of all chosen answers, so that pairs share a "
    "denominator; use CPOTrainer with loss_type='simpo' and cpo_alpha=0.0, which needs no reference model either",
    "GRPOTrainer": _GROUPS,
    "RLOOTrainer": _GROUPS,
    "GMPOTrainer": _GROUPS,
    "AsyncGRPOTrainer": _GROUPS,
    "SDPOTrainer": f"completions are rewarded and taught by the other ones of their group; {_ANSWERS}",
    "A2POTrainer": f"what a prompt is worth is counted on training data before the first step, without noise; {_ANSWERS}",
    "OnlineDPOTrainer": f"{_WRITES}; {_ANSWERS}",
    "DistillationTrainer": f"{_WRITES}; {_TEACHERS}",
    "ServerDistillationTrainer": f"{_WRITES}, and sent to a teacher elsewhere; {_TEACHERS}",
    "AsyncDistillationTrainer": f"{_WRITES}; {_TEACHERS}",
    "IWOPDTrainer": f"{_WRITES}; {_TEACHERS}",
    "SDFTTrainer": f"{_WRITES}; {_TEACHERS}",
    "GOLDTrainer": f"its steps come out of a buffer of several batches, so that a step is no draw of units; {_TEACHERS}",
}
_PER_PAIR = ("margin", "ref_chosen_logps", "ref_rejected_logps")  # what a batch of pairs holds once for each of them
_APART = ("CPOTrainer",)  # whose collators pad chosen and rejected answers by themselves, under names of their own
_METRICS = ("_metrics", "_stored_metrics")  # by "train" and "eval", what a trainer noted since its last log


def examined(trainer: Trainer) -> type | None:
    """TRL's class of this trainer if it is one of those that can be private, else None."""
    base = _trl_class(trainer)
    return base if base is not None and base.__name__ in _ROWS else None


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
        unknown = f"whether its loss couples units was not examined; of TRL's trainers, use {', '.join(_ROWS)}"
        return {f"{name}: {_REFUSED.get(name, unknown)}": True}
    given = getattr(trainer, "loss_types", None) or [getattr(trainer, "loss_type", None)]
    losses = sorted(set(given) - _LOSSES[name]) if name in _LOSSES else []
    adapters = getattr(trainer.model, "peft_config", {}).values()
    return {
        "packing: a packed row holds texts of several units; set packing=False and padding_free=True, which flattens the units "
        "that were drawn": getattr(args, "packing", False),
        f"loss_type={losses}: it sorts or averages over all rows of a batch; use one of {sorted(_LOSSES.get(name, ()))}": bool(
            losses
        ),
        **_of_distillation(trainer),
        **{
            f"{alpha}: beside the mean over pairs stands a mean over the tokens of the batch, so that pairs share a "
            f"denominator; set {alpha}=0.0 in the trainer's config": getattr(trainer, alpha, 0.0) != 0.0
            for alpha in ("cpo_alpha", "tpo_alpha")
        },
        "an encoder-decoder: how its pairs are laid out was not examined; use a decoder": (
            name in _APART and trainer.is_encoder_decoder
        ),
        "generate_during_eval: it shows prompts of the data; set it to False": getattr(args, "generate_during_eval", False),
        "router_aux_loss_coef: the load-balancing loss is computed over all units; set it to 0.0 in the trainer's config": (
            getattr(trainer, "aux_loss_enabled", False) and hasattr(args, "router_aux_loss_coef")
        ),
        "sync_ref_model: not examined; set it to False": getattr(args, "sync_ref_model", False),
        "use_liger_kernel: its layers were not examined; set it to False": args.use_liger_kernel,
        "activation_offloading: not examined; set it to False": getattr(args, "activation_offloading", False),
        "gradient_checkpointing_kwargs={'selective': True}: not examined; leave it out": bool(
            (args.gradient_checkpointing_kwargs or {}).get("selective")
        ),
        "images: pictures of all rows lie in one tensor, which was not examined; use text": (
            getattr(trainer, "_is_vision_dataset", False)
        ),
        f"data_collator {type(trainer.data_collator).__name__}: how it pairs rows is not known; use TRL's own": (
            _ROWS[name] == 2 and not type(trainer.data_collator).__module__.startswith("trl.")
        ),
        "prompt learning (prefix or prompt tuning): its virtual tokens were not examined; use LoRA": any(
            getattr(adapter, "is_prompt_learning", False) for adapter in adapters
        ),
    }


def _of_distillation(trainer: Any) -> dict[str, bool]:
    """Who writes the answers that `GKDTrainer` trains on: in `training_step`, which is replaced."""
    return {
        "lmbda: the student writes answers in a training step of the trainer's own, which is replaced; set lmbda=0.0": (
            getattr(trainer, "lmbda", 0.0) != 0.0
        ),
        "seq_kd: the teacher writes answers in a training step of the trainer's own, which is replaced; have it write them "
        "before training, and set seq_kd=False": getattr(trainer, "seq_kd", False),
    }


def as_rows(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A collated batch in which every tensor has an entry for each row, so that the rows of a unit can be selected."""
    if rows_per_example(trainer) == 1:
        return dict(batch)
    if _is_apart(trainer):  # laid out as DPOTrainer's; what they hold besides, no loss reads
        halves = ("chosen", "rejected")
        ids, mask, labels = (
            pad_sequence([row for half in halves for row in batch[f"{half}_{name}"]], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", trainer.pad_token_id), ("attention_mask", 0), ("labels", IGNORED))
        )
        return {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != IGNORED).long()}
    return {name: torch.cat([value, value]) if name in _PER_PAIR else value for name, value in batch.items()}


def as_collated(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `as_rows`, for the batch or some of its pairs."""
    if rows_per_example(trainer) == 1:
        return dict(batch)
    if _is_apart(trainer):
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        parts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        return {
            f"{half}_{name}": part
            for name, value in parts.items()
            for half, part in zip(("chosen", "rejected"), value.chunk(2), strict=True)
        }
    return {name: value[: len(value) // 2] if name in _PER_PAIR else value for name, value in batch.items()}


def _is_apart(trainer: Trainer) -> bool:
    base = examined(trainer)
    return base is not None and base.__name__ in _APART


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
            for name in filter(partial(hasattr, trainer), _METRICS):
                replace_attribute(undo, trainer, name, {mode: defaultdict(list) for mode in ("train", "eval")})
            if hasattr(trainer, "_total_train_tokens"):
                replace_attribute(undo, trainer, "_total_train_tokens", trainer._total_train_tokens)
        yield


def forget_evaluations(trainer: Any) -> None:
    """Drop what was noted in evaluation mode and not logged, which may be of training data: the next log would add it."""
    if examined(trainer) is not None:
        for name in filter(partial(hasattr, trainer), _METRICS):
            getattr(trainer, name)["eval"].clear()


def stored_metrics(trainer: Any) -> dict[str, float]:
    """The metrics of training since the last log, of trainers that would add them beside `loss`, which is called otherwise."""
    if examined(trainer) is None or not hasattr(trainer, "_stored_metrics"):
        return {}
    found = {name: sum(values) / len(values) for name, values in trainer._stored_metrics["train"].items()}
    trainer._stored_metrics["train"].clear()
    return found


def _trl_class(trainer: Trainer) -> type | None:
    return next((base for base in type(trainer).__mro__ if base.__module__.startswith("trl.")), None)
