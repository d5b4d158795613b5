"""The epsilon of steps, by each of the accountants, whose libraries are imported when they are used.

dp-accounting alone takes seconds to import, for it brings scipy.signal: nothing of it is loaded before an epsilon is asked for.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.sampling import PoissonSampler, TruncatedPoissonSampler

Entry = tuple[tuple[PoissonSampler, float], int]  # ((sampler, noise multiplier), steps taken with them)
_PLD_INTERVAL = 1e-4  # of privacy losses: the accuracy of pld; dp-accounting's default
_MOST_DIVERGENCE = 3000  # Rényi, order 2: epsilon is then in the hundreds, and the memory of pld and prv grows with it


@lru_cache(maxsize=256)
def epsilon_of(accountant: AccountantName, entries: tuple[Entry, ...], delta: float) -> float:
    """The epsilon of all these steps, at `delta`, for neighbours that differ by one unit added or removed.

    - ``pld``: privacy loss distributions of dp-accounting (Koskela et al. 2020, arXiv 1906.03049; discretised as in Doroshenko
      et al. 2022, arXiv 2207.04380), an upper bound that is tight to about 1e-4.
    - ``prv``: privacy random variables of Opacus (Gopi et al. 2021, arXiv 2106.02848), an upper bound within 0.01 of epsilon.
    - ``rdp``: Rényi divergences of Opacus (Mironov et al. 2019, arXiv 1908.10530), a looser upper bound.

    Args:
        accountant: Which of them computes it.
        entries: The steps by kind; their order changes the last digits only.
        delta: Above 0 and below 1.

    Returns:
        0.0 without entries. With pld and prv, inf for so little noise that epsilon is in the hundreds or more.

    Raises:
        UnsupportedError: prv or rdp with sampling other than plain Poisson, or without opacus installed.
    """
    if not entries:
        return 0.0
    for (sampler, _), _ in entries:
        if accountant != "pld" and sampler.kind != "poisson":
            raise UnsupportedError(f"accountant {accountant!r} cannot account {sampler.kind} sampling; use accountant='pld'")
    if accountant != "rdp":
        divergence = sum(steps * math.log1p(chi_square(sampler, sigma)) for (sampler, sigma), steps in entries)
        if divergence > _MOST_DIVERGENCE:
            return math.inf
    return _pld_epsilon(entries, delta) if accountant == "pld" else _opacus_epsilon(accountant, entries, delta)


def chi_square(sampler: PoissonSampler, noise_multiplier: float) -> float:
    """Chi-square divergence between one step's releases with and without a unit: q^2 (exp(1 / sigma^2) - 1), or inf.

    It is exp(Rényi divergence of order 2) - 1 of the Poisson-sampled Gaussian mechanism (Abadi et al. 2016, arXiv 1607.00133),
    and says how large an epsilon will be about; no guarantee is computed from it.
    """
    exponent = 1 / noise_multiplier / noise_multiplier
    return sampler.sampling_rate**2 * math.expm1(exponent) if exponent < 700 else math.inf  # exp(710) overflows


def _pld_epsilon(entries: tuple[Entry, ...], delta: float) -> float:
    """The larger of both directions: a unit removed from a dataset of n units, and one added to it."""
    removed = _composed(entries, 0, delta)
    if all(sampler.kind == "poisson" for (sampler, _), _ in entries):  # which is the same in both
        return removed
    return max(removed, _composed(entries, 1, delta))


def _composed(entries: tuple[Entry, ...], units_added: int, delta: float) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = pld.identity(value_discretization_interval=_PLD_INTERVAL)
    for (sampler, sigma), steps in entries:
        total = total.compose(_one_step(sampler, sigma, units_added).self_compose(steps))
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=4)  # one takes up to 100 MB where noise is small
def _one_step(sampler: PoissonSampler, noise_multiplier: float, units_added: int) -> Any:
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
            value_discretization_interval=_PLD_INTERVAL,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    if type(sampler) is PoissonSampler:
        return pld.from_gaussian_mechanism(
            standard_deviation=noise_multiplier,
            value_discretization_interval=_PLD_INTERVAL,
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
    return float(opacus.get_epsilon(delta))
