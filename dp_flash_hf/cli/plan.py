"""`dp-flash plan`: what a run would cost, in privacy or in memory, before anything is spent."""

from __future__ import annotations

import argparse
import math
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

from dp_flash_hf.cli.common import AUTO_CLASSES, above_zero, add_task, config_of, several, several_whole, show, table, whole

if TYPE_CHECKING:
    from dp_flash_hf.accounting.plan import PrivacyPlan
    from dp_flash_hf.cli.common import Commands

_DTYPES = ("float32", "bfloat16")
_OPTIMIZERS = {"adamw": 2, "sgd": 0}  # values of optimizer state for each trained parameter


def add_parsers(commands: Commands) -> None:
    """Add `plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="epsilon, noise and steps of a run, or its memory, before anything is spent",
        description="Give --units, --batch and two of --epsilon, --noise-multiplier and --steps (or --epochs); the third is "
        "computed. Each of these may be a comma-separated list: the table has every combination. Or give --memory, --model, "
        "--batch-rows and --length: the table has what each strategy needs.",
    )
    parser.set_defaults(command=plan)
    parser.add_argument("--units", type=whole, help="privacy units (usually: examples) in the dataset")
    parser.add_argument("--batch", type=whole, help="expected units per optimizer step")
    parser.add_argument("--delta", type=above_zero, help="default: units ** -1.1")
    parser.add_argument("--epsilon", type=several, help="target epsilon: calibrates the noise, or counts the steps it affords")
    parser.add_argument("--noise-multiplier", type=several, help="noise standard deviation / max_grad_norm")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=several_whole, help="optimizer steps")
    steps.add_argument("--epochs", type=several, help="passes over the data: so many times units / batch steps")
    parser.add_argument("--accountant", default="pld", help="pld (default), prv or rdp")
    parser.add_argument("--max-batch-size", type=whole, help="truncated Poisson sampling: the most units of one step")
    _add_memory(parser)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("memory of a step, from shapes alone")
    memory.add_argument("--memory", action="store_true", help="plan memory")
    memory.add_argument("--model", help="a Hub name or folder; the configuration is read, and no weights")
    add_task(memory)
    memory.add_argument("--batch-rows", type=whole, help="rows computed at once: per_device_train_batch_size")
    memory.add_argument("--length", type=whole, help="tokens per row")
    memory.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    memory.add_argument("--lora", type=whole, help="rank of adapters on all linear layers, which are all that is trained")
    memory.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: float32)")
    memory.add_argument("--autocast", action="store_true", help="with bfloat16 autocast over them: bf16 of TrainingArguments")
    memory.add_argument("--optimizer", choices=sorted(_OPTIMIZERS), default="adamw", help="default: adamw")
    memory.add_argument(
        "--ranks",
        type=whole,
        default=1,
        help="what one rank needs where FSDP2 shards the model over so many; with DDP each needs as much as one alone",
    )


def plan(options: argparse.Namespace) -> None:
    """Print the table that the options ask for.

    Raises:
        ValueError: If they do not say enough, or contradict each other, or the budget does not afford one step.
    """
    if options.memory:
        _plan_memory(options)
    else:
        _plan_privacy(options)


def _plan_privacy(options: argparse.Namespace) -> None:
    from dp_flash_hf.accounting.ledger import ADJACENCY

    if options.units is None or options.batch is None:
        raise ValueError("plan: give --units and --batch, or --memory; see dp-flash plan --help")
    if options.delta is None:
        options.delta = min(options.units**-1.1, 0.5 / options.units)  # less than 1, also for one unit
    rows = _plans(options)
    found = table("epsilon", "noise multiplier", "steps", "epochs", justify="right")
    for row in rows:
        epochs = row.steps * row.sampler.sampling_rate
        found.add_row(f"{row.epsilon():.4g}", f"{row.noise_multiplier:.4f}", str(row.steps), f"{epochs:.2f}")
    show(found)
    print(
        f"{options.units} units, {options.batch} expected per step (sampling rate {rows[0].sampler.sampling_rate:.4g}), "
        f"delta {options.delta:.3g}, {rows[0].sampler.kind} sampling, {options.accountant} accountant, adjacency: {ADJACENCY}. "
        "This is what such a run promises, also if it stops early."
    )


def _plans(options: argparse.Namespace) -> list[PrivacyPlan]:
    """The plan of every combination of the values given."""
    from rich.console import Console
    from rich.progress import track

    from dp_flash_hf.training.batches import steps_per_epoch

    steps = options.steps
    if options.epochs:
        steps = [math.ceil(epochs * steps_per_epoch(options.units, options.batch)) for epochs in options.epochs]
    if sum(values is None for values in (options.epsilon, options.noise_multiplier, steps)) != 1:
        raise ValueError("plan: give exactly two of --epsilon, --noise-multiplier and --steps (or --epochs)")
    combinations = list(product(options.epsilon or [None], options.noise_multiplier or [None], steps or [None]))
    watched = track(combinations, "accounting", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    return [_plan_of(options, *combination) for combination in watched]


def _plan_of(
    options: argparse.Namespace, epsilon: float | None, noise_multiplier: float | None, steps: int | None
) -> PrivacyPlan:
    """The plan of one combination, in which one value is None and is computed."""
    from dp_flash_hf.accounting.plan import PrivacyPlan
    from dp_flash_hf.mechanisms.config import PrivacyConfig

    def plan(epsilon: float | None, steps: int) -> PrivacyPlan:
        config = PrivacyConfig(
            target_delta=options.delta,
            target_epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            accountant=options.accountant,
            sampling="poisson" if options.max_batch_size is None else "truncated_poisson",
            max_batch_size=options.max_batch_size,
        )
        return PrivacyPlan.from_config(config, n_units=options.units, expected_batch_size=options.batch, steps=steps)

    if steps is not None:
        return plan(epsilon, steps)
    assert epsilon is not None
    most = plan(None, 1).max_steps(epsilon)
    if most == 0:
        raise ValueError(f"epsilon {epsilon:g} does not afford one step at noise multiplier {noise_multiplier:g}; add noise")
    return plan(None, most)


def _plan_memory(options: argparse.Namespace) -> None:
    import torch

    from dp_flash_hf.engine.memory import estimate, free_memory
    from dp_flash_hf.engine.model_loss import model_loss

    rows, length = options.batch_rows, options.length
    if None in (options.model, rows, length):
        raise ValueError("plan: --memory needs --model, --batch-rows and --length")
    model, batch = _on_meta(options)
    strategies = estimate(
        model,
        batch,
        rows,
        loss_fn=model_loss,
        moments=_OPTIMIZERS[options.optimizer],
        autocast=torch.bfloat16 if options.autocast else None,
        ranks=options.ranks,
    )
    found = table("MiB", "weights", "grads", "states", "activations", "records", "total", justify="right")
    if options.ranks > 1:
        found.title = f"one of {options.ranks} ranks, sharded by FSDP2"
    for row in strategies:
        parts = (row.parameters, row.gradients, row.optimizer, row.activations, row.records, row.total)
        found.add_row(row.strategy, *(f"{part / 2**20:,.0f}" for part in parts))
    show(found)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (True, False))
    gathered = " Activations are with the weights that FSDP2 gathers." if options.ranks > 1 else ""
    dtype = f"{options.dtype} under bfloat16 autocast" if options.autocast else options.dtype
    print(
        f"{type(model).__name__}: {size:,.1f} M parameters in {dtype}, {trained:,.1f} M trained with {options.optimizer}.\n"
        f"{rows} rows of {length} tokens, {'with' if options.checkpointing else 'without'} checkpointing.{gathered} "
        f"Free on {device} now: {free_memory(device) / 2**20:,.0f} MiB."
    )


def _on_meta(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model and a batch of it, shapes without values."""
    import torch
    import transformers

    config = config_of(options.model)
    with torch.device("meta"):
        auto = getattr(transformers, AUTO_CLASSES[options.task])
        model = auto.from_config(config, attn_implementation="eager", dtype=getattr(torch, options.dtype))
        if options.lora is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=options.lora, target_modules="all-linear"))
        ids = torch.zeros(options.batch_rows, options.length, dtype=torch.long)
        labels = torch.zeros(options.batch_rows, dtype=torch.long) if options.task == "classification" else ids
    if options.checkpointing:
        model.activation_checkpointing_enable()
    return model, {"input_ids": ids, "labels": labels}
