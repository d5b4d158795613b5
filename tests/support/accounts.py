"""Plans, and their epsilon computed by others: dp-accounting called directly, and sums of positive numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp, ndtr, ndtri_exp

from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.sampling import PoissonSampler

KEY = "00" * 16  # of fingerprints


# (units, expected batch size, noise multiplier, steps, delta)
RUNS = [
    (67349, 1000, 0.6, 202, 1e-5),  # SST-2, three epochs
    (10_000, 100, 1.0, 1000, 1e-6),
    (1000, 50, 1.5, 300, 1e-4),
    (500, 500, 8.0, 30, 1e-5),  # every unit in every step
]


def plan_of(run: tuple[int, int, float, int, float], accountant: AccountantName = "pld") -> PrivacyPlan:
    units, batch, sigma, steps, delta = run
    return PrivacyPlan(
        sampler=PoissonSampler(units, batch), noise_multiplier=sigma, steps=steps, target_delta=delta, accountant=accountant
    )


def pld_epsilon(events: Iterable[tuple[dp_accounting.DpEvent, int]], delta: float) -> float:
    """dp-accounting called directly."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in events:
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def poisson_event(q: float, sigma: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))


def fine_pld_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    """dp-accounting called directly, on a grid of this spacing; for a delta of 1e-12 or more."""
    one = pld.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=interval, log_mass_truncation_bound=-70
    )
    return float(one.self_compose(steps, 1e-16).get_epsilon_for_delta(delta))


def bracket(q: float, sigma: float, doublings: int, delta: float, interval: float) -> tuple[float, float]:
    """Below and above the epsilon of 2^doublings Poisson steps, a unit removed, at any delta.

    Losses are rounded down and up to a grid, and distributions convolved number by number: sums of products of positive numbers
    keep their relative accuracy however small they are, where a Fourier transform loses it.
    """
    reach = 12.0  # standard deviations: 1e-33 is beyond
    edges = np.arange(
        math.floor(_loss(-reach * sigma, q, sigma) / interval), math.ceil(_loss(1 + reach * sigma, q, sigma) / interval) + 1
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.log(np.maximum(np.expm1(edges * interval) / q + 1, 0))
    x = np.nan_to_num(inner, neginf=-1e6) * sigma * sigma + 0.5
    masses = (1 - q) * _between(x / sigma) + q * _between((x - 1) / sigma)
    for _ in range(doublings):
        masses = np.convolve(masses, masses)
    lowest = edges[0] * interval * 2**doublings
    bounds = []
    for up in (0, 2**doublings):  # of each loss, the end of its cell that is lower, or higher
        losses = lowest + interval * (np.arange(len(masses)) + up)

        def excess(epsilon: float, losses: np.ndarray = losses) -> float:
            return float(masses @ np.maximum(0, -np.expm1(np.minimum(epsilon - losses, 0)))) / delta - 1

        bounds.append(float(brentq(excess, 0, losses[-1])))
    return bounds[0], bounds[1]


def contour_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """The epsilon of Poisson steps, a unit removed, without any grid of losses; seconds of one core.

    With M(s) = E e^(s loss) of one step, by quadrature over its outcome, delta is, for every t > 0,

        1 / (2 pi i) times the integral of M(s)^steps e^(-s epsilon) / (s (s + 1)) from t - i inf to t + i inf,

    which is cut off at 300 t. NaN where it cancels so far that float64 does not say, as where a unit is hardly ever drawn and
    delta is below 1e-12 or so.
    """
    points, weights = np.polynomial.legendre.leggauss(20)
    reach = -float(ndtri_exp(math.log(1e-9 * delta / steps)))
    edges = np.linspace(-reach * sigma, 1 + reach * sigma, 301)
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half + half * points).ravel()
    exponent = (2 * x - 1) / (2 * sigma * sigma)
    near = np.log1p(q * np.expm1(np.minimum(exponent, 1)))
    losses = np.where(exponent < 1, near, np.logaddexp(math.log1p(-q), math.log(q) + exponent))
    logs = np.log((half * weights).ravel()) - x * x / (2 * sigma * sigma) - math.log(sigma * math.sqrt(2 * math.pi)) + losses

    def bound(log_t: float) -> float:
        return float((steps * logsumexp(logs + math.exp(log_t) * losses) - math.log(delta)) / math.exp(log_t))

    t = math.exp(minimize_scalar(bound, bounds=(-10, 16), method="bounded").x)
    log_moment = float(logsumexp(logs + t * losses))
    masses = np.exp(logs + t * losses - log_moment)
    mean = float(masses @ losses)
    used = masses > 1e-15 * masses.max()
    centred, masses = losses[used] - mean, masses[used]
    panels, width = [0.0], 1 / float(np.abs(losses).max())
    while panels[-1] < 300 * t:  # as wide as losses and epsilon let the integrand turn
        panels.append(panels[-1] + width)
        width = min(max(width, 0.02 * panels[-1]), 2 / bound(math.log(t)))
    half = np.diff(panels)[:, None] / 2
    u = (np.array(panels[:-1])[:, None] + half + half * points).ravel()
    logs_of_ratio = []
    for part in np.array_split(u, max(1, len(u) // 200)):
        turned = part[:, None] * centred
        logs_of_ratio.append(np.log1p(-2 * np.sin(turned / 2) ** 2 @ masses + 1j * (np.sin(turned) @ masses)))
        if steps * float(logs_of_ratio[-1].real.max()) < -60:
            break
    powers = steps * np.concatenate(logs_of_ratio)
    u, s = u[: len(powers)], t + 1j * u[: len(powers)]
    integrand = np.exp(powers) * (half * weights).ravel()[: len(powers)] / (s * (s + 1)) / math.pi

    def excess(epsilon: float) -> float:
        found = float((integrand * np.exp(1j * u * (steps * mean - epsilon))).sum().real)
        if found < 1e-13 * float(np.abs(integrand).sum()):
            return math.nan
        return steps * log_moment - t * epsilon + math.log(found) - math.log(delta)

    high = low = bound(math.log(t))
    while excess(low) < 0:
        low *= 0.97
    return math.nan if math.isnan(excess(low)) else float(brentq(excess, low, high, rtol=1e-9))


def _loss(x: float, q: float, sigma: float) -> float:
    return math.log1p(q * math.expm1((2 * x - 1) / (2 * sigma * sigma)))


def _between(z: np.ndarray) -> np.ndarray:
    left, right = z[:-1], z[1:]
    return np.asarray(np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left)))
