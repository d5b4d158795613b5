"""Privacy losses of releases on a grid: one step's, dominated, and sums of many, by Fourier transforms with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

MOST_CELLS = 2**20  # of a grid
_WRAPPED = 1e-12  # of the tilted probability, for sums of losses outside the window, on either side
_FAR = 40.0  # e^-40 is what losses that are further than this over t above epsilon count for at most
_SUMMED = 1e-9  # what float64 rounds when it adds up the probabilities of a grid, a few times over
_LARGE_CELLS = 4000  # to which large losses are rounded


class Steps(NamedTuple):
    """So many releases alike: of Poisson draws at a sampling rate, with noise of so many times the sensitivity."""

    rate: float
    sigma: float
    number: int


class Outcomes(NamedTuple):
    """Which outcomes of steps alike are counted, and which of them have large losses.

    The outcome of a step is N(0, sigma^2) without the unit, and shifted by 1 if it is drawn; its loss is `losses` of it, or the
    negative of that where a unit is added.

    Attributes:
        steps: How many, and of which kind.
        added: Whether losses are those of the dataset without the unit against the one with it; they fall with the outcome.
        low: Outcomes below are left out.
        split: Above it losses are large; where a unit is added, below it.
        high: Outcomes above are left out.
    """

    steps: Steps
    added: bool
    low: float
    split: float
    high: float

    @property
    def small(self) -> tuple[float, float]:
        """From where to where losses are not large."""
        return (self.split, self.high) if self.added else (self.low, self.split)


class Grid(NamedTuple):
    """Probabilities of consecutive multiples of a grid's spacing, the first one's number, and how many steps have them."""

    first: int
    masses: Values
    number: int


def small_losses(outcomes: Outcomes, interval: float) -> Grid:
    """Losses of one step that are not large, dominated by losses on a grid of this spacing."""
    rate, sigma, number = outcomes.steps
    low, high = (float(losses(x, rate, sigma)) / interval for x in outcomes.small)
    first = math.floor(low)
    last = max(math.ceil(high), first + 1)
    masses = _dominating(outcomes, interval * np.arange(first, last + 1, dtype=np.float64))
    return Grid(-last if outcomes.added else first, masses, number)


def large_losses(outcomes: Outcomes, small: Grid, interval: float) -> tuple[Values, Values]:
    """Losses of one step beyond its `small_losses`, ascending, and their probabilities: they dominate as those do."""
    rate, sigma, _ = outcomes.steps
    edge = interval * (small.first + len(small.masses) - 1)
    beyond = _inverse(np.array([-edge if outcomes.added else edge]), rate, sigma)[0]
    if not outcomes.low < beyond < outcomes.high:
        return np.empty(0), np.empty(0)
    x = np.linspace(outcomes.low if outcomes.added else outcomes.high, beyond, _LARGE_CELLS)
    values = np.unique(losses(x, rate, sigma))
    edges = np.append(values[values < -edge], -edge) if outcomes.added else np.append(edge, values[values > edge])
    masses = _dominating(outcomes, edges)
    return (-edges[::-1] if outcomes.added else edges), masses


def _dominating(outcomes: Outcomes, edges: Values) -> Values:
    """Probabilities of losses at the edges, or their negatives where a unit is added, that dominate the losses between them.

    Both distributions of the pair of neighbours keep their mass in every cell ("connect the dots", Doroshenko et al. 2022,
    arXiv 2207.04380).
    """
    rate, sigma, _ = outcomes.steps
    x = _inverse(edges, rate, sigma)
    log_without = _log_masses(x / sigma)  # of the cells between edges
    log_with = math.log(rate) + _log_masses((x - 1) / sigma)
    log_missed = log_without + (math.log1p(-rate) if rate < 1 else -math.inf)
    if outcomes.added:
        masses = np.exp(log_without)
        other = np.exp(log_missed - edges[1:]) + np.exp(log_with - edges[1:])
    else:
        masses = np.exp(log_missed) + np.exp(log_with)
        other = np.exp(log_without + edges[:-1])
    # Of a cell's mass, so much goes to its upper end that E e^-loss stays the same.
    higher = np.clip((masses - other) / -np.expm1(-np.diff(edges)), 0, masses)
    found = np.zeros(len(edges))
    if outcomes.added:
        found[1:] += masses - higher
        found[:-1] += higher
        return found[::-1]
    found[:-1] += masses - higher
    found[1:] += higher
    return found


class LossSum:
    """The sum S of all steps' losses on a grid, with probabilities tilted by e^(tilt loss).

    Attributes:
        log_moment: log E e^(tilt S), which tilted probabilities are divided by. Those of a grid may add up to less than 1.
        length: Cells of the window that holds all of S but 2 * 1e-12. `compose` needs memory for a few times as many.
    """

    def __init__(self, grids: Sequence[Grid], tilt: float, interval: float) -> None:
        self._tilt, self._interval = tilt, interval
        self.log_moment, self._parts = _tilted(grids, tilt, interval)
        self._start, end = _window(self._parts)
        self.length = end - self._start

    def compose(self) -> None:
        """Convolve the steps' losses."""
        from scipy import fft

        size = fft.next_fast_len(self.length + 1, real=True)
        log_size, angle = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)  # of the sum's transform, but for a shift
        offset, rounding = 0, 0.0
        for first, masses, number in self._parts:
            usual = int(masses.argmax())
            offset += number * (first + usual)
            # The transform minus 1: where nearly all losses are the same, it is tiny, and so are its rounding errors.
            rest = np.roll(np.append(masses, np.zeros(-len(masses) % size)).reshape(-1, size).sum(0), -usual % size)
            rest[0] = 0
            rest[0] = -rest.sum()
            minus_one = fft.rfft(rest)
            real, imaginary = minus_one.real, minus_one.imag
            with np.errstate(divide="ignore", invalid="ignore"):
                near = np.log1p(real * (2 + real) + imaginary * imaginary) / 2
                log_size += number * np.where(real > -0.5, near, np.log(np.hypot(1 + real, imaginary)))
            angle += number * np.arctan2(imaginary, 1 + real)
            rounding += number * float(np.linalg.norm(rest))
        composed = fft.irfft(np.exp(log_size) * np.exp(1j * angle), size)
        self._probabilities = np.roll(composed, (offset - self._start) % size).clip(0)
        # A coefficient is off by log2(size) roundings, its logarithm by `number` times as many (2-norms, by Parseval).
        self._rounding = rounding * 2**-51 * math.log2(size + 2) * float(np.linalg.norm(self._probabilities))
        self._losses = self._interval * np.arange(self._start, self._start + size)
        discounted = self._probabilities * np.exp(-np.maximum(self._losses, -700))
        self._above, self._discounted_above = (np.append(p[::-1].cumsum()[::-1], 0) for p in (self._probabilities, discounted))

    def log_delta(self, epsilon: float) -> float:
        """log E (1 - e^(epsilon - S))_+, or a little more; for a tilt above 0."""
        start, end = np.searchsorted(self._losses, (epsilon, epsilon + _FAR / self._tilt), side="right")
        above = self._losses[start:end] - epsilon
        weights = -np.expm1(-above) * np.exp(-self._tilt * above)
        expected = float(self._probabilities[start:end] @ weights) + self._rounding * float(np.linalg.norm(weights))
        return self.log_moment - self._tilt * epsilon + math.log(expected + 3 * _WRAPPED + math.exp(-_FAR))

    def deltas(self, epsilons: Values) -> Values:
        """E (1 - e^(epsilon - S))_+ for each epsilon, or 1e-9 and what the transform rounds more, and at most 1; for tilt 0."""
        first = np.searchsorted(self._losses, epsilons, side="right")
        found = self._above[first] - np.exp(np.minimum(epsilons, 700)) * self._discounted_above[first]
        weights = np.minimum(1, np.maximum(self._losses[-1] - epsilons, 0)) * np.sqrt(len(self._losses) - first)
        return np.asarray(np.clip(math.exp(self.log_moment) * (found + self._rounding * weights) + _SUMMED, 0, 1))


def _tilted(grids: Sequence[Grid], tilt: float, interval: float) -> tuple[float, list[Grid]]:
    """Log E e^(tilt loss) of all steps together, and the tilted probabilities of each kind.

    Of the probabilities, at both ends so much is left out that all steps together lack at most _WRAPPED.
    """
    log_moment, parts = 0.0, []
    for first, masses, number in grids:
        with np.errstate(divide="ignore"):
            exponents = np.log(masses) + tilt * interval * np.arange(first, first + len(masses))
        most = exponents.max()
        tilted = np.exp(exponents - most)
        total = float(tilted.sum())
        log_moment += number * float(most + math.log(total))
        spare = _WRAPPED / 2 / max(number, 1) / len(grids) * total
        start, end = np.searchsorted(tilted.cumsum(), spare), len(tilted) - np.searchsorted(tilted[::-1].cumsum(), spare)
        parts.append(Grid(first + int(start), tilted[start:end] / total, number))
    return log_moment, parts


def _window(parts: Sequence[Grid]) -> tuple[int, int]:
    """First and last grid point of the sum, outside of which it has at most _WRAPPED on either side, by Chernoff bounds."""
    moments = []
    for first, masses, number in parts:
        points = np.arange(first, first + len(masses), dtype=np.float64)
        mean = float(masses @ points)
        moments.append((points - mean, mean, float(masses @ (points - mean) ** 2), masses, number))
    middle = sum(mean * number for _, mean, _, _, number in moments)
    deviation = math.sqrt(sum(variance * number for _, _, variance, _, number in moments)) or 1.0
    longest = max(len(masses) for _, masses, _ in parts)
    start = sum(first * number for first, _, number in parts)
    end = sum((first + len(masses) - 1) * number for first, masses, number in parts)
    for order in [*(scaled / deviation for scaled in (1.0, 3.0, 6.0)), *(scaled / longest for scaled in (1.0, 3.0, 9.0))]:
        for side in (1, -1):
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                log_mgf = sum(
                    number * float(np.log(masses @ np.exp(side * order * points))) for points, _, _, masses, number in moments
                )
            bound = middle + side * (log_mgf - math.log(_WRAPPED)) / order
            if math.isfinite(bound):
                start, end = (start, min(end, math.ceil(bound))) if side > 0 else (max(start, math.floor(bound)), end)
    return start, end


def losses(x: Any, rate: float, sigma: float) -> Any:
    """log((1 - q) + q e^((2 x - 1) / (2 sigma^2))): the loss of outcome x where a unit is removed, increasing."""
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
