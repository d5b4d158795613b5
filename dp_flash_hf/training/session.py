"""One private training on a dataset, whoever runs the loop: what `DPCallback` and `make_private` have in common."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dp_flash_hf import validation
from dp_flash_hf.accounting.dataset_fingerprint import fingerprint_of
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.run_account import known_logs
from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.distributed import Ranks, accelerators, local, logger_of_all_ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.memory import choose_by_memory, moments_of
from dp_flash_hf.engine.model_loss import model_loss
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.layers.compiled import is_compiled
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.fresh_randomness import Generator, fresh_randomness, own_generators, same_randomness
from dp_flash_hf.mechanisms.sampling import group_rows
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.adapter import TrainingAdapter, prepared
from dp_flash_hf.training.batches import (
    UNITS,
    FreshCollator,
    PoissonBatches,
    UnitCollator,
    WithUnits,
    physical_batches,
    steps_per_epoch,
)
from dp_flash_hf.training.columns import column, column_names
from dp_flash_hf.training.dp_sgd import DPSGD
from dp_flash_hf.training.draws import DRAW, DrawInProgress
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.preflight import Checks
from dp_flash_hf.training.recheck import Rechecks
from dp_flash_hf.training.refusals import refuse_data
from dp_flash_hf.training.rows_of_documents import say_of_documents
from dp_flash_hf.training.shared_numbers import shares_random_numbers
from dp_flash_hf.training.unit_reader import UnitReader
from dp_flash_hf.units import Units

logger = logger_of_all_ranks(__name__)


class PrivateTraining:
    """Draws, clipped sums, noise, accounting, and the checks before the first step, for a loop that somebody else runs.

    In this order::

        training = PrivateTraining(config, dataset, adapter, ...)
        training.open_spend_log(path)                            # or not
        loader = training.loader(dataset, collate, steps=..., splits=...)
        training.start(model, optimizer); training.check(loader)
        for every step: training.add(part) for its parts; training.mechanism.release(); optimizer.step(); optimizer.zero_grad()
        training.stop()

    **Guarantee.** What is released in a step is the sum of the drawn units' gradients, each clipped to `config.max_grad_norm`,
    plus Gaussian noise, divided by the expected batch size; `mechanism` is the only way a gradient reaches the optimizer. That
    is (epsilon, delta)-differential privacy under adding or removing one unit, for everything that is computed from the weights
    (Abadi et al. 2016, https://arxiv.org/abs/1607.00133); losses and norms that are shown meanwhile are not covered.

    **Random numbers.** Data are read and collated, and gradients are computed, with numbers of torch's, numpy's and Python's
    generators that start from the operating system's entropy for every part of a draw, on every rank and in every worker. No
    state of them is kept: after every call the generators are where they were before. See `fresh_randomness`.

    **Edge cases.** An empty draw is a step like any other. A unit whose gradient is not finite adds zero. A unit without a
    label adds zero. On several ranks every method is called by all of them, and what one refuses, all refuse.

    Args:
        config: the privacy parameters.
        dataset: with a length and random access; one example per row.
        adapter: of the integration, how to compute with a batch.
        expected_batch_size: units in a step, on average, of all ranks.
        steps: how long; None for `epochs`.
        epochs: draws that see every unit once on average; used without `steps`.
        max_examples: examples in a physical batch at most, see `physical_batches`.
        max_tokens: instead, tokens in a physical batch at most.
        strategy: see `ClippingEngine`.
        public_state: see `WatchedState`.

    Raises:
        UnsupportedError: units cannot be drawn of these data.
        ValueError: an argument is out of range, or no noise keeps the budget.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        dataset: Any,
        adapter: TrainingAdapter,
        *,
        expected_batch_size: int,
        steps: int | None,
        epochs: float,
        max_examples: int,
        max_tokens: int | None,
        strategy: Strategy,
        public_state: Collection[str] = (),
    ) -> None:
        if max_tokens is not None:
            validation.whole_number("max_tokens_per_device", max_tokens, remedy="set 4096, say, or None to count rows instead")
        with same_randomness(dataset):
            refuse_data(dataset)
            self.rows = None if config.privacy_unit is None else group_rows(_units_named(dataset, config.privacy_unit))
        self.config, self.dataset, self.adapter, self.strategy = config, dataset, adapter, strategy
        self.max_examples, self.max_tokens = max_examples, max_tokens
        self.n_units = len(dataset) if self.rows is None else len(self.rows)  # to draw from; never told where it is not public
        n_units = config.public_n_units or self.n_units
        steps = steps or math.ceil(epochs * steps_per_epoch(n_units, expected_batch_size))
        plan = PrivacyPlan.from_config(config, n_units=n_units, expected_batch_size=expected_batch_size, steps=steps)
        self.mechanism = DPSGD(config, plan)
        self._draw, self._public_state = DrawInProgress(), public_state
        self.engine: ClippingEngine | None = None
        self._loss: UnitLoss | None = None
        self._one_by_one = False  # whether no two units may share a physical batch
        self._own_generators: list[Generator] = []  # of the model
        self._parts = (0, 0)  # the step that parts are added to, and how many were begun
        self._rechecks: Rechecks | None = None
        self._moments = 0  # values of optimizer state for each trained one
        self._one_unit: tuple[dict[str, Any], Units] = ({}, Units.rows(0))  # for ranks that have none left
        logger.info(
            f"private training planned: noise multiplier {plan.noise_multiplier:.4g}, sampling rate "
            f"{plan.sampler.sampling_rate:.4g}, {steps} steps, epsilon {plan.epsilon():.4g} at delta {plan.target_delta:g}, "
            "also if it stops early"
        )

    @property
    def checked(self) -> bool:
        """Whether `check` has passed since `start`, so that steps may be taken."""
        return self._loss is not None

    def report(self) -> PrivacyReport:
        """What was spent so far, and on which assumptions."""
        pairs = self.adapter.rows_per_example == 2 and self.config.privacy_unit is None
        return self.mechanism.report("one pair of texts" if pairs else None)

    def open_spend_log(
        self, path: str | Path, state: dict[str, Any] | None = None, beside: Mapping[Path, dict[str, Any]] | None = None
    ) -> None:
        """Begin a training whose every step is written to this spend log before it is released; what it holds already counts.

        One run at a time writes a log; of several ranks the first one does. The log is private, see `SpendLog`.

        Args:
            path: of the file, which is made where there is none.
            state: of the checkpoint that the training continues; None begins at step 0.
            beside: states of the checkpoints in the log's folder, by where they are, which may know steps that it lacks; used
                on the first rank.

        Raises:
            PrivacyError: another run writes the log, it cannot be read or written, it is of other data, it lacks lines that a
                checkpoint knows, or what it or the checkpoint holds cannot be added up with this training, see
                `RunAccount.begin`.
            ValueError: no noise keeps the budget after what was spent.
        """
        ranks = Ranks()
        log: SpendLog | None = None
        try:
            with ranks.all_ranks_or_none():
                if ranks.first:
                    log = SpendLog(path)
                    with same_randomness(self.dataset):
                        log.require_dataset(self.dataset)
                    for place, known in (beside or {}).items():
                        log.require_continues(known_logs(known), str(place), beside=True)
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
        first_step: int,
        splits: int = 1,
        lengths: Tensor | None = None,
        **options: Any,
    ) -> DataLoader[Any]:
        """The Poisson draws of so many steps, read and collated, each in `splits` parts.

        Args:
            dataset: the one planned for, or it without some columns.
            collate: a list of examples -> a mapping of model inputs.
            steps: how many draws.
            first_step: the number of the first one, counted from the beginning of this training; seeded draws depend on it.
            splits: parts of a draw; the step adds all of them.
            lengths: int64 (units,), to put units of like length into one part.
            options: of torch's DataLoader.
        """
        return DataLoader(
            WithUnits(dataset, seed=self.config.seed),
            batch_sampler=PoissonBatches(
                self.mechanism.account.plan.sampler,
                population=self.n_units,
                steps=steps,
                splits=splits,
                in_one_part=self.max_tokens is not None,  # `physical_batches` then sees the whole draw, and sorts it by length
                rows=self.rows,
                max_examples_per_unit=self.config.max_examples_per_unit,
                lengths=lengths,
                seed=self.config.seed,
                first_step=first_step,
            ),
            collate_fn=FreshCollator(UnitCollator(collate), seed=self.config.seed),
            **options,
        )

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Attach to model and optimizer: from now on the optimizer refuses gradients that `mechanism` did not release.

        Args:
            model: whose parameters with `requires_grad` are trained, as the loop calls it, wrapped or compiled.
            optimizer: of exactly these parameters, wrapped by Accelerate or not.

        Raises:
            PrivacyError: the optimizer updates other parameters, or ranks have other data or settings than each other.
            UnsupportedError: the model couples units, or cannot be trained on these ranks.
        """
        if self.engine is not None:
            self.engine.detach()
        self._loss = self._rechecks = None
        self._require_same_data()
        if Ranks().size > 1 and is_compiled(model):
            raise UnsupportedError("torch.compile on several processes is not supported; leave it off, or use one process")
        self.engine = ClippingEngine(
            unwrapped(model), max_grad_norm=self.config.max_grad_norm, clipping=self.config.clipping, strategy=self.strategy
        )
        self.mechanism.start(self.engine, optimizer, self._draw, self._public_state)
        self._moments = moments_of(optimizer)

    def _require_same_data(self) -> None:
        """Raise PrivacyError unless unit 17 is the same on all ranks: else one person could be in two of their shares."""
        ranks = Ranks()
        if ranks.size == 1:
            return
        key = ranks.shared(secrets.token_hex(16))  # hashes that only the ranks of this run can compare
        rows = None if self.rows is None else fingerprint_of([own.tolist() for own in self.rows], key, examples=len(self.rows))
        with same_randomness(self.dataset):
            found = (fingerprint_of(self.dataset, key), rows)
        if any(other != found for other in ranks.gathered(found)):
            raise PrivacyError(
                "ranks were given different training data, or the same in another order, so a unit could be drawn on two of "
                "them: shuffle and filter with a fixed seed, or on the first rank only"
            )

    def check(self, loader: DataLoader[Any]) -> None:
        """Prove on the data themselves, before the first step, that steps will be private: see `preflight`.

        With `strategy="auto"`, choose by memory first: see `choose_by_memory`.

        Args:
            loader: of `loader`; its dataset and collator are used, nothing is drawn.

        Raises:
            PrivacyError: units are coupled, or weights or losses are not finite.
            UnsupportedError: the loss or the layout of batches is none of those known.
        """
        engine = self._started()
        # Alike on all ranks, which may have to compute the same batch.
        secret = Ranks().shared(secrets.randbits(256) if self.config.seed is None else self.config.seed)
        with fresh_randomness(accelerators(engine.parameters), own=own_generators(engine.model), seed=secret, stream="checks"):
            loss = self._checked(engine, loader)
        self._loss, self._own_generators = loss, own_generators(engine.model)
        attention = getattr(getattr(engine.model, "config", None), "_attn_implementation", None)
        methods = sorted(set(engine.norm_methods().values()))
        logger.info(
            f"preflight passed: the loss is a {loss.divides} over {loss.counted}, attention is {attention}, "
            f"gradients are exact by {', '.join(methods)}"
        )

    def _checked(self, engine: ClippingEngine, loader: DataLoader[Any]) -> UnitLoss:
        """What `check` finds out."""
        with Ranks().all_ranks_or_none():
            require_finite_weights(engine.model, "nothing was trained")
        if self.rows is None:
            say_of_documents(self.dataset)
        reader = UnitReader(
            loader, self.adapter, rows=self.rows, max_examples_per_unit=self.config.max_examples_per_unit, n_units=self.n_units
        )
        checks = Checks(engine, self.adapter, reader, cut_padding=self.max_tokens is not None)
        if self.strategy == "auto":
            self._choose_strategy(engine, *reader.batch([checks.longest_unit()]))
        with Ranks().all_ranks_or_none():
            loss = checks.before_training()
        self._one_by_one = Ranks().any(
            shares_random_numbers(
                engine,
                loss,
                *checks.tried_batch(),
                tolerance=1e-3 if self.adapter.reduced_precision or engine.reduces_precision else 1e-5,
            )
        )
        if self._one_by_one:
            logger.warning(
                "every unit is computed by itself: the model draws random numbers that all rows of a batch share (layer drop, "
                "say, or dropout of relative positions), or draws from numpy or Python. Set that probability to 0 in the "
                "model's config, and units are computed together"
            )
        self.drop_step()  # nothing of the checks stays
        if engine.sharded:
            self._one_unit = reader.batch([0])
        self._rechecks = Rechecks(checks, loss, self.mechanism.account)
        return loss

    def _choose_strategy(self, engine: ClippingEngine, batch: dict[str, Any], units: Units) -> None:
        strategy, because = choose_by_memory(
            engine,
            batch,
            units,
            loss_fn=model_loss,
            max_rows=self.max_examples * self.adapter.rows_per_example,
            max_tokens=self.max_tokens,
            moments=self._moments,
            autocast=torch.bfloat16 if self.adapter.reduced_precision else None,
        )
        engine.choose(strategy)
        logger.warning(f"strategy='auto' chose {strategy}: {because}")  # it decides how long training takes

    def add(self, inputs: Mapping[str, Any]) -> Tensor:
        """Add the clipped gradients of one part of a draw to the step.

        Args:
            inputs: a batch of `loader`, as it was drawn, on any device; an empty one adds nothing, and is a part all the same.

        Returns:
            The part's mean loss per label, a scalar, for display only: it holds no noise.

        Raises:
            PrivacyError: training has diverged, or `check` has not passed; or the batch is not the part of the draw that is
                due, was added before, or was changed: see `DrawInProgress`.
        """
        engine = self._started()
        if self._loss is None or self._rechecks is None:
            raise PrivacyError("a step before check(): how the loss divides is not known")
        self._rechecks.before_step()
        with Ranks().all_ranks_or_none():
            self._draw.arrive(inputs, self.mechanism.account.taken)
        if self._draw.began:
            self.mechanism.before_forward()
        step = self.mechanism.account.taken
        part = self._parts[1] if self._parts[0] == step else 0
        self._parts = (step, part + 1)
        with fresh_randomness(
            accelerators(engine.parameters),
            own=self._own_generators,
            seed=self.config.seed,
            stream=f"computing step {step} part {part} rank {Ranks().rank}",
        ):
            loss = self._added(engine, self._loss, inputs)
        self._draw.added()
        return loss

    def drop_step(self) -> None:
        """Forget what was added to the step: it was clipped, but has no noise."""
        self._started().withhold_sums()
        self._draw.end()

    def _added(self, engine: ClippingEngine, loss_fn: UnitLoss, inputs: Mapping[str, Any]) -> Tensor:
        """What `add` does."""
        total, labels = torch.zeros(()), 0.0
        parts = self._physical_batches(inputs)
        # On ranks that compute as one, each takes part in all forward and backward passes of the others.
        most = max(Ranks().gathered(len(parts))) if engine.sharded else len(parts)
        for part, units in parts:
            scale = loss_fn.scale(part, units) if self.config.unit_loss == "mean" else None
            loss = engine.backward(loss_fn, part, units, scale)
            total = total.to(loss.device) + loss
            labels += loss_fn.count(part)
            self._draw.count(units.n)
        for _ in range(most - len(parts)):
            engine.participate(loss_fn, *self._one_unit)
        if Ranks().any(not bool(total.isfinite())):  # of one unit, which then adds zero; or of all
            with Ranks().all_ranks_or_none():
                require_finite_weights(engine.model, "nothing was released")
        return total / max(labels, 1.0)

    def stop(self) -> None:
        """Let go of model and optimizer, as they are without the library, and of the spend log; what was spent stays counted.

        It may be called at any time, also twice, and after an error.
        """
        self.mechanism.stop()
        self.mechanism.account.close()
        if self.engine is not None:
            self.engine.detach()
            self.drop_step()

    def _started(self) -> ClippingEngine:
        if self.engine is None:
            raise PrivacyError("the training was not started: call start(model, optimizer) first")
        return self.engine

    def _physical_batches(self, inputs: Mapping[str, Any]) -> list[tuple[dict[str, Any], Units]]:
        of_example = inputs[UNITS]
        if not len(of_example):
            return []
        batch, units = prepared(self.adapter, {name: value for name, value in inputs.items() if name != DRAW})
        examples = torch.bincount(of_example.cpu(), minlength=units.n).tolist()
        max_examples, max_tokens = self.max_examples, self.max_tokens
        if self._one_by_one:
            max_examples, max_tokens = 1, None if max_tokens is None else 1
        return list(physical_batches(batch, units, examples, max_examples=max_examples, max_tokens=max_tokens))


def require_finite_weights(model: nn.Module, outcome: str) -> None:
    """Raise PrivacyError where training has diverged. Weights are public, so that it did tells nothing about the data."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not bool(local(p).isfinite().all())]
    if broken:
        raise PrivacyError(
            f"training has diverged: {len(broken)} parameters are no longer finite, {broken[0]} for one; {outcome}. Resume an "
            "older checkpoint, or start again, with a smaller learning rate; the steps taken count"
        )


def unwrapped(model: Any) -> Any:
    """The model that DDP wraps, whose gradients are then added up after they are clipped; any other model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _units_named(dataset: Any, name: str) -> list[Any]:
    names = column_names(dataset)
    made = names is not None and name not in names and len(dataset) and name in dataset[0]  # by a transform
    if names is not None and name not in names and not made:
        raise invalid(
            "privacy_unit",
            expected=f"a column of train_dataset ({', '.join(names)})",
            actual=name,
            remedy="name the one that says whose row it is",
        )
    return column(dataset, name)
