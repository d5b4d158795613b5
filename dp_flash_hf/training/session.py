"""Private training on a dataset, whoever runs the loop: what `DPCallback` and `make_private` share."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.utils import logging

from dp_flash_hf.accounting.dataset_fingerprint import fingerprint_of
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.distributed import Ranks, local
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.memory import choose_by_memory, moments_of
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.layers.compiled import is_compiled
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.sampling import group_rows
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.batches import (
    UNITS,
    PoissonBatches,
    UnitCollator,
    WithUnits,
    physical_batches,
    steps_per_epoch,
    units_of,
)
from dp_flash_hf.training.dp_sgd import DPSGD
from dp_flash_hf.training.losses import ModelLoss, UnitLoss
from dp_flash_hf.training.preflight import choose_units, preflight
from dp_flash_hf.training.refusals import _refuse_data
from dp_flash_hf.units import Batch, Units

logger = logging.get_logger(__name__)

Move = Callable[[dict[str, Any]], Mapping[str, Any]]  # a collated batch -> the same on the model's device


class PrivateTraining:
    """Draws, clipped sums, noise, books, and the checks before the first step.

        loader = training.loader(dataset, collate, steps=..., splits=...)
        training.start(model, optimizer); training.check(loader, model_loss, move)
        for every step: training.add(part) for its parts; training.mechanism.release(); optimizer.step(); optimizer.zero_grad()
        training.stop()

    steps, epochs: how long; epochs count draws that see every unit once on average, and are used without steps.
    max_examples, max_tokens: what fits on the device, see `physical_batches`.
    rows_per_example: 2 where the collator makes two rows of an example, all the first ones before all the second ones.

    Raises UnsupportedError for data that cannot be sampled; ValueError when the budget cannot be met.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        dataset: Any,
        *,
        expected_batch_size: int,
        steps: int | None,
        epochs: float,
        max_examples: int,
        max_tokens: int | None,
        strategy: Strategy,
        rows_per_example: int = 1,
    ) -> None:
        if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
            raise invalid(
                "max_tokens_per_device", expected="None or a whole number >= 1", actual=max_tokens, remedy="4096, say"
            )
        _refuse_data(dataset)
        self.config, self.dataset, self.strategy = config, dataset, strategy
        self.max_examples, self.max_tokens = max_examples, max_tokens
        self.rows_per_example = rows_per_example
        self.rows = None if config.privacy_unit is None else group_rows(_column(dataset, config.privacy_unit))
        n_units = len(dataset) if self.rows is None else len(self.rows)
        steps = steps or math.ceil(epochs * steps_per_epoch(n_units, expected_batch_size))
        plan = PrivacyPlan.from_config(config, n_units=n_units, expected_batch_size=expected_batch_size, steps=steps)
        self.mechanism = DPSGD(config, plan)
        self.engine: ClippingEngine | None = None
        self._loss: UnitLoss | None = None
        self._moments = 0
        self._move: Move = dict
        self._template: tuple[dict[str, Any], Units] = ({}, Units.rows(0))  # one unit, for ranks that have none left
        logger.info(
            f"private training planned: noise multiplier {plan.noise_multiplier:.4g}, sampling rate "
            f"{plan.sampler.sampling_rate:.4g}, {steps} steps, epsilon {plan.epsilon():.4g} at delta {plan.target_delta:g}"
        )

    def report(self) -> PrivacyReport:
        """What was spent so far, and on which assumptions."""
        pair = "one pair of texts" if self.rows_per_example == 2 and self.config.privacy_unit is None else None
        return self.mechanism.report(pair)

    def open_spend_log(self, path: str | Path, state: dict[str, Any] | None = None) -> None:
        """Begin a training, whose every step is written to this spend log before it is released; what it holds already counts.

        state: of a checkpoint that the training continues. Raises PrivacyError where another run writes the log, it cannot be
        read or written, or it is of other data, and as `RunAccount.begin` does.
        """
        ranks = Ranks()
        log: SpendLog | None = None
        try:
            with ranks.all_ranks_or_none():
                if ranks.first:
                    log = SpendLog(path)
                    log.require_dataset(self.dataset)
            replica = ranks.shared(None if log is None else log.replica())
            with ranks.all_ranks_or_none():
                self.mechanism.account.begin(replica if log is None else log, state)
        except BaseException:
            if log is not None:
                log.close()
            raise

    def loader(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        *,
        steps: int,
        skipped: int = 0,
        splits: int = 1,
        lengths: Tensor | None = None,
        **options: Any,
    ) -> DataLoader[Any]:
        """Poisson draws from `dataset` (the one planned for, or it without some columns) for so many steps, in `splits` parts.

        skipped: how many of them the caller passes over, because they were taken before.
        lengths: int64 (units,), to put units of like length into one part. options: of torch's DataLoader.
        """
        return DataLoader(
            WithUnits(dataset),
            batch_sampler=PoissonBatches(
                self.mechanism.account.plan.sampler,
                steps=steps,
                splits=splits,
                together=self.max_tokens is not None,  # `physical_batches` then sees the whole draw, and sorts it by length
                rows=self.rows,
                max_examples_per_unit=self.config.max_examples_per_unit,
                lengths=lengths,
                seed=self.config.seed,
                first_step=self.mechanism.account.taken - skipped,
            ),
            collate_fn=UnitCollator(collate),
            **options,
        )

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """From now on the optimizer refuses gradients without noise. Raises PrivacyError unless it trains exactly the model."""
        if self.engine is not None:
            self.engine.detach()
        self._require_same_data()
        if Ranks().size > 1 and is_compiled(model):
            raise UnsupportedError("torch.compile on several processes is not supported; leave it off, or use one process")
        self.engine = ClippingEngine(
            unwrapped(model), max_grad_norm=self.config.max_grad_norm, clipping=self.config.clipping, strategy=self.strategy
        )
        self.mechanism.start(self.engine, optimizer)
        self._moments = moments_of(optimizer)

    def _require_same_data(self) -> None:
        """Raise PrivacyError unless unit 17 is the same on all ranks: else one person could be in two of their shares."""
        ranks = Ranks()
        if ranks.size == 1:
            return
        key = ranks.shared(secrets.token_hex(16))  # the ranks see each other's hashes, and nobody else does
        rows = None if self.rows is None else fingerprint_of([own.tolist() for own in self.rows], key, examples=len(self.rows))
        found = (fingerprint_of(self.dataset, key), rows)
        if any(other != found for other in ranks.gathered(found)):
            raise PrivacyError(
                "ranks were given different training data, or the same in another order, so a unit could be drawn on two of "
                "them: shuffle and filter with a fixed seed, or on the first rank only"
            )

    def check(self, loader: DataLoader[Any], model_loss: ModelLoss, move: Move, *, reduced_precision: bool) -> None:
        """Prove on the data themselves, before the first step, that steps will be private: see `preflight`."""
        assert self.engine is not None
        assert loader.collate_fn is not None
        self._move = move
        with Ranks().all_ranks_or_none():
            require_finite_weights(self.engine.model, "nothing was trained")

        def keys_of(unit: int, number: int) -> list[tuple[int, int]]:
            own = [unit] if self.rows is None else self.rows[unit][: self.config.max_examples_per_unit].tolist()
            return [(row, number) for row in own]

        if self.strategy == "auto":
            longest = choose_units(
                self.mechanism.account.plan.sampler.n_units, lambda unit: loader.dataset[keys_of(unit, 0)[0]][0]
            )[0]
            example = loader.collate_fn(loader.dataset.__getitems__(keys_of(longest, 0)))  # type: ignore[attr-defined]
            self._choose_by_memory(*self._prepared(example), torch.bfloat16 if reduced_precision else None)

        self._loss = preflight(
            self.engine,
            model_loss,
            loader.dataset,
            loader.collate_fn,
            self._prepared,
            keys_of,
            n_units=self.mechanism.account.plan.sampler.n_units,
            rows_per_example=self.rows_per_example,
            cut_padding=self.max_tokens is not None,
            reduced_precision=reduced_precision,
        )
        data: Any = loader.dataset
        self._template = self._prepared(loader.collate_fn(data.__getitems__(keys_of(0, 0))))
        attention = getattr(getattr(self.engine.model, "config", None), "_attn_implementation", None)
        forms = sorted(set(self.engine.norm_methods().values()))
        logger.info(
            f"preflight passed: the loss is a {self._loss.divides} over {self._loss.counted}, attention is {attention}, "
            f"gradients are exact by {', '.join(forms)}"
        )

    def _choose_by_memory(self, batch: dict[str, Any], units: Units, autocast: torch.dtype | None) -> None:
        """Set what strategy="auto" does, and say so. batch: of one unit, a long one."""
        assert self.engine is not None
        strategy, because = choose_by_memory(
            self.engine,
            batch,
            units,
            loss_fn=model_loss_of,
            max_rows=self.max_examples * self.rows_per_example,
            max_tokens=self.max_tokens,
            moments=self._moments,
            autocast=autocast,
        )
        self.engine.choose(strategy)
        logger.warning(f"strategy='auto' chose {strategy}: {because}")

    def add(self, inputs: Mapping[str, Any]) -> Tensor:
        """Add the clipped gradients of one part of a draw, and return its mean loss per label, for display only."""
        assert self.engine is not None
        if self._loss is None:
            raise PrivacyError("a step before check(): how the loss divides is not known")
        total, labels = torch.zeros(()), 0.0
        parts = self._physical_batches(inputs)
        # On ranks that compute together, each takes part in all forward and backward passes of the others.
        most = max(Ranks().gathered(len(parts))) if self.engine.sharded else len(parts)
        for part, units in parts:
            scale = self._loss.scale(part, units) if self.config.unit_loss == "mean" else None
            loss = self.engine.backward(self._loss, part, units, scale)
            total = total.to(loss.device) + loss
            labels += self._loss.count(part)
        for _ in range(most - len(parts)):
            self.engine.participate(self._loss, *self._template)
        if Ranks().any(not bool(total.isfinite())):  # of one unit, which then adds zero; or of all
            with Ranks().all_ranks_or_none():
                require_finite_weights(self.engine.model, "nothing was released")
        return total / max(labels, 1.0)

    def stop(self) -> None:
        """Let go of model and optimizer, as they are without the library; what was spent stays counted."""
        self.mechanism.stop()
        self.mechanism.account.close()
        if self.engine is not None:
            self.engine.detach()
            self.engine.model.zero_grad()  # what an interrupted step left was clipped, but has no noise

    def _physical_batches(self, inputs: Mapping[str, Any]) -> list[tuple[dict[str, Any], Units]]:
        of_example = inputs[UNITS]
        if not len(of_example):
            return []
        batch, units = self._prepared(inputs)
        examples = torch.bincount(of_example.cpu(), minlength=units.n).tolist()
        return list(physical_batches(batch, units, examples, max_examples=self.max_examples, max_tokens=self.max_tokens))

    def _prepared(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Units]:
        batch = dict(inputs)
        of_example = batch.pop(UNITS)
        batch = dict(self._move(batch))
        return batch, units_of(batch, of_example, self.rows_per_example)


def require_finite_weights(model: nn.Module, outcome: str) -> None:
    """Raise PrivacyError where training has diverged. Weights are public, so that it did tells nothing about the data."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not bool(local(p).isfinite().all())]
    if broken:
        raise PrivacyError(
            f"training has diverged: {len(broken)} parameters are no longer finite, {broken[0]} for one; {outcome}. Resume an "
            "older checkpoint, or start anew, with a smaller learning rate; the steps taken count"
        )


def model_loss_of(model: Any, batch: Batch) -> Tensor:
    """What a Transformers model computes itself."""
    loss: Tensor = model(**batch).loss
    return loss


def unwrapped(model: Any) -> Any:
    """The model that DDP wraps, whose gradients are then added up after they are clipped; any other model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _column(dataset: Any, name: str) -> list[Any]:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and name not in columns:
        raise invalid(
            "privacy_unit", expected=f"a column of train_dataset ({', '.join(columns)})", actual=name, remedy="name one"
        )
    values = dataset[name] if columns is not None else [dataset[row][name] for row in range(len(dataset))]
    return [value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value for value in values]
