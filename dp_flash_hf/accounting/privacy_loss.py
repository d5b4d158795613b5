"""Epsilon of composed Gaussian releases by their privacy loss distributions, also far in the tails.

Libraries convolve these distributions with fast Fourier transforms, whose rounding of 1e-16 drowns what a delta of 1e-12 or
less depends on. Here a distribution is tilted before it is transformed, so that what is rare, and decides, becomes usual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

_DISCRETISATION = 2e-4  # of epsilon, that rounding losses to a grid may add
_LEAST_EPSILON = 1e-3  # below, the grid is as fine as for this
_OUTSIDE = 1e-6  # of delta, for losses outside the grid
_WRAPPED = 1e-12  # of the tilted probability, for sums of losses outside the window, on either side
_FAR = 40.0  # e^-40 is what losses that are further than this over t above epsilon count for at most
_MOST_CELLS = 2**20  # of a grid
_ROUNDING = 1e-5  # of epsilon, added for what float64 rounds in losses: a thousand times what it can be in 100,000 steps
_TILTS = np.geomspace(1e-4, 1e7, 100)


class Steps(NamedTuple):
    """So many releases alike: of Poisson draws at a sampling rate, with noise of so many times the sensitivity."""

    rate: float
    sigma: float
    number: int


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

    It is within 0.1 % of epsilon from 0.001 to above 1000, also at a delta of 1e-18, for one step and for 100,000. (Where
    thousands of steps together draw a unit less than once on average, and epsilon is below 0.1, the grid would have to be too
    long, and the bound is up to 10 % high.)

    The privacy losses of one step are rounded to a grid of spacing h so that both distributions of a pair of neighbours keep
    their mass in every cell ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380), which dominates the pair whatever h
    is. With tilt t >= 0, M(t) = E e^(t loss) of a step, n steps and p the distribution of their losses' sum, its density tilted
    by e^(t loss) / M(t)^n,

        delta(epsilon) = M(t)^n e^(-t epsilon) E_p g,    g(loss) = (1 - e^(epsilon - loss))_+ e^(-t (loss - epsilon)) <= 1,

    exactly, for every t. The t that minimises the first two factors (which is what Rényi accounting does, and all that it does)
    puts the bulk of p at epsilon, so that a Fourier transform gives E_p g to about 1e-10, whatever delta is. What lies outside
    the grid is added to delta; what is outside the transform's window, and what wraps around, is added to E_p g. The grid is
    made finer until that changes little.

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
    reach = _reach(steps, delta)
    delta *= 1 - _OUTSIDE
    sampled = [_Sampled(step, reach, added) for step in steps]
    tilt, epsilon = _tilt(sampled, delta)
    interval = _interval(sampled, tilt, _DISCRETISATION * max(epsilon, known, _LEAST_EPSILON))
    if known and _on_grid(steps, delta, reach, added, tilt, 64 * interval) <= known:
        return known  # a rough bound is enough
    interval, shrunk = 2 * interval, 2.0
    found = _on_grid(steps, delta, reach, added, tilt, interval)
    while True:  # what rounding to the grid adds falls with its square, to a third of the last difference
        interval, before = interval / shrunk, found
        found = min(before, _on_grid(steps, delta, reach, added, tilt, interval))
        missed = (before - found) / (4 * _DISCRETISATION * max(found, known, _LEAST_EPSILON))
        if missed <= 1 or found <= known:
            return found
        shrunk = 2.0 if missed < 16 else 4.0


def grid_interval(steps: Sequence[Steps], delta: float) -> float:
    """The spacing of a grid to which losses can be rounded at about 0.02 % of epsilon; arguments as in `poisson_epsilon`."""
    sampled = [_Sampled(step, _reach(steps, delta), False) for step in steps]
    tilt, epsilon = _tilt(sampled, delta)
    return _interval(sampled, tilt, _DISCRETISATION * max(epsilon, _LEAST_EPSILON))


def _reach(steps: Sequence[Steps], delta: float) -> float:
    """Standard deviations beyond which, on both sides, all steps together have at most _OUTSIDE of delta."""
    from scipy.special import ndtri_exp

    return -float(ndtri_exp(math.log(_OUTSIDE / 2 * delta / sum(step.number for step in steps))))


class _Sampled:
    """Privacy losses of one step at some outcomes, with their probabilities' logarithms; only choices are made by them."""

    def __init__(self, step: Steps, reach: float, added: bool) -> None:
        from scipy.special import logsumexp

        rate, sigma, self.number = step
        x = np.linspace(-reach * sigma, 1 + reach * sigma, 2001)
        losses = _losses(x, rate, sigma)
        log_weights = -x * x / (2 * sigma * sigma) + (0 if added else losses)
        self.losses: Values = -losses if added else losses
        self.log_weights: Values = log_weights - logsumexp(log_weights)

    def log_moments(self, tilts: Values) -> Values:
        from scipy.special import logsumexp

        return np.asarray(logsumexp(self.log_weights + tilts[:, None] * self.losses, axis=1))

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
    """The tilt t that minimises (log M(t)^n - log delta) / t, and that minimum."""

    def bound(tilts: Values) -> Values:
        return np.asarray((sum(part.number * part.log_moments(tilts) for part in sampled) - math.log(delta)) / tilts)

    best = int(bound(_TILTS).argmin())
    finer = np.geomspace(_TILTS[max(best - 1, 0)], _TILTS[min(best + 1, len(_TILTS) - 1)], 20)
    found = bound(finer)
    return float(finer[found.argmin()]), float(found.min())


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


def _on_grid(steps: Sequence[Steps], delta: float, reach: float, added: bool, tilt: float, interval: float) -> float:
    """The bound by losses on a grid of this spacing, or of a wider one where that would be too long."""
    from scipy import fft
    from scipy.optimize import brentq

    spans = [float(_losses(1 + reach * s.sigma, s.rate, s.sigma) - _losses(-reach * s.sigma, s.rate, s.sigma)) for s in steps]
    interval = max(interval, max(spans) / _MOST_CELLS)
    while True:
        log_moment, parts = _tilted(steps, reach, added, tilt, interval)
        start, end = _window(parts)
        if end - start < _MOST_CELLS:
            break
        interval *= 1.01 * (end - start) / _MOST_CELLS
    size = fft.next_fast_len(end - start + 1, real=True)
    log_size, angle = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)  # of the sum's transform, but for a shift
    offset, rounding = 0, 0.0
    for first, masses, count in parts:
        usual = int(masses.argmax())
        offset += count * (first + usual)
        # The transform minus 1: where nearly all losses are the same, it is tiny, and so are its rounding errors.
        rest = np.roll(np.append(masses, np.zeros(-len(masses) % size)).reshape(-1, size).sum(0), -usual % size)
        rest[0] = 0
        rest[0] = -rest.sum()
        minus_one = fft.rfft(rest)
        real, imaginary = minus_one.real, minus_one.imag
        with np.errstate(divide="ignore", invalid="ignore"):
            near = np.log1p(real * (2 + real) + imaginary * imaginary) / 2
            log_size += count * np.where(real > -0.5, near, np.log(np.hypot(1 + real, imaginary)))
        angle += count * np.arctan2(imaginary, 1 + real)
        rounding += count * float(np.linalg.norm(rest))
    composed = np.roll(fft.irfft(np.exp(log_size) * np.exp(1j * angle), size), (offset - start) % size).clip(0)
    # A coefficient is off by log2(size) roundings, its logarithm by `count` times as many (2-norms, by Parseval).
    rounding *= 2**-51 * math.log2(size + 2) * float(np.linalg.norm(composed))
    losses = interval * np.arange(start, start + size)

    def excess(epsilon: float) -> float:
        cut, far = np.searchsorted(losses, (epsilon, epsilon + _FAR / tilt), side="right")
        above = losses[cut:far] - epsilon
        weights = -np.expm1(-above) * np.exp(-tilt * above)
        expected = float(composed[cut:far] @ weights) + rounding * float(np.linalg.norm(weights))
        return log_moment - tilt * epsilon + math.log(expected + 3 * _WRAPPED + math.exp(-_FAR)) - math.log(delta)

    most = (log_moment - math.log(delta)) / tilt  # where E_p g <= 1 suffices
    if excess(0.0) <= 0:
        return 0.0
    return most if excess(most) >= 0 else float(brentq(excess, 0.0, most, xtol=1e-12, rtol=1e-9)) * (1 + 1e-8) + 1e-12


def _tilted(
    steps: Sequence[Steps], reach: float, added: bool, tilt: float, interval: float
) -> tuple[float, list[tuple[int, Values, int]]]:
    """Log M(tilt)^n of all steps, and of each kind the first grid point, tilted probabilities from there on, and their number.

    Of the probabilities, at both ends so much is left out that all steps together lack at most _WRAPPED.
    """
    log_moment, parts = 0.0, []
    for step in steps:
        first, masses = _discretised(step, reach, interval, added)
        with np.errstate(divide="ignore"):
            exponents = np.log(masses) + tilt * interval * np.arange(first, first + len(masses))
        most = exponents.max()
        tilted = np.exp(exponents - most)
        total = float(tilted.sum())
        log_moment += step.number * float(most + math.log(total))
        spare = _WRAPPED / 2 / step.number / len(steps) * total
        start, end = np.searchsorted(tilted.cumsum(), spare), len(tilted) - np.searchsorted(tilted[::-1].cumsum(), spare)
        parts.append((first + int(start), tilted[start:end] / total, step.number))
    return log_moment, parts


def _window(parts: Sequence[tuple[int, Values, int]]) -> tuple[int, int]:
    """First and last grid point of the sum, outside of which it has at most _WRAPPED on either side, by Chernoff bounds."""
    moments = []
    for first, masses, count in parts:
        points = np.arange(first, first + len(masses), dtype=np.float64)
        mean = float(masses @ points)
        moments.append((points - mean, mean, float(masses @ (points - mean) ** 2), masses, count))
    middle = sum(mean * count for _, mean, _, _, count in moments)
    deviation = math.sqrt(sum(variance * count for _, _, variance, _, count in moments)) or 1.0
    longest = max(len(masses) for _, masses, _ in parts)
    start = sum(first * count for first, _, count in parts)
    end = sum((first + len(masses) - 1) * count for first, masses, count in parts)
    for order in [*(scaled / deviation for scaled in (1.0, 3.0, 6.0)), *(scaled / longest for scaled in (1.0, 3.0, 9.0))]:
        for side in (1, -1):
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                log_mgf = sum(
                    count * float(np.log(masses @ np.exp(side * order * points))) for points, _, _, masses, count in moments
                )
            bound = middle + side * (log_mgf - math.log(_WRAPPED)) / order
            if math.isfinite(bound):
                start, end = (start, min(end, math.ceil(bound))) if side > 0 else (max(start, math.floor(bound)), end)
    return start, end


def _discretised(step: Steps, reach: float, interval: float, added: bool) -> tuple[int, Values]:
    """Probabilities of multiples of `interval`, the first one's number, that dominate the privacy losses of one step."""
    rate, sigma, _ = step
    first = math.floor(_losses(-reach * sigma, rate, sigma) / interval)
    last = max(math.ceil(_losses(1 + reach * sigma, rate, sigma) / interval), first + 1)
    grid = interval * np.arange(first, last + 1)
    x = _inverse(grid, rate, sigma)
    log_without = _log_masses(x / sigma)  # of the cells between grid points
    log_with = math.log(rate) + _log_masses((x - 1) / sigma)
    log_missed = log_without + (math.log1p(-rate) if rate < 1 else -math.inf)
    if added:
        masses = np.exp(log_without)
        other = np.exp(log_missed - grid[1:]) + np.exp(log_with - grid[1:])
    else:
        masses = np.exp(log_missed) + np.exp(log_with)
        other = np.exp(log_without + grid[:-1])
    # Of a cell's mass, so much goes to its upper end that E e^-loss stays the same.
    higher = np.clip((masses - other) / -math.expm1(-interval), 0, masses)
    found = np.zeros(len(grid))
    if added:
        found[1:] += masses - higher
        found[:-1] += higher
        return -last, found[::-1]
    found[:-1] += masses - higher
    found[1:] += higher
    return first, found


def _losses(x: Any, rate: float, sigma: float) -> Any:
    """log((1 - q) + q e^((2 x - 1) / (2 sigma^2))): the loss of outcome x, increasing."""
    exponent = (2 * x - 1) / (2 * sigma * sigma)
    if rate == 1:
        return exponent
    small = np.log1p(rate * np.expm1(np.minimum(exponent, 1.0)))
    return np.where(exponent < 1, small, np.logaddexp(math.log1p(-rate), math.log(rate) + exponent))


def _inverse(losses: Values, rate: float, sigma: float) -> Values:
    """The outcome x of a loss; -inf for losses that are too low for any."""
    if rate == 1:
        return losses * sigma * sigma + 0.5
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low = np.log1p(np.maximum(np.expm1(np.minimum(losses, 1.0)) / rate, -1.0))
        high = losses - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-np.maximum(losses, 1.0)))
    return np.asarray(sigma * sigma * np.where(losses < 1, low, high) + 0.5)


def _log_masses(z: Values) -> Values:
    """Log of a standard normal's probabilities between neighbours of `z`, ascending; each from the side where it is smaller."""
    from scipy.special import log_ndtr

    left, right = z[:-1], z[1:]
    mirrored = left > 0
    near = log_ndtr(np.where(mirrored, -left, right))
    far = log_ndtr(np.where(mirrored, -right, left))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = near + np.log(-np.expm1(far - near))
    return np.where(np.isneginf(near), -np.inf, found)
