"""DP-SGD's release gate: the only way a gradient reaches the optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal

import torch

from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.run_account import RunAccount
from dp_flash_hf.distributed import Ranks, as_gradient, local, part_of
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.gradient_buffer import MOST_ROUNDING
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.kernels.keystream import Keystream, derived_key
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.gaussian_noise import SENSITIVITY, Words, add_gaussian_noise_, spacing
from dp_flash_hf.mechanisms.generators import fresh_generator, generator_words
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.draws import DrawInProgress
from dp_flash_hf.training.watched_state import WatchedState, checksums, differing


class DPSGD:
    """Turns the clipped sums of an engine into noisy gradients, one a step, and accounts for each (Abadi et al. 2016).

    A loop of one's own::

        mechanism = DPSGD(config, plan)
        mechanism.start(engine, optimizer)
        for draw in draws:              # of plan.sampler
            engine.backward(...)        # any number of times, also never: an empty draw takes a noisy step like any other
            mechanism.release()         # .grad = (clipped sum + N(0, (sigma C)^2), on a grid) / expected batch size
            optimizer.step(); optimizer.zero_grad()
        mechanism.stop()

    Formal guarantee: between `start` and `stop`, the optimizer updates parameters only by what `release` made, each of it once,
    and `release` makes at most the planned number of steps. If every step's units were drawn by the plan's sampler, the
    sequence of updates, and with it the trained model, is (`epsilon()`, target_delta)-differentially private, where neighbours
    differ by one privacy unit added or removed. The divisor is the expected batch size, a public constant; the drawn size would
    reveal how many units took part.

    ================================================= ==================================================================
    Case                                              Result
    ================================================= ==================================================================
    an empty draw                                     noise alone is released, and counts as a step
    `release` twice without `optimizer.step()`        PrivacyError from the second
    `release` beyond the planned steps                PrivacyError: it would exceed the budget
    `optimizer.step()` without `release`              PrivacyError, nothing updated
    `optimizer.step()` twice after one `release`      PrivacyError from the second, nothing updated
    gradients replaced or changed after `release`     PrivacyError, nothing updated
    weights changed outside of `optimizer.step()`     PrivacyError from the next `release`, before it counts
    a buffer or a frozen parameter changes            the same, unless it was named in `public_state`
    parameters frozen or unfrozen while training      the same
    plan, configuration or engine's settings changed  the same
    `optimizer.step(closure)`                         PrivacyError: a closure computes gradients again, without noise
    gradients on parameters that are not the engine's PrivacyError, nothing updated
    all gradients zero, before any backward pass      allowed: so torch's distributed checkpoints set up an optimizer
    a unit with NaN or infinite gradient              the engine leaves it out of the sum; the step counts
    an error after the step was counted               it counts, and nothing is released
    the spend log cannot be written                   PrivacyError, nothing counted or released
    ================================================= ==================================================================

    Where torch.distributed runs several ranks, all of them do the same: each runs `engine.backward` on its own share of a draw,
    and `release` adds their sums up, once a step, before it puts the same noise on the same parameters everywhere. Parameters
    are compared between ranks when training starts and after its first step, and one of them after each further step.

    `account` holds the plan and counts what was spent: `account.open_spend_log` has every step written to disk before it is
    released, and `load_state_dict` continues a checkpoint. After either, the plan is made again; see `RunAccount`.

    Args:
        config: The privacy parameters.
        plan: What the training will do to the data, see `PrivacyPlan.from_config`.

    Attributes:
        config: The privacy parameters.
        account: Plan, ledgers and spend log of the run.
    """

    def __init__(self, config: PrivacyConfig, plan: PrivacyPlan) -> None:
        self.config = config
        self.account = RunAccount(config, plan)
        self._engine: ClippingEngine | None = None
        self._draw: DrawInProgress | None = None
        self._state: WatchedState | None = None
        self._public_state: tuple[str, ...] = ()
        self._moves_weights = False  # whether the optimizer does between steps, as schedule-free ones do for evaluation
        self._sums: dict[str, torch.Tensor] = {}  # checksums of what was released
        self._handles: list[Any] = []
        self._gradient: Literal["clipped", "released", "used"] = "clipped"
        self._released: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}  # what release() made, and its version
        self._ranks = Ranks()
        self._steps_here = 0  # since start()

    def start(
        self,
        engine: ClippingEngine,
        optimizer: torch.optim.Optimizer,
        draw: DrawInProgress | None = None,
        public_state: Collection[str] = (),
    ) -> None:
        """Guard this optimizer, until `stop` or the next `start`.

        Args:
            engine: Whose clipped sums are released.
            optimizer: Any, also one that accelerate wraps. Frozen parameters may be in it.
            draw: What knows whether a draw was added, all of it and once: asked by every `release`. With None the caller
                answers for that.
            public_state: See `WatchedState`, which compares everything else in the model from step to step.

        Raises:
            PrivacyError: It does not update exactly the engine's parameters, the engine clips otherwise than the configuration
                says, or ranks hold different parameters, privacy settings or ledgers. Nothing is guarded then.
        """
        with Ranks().all_ranks_or_none():
            inner = self._require_fitting(engine, optimizer)
            state = WatchedState(engine.model, engine.parameters, public_state)
        self.stop()
        self._ranks, self._steps_here = Ranks(), 0
        account = self.account
        account.rename_writer(self._ranks.shared(account.writer))  # one name for one training, also where no spend log gives it
        plan = account.plan
        described = (self.config.to_dict(), plan.sampler.to_dict(), plan.noise_multiplier, plan.steps, account.steps)
        if any(other != described for other in self._ranks.gathered(described)):
            raise PrivacyError(
                "ranks have different privacy parameters or ledgers: give all of them the same configuration and checkpoint"
            )
        self._ranks.require_equal([(part_of(p), local(p)) for p in engine.model.parameters()], "parameters")
        self._engine, self._draw, self._state = engine, draw, state
        self._moves_weights = callable(getattr(inner, "eval", None))
        self._public_state = tuple(public_state)
        engine.withhold_sums()
        self._gradient = "clipped"
        self._handles = [inner.register_step_pre_hook(self._before_step), inner.register_step_post_hook(self._after_step)]

    def _require_fitting(self, engine: ClippingEngine, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer itself, where accelerate wraps it."""
        self._require_same_settings(engine)
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        updated = {p for group in inner.param_groups for p in group["params"] if p.requires_grad}
        if updated != set(engine.parameters):
            missing = [name for p, name in engine.parameters.items() if p not in updated]
            raise PrivacyError(
                f"the optimizer must update exactly the trained parameters: {len(updated - set(engine.parameters))} are not "
                f"the model's, and it lacks {missing[:5]}; create it after freezing and wrapping the model"
            )
        return inner

    def _require_same_settings(self, engine: ClippingEngine) -> None:
        """Raise PrivacyError unless engine, configuration and plan are still what the report says."""
        if engine.sharded and self.config.public_n_units is not None:
            raise UnsupportedError(  # `_std` bounds the rounding of a sharded sum by the largest draw from n_units
                "public_n_units with a sharded model: how far a sum is rounded depends on the true number of units; train "
                "without FSDP2, or leave public_n_units out where the number may be public"
            )
        for name in ("max_grad_norm", "clipping"):
            if getattr(engine, name) != getattr(self.config, name):
                raise PrivacyError(
                    f"the engine clips with {name}={getattr(engine, name)!r} and the configuration says "
                    f"{getattr(self.config, name)!r}, which the report would repeat: make the engine with config.{name}"
                )
        self.account.require_as_planned(self.config)

    def before_forward(self) -> None:
        """The first part of a draw is about to be computed: until its release, no weight may change."""
        if self._state is not None:
            self._state.note(again=self._moves_weights)

    def stop(self) -> None:
        """Let go of engine and optimizer, which then updates by any gradient; what was spent stays on the account."""
        for handle in self._handles:
            handle.remove()
        if self._engine is not None:
            self._engine.withhold_sums(False)
        self._handles, self._engine, self._released, self._state = [], None, {}, None

    @property
    def released(self) -> bool:
        """Whether gradients with noise wait for `optimizer.step()`."""
        return self._gradient == "released"

    def require_next(self) -> None:
        """Raise PrivacyError where `release` may not be called now: before `start`, twice in one step, beyond the plan."""
        if self._engine is None:
            raise PrivacyError("release() before start(): there is no engine to release gradients of")
        if self._gradient == "released":
            raise PrivacyError(
                "release() twice in one step (with make_private: private.backward): call optimizer.step() in between"
            )
        if self.account.steps_left <= 0:
            raise PrivacyError(
                f"the {self.account.plan.steps} planned steps are spent: one more would exceed the privacy budget"
            )

    def release(self) -> None:
        """Noise the clipped sums, once, and make them the gradients of one optimizer step.

        Each parameter of the engine gets `.grad`, of its own dtype and layout: (clipped sum over all ranks + Gaussian noise of
        standard deviation noise_multiplier * max_grad_norm, and 0.4 % more for all that rounds the sum) / expected batch size.
        Sum and noise are added exactly, on a grid, before the division, see `mechanisms.gaussian_noise`; where parameters are
        sharded, each shard has noise of its own. The noise's key is drawn for this step, and forgotten with it.

        Raises:
            PrivacyError: See `require_next`; the sums do not hold exactly one draw; the step cannot be written to the spend
                log; or another rank refused it. Nothing was released then, on any rank.
        """
        sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        with self._ranks.all_ranks_or_none():  # what one rank refuses, no rank releases
            self._sum_alike()
            self.require_next()
            assert self._engine is not None
            assert self._state is not None
            self._require_same_settings(self._engine)
            self._state.require_unchanged()
            if self._draw is not None:
                self._draw.require_whole(None if self._engine.sharded else self._engine.rounding[0])
            for parameter in self._engine.parameters:  # what cannot be taken is not counted
                self._engine.clipped_sum(parameter)
            self.account.count_step()  # before anything of it can be seen
            sums = self._engine.take_sums()
        noise = _StepNoise(
            self.config,
            self._ranks.secret(),
            step=self.account.taken + 1,
            std=self._std(),
            spacing=self._spacing(),
        )
        split = [total for parameter, total in sums.items() if part_of(parameter)]
        noise.add_(split, next((part_of(parameter) for parameter in sums if part_of(parameter)), ""))  # added up already
        for bucket in self._ranks.added_up([total for parameter, total in sums.items() if not part_of(parameter)]):
            noise.add_(bucket, "")
        for parameter in list(sums):
            total = sums.pop(parameter)
            # A public constant: the drawn size would reveal how many units took part.
            total.div_(self.account.plan.sampler.expected_batch_size)
            parameter.grad, _ = as_gradient(parameter, total)
            self._released[parameter] = (parameter.grad, local(parameter.grad)._version)
        self._sums = self._checksums_of_gradients()
        self._gradient = "released"
        self.account.complete_step()
        if self._draw is not None:
            self._draw.end()

    def epsilon(self) -> float:
        """What the run promises, at the plan's target_delta, see `RunAccount.epsilon`."""
        return self.account.epsilon()

    def spent_epsilon(self) -> float:
        """The epsilon of all steps so far, if their number was fixed beforehand, see `RunAccount.spent_epsilon`."""
        return self.account.spent_epsilon()

    def report(self, unit: str | None = None) -> PrivacyReport:
        """What was spent, and on which assumptions.

        Args:
            unit: What one privacy unit is, in words; see `PrivacyReport.of`.

        Returns:
            A report of all steps so far, lost ones included.
        """
        account = self.account
        return PrivacyReport.of(
            self.config,
            account.plan,
            account.ledger,
            unit=unit,
            lost_steps=account.lost_steps,
            recorded=account.recorded,
            extended=account.extended,
            not_covered=()
            if not self._public_state
            else (
                f"State that was named public, and holds nothing of the data by that word: {', '.join(self._public_state)}.",
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, see `RunAccount.state_dict`."""
        return self.account.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped, on all ranks or none, see `RunAccount.load_state_dict`."""
        with Ranks().all_ranks_or_none():
            self.account.load_state_dict(state)
        if self._state is not None:
            self._state.begin()

    def _checksums_of_gradients(self) -> dict[str, torch.Tensor]:
        assert self._engine is not None
        return checksums((name, p.grad) for p, name in self._engine.parameters.items() if p.grad is not None)

    def _std(self) -> float:
        """Of the noise: sigma times how far neighbours' sums may be apart, further for large draws of a sharded model."""
        assert self._engine is not None
        plan, further = self.account.plan, 0.0
        if self._engine.sharded:  # added up over ranks in float32, after each batch
            further = max(0.0, self._ranks.size * plan.sampler.hardly_more - MOST_ROUNDING / 2) * 2.0**-23
        return plan.noise_multiplier * self._engine.max_grad_norm * (SENSITIVITY + further)

    def _sum_alike(self) -> None:
        """Ranks add float64 sums up where float32 would round further than is charged for, or one of them has those already."""
        engine = self._engine
        if engine is None or self._ranks.size == 1 or engine.sharded:
            return
        units, wide = zip(*self._ranks.gathered(engine.rounding), strict=True)
        if any(wide) or self._ranks.size * sum(units) > MOST_ROUNDING / 2:
            engine.sum_in_float64()

    def _spacing(self) -> float:
        assert self._engine is not None
        bound = self._engine.max_grad_norm
        n_values = sum(parameter.numel() for parameter in self._engine.parameters)
        return spacing(n_values, bound, self.account.plan.noise_multiplier * bound)

    @staticmethod
    def _only_zeros(optimizer: torch.optim.Optimizer) -> bool:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and all(bool((local(g) == 0).all()) for g in gradients)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._engine is not None
        if self._gradient != "released" and not self._engine.holds_sums and self._only_zeros(optimizer):
            return  # as torch's distributed checkpoints set up an optimizer that they are about to load
        if self._gradient != "released":
            raise PrivacyError(
                "optimizer.step() on gradients without noise: call release() first (with make_private: private.backward(batch)"
                "); nothing was updated"
            )
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise PrivacyError(
                "optimizer.step(closure) computes gradients again, without noise: use an optimizer without a closure"
            )
        replaced = any(p.grad is not g or local(g)._version != version for p, (g, version) in self._released.items())
        if replaced or differing(self._sums, self._checksums_of_gradients()):
            raise PrivacyError(
                "gradients changed between release() and optimizer.step(), by a backward pass without noise for all that is "
                "known; nothing was updated. Run every backward through the engine, before release()"
            )
        updated = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if foreign := len(updated - set(self._engine.parameters)):
            raise PrivacyError(
                f"{foreign} parameters of the optimizer have gradients without noise: they were unfrozen or added after "
                "training began; nothing was updated. Choose what is trained before trainer.train()"
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._gradient != "released":
            return
        self._gradient, self._released = "used", {}
        if self._state is not None:
            self._state.stepped()
        assert self._engine is not None
        parameters = list(self._engine.parameters)
        one = parameters[self._steps_here % len(parameters)]
        compared = parameters if self._steps_here == 0 else [one]
        self._ranks.require_equal([(part_of(p), local(p)) for p in compared], "parameters after a step")
        self._steps_here += 1


class _StepNoise:
    """The noise of one step: the same on all ranks for the same part of a parameter, independent on all others.

    Args:
        config: Says where randomness comes from.
        secret: Of this step, and of all ranks.
        step: Its number, for a fixed seed.
        std, spacing: As of `add_gaussian_noise_`.
    """

    def __init__(self, config: PrivacyConfig, secret: bytes, *, step: int, std: float, spacing: float) -> None:
        self._fast = config.noise == "fast"
        self._secret = secret if config.seed is None else repr((config.seed, step)).encode()
        self._std, self._spacing = std, spacing
        self._words: dict[tuple[torch.device, str], Words] = {}

    def add_(self, sums: Sequence[torch.Tensor], part: str) -> None:
        """Release these sums, of one part of their parameters, in place."""
        for device in sorted({total.device for total in sums}, key=str):
            here = [total for total in sums if total.device == device]
            add_gaussian_noise_(here, std=self._std, spacing=self._spacing, words=self._words_of(device, part))

    def _words_of(self, device: torch.device, part: str) -> Words:
        if (device, part) not in self._words:
            stream = f"noise {part}"  # the same on whatever device the part lies
            self._words[device, part] = (
                partial(generator_words, fresh_generator(device, seed=self._secret, stream=stream))
                if self._fast
                else Keystream(derived_key(self._secret, stream), device)
            )
        return self._words[device, part]
