"""accounting.ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Self, get_args

from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant

from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.sampling import PoissonSampler, sampler_from_dict

ADJACENCY = "add or remove one unit"

Entry = tuple[tuple[PoissonSampler, float], int]  # ((sampler, noise multiplier), steps taken with them)
_MOST_DIVERGENCE = 3000  # Rényi, order 2: epsilon is then in the hundreds, and the memory of pld and prv grows with it


class Ledger:
    """The steps that were executed, and the privacy they cost together.

    Steps may differ in sampler and noise; adaptive composition holds whatever their order. Every release that touches private
    data must be recorded, also a step with an empty draw. `accountant` is "pld" (dp-accounting), "prv" or "rdp" (opacus).
    """

    def __init__(self, accountant: AccountantName = "pld") -> None:
        if accountant not in get_args(AccountantName):
            raise invalid("accountant", expected="pld, prv or rdp", actual=accountant, remedy="choose one of them")
        self.accountant: AccountantName = accountant
        self._counts: dict[tuple[PoissonSampler, float], int] = {}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """((sampler, noise multiplier), steps) for each distinct kind of step."""
        return tuple(self._counts.items())

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return sum(self._counts.values())

    def count(self, sampler: PoissonSampler, noise_multiplier: float) -> int:
        """How many of the steps had this sampler and noise."""
        return self._counts.get((sampler, noise_multiplier), 0)

    @classmethod
    def total(cls, ledgers: Iterable[Ledger], accountant: AccountantName) -> Self:
        """The steps of all these ledgers together. Raises ValueError where they count units differently."""
        together = cls(accountant)
        for ledger in ledgers:
            for (sampler, noise_multiplier), steps in ledger.entries:
                together.record(sampler, noise_multiplier, steps)
        return together

    def merge_max(self, other: Ledger) -> None:
        """Of two counts of the same steps keep the higher, for each kind of step: neither can have counted too many."""
        for (sampler, noise_multiplier), steps in other.entries:
            self.record(sampler, noise_multiplier, max(0, steps - self.count(sampler, noise_multiplier)))

    def record(self, sampler: PoissonSampler, noise_multiplier: float, steps: int = 1) -> None:
        """Count `steps` >= 0 further steps with this sampler and noise_multiplier (noise std / sensitivity, > 0)."""
        if not 0 < noise_multiplier < math.inf:
            raise invalid("noise_multiplier", expected="a finite number above 0", actual=noise_multiplier, remedy="add noise")
        if not isinstance(steps, int) or steps < 0:
            raise invalid("steps", expected="a whole number >= 0", actual=steps, remedy="count executed optimizer steps")
        for known, _ in self._counts:
            if known.n_units != sampler.n_units:
                raise invalid(
                    "sampler",
                    expected=f"{known.n_units} units",
                    actual=sampler.n_units,
                    remedy="keep one ledger per dataset",
                )
        if steps:
            key = (sampler, noise_multiplier)
            self._counts[key] = self._counts.get(key, 0) + steps

    def epsilon(self, delta: float) -> float:
        """The epsilon of everything recorded, at `delta`; 0 before the first step.

        With pld and prv, inf for so little noise that epsilon is in the hundreds or more; rdp bounds any.
        Typically 0.3 s with pld and 0.1 s with prv or rdp for each kind of step, at once if asked again: call it when logging.
        Raises UnsupportedError for prv and rdp with truncated Poisson sampling or without opacus.
        """
        if not 0 < delta < 1:
            raise invalid("delta", expected="0 < delta < 1", actual=delta, remedy="use well below 1 / units")
        # In one order, so that the same steps give the same figure to the last digit, whichever came first.
        return _epsilon(self.accountant, tuple(sorted(self.entries, key=repr)), delta)

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain JSON data. It holds no secret: no draw, no noise, no generator state."""
        return {
            "accountant": self.accountant,
            "entries": [{"sampler": s.to_dict(), "noise_multiplier": sigma, "steps": n} for (s, sigma), n in self.entries],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the ledger by a saved one. Raises ValueError, and keeps the ledger, if `state` is not a ledger's state."""
        try:
            loaded = Ledger(state["accountant"])
            for entry in state["entries"]:
                loaded.record(sampler_from_dict(entry["sampler"]), entry["noise_multiplier"], entry["steps"])
        except (KeyError, TypeError, AttributeError) as error:
            raise invalid(
                "state", expected="a ledger's state_dict()", actual=str(state)[:80], remedy="load it unedited"
            ) from error
        self.accountant, self._counts = loaded.accountant, loaded._counts


def _chi_square(sampler: PoissonSampler, noise_multiplier: float) -> float:
    """Chi-square divergence between one step's releases with and without a unit: exp(Rényi divergence of order 2) - 1."""
    exponent = 1 / noise_multiplier / noise_multiplier
    return sampler.sampling_rate**2 * math.expm1(exponent) if exponent < 700 else math.inf  # exp(710) overflows


@lru_cache(maxsize=256)
def _epsilon(accountant: AccountantName, entries: tuple[Entry, ...], delta: float) -> float:
    if not entries:
        return 0.0
    for (sampler, _), _ in entries:
        if accountant != "pld" and sampler.kind != "poisson":
            raise UnsupportedError(f"accountant {accountant!r} cannot account {sampler.kind} sampling; use accountant='pld'")
    if accountant != "rdp":
        divergence = sum(steps * math.log1p(_chi_square(sampler, sigma)) for (sampler, sigma), steps in entries)
        if divergence > _MOST_DIVERGENCE:
            return math.inf
    if accountant == "pld":
        removed = tuple((sampler.events(sigma)[0], steps) for (sampler, sigma), steps in entries)
        added = tuple((sampler.events(sigma)[1], steps) for (sampler, sigma), steps in entries)
        epsilon = _pld_epsilon(removed, delta)
        return epsilon if added == removed else max(epsilon, _pld_epsilon(added, delta))
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise UnsupportedError(
            f"accountant {accountant!r} needs opacus: pip install dp-flash-hf[opacus], or use accountant='pld'"
        ) from error
    opacus = PRVAccountant() if accountant == "prv" else RDPAccountant()
    opacus.history = [(sigma, sampler.sampling_rate, steps) for (sampler, sigma), steps in entries]
    return float(opacus.get_epsilon(delta))


def _pld_epsilon(events: tuple[tuple[Any, int], ...], delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, steps in events:
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))
