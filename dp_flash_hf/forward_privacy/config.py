"""How calls of privatised attention are made private: the one configuration a user writes, and the noise that follows from it.

Adjacency: one unit is *replaced*. With unit="sequence", by any other sequence of the same length; with unit="token", one token
by any other, in the same place. Lengths are public. Values are clipped to norm C_h for each head; C_h of a query head is that
of the key/value head it reads. The squared sensitivity of a call is sum_h (2 C_h)^2 times a factor that is the same for every
head (`sensitivity`), so a head's noise is std_h = noise_multiplier * 2 C_h sqrt(factor / share_h) with shares of the budget
that add up to 1, and a call with a smaller factor costs mu^2 = (its factor / factor) / noise_multiplier^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dp_flash_hf import validation
from dp_flash_hf.errors import invalid
from dp_flash_hf.forward_privacy.gaussian import calibrated_noise
from dp_flash_hf.forward_privacy.sensitivity import full_token_factor
from dp_flash_hf.mechanisms.config import Noise

Unit = Literal["sequence", "token"]
Placement = Literal["attention", "residual"]


@dataclass(frozen=True, kw_only=True)
class AttentionPrivacy:
    """How calls are made private. Every field is public information: none may be chosen by looking at private data.

    The release of a call is the output of the chosen places, (rows, heads, E) for attention, with Gaussian noise; everything
    computed from it is as private as it is. Neighbours differ in one unit that is replaced by another of the same length
    ("replace one"). With values clipped to norms C_h and T rows that see something, a sequence moves the output by at most::

        2 sqrt(T sum_h C_h^2)

    in Euclidean norm (`sensitivity.sequence_sensitivity`). A token, with logits capped to [-S, S], has at most the weight
    w(n) = e^S / (e^S + (n - 1) e^-S) among n keys, and moves the output by at most::

        2 sqrt((1 + sum of w(n_i)^2 over the other rows i that see it) sum_h C_h^2)

    (`sensitivity.token_factor`). With placement "residual" a sequence's hidden states are clipped as a whole, to C in Frobenius
    norm, and the sensitivity is 2 C. Noise protects only if the places cut private inputs off from what is released: see
    `verify_cut`.

    Fields of the wrong type or outside their range raise ValueError.

    Attributes:
        clip_norm: C above 0, or one for each key/value head. Placement "residual": of a sequence's hidden states as a whole.
        max_length: The most rows a unit has in a call; noise is made for it, whatever the call's length, and a longer unit is
            refused. A token's noise is made for causal self-attention; other patterns are charged what they cost. Needed for
            placement "attention", and meaningless for "residual".
        noise_multiplier: Noise std / sensitivity of one privatised place, at `max_length` rows. Or, instead of it:
        target_epsilon: With `target_delta`, the guarantee for which the multiplier is calibrated, over all places and `passes`
            passes in which a unit takes part in every place once.
        target_delta: Above 0 and below 1; well below 1 / number of units.
        passes: Forward passes, for a target.
        sampling_rate: Below 1, the passes are Poisson samples, run ``with ledger.sampled(sampling_rate)``.
        unit: What is protected: "sequence", or "token", which is known only where the inputs of the call depend on a token in
            its own place alone.
        logit_cap: S above 0; logits become S tanh(logits / S). unit="token" needs it.
        head_shares: What share of mu^2 each query head spends, adding up to 1. By default in proportion to C_h^2, which gives
            every head the same noise.
        noise: Where the noise's randomness comes from. "secure": a cryptographic keystream (ChaCha20), under a new key of 256
            bits from the operating system for every call. "fast": Philox, with keys of 64 bits, which is no cryptographic
            generator, and under which two of n releases have the same noise with probability n^2 / 2^65. Both have full
            tails, and neither is on an exact grid: noise is added in float32 (float64 for such a model).
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
    noise: Noise = "secure"

    def __post_init__(self) -> None:
        for name in ("clip_norm", "head_shares"):
            self._check_heads(name)
        if self.head_shares is not None and abs(sum(self.head_shares) - 1) > 1e-9:
            raise invalid(
                "head_shares", expected="shares adding up to 1", actual=sum(self.head_shares), remedy="divide each by their sum"
            )
        if self.max_length is not None:
            validation.whole_number("max_length", self.max_length, remedy="count tokens")
        self._check_noise()
        validation.whole_number("passes", self.passes, remedy="count forward passes")
        validation.rate("sampling_rate", self.sampling_rate, remedy="give batch size / number of units")
        validation.one_of("unit", self.unit, get_args(Unit))
        validation.one_of("noise", self.noise, get_args(Noise))
        if self.logit_cap is not None:
            validation.positive("logit_cap", self.logit_cap, remedy="try 5")
        if self.unit == "token" and self.logit_cap is None:
            raise invalid("logit_cap", expected='a value, for unit="token"', actual=None, remedy="bound the weights: try 5")

    def _check_heads(self, name: str) -> None:
        """A value or several, which become a tuple of floats, so that the whole is hashable."""
        given = getattr(self, name)
        if isinstance(given, Sequence):
            object.__setattr__(self, name, tuple(map(float, given)))
        values = getattr(self, name) if isinstance(given, Sequence) else () if given is None else (given,)
        if not all(0 < value < math.inf for value in values) or (given is not None and not values):
            raise invalid(name, expected="finite values above 0", actual=given, remedy="give one for each head")

    def _check_noise(self) -> None:
        targets = (self.target_epsilon, self.target_delta)
        if (self.noise_multiplier is None) == (targets == (None, None)) or (None in targets and targets != (None, None)):
            raise invalid(
                "noise_multiplier",
                expected="either it, or both target_epsilon and target_delta",
                actual=(self.noise_multiplier, *targets),
                remedy="set the targets to have the noise calibrated, or noise_multiplier",
            )
        if self.noise_multiplier is None:
            validation.positive("target_epsilon", self.target_epsilon, remedy="give the epsilon of all passes")
            validation.delta("target_delta", self.target_delta)
            return
        validation.positive("noise_multiplier", self.noise_multiplier, remedy="1.0 is a place to start")
        if self.passes != 1 or self.sampling_rate != 1:
            raise invalid(
                "passes",
                expected="a target_epsilon to calibrate for, with passes and sampling_rate",
                actual=(self.passes, self.sampling_rate),
                remedy="leave them out: with a noise_multiplier the ledger counts what happens",
            )

    @property
    def is_secure(self) -> bool:
        """Whether noise comes from a cryptographic keystream."""
        return self.noise == "secure"

    def multiplier(self, places: int) -> float:
        """Noise std / sensitivity of each of so many privatised places: `noise_multiplier`, or what the target needs.

        Raises:
            ValueError: Sampling alone would reach the target: without noise, it is those who are drawn who pay.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        assert self.target_delta is not None
        return calibrated_noise(self.target_epsilon, self.target_delta, self.passes, self.sampling_rate) * math.sqrt(places)

    def clip_norms(self, kv_heads: int) -> tuple[float, ...]:
        """C for each key/value head.

        Raises:
            ValueError: `clip_norm` gives another number of them.
        """
        if not isinstance(self.clip_norm, tuple):
            return (float(self.clip_norm),) * kv_heads  # type: ignore[arg-type]
        if len(self.clip_norm) != kv_heads:
            raise invalid(
                "clip_norm",
                expected=f"{kv_heads} norms, one for each key/value head",
                actual=self.clip_norm,
                remedy="or give one for all",
            )
        return self.clip_norm

    def noise_std(self, heads: int, kv_heads: int, places: int) -> tuple[float, ...]:
        """The standard deviation of the noise of each query head; a public constant.

        >>> AttentionPrivacy(clip_norm=0.5, noise_multiplier=2.0, max_length=16).noise_std(heads=4, kv_heads=2, places=1)
        (16.0, 16.0, 16.0, 16.0)

        Args:
            heads: Query heads, a multiple of `kv_heads`.
            kv_heads: Key/value heads.
            places: Privatised places that share a target.

        Raises:
            ValueError: Fields that do not fit the heads.
        """
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
