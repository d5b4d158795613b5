"""From samplers and noise to (epsilon, delta), and back: what a training will do, and how much noise keeps its budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from dp_flash_hf import validation
from dp_flash_hf.accounting.epsilon import Entry, chi_square, of_computed_noise
from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.privacy_filter import filter_epsilon
from dp_flash_hf.errors import invalid
from dp_flash_hf.mechanisms.config import AccountantName, PrivacyConfig
from dp_flash_hf.mechanisms.sampling import PoissonSampler, sampler_from

_CALIBRATION_TOLERANCE = 1e-3  # calibrated epsilon lies in [1 - this, 1] * target
_NOISE_MULTIPLIERS = (1e-3, 1e6)  # searched
_MOST_STEPS = 10**6  # a search for an affordable number of steps ends here, far beyond any fine-tuning


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What a training run will do to the private data, decided before it starts; everything here is public.

    The guarantee: after all steps, the sequence of noisy sums (and whatever is computed from them, the trained weights in
    particular) is (`epsilon()`, target_delta)-differentially private, where neighbours differ by one privacy unit added or
    removed. It holds for a run that stops earlier too, whatever made it stop: what it released is a part of what the whole run
    would have. `epsilon(k)` is that of a run of which it was fixed beforehand that it takes k steps.

    Steps of other kinds in `spent` mean that parameters were changed after some steps, by what may have been seen in them.
    Epsilon is then that of a privacy filter, see `filter_epsilon`.

    >>> plan = PrivacyPlan(sampler=PoissonSampler(1000, 10), noise_multiplier=1.0, steps=100, target_delta=1e-5)
    >>> print(f"epsilon is {plan.epsilon(10):.2f} after ten steps, {plan.epsilon():.2f} after all")
    epsilon is 0.38 after ten steps, 0.72 after all

    Attributes:
        sampler: How the units of a step are drawn.
        noise_multiplier: Noise standard deviation / max_grad_norm, finite and above 0.
        steps: Optimizer steps with this sampler and noise, those of them already taken included; at least 1.
        target_delta: delta of the guarantee, above 0 and below 1 / n_units. At a larger delta, publishing one unit chosen at
            random would count as private.
        accountant: Who computes epsilon, see `PrivacyConfig`.
        spent: Steps of other kinds, taken before, as entries of a `Ledger`; they count in `epsilon`.

    Raises:
        ValueError: A field out of range.
    """

    sampler: PoissonSampler
    noise_multiplier: float
    steps: int
    target_delta: float
    accountant: AccountantName = "pld"
    spent: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        validation.whole_number("steps", self.steps, remedy="set max_steps or num_train_epochs")
        n = self.sampler.n_units
        if not 0 < self.target_delta < 1 / n:
            raise invalid(
                "target_delta",
                expected=f"0 < delta < 1 / {n} units",
                actual=self.target_delta,
                remedy=f"try {usual_delta(n):g}",
            )
        self._ledger(1)

    @classmethod
    def from_config(
        cls, config: PrivacyConfig, *, n_units: int, expected_batch_size: int, steps: int, spent: Ledger | None = None
    ) -> Self:
        """The plan that keeps a configuration's promise, with the noise calibrated if it gives target_epsilon.

        A calibrated plan has 0.999 * target_epsilon <= epsilon() <= target_epsilon (less only where target_epsilon asks for
        almost no noise), what was spent included. Calibration computes epsilon about five times, in a second with pld.

        Args:
            config: The privacy parameters.
            n_units: Privacy units in the dataset.
            expected_batch_size: Units in a step, on average, over all processes.
            steps: Optimizer steps to take, on top of those spent.
            spent: What was taken before, on the same units.

        Returns:
            The plan. Steps of `spent` that are of its own kind are among its `steps`, others in its `spent`.

        Raises:
            ValueError: An argument out of range, or no noise that keeps the budget.
        """
        plan = cls(
            sampler=sampler_from(config, n_units=n_units, expected_batch_size=expected_batch_size),
            noise_multiplier=config.noise_multiplier or 1.0,
            steps=steps,
            target_delta=config.target_delta,
            accountant=config.accountant,
        )
        if config.target_epsilon is None:
            return plan if spent is None else plan.after(spent, steps)
        if spent is not None:
            plan = replace(plan, spent=spent.entries)
        squared_mu = _squared_mu(config.target_epsilon, config.target_delta) / (plan.sampler.sampling_rate**2 * steps)
        sigma = _calibrate(
            lambda sigma: replace(plan, noise_multiplier=sigma).epsilon(),
            target=config.target_epsilon,
            start=1 / math.sqrt(math.log1p(squared_mu)),
        )
        plan = replace(plan, noise_multiplier=sigma)
        return plan if spent is None else plan.after(spent, steps)

    def after(self, spent: Ledger, steps: int) -> Self:
        """This plan with so many steps on top of those spent; those of its own kind it counts as its own.

        Raises:
            ValueError: `steps` is 0 and none of those spent are of the plan's kind: a plan has at least one step.
        """
        own = (self.sampler, self.noise_multiplier)
        others = tuple(entry for entry in spent.entries if entry[0] != own)
        return replace(self, steps=spent.count(*own) + steps, spent=others)

    def epsilon(self, steps: int | None = None) -> float:
        """The epsilon after the first `steps` steps (default: all) on top of those in `spent`, at target_delta.

        Without `spent` it equals `Ledger.epsilon` of a ledger that recorded the same steps. Raises as that does.
        """
        ledger = self._ledger(self.steps if steps is None else steps)
        if self.spent:
            return of_computed_noise(partial(filter_epsilon, ledger.entries), ledger.steps, self.target_delta)
        return ledger.epsilon(self.target_delta)

    def _ledger(self, steps: int) -> Ledger:
        ledger = Ledger(self.accountant)
        for (sampler, noise_multiplier), taken in self.spent:
            ledger.record(sampler, noise_multiplier, taken)
        ledger.record(self.sampler, self.noise_multiplier, steps)
        return ledger

    def max_steps(self, target_epsilon: float) -> int:
        """The number of steps k that this noise affords: epsilon(k) <= target_epsilon < epsilon(k + 1).

        Args:
            target_epsilon: The budget, finite and above 0.

        Returns:
            k, from 0 to a million, where the search ends.

        Raises:
            ValueError: target_epsilon out of range.
        """
        validation.positive("target_epsilon", target_epsilon, remedy="give a positive one")
        guess = _squared_mu(target_epsilon, self.target_delta) / chi_square(self.sampler, self.noise_multiplier)
        high = min(max(1, round(guess)), _MOST_STEPS)
        low, low_epsilon, high_epsilon = 0, 0.0, self.epsilon(high)
        while high_epsilon <= target_epsilon:
            if high == _MOST_STEPS:
                return high
            low, low_epsilon = high, high_epsilon
            high = min(math.ceil(high * 1.2), _MOST_STEPS)
            high_epsilon = self.epsilon(high)
        while high - low > 1:
            middle = int(_crossing(low, low_epsilon, high, high_epsilon, target_epsilon)) if low else high // 2
            middle = min(max(middle, low + 1), high - 1)
            middle_epsilon = self.epsilon(middle)
            if middle_epsilon <= target_epsilon:
                low, low_epsilon = middle, middle_epsilon
            else:
                high, high_epsilon = middle, middle_epsilon
        return low


def usual_delta(n_units: int) -> float:
    """n^-1.1, or half of 1 / n where that is less, rounded down to one digit: a delta that a plan for n units takes."""
    delta = min(n_units**-1.1, 0.5 / n_units)
    scale = 10.0 ** math.floor(math.log10(delta))
    return float(f"{math.floor(delta / scale * (1 + 1e-12)) * scale:.0e}")


def _squared_mu(epsilon: float, delta: float) -> float:
    """mu^2 of the Gaussian mechanism that mu^2 / 2 + mu sqrt(2 ln(1 / delta)) makes (epsilon, delta)-private.

    DP-SGD tends to mu = q sqrt(steps (exp(1 / sigma^2) - 1)) (Bu et al. 2020, arXiv 1911.11607). It gives first guesses only.
    """
    log_delta = 2 * math.log(1 / delta)
    return (math.sqrt(log_delta + 2 * epsilon) - math.sqrt(log_delta)) ** 2


def _calibrate(epsilon: Callable[[float], float], *, target: float, start: float) -> float:
    """The least noise multiplier, to the tolerance, whose epsilon is at most `target`."""
    least, most = _NOISE_MULTIPLIERS
    tried: list[tuple[float, float]] = []  # noise multipliers with their epsilon

    def attempt(sigma: float) -> float:
        tried.append((sigma, epsilon(sigma)))
        return tried[-1][1]

    high = low = min(max(start, least), most)
    high_epsilon = low_epsilon = attempt(high)
    factor = _first_step(high_epsilon, target)
    while high_epsilon > target:
        if high >= most:
            raise invalid(
                "target_epsilon",
                expected=f"a budget that some noise keeps, at least {high_epsilon:.3g} here",
                actual=target,
                remedy="raise target_epsilon or target_delta, take fewer steps, or use accountant='pld'; what earlier "
                "runs on these data spent is counted",
            )
        low, low_epsilon = high, high_epsilon
        high = min(high * factor, most)
        high_epsilon = attempt(high)
        factor **= 2
    while low_epsilon <= target:
        high, high_epsilon = low, low_epsilon
        if low <= least or high_epsilon >= (1 - _CALIBRATION_TOLERANCE) * target:
            return high
        low = max(low / factor, least)
        low_epsilon = attempt(low)
        factor **= 2
    aim = (1 - _CALIBRATION_TOLERANCE / 2) * target
    while high_epsilon < (1 - _CALIBRATION_TOLERANCE) * target and high / low > 1 + 1e-9:
        best, other = sorted(tried, key=lambda point: abs(point[1] - aim))[:2]
        middle = _secant(best, other, aim)
        if not low < middle < high:
            middle = _crossing(low, low_epsilon, high, high_epsilon, aim)
        middle_epsilon = attempt(middle)
        if middle_epsilon <= target:
            high, high_epsilon = middle, middle_epsilon
        else:
            low, low_epsilon = middle, middle_epsilon
    return high


def _first_step(epsilon: float, target: float) -> float:
    """A factor to change noise by: epsilon falls at least about as fast as noise grows."""
    if not 0 < epsilon < math.inf:
        return 1.2
    return min(max(epsilon / target, target / epsilon) * (1 + 2 * _CALIBRATION_TOLERANCE), 1.2)


def _secant(best: tuple[float, float], other: tuple[float, float], target: float) -> float:
    """Where the line through two points, in logarithms, meets `target`; NaN if nowhere. It may be outside of them."""
    if best[0] == other[0] or best[1] == other[1] or not all(0 < epsilon < math.inf for _, epsilon in (best, other)):
        return math.nan
    slope = math.log(other[1] / best[1]) / math.log(other[0] / best[0])
    return best[0] * math.exp(min(math.log(target / best[1]) / slope, 700))


def _crossing(low: float, low_epsilon: float, high: float, high_epsilon: float, target: float) -> float:
    """Where epsilon is about `target`, between low and high: log epsilon is nearly linear in log sigma and in log steps."""
    share = 0.5
    if 0 < low_epsilon < math.inf and 0 < high_epsilon < math.inf:
        share = math.log(target / low_epsilon) / math.log(high_epsilon / low_epsilon)
    return low * math.pow(high / low, min(max(share, 0.01), 0.99))  # strictly between, so that every search ends
