"""Privatised attention: what one call may reveal, the noise that hides it, and what all calls cost together.

Adjacency: one unit is *replaced*. With unit="sequence", by any other sequence of the same length; with unit="token", one token
by any other, in the same place. Lengths are public. Values are clipped to norm C_h for each head; C_h of a query head is that
of the key/value head it reads. The squared sensitivity of a call is sum_h (2 C_h)^2 times a factor that is the same for every
head (`sequence_factor`, `token_factor`), so a head's noise is std_h = noise_multiplier * 2 C_h sqrt(factor / share_h) with
shares of the budget that add up to 1, and a call with a smaller factor costs mu^2 = (its factor / factor) / noise_multiplier^2.
"""

from __future__ import annotations

import contextlib
import json
import math
import textwrap
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from torch import Tensor

from dp_flash_hf.errors import PrivacyError, invalid

Unit = Literal["sequence", "token"]
Placement = Literal["attention", "residual"]

ADJACENCY = {
    "sequence": "replace one sequence by another of the same length",
    "token": "replace one token of a sequence by another",
}
NOT_COVERED = (
    "Lengths, padding and masks, and the places of special tokens; how often and when a unit took part.",
    "Inputs listed as public, outputs not listed as released, and everything before the noise.",
    "The trained weights, where gradients of private data reach them by another way than the released outputs.",
    "A number of calls that depends on what calls released: then the epsilon is that of the most calls there could have been.",
    "Units that hold several rows of a batch, or several batches' rows, unless ledger.units(ids) said so.",
    "Attacks on floating-point noise, on the operating system's random numbers, or on timing and memory use.",
)


# --- sensitivity ----------------------------------------------------------------------------------------------------------


def sequence_sensitivity(rows: int, clip_norms: Sequence[float]) -> float:
    """How far one sequence moves the output (rows, heads, E) of a call in norm, at most: 2 sqrt(rows sum_h C_h^2).

    Proof. Output row i of head h is sum_j p_j v_j with p_j >= 0 and sum_j p_j <= 1 (less than 1 with attention sinks) and
    |v_j| <= C_h: it lies in the ball of radius C_h, whatever the sequence, its mask or the logits. Two points of that ball are
    at most 2 C_h apart. Squared distances add over rows and heads. Reached by two sequences whose values are all C_h u, and
    all -C_h u.

    Args:
        rows: queries of the sequence that see something.
        clip_norms: C_h for each *query* head; with grouped queries a key/value head counts once for each that reads it.
    """
    return 2 * math.sqrt(rows * sum(norm**2 for norm in clip_norms))


def weight_bound(keys: int | Tensor, logit_cap: float) -> Any:
    """The largest weight that one of `keys` keys can have, with logits within [-S, S]: 1 / (1 + (keys - 1) e^(-2 S)).

    e^S / (e^S + (n - 1) e^-S): its own logit as large, and all others as small, as they can be. A sink only adds to the sum.
    """
    return 1 / (1 + (keys - 1) * math.exp(-2 * logit_cap))


def token_sensitivity(
    rows: int, clip_norms: Sequence[float], logit_cap: float, *, causal: bool = True, window: int | None = None
) -> float:
    """How far one token moves the output (rows, heads, E) of self-attention in norm, at most; see `token_factor`.

    Args:
        rows: tokens of the sequence.
        clip_norms: C_h for each query head.
        logit_cap: S.
        causal: token i sees the tokens up to i; else all.
        window: with `causal` the last `window` of these; else those less than `window` away.
    """
    place = torch.arange(rows)
    away = place[:, None] - place
    visible = away >= 0 if causal else torch.ones(rows, rows, dtype=torch.bool)
    if window is not None:
        visible = visible & (away.abs() < window)
    return 2 * math.sqrt(float(token_factor(visible[None, None], logit_cap)) * sum(norm**2 for norm in clip_norms))


def token_factor(visible: Tensor, logit_cap: float) -> Tensor:
    """(B,) float64: the squared token-level sensitivity of a call over sum_h (2 C_h)^2.

    Replacing token j replaces its key, its value and its query. Consider a row i of another token that sees n_i keys, j among
    them, and let p, p' be the weights of j before and after, both at most w = weight_bound(n_i, S). The other weights keep
    their proportions, so with m their weighted mean (|m| <= C, shorter still with a sink), o = p v + (1 - p) m and
    o' = p' v' + (1 - p') m; o - o' = p v - p' v' + (p' - p) m has norm at most C (p + p' + |p' - p|) = 2 C max(p, p') <= 2 w C.
    The token's own row, whose query changes too, moves by at most 2 C, as any row does. Rows that do not see j do not move. So

        factor = max_j (1 + sum over other rows i that see j of w(n_i)^2).

    Where queries and keys are not the same tokens, every row that sees j is counted besides its own, wherever that is.

    Args:
        visible: (B, H or 1, Q, K) bool, True where a query sees a key; what is visible must not depend on the tokens.
        logit_cap: S.
    """
    weights: Tensor = weight_bound(visible.sum(-1).clamp(min=1).double(), logit_cap).square()  # (B, H, Q)
    moved: Tensor = (visible * weights[..., None]).sum(-2)  # (B, H, K)
    if visible.shape[-2] == visible.shape[-1]:
        moved = moved - visible.diagonal(dim1=-2, dim2=-1) * weights
    return 1 + moved.flatten(1).amax(-1)


@lru_cache(maxsize=256)
def full_token_factor(queries: int, keys: int, logit_cap: float, causal: bool) -> float:
    """`token_factor` where nothing but causality hides a key, without forming the mask.

    Causal (queries == keys): the first token is seen by all rows, and its row is the shortest, so it is the worst j:
    1 + sum_{n=2}^{T} w(n)^2. No square pattern of all keys has more, because w falls: (T - 1) w(T)^2 <= the same sum.
    """
    if causal:
        return 1 + float(weight_bound(torch.arange(2, queries + 1, dtype=torch.float64), logit_cap).square().sum())
    return 1 + (queries - (queries == keys)) * float(weight_bound(keys, logit_cap)) ** 2


# --- the Gaussian mechanism -----------------------------------------------------------------------------------------------


def gaussian_delta(epsilon: float, mu: Tensor) -> Tensor:
    """The delta of Gaussian mechanisms with sensitivity / std = mu > 0, at epsilon, float64; exact.

    Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu) (Balle and Wang 2018, arXiv:1805.06530, theorem 8).
    """
    mu = mu.double()
    above, below = (torch.special.log_ndtr(sign * mu / 2 - epsilon / mu) for sign in (1, -1))
    delta: Tensor = above.exp() - (epsilon + below).exp()
    return delta


def sampled_delta(epsilon: float, *, squared_mu: float, sampling_rate: float, passes: int, certain: float = 0.0) -> float:
    """The delta, at epsilon, of `passes` passes each of which a unit joins independently with probability `sampling_rate`.

    A pass costs a unit that takes part mu^2 = `squared_mu`; `certain` is the mu^2 of what it takes part in anyway.

    What is released are rows of units, so an observer sees who took part: the privacy of not taking part, on which the
    amplification of DP-SGD rests, is not there, and epsilon is not multiplied by the sampling rate. What remains: whether a
    unit takes part does not depend on what it holds. So under both neighbours K, the number of its passes, is the same
    Binomial(passes, q) and is seen; given K the view is a Gaussian mechanism with mu^2 = certain + K squared_mu. The two
    distributions of (K, view) have densities P(K) f_K and P(K) g_K, so the hockey-stick divergence, an integral of
    max(0, f - e^epsilon g), is the sum over k of P(K = k) times that of f_k and g_k:

        delta(epsilon) = sum_k P(K = k) delta_Gauss(epsilon; sqrt(certain + k squared_mu)),

    exactly. Passes may be chosen adaptively, as long as each joins by a draw of its own.
    """
    k = torch.arange(passes + 1, dtype=torch.float64)
    n = torch.tensor(float(passes), dtype=torch.float64)
    log_choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    q = torch.tensor(sampling_rate, dtype=torch.float64)
    share = (log_choices + torch.xlogy(k, q) + torch.xlogy(n - k, 1 - q)).exp()
    mu = (certain + k * squared_mu).sqrt()
    return float((share * torch.where(mu > 0, gaussian_delta(epsilon, mu.clamp(min=1e-300)), 0)).sum())


def sampled_epsilon(delta: float, *, squared_mu: float, sampling_rate: float, passes: int, certain: float = 0.0) -> float:
    """The least epsilon at which `sampled_delta` is at most delta."""

    def delta_at(epsilon: float) -> float:
        return sampled_delta(
            epsilon, squared_mu=squared_mu, sampling_rate=sampling_rate, passes=passes, certain=certain
        )  # falls with epsilon

    if delta_at(0) <= delta:
        return 0.0
    return _least(lambda epsilon: delta_at(epsilon) <= delta, 0, _epsilon(certain + passes * squared_mu, delta))


def _epsilon(squared_mu: float, delta: float) -> float:
    return float(get_epsilon_gaussian(1 / math.sqrt(squared_mu), delta)) if squared_mu > 0 else 0.0


def _least(holds: Any, low: float, high: float) -> float:
    """The least number in (low, high] at which `holds`, which holds from there on, to 1e-12; on the safe side."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class Calibration(NamedTuple):
    """Noise std / sensitivity for (epsilon, delta), by two formulas; for tables. Nothing here is accounted by `classic`."""

    analytic: float  # the least that is private: Balle and Wang 2018
    classic: float  # sqrt(2 ln(1.25 / delta)) / epsilon: Dwork and Roth 2014, theorem A.1
    classic_is_proven: bool  # only for epsilon <= 1; far beyond, it is too little
    waste: float  # classic / analytic; below 1 the classic noise does not keep the promise


def calibrations(epsilon: float, delta: float) -> Calibration:
    """The noise that one Gaussian release needs for (epsilon, delta), and what the textbook formula says instead.

    The textbook's proof needs epsilon <= 1. There it wastes noise; for large epsilon it has the wrong rate (1 / epsilon, where
    1 / sqrt(2 epsilon) is necessary) and does not protect. Raises ValueError outside epsilon > 0, 0 < delta < 1.
    """
    _check_budget("epsilon", epsilon, "delta", delta)
    analytic, classic = float(get_sigma_gaussian(epsilon, delta)), math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return Calibration(analytic, classic, epsilon <= 1, classic / analytic)


def _check_budget(name: str, epsilon: float, delta_name: str, delta: float) -> None:
    if not 0 < epsilon < math.inf:
        raise invalid(name, expected="a finite number above 0", actual=epsilon, remedy="give a positive one")
    if not 0 < delta < 1:
        raise invalid(delta_name, expected="0 < delta < 1", actual=delta, remedy="use well below 1 / units")


# --- what the user asks for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionPrivacy:
    """How calls are made private; all of it public.

    clip_norm: C, or one for each key/value head. Placement "residual": of a sequence's hidden states together.
    noise_multiplier: noise std / sensitivity of one privatised place (at `max_length` rows); or
    target_epsilon, target_delta: calibrates it, for `passes` passes in which a unit takes part in every place once. With
        `sampling_rate` below 1 the passes are Poisson samples, run `with ledger.sampled(sampling_rate)`.
    max_length: the most rows a unit has in a call; noise is a constant made for it, and a longer unit is refused. A token's
        noise is made for causal self-attention; other patterns are charged what they cost.
    unit: "sequence", or "token": only where the inputs of the call depend on a token in its own place alone.
    logit_cap: S; logits become S tanh(logits / S). "token" needs it.
    head_shares: what share of mu^2 each query head spends, adding up to 1. By default in proportion to C_h^2, which gives
        every head the same noise.
    secure: noise from ChaCha20 with 256-bit keys, instead of Philox with keys of 64 bits, which is no cryptographic generator,
        and under which two of n releases have the same noise with probability n^2 / 2^65.

    Raises ValueError for fields outside their range.
    """

    clip_norm: float | Sequence[float]
    max_length: int | None = None
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    target_delta: float | None = None
    passes: int = 1
    sampling_rate: float = 1.0
    unit: Unit = "sequence"
    logit_cap: float | None = None
    head_shares: Sequence[float] | None = None
    secure: bool = False

    def __post_init__(self) -> None:
        for name in ("clip_norm", "head_shares"):  # tuples, so that the whole is hashable
            given = getattr(self, name)
            if isinstance(given, Sequence):
                object.__setattr__(self, name, tuple(map(float, given)))
            numbers = getattr(self, name) if isinstance(given, Sequence) else () if given is None else (given,)
            if not all(0 < number < math.inf for number in numbers) or (given is not None and not numbers):
                raise invalid(name, expected="finite numbers above 0", actual=given, remedy="give one for each head")
        if self.head_shares is not None and abs(sum(self.head_shares) - 1) > 1e-9:
            raise invalid("head_shares", expected="shares adding up to 1", actual=sum(self.head_shares), remedy="divide by it")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 1):
            raise invalid("max_length", expected="a whole number >= 1", actual=self.max_length, remedy="count tokens")
        targets = (self.target_epsilon, self.target_delta)
        if (self.noise_multiplier is None) == (targets == (None, None)) or (None in targets and targets != (None, None)):
            raise invalid(
                "noise_multiplier",
                expected="it, or target_epsilon and target_delta",
                actual=(self.noise_multiplier, *targets),
                remedy="give one of the two",
            )
        if self.noise_multiplier is not None and not 0 < self.noise_multiplier < math.inf:
            raise invalid(
                "noise_multiplier", expected="a finite number above 0", actual=self.noise_multiplier, remedy="add noise"
            )
        if self.noise_multiplier is not None and (self.passes != 1 or self.sampling_rate != 1):
            raise invalid(
                "passes",
                expected="a target_epsilon to calibrate for, with passes and sampling_rate",
                actual=(self.passes, self.sampling_rate),
                remedy="leave them out: with a noise_multiplier the ledger counts what happens",
            )
        if self.target_epsilon is not None and self.target_delta is not None:
            _check_budget("target_epsilon", self.target_epsilon, "target_delta", self.target_delta)
        if not isinstance(self.passes, int) or self.passes < 1:
            raise invalid("passes", expected="a whole number >= 1", actual=self.passes, remedy="count forward passes")
        if not 0 < self.sampling_rate <= 1:
            raise invalid(
                "sampling_rate", expected="0 < rate <= 1", actual=self.sampling_rate, remedy="batch size / number of units"
            )
        if self.unit not in get_args(Unit):
            raise invalid("unit", expected="sequence or token", actual=self.unit, remedy="choose one of them")
        if self.logit_cap is not None and not 0 < self.logit_cap < math.inf:
            raise invalid("logit_cap", expected="a finite number above 0", actual=self.logit_cap, remedy="try 5")
        if self.unit == "token" and self.logit_cap is None:
            raise invalid("logit_cap", expected='a number, for unit="token"', actual=None, remedy="bound the weights: try 5")

    def multiplier(self, places: int) -> float:
        """Noise std / sensitivity of each of so many privatised places: noise_multiplier, or what meets the target.

        Raises ValueError where sampling alone would meet the target: without noise, it is those who are drawn who pay.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        assert self.target_delta is not None
        return _calibrated(self.target_epsilon, self.target_delta, self.passes, self.sampling_rate) * math.sqrt(places)

    def clip_norms(self, kv_heads: int) -> tuple[float, ...]:
        """C for each key/value head. Raises ValueError if clip_norm gives another number of them."""
        if not isinstance(self.clip_norm, tuple):
            return (float(self.clip_norm),) * kv_heads  # type: ignore[arg-type]
        if len(self.clip_norm) != kv_heads:
            raise invalid(
                "clip_norm", expected=f"{kv_heads} numbers, one for each key/value head", actual=self.clip_norm, remedy="or one"
            )
        return self.clip_norm

    def noise_std(self, heads: int, kv_heads: int, places: int) -> tuple[float, ...]:
        """The noise of each query head; a public constant. Raises ValueError if fields do not fit the heads."""
        clip = [norm for norm in self.clip_norms(kv_heads) for _ in range(heads // kv_heads)]
        shares = self.head_shares or [norm**2 / sum(other**2 for other in clip) for norm in clip]
        if len(shares) != heads:
            raise invalid("head_shares", expected=f"{heads} shares", actual=len(shares), remedy="give one for each query head")
        scale = self.multiplier(places) * 2 * math.sqrt(self.factor)
        return tuple(scale * norm / math.sqrt(share) for norm, share in zip(clip, shares, strict=True))

    @property
    def factor(self) -> float:
        """The squared sensitivity that the noise is made for, over sum_h (2 C_h)^2: `max_length` rows, or one token of them."""
        assert self.max_length is not None
        if self.unit == "sequence":
            return float(self.max_length)
        assert self.logit_cap is not None
        return full_token_factor(self.max_length, self.max_length, self.logit_cap, True)


@lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, passes: int, sampling_rate: float) -> float:
    """1 / mu of a pass, such that all of them together are (epsilon, delta)-private."""
    sigma = float(get_sigma_gaussian(epsilon, delta)) * math.sqrt(passes)  # enough if a unit takes part in every pass
    if sampling_rate < 1:
        taking_part = 1 - (1 - sampling_rate) ** passes
        if taking_part <= delta:
            raise invalid(
                "target_delta",
                expected=f"less than the {taking_part:.2g} with which a unit takes part at all",
                actual=delta,
                remedy="lower it",
            )
        sigma = _least(
            lambda sigma: sampled_delta(epsilon, squared_mu=1 / sigma**2, sampling_rate=sampling_rate, passes=passes) <= delta,
            0,
            sigma,
        )
    return sigma * (1 + 1e-6)  # so that what rounding adds to the epsilon of it all stays below the target


# --- what was spent -------------------------------------------------------------------------------------------------------


class AttentionLedger:
    """Every privatised call, and the privacy that all cost a unit together.

    Calls are Gaussian mechanisms, and these compose exactly, over layers, heads and passes and also where later inputs depend
    on earlier outputs: mu^2 adds up (Dong, Roth and Su 2022, corollary 2; rho = mu^2 / 2 in zCDP). How many calls there are has
    to be settled beforehand: where it depends on what was released (generating up to an end token), what is promised is the
    epsilon of the most that there could have been (Rogers et al. 2016, on odometers). By default every call counts
    against every unit. Copies of a privatised model made by copy.deepcopy record in the same ledger; those in another process
    (pickle, fork) each in a copy of their own, and the sum is what was spent.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, float]] = Counter()
        self._everyone = 0.0  # mu^2 that counts against every unit
        self._units: dict[Hashable, float] = {}  # mu^2 that counts against a unit besides
        self._passes: Counter[tuple[float, float]] = Counter()  # (sampling rate, mu^2): passes
        self._ids: list[Hashable] | None = None
        self._open: list[float] | None = None  # [sampling rate, mu^2 so far] of the pass under way
        self._thread: int | None = None  # that opened a context

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # what a copy of the model releases is of the same units

    @property
    def calls(self) -> dict[tuple[str, float], int]:
        """How often each (place, mu^2 of the unit that it cost most) was released."""
        return dict(self._calls)

    @property
    def knows_units(self) -> bool:
        """Whether a `units` context says whose rows a batch holds."""
        return self._ids is not None

    @contextlib.contextmanager
    def units(self, ids: Iterable[Hashable] | Tensor) -> Iterator[None]:
        """Within the context, calls count against these units only: ids of the batch's rows, in order, or of its packed parts.

        A unit may stand there several times (beams, several return sequences, several rows of one user). Units are disjoint,
        so the epsilon of all is that of the unit with most (parallel composition); `epsilon` reports it.
        """
        self._enter("units")
        known = [one.item() if isinstance(one, Tensor) else one for one in ids]  # tensors are equal to themselves only
        if any(one != one for one in known):
            raise invalid("ids", expected="ids that are equal to themselves", actual=math.nan, remedy="number the units")
        self._ids = known
        try:
            yield
        finally:
            self._ids = None

    @contextlib.contextmanager
    def sampled(self, sampling_rate: float) -> Iterator[None]:
        """Within the context, one pass over a batch that every unit joined independently with this probability.

        A promise of the caller's: a fresh Poisson draw for this context (`sampling.PoissonSampler`), a unit in one row. See
        `sampled_delta` for what it gains, which is less than in DP-SGD. Passes of unequal cost are taken for the dearest.
        """
        self._enter("sampled")
        if not 0 < sampling_rate <= 1:
            raise invalid("sampling_rate", expected="0 < rate <= 1", actual=sampling_rate, remedy="give the sampler's")
        self._open = [sampling_rate, 0.0]
        try:
            yield
        finally:
            self._close()

    def _enter(self, name: str) -> None:
        if self._ids is not None or self._open is not None:
            raise PrivacyError(f"ledger.{name} within another context of the ledger: a call is counted in one way only")
        self._thread = threading.get_ident()

    def _close(self) -> None:
        assert self._open is not None
        rate, squared_mu = self._open
        self._passes[rate, squared_mu] += 1
        self._open = None

    def per_unit(self, by_row: list[float], by_part: list[float], whole: float, *, rows_are_units: bool) -> list[float]:
        """What a call costs each unit in it, of three ways to count.

        by_row: per row of the call's batch. by_part: per packed part. whole: if all were one unit, which is never too little.
        rows_are_units: whether these rows are those of the batch that the model was given.

        Raises PrivacyError if the number of ids is neither that of rows nor that of parts.
        """
        if (self._ids is not None or self._open is not None) and self._thread != threading.get_ident():
            raise PrivacyError("a privatised call of another thread than the one that opened the ledger's context: whose rows?")
        if self._ids is None:
            return by_row if rows_are_units else [whole]
        for costs in (by_row, by_part, [whole]):
            if len(costs) == len(self._ids):
                return costs
        raise PrivacyError(
            f"ledger.units was given {len(self._ids)} ids, and a privatised call has {len(by_row)} rows, {len(by_part)} parts; "
            "give an id for every row (beams and several return sequences repeat them) or for every packed part"
        )

    def record(self, place: str, squared_mus: list[float]) -> None:
        """Count a call that costs units so much mu^2 each, in the order of `per_unit`. Before it is released."""
        most = max(squared_mus, default=0.0)
        self._calls[place, most] += 1
        if self._ids is not None:
            for unit, squared_mu in zip(self._ids, squared_mus, strict=True):
                self._units[unit] = self._units.get(unit, 0.0) + squared_mu
        elif self._open is not None:
            self._open[1] += most
        else:
            self._everyone += most

    @property
    def squared_mu(self) -> float:
        """mu^2 of the unit that everything cost most, had it taken part in every sampled pass."""
        return self._certain + sum(squared_mu * n for (_, squared_mu), n in self._all_passes().items())

    @property
    def rho(self) -> float:
        """The same in zero-concentrated differential privacy: mu^2 / 2."""
        return self.squared_mu / 2

    def epsilon(self, delta: float) -> float:
        """The epsilon of everything recorded, at delta, of the unit that it cost most; 0 before the first call."""
        if not 0 < delta < 1:
            raise invalid("delta", expected="0 < delta < 1", actual=delta, remedy="use well below 1 / units")
        passes = self._all_passes()
        if not passes:
            return _epsilon(self._certain, delta)
        rate, squared_mu = (max(column) for column in zip(*passes, strict=True))
        return sampled_epsilon(
            delta, squared_mu=squared_mu, sampling_rate=rate, passes=sum(passes.values()), certain=self._certain
        )

    @property
    def _certain(self) -> float:
        return self._everyone + max(self._units.values(), default=0)

    def _all_passes(self) -> Counter[tuple[float, float]]:
        return self._passes + Counter([] if self._open is None else [(self._open[0], self._open[1])])


@dataclass(frozen=True, kw_only=True)
class AttentionPrivacyReport:
    """What the privatised calls so far guarantee: their outputs, and what is computed of them, are (epsilon, delta)-private."""

    epsilon: float
    delta: float
    rho: float
    target_epsilon: float | None
    adjacency: str
    placement: str
    places: tuple[str, ...]
    calls: int
    clip_norm: float | tuple[float, ...]
    noise_multiplier: float
    max_length: int | None
    logit_cap: float | None
    generator: str
    private_inputs: tuple[str, ...]
    public_inputs: tuple[str, ...]
    released: tuple[str, ...]
    not_covered: tuple[str, ...] = NOT_COVERED

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """The report for a reviewer, at most 100 columns."""
        target = "" if self.target_epsilon is None else f" (calibrated for epsilon = {self.target_epsilon:g})"
        epsilon = math.ceil(self.epsilon * 1000) / 1000 if self.epsilon < math.inf else self.epsilon
        length = "" if self.max_length is None else f", for at most {self.max_length} rows of a unit"
        cap = "" if self.logit_cap is None else f"; logits capped at {self.logit_cap:g}"
        rows = [
            ("guarantee", f"epsilon <= {epsilon:g} at delta = {self.delta:g}, rho = {self.rho:.6g} in zCDP{target}"),
            ("adjacency", self.adjacency),
            ("placement", f"{self.placement}: {', '.join(self.places)}"),
            ("clipping", f"C = {self.clip_norm}{cap}"),
            ("noise", f"Gaussian, std / sensitivity = {self.noise_multiplier:.6g}{length}; {self.generator}"),
            ("calls", str(self.calls)),
            ("private", ", ".join(self.private_inputs)),
            ("public", ", ".join(self.public_inputs) or "nothing else was given"),
            ("released", ", ".join(self.released)),
        ]
        lines = ["Privacy report of privatised attention"]
        for name, value in rows:
            lines += textwrap.wrap(value, 100, initial_indent=f"  {name:<10} ", subsequent_indent=" " * 13)
        lines.append("Not covered")
        for sentence in self.not_covered:
            lines += textwrap.wrap(sentence, 100, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()
