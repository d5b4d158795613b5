"""From samplers and noise to (epsilon, delta), and back. Adjacency: add or remove one privacy unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self, get_args

from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant

from dp_flash_hf.config import AccountantName, PrivacyConfig
from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.sampling import PoissonSampler, sampler_from, sampler_from_dict

ADJACENCY = "add or remove one unit"

Entry = tuple[tuple[PoissonSampler, float], int]  # ((sampler, noise multiplier), steps taken with them)

_CALIBRATION_TOLERANCE = 1e-3  # calibrated epsilon lies in [1 - this, 1] * target
_NOISE_MULTIPLIERS = (0.05, 1e6)  # searched; pld needs a minute for one step with less noise
_MOST_DIVERGENCE = 3000  # Rényi, order 2: epsilon is then in the hundreds, and the memory of pld and prv grows with it
_MOST_STEPS = 10**6  # a search for an affordable number of steps ends here, far beyond any fine-tuning


class Ledger:
    """The steps that were executed, and the privacy they cost together.

    Steps may differ in sampler and noise; adaptive composition holds whatever their order. Every release that touches private
    data must be recorded, also a step with an empty draw. `accountant` is "pld" (dp-accounting), "prv" or "rdp" (opacus).
    """

    def __init__(self, accountant: AccountantName = "pld") -> None:
        if accountant not in get_args(AccountantName):
            raise invalid("accountant", expected="pld, prv or rdp", actual=accountant, remedy="choose one of them")
        self.accountant: AccountantName = accountant
        self._counts: dict[tuple[PoissonSampler, float], int] = {}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """((sampler, noise multiplier), steps) for each distinct kind of step."""
        return tuple(self._counts.items())

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return sum(self._counts.values())

    def count(self, sampler: PoissonSampler, noise_multiplier: float) -> int:
        """How many of the steps had this sampler and noise."""
        return self._counts.get((sampler, noise_multiplier), 0)

    @classmethod
    def total(cls, ledgers: Iterable[Ledger], accountant: AccountantName) -> Self:
        """The steps of all these ledgers together. Raises ValueError where they count units differently."""
        together = cls(accountant)
        for ledger in ledgers:
            for (sampler, noise_multiplier), steps in ledger.entries:
                together.record(sampler, noise_multiplier, steps)
        return together

    def raise_to(self, other: Ledger) -> None:
        """Of two counts of the same steps keep the higher, for each kind of step: neither can have counted too many."""
        for (sampler, noise_multiplier), steps in other.entries:
            self.record(sampler, noise_multiplier, max(0, steps - self.count(sampler, noise_multiplier)))

    def record(self, sampler: PoissonSampler, noise_multiplier: float, steps: int = 1) -> None:
        """Count `steps` >= 0 further steps with this sampler and noise_multiplier (noise std / sensitivity, > 0)."""
        if not 0 < noise_multiplier < math.inf:
            raise invalid("noise_multiplier", expected="a finite number above 0", actual=noise_multiplier, remedy="add noise")
        if not isinstance(steps, int) or steps < 0:
            raise invalid("steps", expected="a whole number >= 0", actual=steps, remedy="count executed optimizer steps")
        for known, _ in self._counts:
            if known.n_units != sampler.n_units:
                raise invalid(
                    "sampler",
                    expected=f"{known.n_units} units",
                    actual=sampler.n_units,
                    remedy="keep one ledger per dataset",
                )
        if steps:
            key = (sampler, noise_multiplier)
            self._counts[key] = self._counts.get(key, 0) + steps

    def epsilon(self, delta: float) -> float:
        """The epsilon of everything recorded, at `delta`; 0 before the first step.

        With pld and prv, inf for so little noise that epsilon is in the hundreds or more; rdp bounds any.
        Typically 0.3 s with pld and 0.1 s with prv or rdp for each kind of step, at once if asked again: call it when logging.
        Raises UnsupportedError for prv and rdp with truncated Poisson sampling or without opacus.
        """
        if not 0 < delta < 1:
            raise invalid("delta", expected="0 < delta < 1", actual=delta, remedy="use well below 1 / units")
        # In one order, so that the same steps give the same figure to the last digit, whichever came first.
        return _epsilon(self.accountant, tuple(sorted(self.entries, key=repr)), delta)

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain JSON data. It holds no secret: no draw, no noise, no generator state."""
        return {
            "accountant": self.accountant,
            "entries": [{"sampler": s.to_dict(), "noise_multiplier": sigma, "steps": n} for (s, sigma), n in self.entries],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the ledger by a saved one. Raises ValueError, and keeps the ledger, if `state` is not a ledger's state."""
        try:
            loaded = Ledger(state["accountant"])
            for entry in state["entries"]:
                loaded.record(sampler_from_dict(entry["sampler"]), entry["noise_multiplier"], entry["steps"])
        except (KeyError, TypeError, AttributeError) as error:
            raise invalid(
                "state", expected="a ledger's state_dict()", actual=str(state)[:80], remedy="load it unedited"
            ) from error
        self.accountant, self._counts = loaded.accountant, loaded._counts


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What a training run will do to the private data, decided before it starts; everything here is public.

    noise_multiplier: noise standard deviation / max_grad_norm. steps: optimizer steps with this sampler and noise.
    spent: steps with others, taken before.
    Raises ValueError for a field outside its range, in particular target_delta >= 1 / n_units: at such a delta, publishing one
    unit chosen at random would count as private.
    """

    sampler: PoissonSampler
    noise_multiplier: float
    steps: int
    target_delta: float
    accountant: AccountantName = "pld"
    spent: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise invalid(
                "steps", expected="a whole number >= 1", actual=self.steps, remedy="set max_steps or num_train_epochs"
            )
        n = self.sampler.n_units
        if not 0 < self.target_delta < 1 / n:
            raise invalid(
                "target_delta", expected=f"0 < delta < 1 / {n} units", actual=self.target_delta, remedy=f"try {n**-1.1:.1g}"
            )
        self._ledger(1)

    @classmethod
    def from_config(
        cls, config: PrivacyConfig, *, n_units: int, expected_batch_size: int, steps: int, spent: Ledger | None = None
    ) -> Self:
        """The plan that keeps `config`'s promise, with the noise calibrated if it gives target_epsilon.

        spent: what was taken before, on the same units. `steps` come on top, and noise is calibrated so that all together keep
        the budget.

        The calibrated plan has 0.999 * target_epsilon <= epsilon() <= target_epsilon (less only where target_epsilon asks for
        almost no noise). Raises ValueError if no noise can meet the budget.
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
        """This plan with so many steps on top of those spent, of which it counts those of its own kind as its own."""
        own = (self.sampler, self.noise_multiplier)
        others = tuple(entry for entry in spent.entries if entry[0] != own)
        return replace(self, steps=spent.count(*own) + steps, spent=others)

    def epsilon(self, steps: int | None = None) -> float:
        """The epsilon of the first `steps` steps (default: all) after those spent, at target_delta: what a ledger says."""
        return self._ledger(self.steps if steps is None else steps).epsilon(self.target_delta)

    def _ledger(self, steps: int) -> Ledger:
        ledger = Ledger(self.accountant)
        for (sampler, noise_multiplier), taken in self.spent:
            ledger.record(sampler, noise_multiplier, taken)
        ledger.record(self.sampler, self.noise_multiplier, steps)
        return ledger

    def max_steps(self, target_epsilon: float) -> int:
        """The number of steps k that this noise affords: epsilon(k) <= target_epsilon < epsilon(k + 1); at most a million."""
        if not 0 < target_epsilon < math.inf:
            raise invalid(
                "target_epsilon", expected="a finite number above 0", actual=target_epsilon, remedy="give a positive one"
            )
        guess = _squared_mu(target_epsilon, self.target_delta) / _chi_square(self.sampler, self.noise_multiplier)
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


def _chi_square(sampler: PoissonSampler, noise_multiplier: float) -> float:
    """Chi-square divergence between one step's releases with and without a unit: exp(Rényi divergence of order 2) - 1."""
    exponent = 1 / noise_multiplier / noise_multiplier
    return sampler.sampling_rate**2 * math.expm1(exponent) if exponent < 700 else math.inf  # exp(710) overflows


def _squared_mu(epsilon: float, delta: float) -> float:
    """mu^2 of the Gaussian mechanism that mu^2 / 2 + mu sqrt(2 ln(1 / delta)) makes (epsilon, delta)-private.

    DP-SGD tends to mu = q sqrt(steps (exp(1 / sigma^2) - 1)) (Bu et al. 2020, arXiv 1911.11607). It gives first guesses only.
    """
    log_delta = 2 * math.log(1 / delta)
    return (math.sqrt(log_delta + 2 * epsilon) - math.sqrt(log_delta)) ** 2


def _calibrate(epsilon: Callable[[float], float], *, target: float, start: float) -> float:
    """The least noise multiplier, to the tolerance, whose epsilon is at most `target`."""
    least, most = _NOISE_MULTIPLIERS
    high = low = min(max(start, least), most)
    high_epsilon = low_epsilon = epsilon(high)
    factor = 1.2
    while high_epsilon > target:
        if high >= most:
            raise invalid(
                "target_epsilon",
                expected=f"a budget that some noise meets, at least {high_epsilon:.3g} here",
                actual=target,
                remedy="raise target_epsilon or target_delta, take fewer steps, or use accountant='pld'",
            )
        low, low_epsilon = high, high_epsilon
        high = min(high * factor, most)
        high_epsilon = epsilon(high)
        factor **= 2
    while low_epsilon <= target:
        high, high_epsilon = low, low_epsilon
        if low <= least:
            return high
        low = max(low / 1.2, least)
        low_epsilon = epsilon(low)
    while high_epsilon < (1 - _CALIBRATION_TOLERANCE) * target and high / low > 1 + 1e-9:
        middle = _crossing(low, low_epsilon, high, high_epsilon, (1 - _CALIBRATION_TOLERANCE / 2) * target)
        middle_epsilon = epsilon(middle)
        if middle_epsilon <= target:
            high, high_epsilon = middle, middle_epsilon
        else:
            low, low_epsilon = middle, middle_epsilon
    return high


def _crossing(low: float, low_epsilon: float, high: float, high_epsilon: float, target: float) -> float:
    """Where epsilon is about `target`, between low and high: log epsilon is nearly linear in log sigma and in log steps."""
    share = 0.5
    if 0 < low_epsilon < math.inf and 0 < high_epsilon < math.inf:
        share = math.log(target / low_epsilon) / math.log(high_epsilon / low_epsilon)
    return low * math.pow(high / low, min(max(share, 0.01), 0.99))  # strictly between, so that every search ends


@lru_cache(maxsize=256)
def _epsilon(accountant: AccountantName, entries: tuple[Entry, ...], delta: float) -> float:
    if not entries:
        return 0.0
    for (sampler, _), _ in entries:
        if accountant != "pld" and sampler.kind != "poisson":
            raise UnsupportedError(f"accountant {accountant!r} cannot account {sampler.kind} sampling; use accountant='pld'")
    if accountant != "rdp":
        divergence = sum(steps * math.log1p(_chi_square(sampler, sigma)) for (sampler, sigma), steps in entries)
        if divergence > _MOST_DIVERGENCE:
            return math.inf
    if accountant == "pld":
        removed = tuple((sampler.events(sigma)[0], steps) for (sampler, sigma), steps in entries)
        added = tuple((sampler.events(sigma)[1], steps) for (sampler, sigma), steps in entries)
        epsilon = _pld_epsilon(removed, delta)
        return epsilon if added == removed else max(epsilon, _pld_epsilon(added, delta))
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise UnsupportedError(
            f"accountant {accountant!r} needs opacus: pip install dp-flash-hf[opacus], or use accountant='pld'"
        ) from error
    opacus = PRVAccountant() if accountant == "prv" else RDPAccountant()
    opacus.history = [(sigma, sampler.sampling_rate, steps) for (sampler, sigma), steps in entries]
    return float(opacus.get_epsilon(delta))


def _pld_epsilon(events: tuple[tuple[Any, int], ...], delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, steps in events:
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))
