"""Privatised attention: what one call may reveal, the noise that hides it, and what all calls cost together.

Adjacency: one unit is *replaced*. With unit="sequence", by any other sequence of the same length; with unit="token", one token
by any other, in the same place. Lengths are public. Values are clipped to norm C_h for each head; C_h of a query head is that
of the key/value head it reads. The squared sensitivity of a call is sum_h (2 C_h)^2 times a factor that is the same for every
head (`sequence_factor`, `token_factor`), so a head's noise is std_h = noise_multiplier * 2 C_h sqrt(factor / share_h) with
shares of the budget that add up to 1, and a call with a smaller factor costs mu^2 = (its factor / factor) / noise_multiplier^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from dp_accounting import get_sigma_gaussian

from dp_flash_hf.errors import invalid
from dp_flash_hf.forward_privacy.gaussian import _least, sampled_delta
from dp_flash_hf.forward_privacy.sensitivity import full_token_factor

Unit = Literal["sequence", "token"]
Placement = Literal["attention", "residual"]


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
