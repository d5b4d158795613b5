"""Which steps were executed, kind by kind, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, get_args

from dp_flash_hf import validation
from dp_flash_hf.accounting.epsilon import Entry, epsilon_of, of_computed_noise
from dp_flash_hf.errors import invalid
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.sampling import PoissonSampler, sampler_from_dict

ADJACENCY = "add or remove one unit"


class Ledger:
    """The steps that were executed, and the privacy they cost in all.

    Steps may differ in sampler and noise; their order does not matter. Every release that touches private data must be
    recorded, also a step with an empty draw. A ledger only ever grows. Its epsilon is that of steps whose kinds and number were
    fixed before the first of them: `PrivacyPlan.epsilon` is what holds where they were not.

    >>> ledger = Ledger("pld")
    >>> ledger.record(PoissonSampler(n_units=1000, expected_batch_size=10), noise_multiplier=1.0, steps=100)
    >>> ledger.steps
    100
    >>> print(f"epsilon = {ledger.epsilon(delta=1e-5):.2f}")
    epsilon = 0.72

    Args:
        accountant: Who computes epsilon: "pld" (tight), or "prv" or "rdp" (opacus).

    Raises:
        ValueError: Another accountant.
    """

    def __init__(self, accountant: AccountantName = "pld") -> None:
        validation.one_of("accountant", accountant, get_args(AccountantName))
        self.accountant: AccountantName = accountant
        self._counts: dict[tuple[PoissonSampler, float], int] = {}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """((sampler, noise multiplier), steps) for each distinct kind of step, in the order of their first record."""
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
        """One ledger of the steps of all these, each counted once.

        Raises:
            ValueError: Ledgers of datasets with different numbers of units.
        """
        total = cls(accountant)
        for ledger in ledgers:
            for (sampler, noise_multiplier), steps in ledger.entries:
                total.record(sampler, noise_multiplier, steps)
        return total

    def merge_max(self, other: Ledger) -> None:
        """Of two counts of the same steps keep the higher, for each kind of step: neither can have counted too many."""
        for (sampler, noise_multiplier), steps in other.entries:
            self.record(sampler, noise_multiplier, max(0, steps - self.count(sampler, noise_multiplier)))

    def record(self, sampler: PoissonSampler, noise_multiplier: float, steps: int = 1) -> None:
        """Count further steps.

        Args:
            sampler: How their units were drawn.
            noise_multiplier: Their noise's standard deviation over their sensitivity, finite and above 0.
            steps: How many, 0 or more.

        Raises:
            ValueError: An argument out of range, or a sampler over another number of units than the steps so far; nothing is
                counted then.
        """
        validation.positive("noise_multiplier", noise_multiplier, remedy="add noise")
        validation.whole_number("steps", steps, least=0, remedy="count executed optimizer steps")
        for known, _ in self._counts:
            if known.n_units != sampler.n_units:
                raise invalid(
                    "sampler", expected=f"{known.n_units} units", actual=sampler.n_units, remedy="keep one ledger per dataset"
                )
        if steps:
            key = (sampler, noise_multiplier)
            self._counts[key] = self._counts.get(key, 0) + steps

    def epsilon(self, delta: float) -> float:
        """The epsilon of all steps, if they were fixed beforehand, for neighbours that differ by one unit added or removed.

        That of ideal Gaussian noise, and what noise computed in float64 is charged, 2e-5 for 400 steps.

        Typically 0.05 s with pld, 0.1 s with prv or rdp, at once if asked again: call it when logging. The first call imports
        the accountant's library, which takes a second or more.

        Args:
            delta: Of the guarantee, above 0 and below 1.

        Returns:
            Epsilon; 0.0 before the first step, inf for hopelessly little noise, see `epsilon_of`.

        Raises:
            ValueError: delta out of range.
            UnsupportedError: the accountant cannot account these steps at this delta; it says which one can.
        """
        validation.delta("delta", delta)
        # In one order, so that the same steps give the same figure to the last digit, whichever came first.
        entries = tuple(sorted(self.entries, key=repr))
        return of_computed_noise(lambda delta: epsilon_of(self.accountant, entries, delta), self.steps, delta)

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain JSON data. It holds no secret: no draw, no noise, no generator state."""
        return {
            "accountant": self.accountant,
            "entries": [{"sampler": s.to_dict(), "noise_multiplier": sigma, "steps": n} for (s, sigma), n in self.entries],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the ledger by a saved one.

        Raises:
            ValueError: `state` is not what `state_dict` returned; the ledger is kept then.
        """
        try:
            loaded = Ledger(state["accountant"])
            for entry in state["entries"]:
                loaded.record(sampler_from_dict(entry["sampler"]), entry["noise_multiplier"], entry["steps"])
        except (KeyError, TypeError, AttributeError) as error:
            raise invalid(
                "state", expected="a ledger's state_dict()", actual=str(state)[:80], remedy="load it unedited"
            ) from error
        self.accountant, self._counts = loaded.accountant, loaded._counts
