"""What privatised calls have cost: mu^2 of every release, added up for the units whose rows it held."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Self

from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.errors import PrivacyError, invalid
from dp_flash_hf.forward_privacy.gaussian import gaussian_epsilon, sampled_epsilon


class AttentionLedger:
    """Every privatised call, and the privacy that all of them cost a unit.

    Calls are Gaussian mechanisms, and these compose exactly, over layers, heads and passes and also where later inputs depend
    on earlier outputs: mu^2 adds up (Dong, Roth and Su 2022, arXiv:1905.02383, corollary 2; rho = mu^2 / 2 in zCDP). How many
    calls there are has to be fixed beforehand: where it depends on what was released (generating up to an end token), what is
    promised is the epsilon of the most that there could have been (Rogers et al. 2016, arXiv:1605.08294, on odometers).

    By default every call counts against every unit, and a call costs what its most expensive row does; `units` says whose rows
    a batch holds, `sampled` that a batch was drawn at random. Copies of a privatised model made by copy.deepcopy record in the
    same ledger; those in another process (pickle, fork) each in a copy of their own, and the sum is what was spent.

    >>> ledger = AttentionLedger()
    >>> ledger.record("layer", [0.25]); ledger.record("layer", [0.25])
    >>> ledger.squared_mu, ledger.rho, ledger.calls
    (0.5, 0.25, {('layer', 0.25): 2})
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
        """Within the context, calls count against these units only.

        A unit may stand there several times (beams, several return sequences, several rows of one user). Units are disjoint,
        so the epsilon of all is that of the unit with most (parallel composition); `epsilon` reports it. The context holds for
        the thread that opened it; a call of another thread raises PrivacyError.

        Args:
            ids: One for each row of the batch, in order, or for each of its packed parts. Anything hashable, or a tensor.

        Raises:
            PrivacyError: Within another context of the ledger.
            ValueError: Ids that are not equal to themselves (NaN), which could not be found again.
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

        A promise of the caller's: a fresh Poisson draw for this context (`mechanisms.sampling.PoissonSampler`), a unit in one
        row. See `gaussian.sampled_delta` for what it gains, which is less than in DP-SGD. Passes of unequal cost are all taken
        for the most expensive one.

        Args:
            sampling_rate: Above 0 and at most 1.

        Raises:
            PrivacyError: Within another context of the ledger.
            ValueError: A rate outside its range.
        """
        self._enter("sampled")
        validation.rate("sampling_rate", sampling_rate, remedy="give the sampler's")
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

        Args:
            by_row: Per row of the call's batch.
            by_part: Per packed part.
            whole: If all were one unit, which is never too little.
            rows_are_units: Whether these rows are those of the batch that the model was given.

        Raises:
            PrivacyError: The number of ids is neither that of rows nor that of parts, or another thread opened the context.
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
        """Count a call, before it is released.

        Args:
            place: The name of the privatised module.
            squared_mus: mu^2 that it costs each unit in it, in the order of `per_unit`.
        """
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
        """The epsilon of everything recorded, of the unit that it cost most; 0 before the first call.

        Args:
            delta: Above 0 and below 1, else ValueError.
        """
        validation.delta("delta", delta)
        passes = self._all_passes()
        if not passes:
            return gaussian_epsilon(self._certain, delta)
        rate, squared_mu = (max(column) for column in zip(*passes, strict=True))
        return sampled_epsilon(
            delta, squared_mu=squared_mu, sampling_rate=rate, passes=sum(passes.values()), certain=self._certain
        )

    @property
    def _certain(self) -> float:
        return self._everyone + max(self._units.values(), default=0)

    def _all_passes(self) -> Counter[tuple[float, float]]:
        return self._passes + Counter([] if self._open is None else [(self._open[0], self._open[1])])
