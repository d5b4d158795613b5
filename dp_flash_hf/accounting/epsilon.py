"""The epsilon of steps, by each of the accountants, whose libraries are imported when they are used.

dp-accounting alone takes seconds to import, for it brings scipy.signal: nothing of it is loaded before an epsilon is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dp_flash_hf.accounting.loss_grid import Steps
from dp_flash_hf.accounting.privacy_loss import gaussian_epsilon, grid_interval, poisson_epsilon
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.gaussian_noise import closeness
from dp_flash_hf.mechanisms.sampling import PoissonSampler, TruncatedPoissonSampler

Entry = tuple[tuple[PoissonSampler, float], int]  # ((sampler, noise multiplier), steps taken with them)
_LEAST_SIGMA = 3e-5  # below, one step's epsilon is beyond 1e8
_LEAST_TRUNCATED_DELTA = 1e-12  # below, dp-accounting's rounding shows
_COARSER = 4  # the grid of dp-accounting's than that of 0.02 % of epsilon: 0.3 %, in a quarter of the time
_RARE = 1e-3  # of delta, for draws that are truncated, where they are accounted as if none were
_MOST_DIVERGENCE = 3000  # Rényi, order 2: epsilon is then in the hundreds, and the memory of Opacus' prv grows with it
_PRV_ERROR = 0.01  # of epsilon, absolute: Opacus' default; less where epsilon is below 2


@lru_cache(maxsize=256)
def epsilon_of(accountant: AccountantName, entries: tuple[Entry, ...], delta: float) -> float:
    """The epsilon of all these steps, at `delta`, for neighbours that differ by one unit added or removed.

    - ``pld``: privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049), an upper bound within 0.1 % of epsilon
      wherever epsilon is from 0.01 to 1000, delta from 1e-2 to 1e-18 and steps are 1 to 100,000: exact for full batches, see
      `gaussian_epsilon`, and `poisson_epsilon` for Poisson draws. Truncated Poisson draws are accounted as these where it is
      improbable that any is truncated, see `_of_rarely_truncated`; else by dp-accounting, within 1 %, for delta from 1e-12.
    - ``prv``: privacy random variables of Opacus (Gopi et al. 2021, arXiv 2106.02848), within 0.01 or 0.5 % of epsilon, for
      delta from about 1e-12.
    - ``rdp``: Rényi divergences of Opacus (Mironov et al. 2019, arXiv 1908.10530), an upper bound that is 5 to 30 % looser, and
      useless below an epsilon of about log(1 / delta) / 62.

    Args:
        accountant: Which of them computes it.
        entries: The steps by kind; their order changes the last digits only.
        delta: Above 0 and below 1.

    Returns:
        0.0 without entries. inf for so little noise that epsilon is beyond 1e8 a step; with prv and truncated draws, beyond
        hundreds in all.

    Raises:
        UnsupportedError: prv or rdp with sampling other than plain Poisson, or without opacus installed; a delta that is too
            small for prv or for truncated draws. It says which accountant can.
    """
    if not entries:
        return 0.0
    for (sampler, _), _ in entries:
        if accountant != "pld" and sampler.kind != "poisson":
            raise UnsupportedError(f"accountant {accountant!r} cannot account {sampler.kind} sampling; use accountant='pld'")
    if any(sigma < _LEAST_SIGMA for (_, sigma), _ in entries) and accountant != "rdp":
        return math.inf
    return _pld_epsilon(entries, delta) if accountant == "pld" else _opacus_epsilon(accountant, entries, delta)


def of_computed_noise(of_ideal_noise: Callable[[float], float], steps: int, delta: float) -> float:
    """The epsilon of so many steps whose noise is computed, not ideal: as in `mechanisms.gaussian_noise`.

    d = delta 2^-11 exp(-epsilon - 1), so that e^e delta (1 - 2^-9) + d (1 + e^(epsilon + e)) is at most delta.

    Args:
        of_ideal_noise: delta -> the epsilon of the same steps with ideal noise.
        steps: All that are added up.
        delta: Of the guarantee.
    """
    ideal = of_ideal_noise(delta * (1 - 2.0**-9))
    if not 0 < ideal < math.inf:
        return ideal
    return ideal + 2 * closeness(steps, math.log(2.0**11 / delta) + ideal + 1)


def chi_square(sampler: PoissonSampler, noise_multiplier: float) -> float:
    """Chi-square divergence between one step's releases with and without a unit: q^2 (exp(1 / sigma^2) - 1), or inf.

    It is exp(Rényi divergence of order 2) - 1 of the Poisson-sampled Gaussian mechanism (Abadi et al. 2016, arXiv 1607.00133),
    and says how large an epsilon will be about; no guarantee is computed from it.
    """
    exponent = 1 / noise_multiplier / noise_multiplier
    return sampler.sampling_rate**2 * math.expm1(exponent) if exponent < 700 else math.inf  # exp(710) overflows


def _hopeless(entries: tuple[Entry, ...]) -> bool:
    """Whether epsilon is in the hundreds or more, at any delta of use."""
    return sum(steps * math.log1p(chi_square(sampler, sigma)) for (sampler, sigma), steps in entries) > _MOST_DIVERGENCE


def _pld_epsilon(entries: tuple[Entry, ...], delta: float) -> float:
    alike = [Steps(sampler.sampling_rate, sigma, steps) for (sampler, sigma), steps in entries]
    if any(sampler.kind != "poisson" for (sampler, _), _ in entries):
        rarely = _of_rarely_truncated(entries, alike, delta)
        return _dp_accounting_epsilon(entries, delta, _COARSER * grid_interval(alike, delta)) if rarely is None else rarely
    return _poisson_epsilon(alike, delta)


def _poisson_epsilon(alike: list[Steps], delta: float) -> float:
    if all(steps.rate == 1 for steps in alike):
        return gaussian_epsilon(math.sqrt(sum(steps.number / steps.sigma / steps.sigma for steps in alike)), delta)
    return poisson_epsilon(alike, delta)


def _of_rarely_truncated(entries: tuple[Entry, ...], alike: list[Steps], delta: float) -> float | None:
    """The epsilon of Poisson draws, where it is that of truncated ones too; None where draws are truncated more often.

    A draw of at most max_batch_size units is released as an ordinary Poisson draw is. With r the probability that any step of
    the larger dataset draws more, what either of them releases is within r, in total variation, of what ordinary draws release,
    which are (epsilon, d)-private; and truncated draws are (epsilon, d + r (1 + e^epsilon))-private, with 1 + e^epsilon at most
    2 e^epsilon.
    """
    from scipy.stats import binom

    truncated = 0.0
    for (sampler, _), steps in entries:
        if type(sampler) is TruncatedPoissonSampler:
            truncated += steps * float(binom.sf(sampler.max_batch_size, sampler.n_units + 1, sampler.sampling_rate))
        elif type(sampler) is not PoissonSampler:
            return None
    epsilon = _poisson_epsilon(alike, delta * (1 - _RARE))
    return epsilon if 2 * truncated <= _RARE * delta * math.exp(-epsilon) else None


def _dp_accounting_epsilon(entries: tuple[Entry, ...], delta: float, interval: float) -> float:
    """The larger of both directions: a unit removed from a dataset of n units, and one added to it."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    if _hopeless(entries):
        return math.inf
    if delta < 0.99 * _LEAST_TRUNCATED_DELTA:  # some of a delta is charged for noise
        raise UnsupportedError(
            f"truncated_poisson sampling can be accounted for target_delta >= {_LEAST_TRUNCATED_DELTA:g}, unless draws are "
            "hardly ever truncated: raise max_batch_size, or use sampling='poisson' with accountant='pld', for any delta"
        )
    interval = 2.0 ** min(math.floor(math.log2(interval)), -7)  # few different ones, so that `_one_step` is found again

    def composed(units_added: int) -> float:
        total = pld.identity(value_discretization_interval=interval)
        for (sampler, sigma), steps in entries:
            total = total.compose(_one_step(sampler, sigma, units_added, interval).self_compose(steps))
        return float(total.get_epsilon_for_delta(delta))

    return max(composed(0), composed(1))


@lru_cache(maxsize=4)  # one takes up to 100 MB where noise is small
def _one_step(sampler: PoissonSampler, noise_multiplier: float, units_added: int, interval: float) -> Any:
    """The privacy loss distribution of one step, as `PLDAccountant` makes it.

    Kept, because it takes most of the time of an epsilon, and training asks for one after every step.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    if type(sampler) is TruncatedPoissonSampler:
        return pld.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=sampler.n_units + units_added,  # that of the larger of two neighbours
            sampling_probability=sampler.sampling_rate,
            truncated_batch_size=sampler.max_batch_size,
            noise_multiplier=noise_multiplier,
            value_discretization_interval=interval,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    if type(sampler) is PoissonSampler:
        return pld.from_gaussian_mechanism(
            standard_deviation=noise_multiplier,
            value_discretization_interval=interval,
            sampling_prob=sampler.sampling_rate,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    raise UnsupportedError(f"no accountant knows {sampler.kind} sampling as {type(sampler).__name__} draws it")


def _opacus_epsilon(accountant: AccountantName, entries: tuple[Entry, ...], delta: float) -> float:
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise UnsupportedError(
            f"accountant {accountant!r} needs opacus: pip install dp-flash-hf[opacus], or use accountant='pld'"
        ) from error
    opacus = PRVAccountant() if accountant == "prv" else RDPAccountant()
    opacus.history = [(sigma, sampler.sampling_rate, steps) for (sampler, sigma), steps in entries]
    if accountant == "rdp":
        return float(opacus.get_epsilon(delta))
    if _hopeless(entries):
        return math.inf
    try:
        return float(opacus.get_epsilon(delta, eps_error=min(_PRV_ERROR, max(1e-4, 0.005 * _pld_epsilon(entries, delta)))))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise UnsupportedError(f"accountant 'prv' cannot account this ({error}); use accountant='pld'") from error
