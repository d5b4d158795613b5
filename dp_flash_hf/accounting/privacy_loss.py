"""Epsilon of composed Gaussian releases by their privacy loss distributions, also far in the tails.

Libraries convolve these distributions with fast Fourier transforms, whose rounding of 1e-16 drowns what a delta of 1e-12 or
less depends on. Here a distribution is tilted before it is transformed, so that what is rare, and decides, becomes usual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dp_flash_hf.accounting.loss_grid import (
    MOST_CELLS,
    Grid,
    LossSum,
    Outcomes,
    Steps,
    Values,
    large_losses,
    losses,
    small_losses,
)

_DISCRETISATION = 2e-4  # of epsilon, that rounding losses to a grid may add
_LEAST_EPSILON = 1e-3  # below, the grid is as fine as for this
_OUTSIDE = 1e-6  # of delta, for outcomes that are left out
_TWICE = 1e-4  # of delta, for more than one large loss
_LARGE = 1e5  # times delta: the probability of a large loss is at most this in all steps together
_MOST_EPSILON = 1e12  # searched
_ROUNDING = 1e-5  # of epsilon, added for what float64 rounds in losses: a thousand times what it can be in 100,000 steps
_TILTS = np.geomspace(1e-4, 1e7, 100)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of the Gaussian mechanism of sensitivity mu and noise 1, exact (Balle and Wang 2018, arXiv 1805.06530).

    Full-batch steps compose to one such mechanism, with mu^2 = sum of 1 / sigma^2 (Dong et al. 2019, arXiv 1905.02383).

    Args:
        mu: At least 0 and finite.
        delta: Above 0 and below 1; also 1e-300.

    Returns:
        The least epsilon >= 0 with delta >= Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu).
    """
    from scipy.optimize import brentq
    from scipy.special import erfcx, log_ndtr

    def excess(epsilon: float) -> float:
        upper, lower = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        if upper < -1:  # e^epsilon = e^((lower^2 - upper^2) / 2): what both terms share is taken out, and nothing cancels
            terms = erfcx(-upper / math.sqrt(2)) - erfcx(-lower / math.sqrt(2))
            return float(math.log(terms / 2) - upper * upper / 2 - math.log(delta))
        first, second = log_ndtr(upper), epsilon + log_ndtr(lower)
        return float(first + math.log(-math.expm1(second - first)) - math.log(delta))

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # of its Rényi divergences, an upper bound
    return float(brentq(excess, 0.0, most, xtol=1e-300, rtol=1e-12)) * (1 + 1e-11)


def poisson_epsilon(steps: Sequence[Steps], delta: float) -> float:
    """An upper bound of the epsilon of all these steps, where one unit is added or removed.

    It is within 0.1 % of epsilon from 0.01 to above 1000, also at a delta of 1e-18, for one step and for 100,000, also where
    all of them together draw a unit a thousandth of a time.

    The privacy losses of one step are rounded to a grid of spacing h so that both distributions of a pair of neighbours keep
    their mass in every cell ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380), which dominates the pair whatever h
    is, and whether or not cells are equally wide. Losses beyond some value are called large; any of n steps has one with a
    probability r of at most 1e5 delta, and r^2 / 2 at most 1e-4 delta. Then delta(epsilon) is the sum of what events add:

    *No large loss.* With tilt t > 0, M(t) = E e^(t loss) of a step's small losses and p the distribution of the sum of n, its
    density tilted by e^(t loss) / M(t)^n, this is, exactly and for every t,

        M(t)^n e^(-t epsilon) E_p g,    g(loss) = (1 - e^(epsilon - loss))_+ e^(-t (loss - epsilon)) <= 1.

    The t that puts the mean of p at epsilon (saddle point) makes a Fourier transform give E_p g to about 1e-10, whatever delta
    is. What is outside the transform's window, and what wraps around, is added to E_p g.

    *One large loss*, any of the n: n times the sum over its values l, which need no equal spacing, of its probability times
    E (1 - e^(epsilon - l - S))_+, with S the sum of n - 1 small losses. As r is at most 1e5 delta, a transform without tilt is
    accurate enough.

    *More than one*: r^2 / 2 at most. It is taken off delta, as is what lies outside of all outcomes that are looked at.

    Where n steps draw a unit less than once, large losses are what epsilon comes from, hundreds of times larger than all others
    and on no grid with them; and tilted together with small ones they would leave p next to nothing near epsilon.

    The grid is made finer until that changes little.

    Args:
        steps: At least one, with sigma from 3e-5.
        delta: Above 0 and below 1, not below 1e-100.

    Returns:
        Epsilon, the larger of both directions.
    """
    removed = _directed(steps, delta, added=False, known=0.0)
    # An added unit lowers the probability of no outcome by more than the factor (1 - q)^n, which bounds the other direction.
    most = sum(-step.number * math.log1p(-step.rate) if step.rate < 1 else math.inf for step in steps)
    if most > max(removed, _LEAST_EPSILON):
        most = _directed(steps, delta, added=True, known=removed)
    return max(removed, most) * (1 + _ROUNDING)


def _directed(steps: Sequence[Steps], delta: float, *, added: bool, known: float) -> float:
    """The bound for losses of a dataset with the unit against the one without it, or the reverse (`added`).

    It is accurate if it is above `known`.
    """
    outcomes = _outcomes(steps, delta, added)
    sampled = [_Sampled(of_kind) for of_kind in outcomes]
    delta *= 1 - _OUTSIDE
    tilt, epsilon = _tilt(sampled, delta)
    interval = _interval(sampled, tilt, _DISCRETISATION * max(epsilon, known, _LEAST_EPSILON))
    if known and _on_grid(outcomes, delta, tilt, 64 * interval) <= known:
        return known  # a rough bound is enough
    interval, shrunk = 2 * interval, 2.0
    found = _on_grid(outcomes, delta, tilt, interval)
    while True:  # what rounding to the grid adds falls with its square, to a third of the last difference
        interval, before = interval / shrunk, found
        found = min(before, _on_grid(outcomes, delta, tilt, interval))
        missed = (before - found) / (4 * _DISCRETISATION * max(found, known, _LEAST_EPSILON))
        if missed <= 1 or found <= known:
            return found
        shrunk = 2.0 if missed < 16 else 4.0


def grid_interval(steps: Sequence[Steps], delta: float) -> float:
    """The spacing of a grid to which losses can be rounded at about 0.02 % of epsilon; arguments as in `poisson_epsilon`."""
    sampled = [_Sampled(of_kind) for of_kind in _outcomes(steps, delta, False)]
    tilt, epsilon = _tilt(sampled, delta)
    return _interval(sampled, tilt, _DISCRETISATION * max(epsilon, _LEAST_EPSILON))


def _outcomes(steps: Sequence[Steps], delta: float, added: bool) -> list[Outcomes]:
    """Of each kind, so that what is left out has at most _OUTSIDE of delta in all steps together."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtri_exp

    number = sum(step.number for step in steps)
    reach = -float(ndtri_exp(math.log(_OUTSIDE / 2 * delta / number)))
    log_large = math.log(min(math.sqrt(2 * _TWICE * delta), _LARGE * delta) / number)
    found = []
    for step in steps:
        rate, sigma, _ = step
        low, high = -reach * sigma, 1 + reach * sigma

        def excess(x: float, rate: float = rate, sigma: float = sigma) -> float:
            without = math.log1p(-rate) + log_ndtr(-x / sigma) if rate < 1 else -math.inf
            return float(np.logaddexp(without, math.log(rate) + log_ndtr((1 - x) / sigma))) - log_large

        split = float(ndtri_exp(log_large)) * sigma if added else float(brentq(excess, low, high))
        found.append(Outcomes(step, added, low, split, high))
    return found


class _Sampled:
    """Small losses of one step at some outcomes, with their probabilities' logarithms; only choices are made by them."""

    def __init__(self, outcomes: Outcomes) -> None:
        from scipy.special import logsumexp

        rate, sigma, self.number = outcomes.steps
        x = np.linspace(*outcomes.small, 2001)
        removed = losses(x, rate, sigma)
        log_weights = -x * x / (2 * sigma * sigma) + (0 if outcomes.added else removed)
        self.losses: Values = -removed if outcomes.added else removed
        self.log_weights: Values = log_weights - logsumexp(log_weights)

    def tilted(self, tilts: Values) -> tuple[Values, Values, Values]:
        """For each tilt: log M, and mean and variance of a loss under the tilted probabilities."""
        from scipy.special import logsumexp

        log_weights = self.log_weights + tilts[:, None] * self.losses
        log_moments = np.asarray(logsumexp(log_weights, axis=1))
        weights = np.exp(log_weights - log_moments[:, None])
        means = weights @ self.losses
        return log_moments, means, weights @ self.losses**2 - means**2

    def log_moment_added(self, tilt: float, interval: float) -> float:
        """What rounding to a grid of this interval adds to log M(tilt)."""
        from scipy.special import logsumexp

        below = np.mod(self.losses, interval)
        above = interval - below
        up = np.expm1(-below) / np.expm1(-interval)
        with np.errstate(divide="ignore"):
            spread = np.logaddexp(np.log1p(-up) - tilt * below, np.log(up) + tilt * above)
        weights = self.log_weights + tilt * self.losses
        return float(logsumexp(weights + spread) - logsumexp(weights))


def _tilt(sampled: Sequence[_Sampled], delta: float) -> tuple[float, float]:
    """A tilt that puts the mean of small losses' sum at the epsilon that they alone would have, and that epsilon, about.

    By the saddle point approximation M(t)^n e^(-t epsilon) / (t (t + 1) sqrt(2 pi variance)) of delta at that mean, which falls
    as t grows.
    """

    def log_deltas(tilts: Values) -> tuple[Values, Values]:
        log_moment, mean, variance = (
            sum(part.number * values for part, values in zip(sampled, each, strict=True))
            for each in zip(*(part.tilted(tilts) for part in sampled), strict=True)
        )
        width = np.sqrt(2 * math.pi * np.maximum(variance, 0))
        return log_moment - tilts * mean - np.log(np.maximum(tilts * (tilts + 1) * width, 1)), mean

    tilts = _TILTS
    for _ in range(2):
        log_delta, mean = log_deltas(tilts)
        best = int(np.argmax(log_delta <= math.log(delta))) or len(tilts) - 1
        found = float(tilts[best]), float(mean[best])
        tilts = np.geomspace(tilts[best - 1], tilts[best], 20)
    return found


def _interval(sampled: Sequence[_Sampled], tilt: float, allowed: float) -> float:
    """A grid's spacing h that adds about `allowed` to epsilon.

    Rounding gives a loss a variance of h^2 / 6 on average without a change of E e^(-loss), which moves log M(t) by
    t (t + 1) h^2 / 12, and epsilon by n (t + 1) h^2 / 12. Where most losses are close to 0, a multiple of h, it is much less.
    """
    interval = math.sqrt(12 * allowed / (sum(part.number for part in sampled) * (tilt + 1)))
    for _ in range(40):
        larger = interval * math.sqrt(2)
        if sum(part.number * part.log_moment_added(tilt, larger) for part in sampled) > allowed * tilt:
            break
        interval = larger
    return interval


def _on_grid(outcomes: Sequence[Outcomes], delta: float, tilt: float, interval: float) -> float:
    """The bound by losses on a grid of this spacing, or of a wider one where that would be too long."""
    from scipy.optimize import brentq

    spans = [np.ptp(losses(np.array(of_kind.small), *of_kind.steps[:2])) for of_kind in outcomes]
    interval = max(interval, float(max(spans)) / MOST_CELLS)
    while True:
        small = [small_losses(of_kind, interval) for of_kind in outcomes]
        total = LossSum(small, tilt, interval)
        others = [LossSum(_without_one(small, kind), 0.0, interval) for kind in range(len(small))]  # beside a large loss
        length = max(part.length for part in (total, *others))
        if length < MOST_CELLS:
            break
        interval *= 1.01 * length / MOST_CELLS
    large = [large_losses(of_kind, small[kind], interval) for kind, of_kind in enumerate(outcomes)]
    for part in (total, *others):
        part.compose()
    numbers = [of_kind.steps.number for of_kind in outcomes]
    delta -= sum(number * masses.sum() for number, (_, masses) in zip(numbers, large, strict=True)) ** 2 / 2

    def excess(epsilon: float) -> float:
        with_large = sum(
            number * float(masses @ other.deltas(epsilon - values))
            for number, (values, masses), other in zip(numbers, large, others, strict=True)
        )
        return float(np.logaddexp(total.log_delta(epsilon), math.log(with_large or 1e-300))) - math.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    most = max((total.log_moment - math.log(delta)) / tilt, interval)  # enough for small losses
    while excess(most) >= 0:
        most *= 2
        if most > _MOST_EPSILON:
            return math.inf
    return float(brentq(excess, 0.0, most, xtol=1e-12, rtol=1e-9)) * (1 + 1e-8) + 1e-12


def _without_one(grids: Sequence[Grid], kind: int) -> list[Grid]:
    return [grid._replace(number=grid.number - (index == kind)) for index, grid in enumerate(grids)]
