"""Epsilon over the whole range beside other computations, with seconds of one core: `python -m tests.support.epsilon_table`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial

from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.mechanisms.config import PrivacyConfig
from tests.support.accounts import contour_epsilon, fine_pld_epsilon

# (units, expected batch size, steps); delta; budgets
RUNS = [
    (10**7, 10**7, 60),
    (10**7, 5 * 10**6, 1),
    (10**7, 10**5, 1000),
    (10**7, 10**4, 20_000),
    (10**7, 2000, 100_000),
    (10**7, 10, 100_000),  # a unit is drawn a tenth of a time
]
DELTAS = (1e-8, 1e-12, 1e-18)
BUDGETS = (0.01, 0.5, 8.0, 100.0, 1000.0)
_LEAST_DELTA = 1e-12  # of both libraries


def timed(compute: Callable[[], float]) -> tuple[float, float]:
    begun = time.process_time()
    try:
        found = compute()
    except (ValueError, RuntimeError, MemoryError, OverflowError, ZeroDivisionError):
        found = math.nan
    return found, time.process_time() - begun


def prv_epsilon(q: float, sigma: float, steps: int, delta: float, error: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    return float(accountant.get_epsilon(delta, eps_error=error))


def main() -> None:
    """Print a Markdown table; half an hour. Noise is ours for each budget; the others say what epsilon it has."""
    warnings.simplefilter("ignore")
    columns = ["q", "steps", "delta", "budget", "noise", "planned in s"]
    for of in ("epsilon", "contour", "dp-accounting", "prv"):
        columns += [of, "in s"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for units, batch, steps in RUNS:
        for delta in DELTAS:
            for budget in BUDGETS:
                config = PrivacyConfig(target_epsilon=budget, target_delta=delta)
                begun = time.process_time()
                plan = PrivacyPlan.from_config(config, n_units=units, expected_batch_size=batch, steps=steps)
                planned = time.process_time() - begun
                q, sigma = batch / units, plan.noise_multiplier
                _, took = timed(partial(plan.epsilon, plan.steps + 1))  # another number, so that nothing is remembered
                ours = plan.epsilon()
                interval = max(1e-6, min(1e-3, budget / 30 / math.sqrt(steps)))  # a thirtieth of one step's losses, or less
                row = [f"{q:g}", f"{steps}", f"{delta:g}", f"{budget:g}"]
                row += [f"{sigma:.5g}", f"{planned:.2f}", f"{ours:.5g}", f"{took:.2f}"]
                for least_delta, other in (
                    (0.0, partial(contour_epsilon, q, sigma, steps, delta)),
                    (_LEAST_DELTA, partial(fine_pld_epsilon, q, sigma, steps, delta, interval)),
                    (_LEAST_DELTA, partial(prv_epsilon, q, sigma, steps, delta, 0.004 * min(budget, 2.5))),
                ):
                    found, took = (
                        timed(other) if delta >= least_delta and budget < 1000 and (q < 1 or least_delta) else (math.nan, 0.0)
                    )
                    row += ["-", ""] if math.isnan(found) else [f"{found:.5g}", f"{took:.2f}"]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
