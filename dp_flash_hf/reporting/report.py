"""What a training run guarantees, on which assumptions, and what it does not cover."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any, Self

from dp_flash_hf.accounting.ledger import ADJACENCY, Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.errors import invalid
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.sampling import TruncatedPoissonSampler
from dp_flash_hf.reporting.text import page, rounded_up

NOT_COVERED = (
    "Losses, gradient norms and metrics logged during training are computed without noise.",
    "Choosing hyper-parameters, or the best of several runs or checkpoints, by results on the private data.",
    "Validation and test data, unless they too were trained on under this guarantee.",
    "A tokenizer, vocabulary, filter or base model that was itself learnt from the private data.",
    "Every setting of the run, which is public.",
    "Copies: a person whose data also appears in other units is protected unit by unit, not as a whole.",
    "Attacks on the ciphers and the operating system's random numbers that noise is made from, or on timing and memory use.",
    "Anyone who reads the training machine's memory or the spend log.",
    "Dropout, masking and augmentation by generators that code seeds for itself: see the page on random numbers.",
)
N_UNITS_NOT_COVERED = (
    "The number of units, which is public, as it is between neighbours that differ by a unit emptied, not removed, for which "
    "epsilon is the same. With public_n_units it is not needed."
)
EXTENDED_NOT_COVERED = (
    "Steps were added to the plan after some were taken: epsilon holds if that was not decided by what had been released."
)
CHANGED_NOT_COVERED = (
    "Parameters were changed after some steps: epsilon is that of a privacy filter, for these steps. Over this run and what it "
    "would have been unchanged, it holds at twice the delta."
)
FAST_NOISE_NOT_COVERED = "Attacks on PyTorch's random generators, of which noise='fast' is made."
LOST_STEPS_NOT_COVERED = "Steps lost in a crash after the last checkpoint, if anything that they wrote was seen."
_NOT_PRIVATE = "NOT PRIVATE: a fixed seed makes the sampling and the noise reproducible. No figure here is a guarantee."


@dataclass(frozen=True, kw_only=True)
class PrivacyReport:
    """The guarantee of a run: the trained model is (epsilon, delta)-differentially private.

    Two figures differ where a run ends, or is looked at, before its planned steps are taken. `epsilon` is that of the whole
    plan and always holds: what was released is a part of what the whole run would have released. `spent_epsilon` is that of the
    steps executed, and holds only if what was released could not decide when to stop: early stopping, a look at samples or at
    loss on held-out data, and a user who interrupts, all decide by it.

    All fields are public. How many units were dropped for NaN or Inf gradients is deliberately absent: such a count is computed
    from the private data without noise. The guarantee holds under the assumptions that the report states: the sampling, the
    clipping norm and the noise are those named, and what `not_covered` lists is not published, or protected in another way.

    Attributes:
        private: False when a seed was fixed: then nothing is guaranteed.
        epsilon: Of all steps planned, with those executed before, lost ones included, at `delta`: the promise.
        spent_epsilon: Of all steps executed, lost ones included, at `delta`, as if their number had been fixed beforehand.
        delta: target_delta of the configuration.
        target_epsilon: The budget, if there was one.
        adjacency: Which datasets are neighbours: those that differ by one unit added or removed.
        unit: What one unit is, in words.
        max_examples_per_unit: Most rows of a unit in one draw; None where one example is a unit.
        n_units: Units in the dataset; where `n_units_estimated`, a public estimate, and the true number is not in the report.
        n_units_estimated: Whether the configuration gave `public_n_units`.
        sampler: "poisson" or "truncated_poisson".
        sampling_rate: Probability that a unit is drawn for a step.
        expected_batch_size: Units in a step on average.
        max_batch_size: Most units in a step; None with plain Poisson sampling.
        noise_multiplier: Standard deviation of the noise on a step's sum / max_grad_norm.
        noise: "secure" or "fast", see `PrivacyConfig`.
        max_grad_norm: L2 norm that each unit's gradient is clipped to.
        clipping: "flat", "automatic" or "per_layer".
        steps: All noisy steps that count.
        lost_steps: Those of them that are not in the weights: lost in a crash, or of another training in the same folder. They
            count like any other.
        planned_steps: Steps that will have been taken in the end.
        parts: The kinds of step that were taken, each a mapping with "steps", "sampler" (its fields) and "noise_multiplier";
            the fields above are those of the latest plan.
        accountant: Who computed epsilon: "pld", "prv" or "rdp"; with ", filter" where parameters were changed after some steps,
            and `epsilon` is that of `filter_epsilon`.
        versions: Of the libraries that took part, by name.
        not_covered: Sentences: what the guarantee does not say.
    """

    private: bool
    epsilon: float
    spent_epsilon: float
    delta: float
    target_epsilon: float | None
    adjacency: str
    unit: str
    max_examples_per_unit: int | None
    n_units: int
    n_units_estimated: bool
    sampler: str
    sampling_rate: float
    expected_batch_size: int
    max_batch_size: int | None
    noise_multiplier: float
    noise: str
    max_grad_norm: float
    clipping: str
    steps: int
    lost_steps: int
    planned_steps: int
    parts: tuple[dict[str, Any], ...]
    accountant: str
    versions: dict[str, str]
    not_covered: tuple[str, ...]

    @classmethod
    def of(
        cls,
        config: PrivacyConfig,
        plan: PrivacyPlan,
        ledger: Ledger,
        *,
        unit: str | None = None,
        lost_steps: int = 0,
        recorded: bool = False,
        extended: bool = False,
        not_covered: tuple[str, ...] = (),
    ) -> Self:
        """The report of the steps in `ledger`, taken under `plan`.

        The guarantee is that of the steps taken. What is still planned shows in `planned_steps` only, so that a report may be
        asked for at any time.

        Args:
            config: The privacy parameters.
            plan: The latest plan of the run.
            ledger: Every step that counts.
            unit: What one unit is, in words, where it is neither one training example nor the rows of `config.privacy_unit`:
                "one preference pair", say.
            lost_steps: How many of the steps are not in the weights.
            recorded: Whether every step was written to a spend log before it was released; if not, the report says that lost
                steps may be missing.
            extended: Whether steps were added to the plan after some were taken.
            not_covered: Sentences to add to those that hold for every run.

        Returns:
            The report, computed from the arguments alone; no data are read. Epsilon is that of all steps in `ledger`: 0.0 where
            it is empty, and inf where noise is too small for the accountant, see `Ledger.epsilon`.

        Raises:
            UnsupportedError: The accountant cannot add up the steps in `ledger`, or needs opacus, which is not installed.
        """
        if unit is None:
            unit = "one training example" if config.privacy_unit is None else f"all rows with the same {config.privacy_unit!r}"
        sampler = plan.sampler
        libraries = ["dp-flash-hf", "torch", "transformers", "scipy"]
        if any(isinstance(sampler, TruncatedPoissonSampler) for (sampler, _), _ in ledger.entries):
            libraries.append("dp-accounting")
        if ledger.accountant != "pld":
            libraries.append("opacus")
        caveats = [
            *NOT_COVERED,
            *([FAST_NOISE_NOT_COVERED] if config.noise == "fast" else []),
            *([N_UNITS_NOT_COVERED] if config.public_n_units is None else []),
            *([] if recorded else [LOST_STEPS_NOT_COVERED]),
            *([CHANGED_NOT_COVERED] if plan.spent else [EXTENDED_NOT_COVERED] if extended else []),
            *not_covered,
        ]
        return cls(
            private=config.seed is None,
            epsilon=plan.epsilon(),
            spent_epsilon=ledger.epsilon(plan.target_delta),
            delta=plan.target_delta,
            target_epsilon=config.target_epsilon,
            adjacency=ADJACENCY,
            unit=unit,
            max_examples_per_unit=config.max_examples_per_unit,
            n_units=sampler.n_units,
            n_units_estimated=config.public_n_units is not None,
            sampler=sampler.kind,
            sampling_rate=sampler.sampling_rate,
            expected_batch_size=sampler.expected_batch_size,
            max_batch_size=sampler.max_batch_size if isinstance(sampler, TruncatedPoissonSampler) else None,
            noise_multiplier=plan.noise_multiplier,
            noise=config.noise,
            max_grad_norm=config.max_grad_norm,
            clipping=config.clipping,
            steps=ledger.steps,
            lost_steps=lost_steps,
            planned_steps=plan.steps + sum(steps for _, steps in plan.spent),
            parts=tuple(
                {"steps": steps, "sampler": sampler.to_dict(), "noise_multiplier": sigma}
                for (sampler, sigma), steps in ledger.entries
            ),
            accountant=f"{ledger.accountant}, filter" if plan.spent else ledger.accountant,
            versions={name: metadata.version(name) for name in libraries},
            not_covered=tuple(caveats),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, in the order above."""
        return {**asdict(self), "not_covered": list(self.not_covered), "parts": [*self.parts]}

    def to_json(self) -> str:
        """The fields as indented JSON; `from_json` reads it."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote. Raises ValueError for anything else, also for JSON with other fields."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.keys() != {f.name for f in fields(cls)}:
            raise invalid("text", expected="what to_json() wrote", actual=text[:80], remedy="give an unedited report")
        return cls(**{**data, "not_covered": tuple(data["not_covered"]), "parts": tuple(data["parts"])})

    def to_text(self) -> str:
        """The report for a reviewer: one screen of plain text, at most 100 columns."""
        title = "Privacy report" if self.private else f"{_NOT_PRIVATE}\n\nPrivacy report"
        return page(title, self._rows(), self.not_covered)

    def to_model_card(self) -> str:
        """The report as a Markdown section for a model card, with the same content as `to_text`."""
        warning = "" if self.private else f"> **{_NOT_PRIVATE}**\n\n"
        rows = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in self._rows())
        gaps = "\n".join(f"- {sentence}" for sentence in self.not_covered)
        return f"## Differential privacy\n\n{warning}| | |\n|---|---|\n{rows}\n\nNot covered by the guarantee:\n\n{gaps}\n"

    def __str__(self) -> str:
        return self.to_text()

    def _rows(self) -> list[tuple[str, str]]:
        epsilon = f"epsilon <= {rounded_up(self.epsilon)} at delta = {self.delta:g}"
        spent = f"epsilon <= {rounded_up(self.spent_epsilon)}"
        target = "" if self.target_epsilon is None else f" (budget: epsilon = {self.target_epsilon:g})"
        per_draw = "" if self.max_examples_per_unit is None else f", at most {self.max_examples_per_unit} rows of each per draw"
        at_most = "" if self.max_batch_size is None else f", at most {self.max_batch_size}"
        clip = {
            "flat": "per-unit gradients scaled to norm at most C",
            "automatic": "per-unit gradients scaled to norm at most C by C / (norm + 0.01)",
            "per_layer": "per-unit gradients scaled layer by layer, to norm at most C over all layers",
        }[self.clipping]
        lost = "" if not self.lost_steps else f"; {self.lost_steps} of them are not in the weights, and count all the same"
        return [
            ("guarantee", f"{epsilon}{target}, whenever it stopped"),
            ("spent", f"{spent} by the steps executed, if nothing released decided when to stop"),
            ("adjacency", self.adjacency),
            ("unit", f"{self.unit}{per_draw}"),
            (
                "dataset",
                f"{self.n_units} units, {'a public estimate' if self.n_units_estimated else 'counted: the number is public'}",
            ),
            (
                "sampling",
                f"{self.sampler}, q = {self.sampling_rate:.6g}: {self.expected_batch_size} units expected a step{at_most}",
            ),
            ("clipping", f"{clip}, C = {self.max_grad_norm:g}"),
            (
                "noise",
                f"Gaussian, {self.noise}, sigma = {self.noise_multiplier:.6g}: std sigma * C on each sum, also an empty one",
            ),
            ("steps", f"{self.steps} executed of {self.planned_steps} planned{lost}"),
            *(("parts", parts) for parts in [_parts(self.parts)] if len(self.parts) > 1),
            ("accountant", self.accountant),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]


def _parts(parts: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for part in parts:
        sampler = part["sampler"]
        rate = sampler["expected_batch_size"] / sampler["n_units"]
        at_most = f" (at most {sampler['max_batch_size']} units)" if "max_batch_size" in sampler else ""
        said.append(f"{part['steps']} steps with sigma = {part['noise_multiplier']:.6g}, q = {rate:.6g}{at_most}")
    return "composed of " + "; ".join(said)
