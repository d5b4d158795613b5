"""What the user decides about privacy, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from dp_flash_hf import validation
from dp_flash_hf.errors import invalid

Clipping = Literal["flat", "automatic", "per_layer"]
Sampling = Literal["poisson", "truncated_poisson"]
AccountantName = Literal["pld", "prv", "rdp"]
UnitLoss = Literal["mean", "sum"]
Noise = Literal["secure", "fast"]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """The privacy parameters of a training run; every field is public information.

    Set exactly one of `target_epsilon` (noise is calibrated to it) and `noise_multiplier` (epsilon is computed from it).

    >>> PrivacyConfig(target_epsilon=8.0, target_delta=1e-6).clipping
    'flat'
    >>> PrivacyConfig(target_epsilon=8.0, target_delta=2.0)
    Traceback (most recent call last):
    ValueError: target_delta: expected 0 < delta < 1, got 2.0; use well below 1 / units

    Attributes:
        target_delta: delta of the guarantee: above 0, and below 1 / number of privacy units, better well below. At 1 / units,
            publishing one unit chosen at random would count as private.
        target_epsilon: The budget, finite and above 0. Noise is calibrated so that all planned steps, and those that earlier
            runs spent, keep it; it is never exceeded.
        noise_multiplier: sigma, standard deviation of the noise on a step's sum over `max_grad_norm`; finite and above 0.
        max_grad_norm: C, the L2 norm that each unit's gradient is clipped to; finite and above 0. Adding or removing one unit
            moves a step's sum by at most C.
        clipping: "flat": min(1, C / norm) over all parameters (Abadi et al. 2016, arXiv 1607.00133). "automatic":
            C / (norm + 0.01), which makes the learning rate independent of C (Bu et al. 2023, arXiv 2206.07136). "per_layer":
            each layer to C / sqrt(layers). All three have the same sensitivity C.
        sampling: "poisson": every unit joins every step independently. "truncated_poisson": the same with at most
            `max_batch_size` units (Ganesh 2025, arXiv 2508.15089).
        max_batch_size: With truncated_poisson, and only then: most units in one draw, at least the expected batch size.
        accountant: Who computes epsilon: "pld" (tight, for any delta, and the only one for truncated_poisson), "prv" or "rdp"
            (opacus); see `accounting.epsilon.epsilon_of` for the range of each.
        privacy_unit: Column of the dataset that names whose data a row is; rows of the same value are one unit. None: every
            example is a unit.
        max_examples_per_unit: With privacy_unit, and only then: most rows of a unit in one draw, at least 1.
        public_n_units: A public estimate of the number of units, where the number itself must not be told. Sampling rate and
            divisor follow from it alone, and no message, log or report holds the true number, which may be larger or smaller.
            None: the units are counted, and their number is public. With plain Poisson sampling only: what a truncated draw
            costs depends on the true number.
        unit_loss: "mean": the loss of a unit is the mean over its own labels. "sum": their sum, so that long texts weigh more.
        noise: Where the noise's randomness comes from. "secure": a cryptographic keystream (AES-256 in counter mode on CPUs,
            ChaCha20 on GPUs) under a new key for every step. "fast": torch's generator of the device. Both are on the same
            exact grid, with full tails; see `mechanisms.gaussian_noise`.
        seed: For tests only, 0 or above: sampling and noise can then be replayed, and nothing is private.

    Raises:
        ValueError: A field out of range, or anything but one of target_epsilon and noise_multiplier; the message says what to
            set.
    """

    target_delta: float = field(metadata={"help": "delta of the guarantee; well below 1 / number of privacy units"})
    target_epsilon: float | None = field(default=None, metadata={"help": "epsilon to calibrate the noise to, never exceeded"})
    noise_multiplier: float | None = field(default=None, metadata={"help": "noise standard deviation / max_grad_norm"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "C: the L2 norm each unit's gradient is clipped to"})
    clipping: Clipping = field(default="flat", metadata={"help": "flat: min(1, C/n); automatic: C/(n+0.01); per_layer"})
    sampling: Sampling = field(default="poisson", metadata={"help": "how each step's units are drawn"})
    max_batch_size: int | None = field(default=None, metadata={"help": "truncated_poisson: most units in one draw"})
    accountant: AccountantName = field(default="pld", metadata={"help": "pld (tight), prv or rdp (opacus)"})
    privacy_unit: str | None = field(default=None, metadata={"help": "column naming the unit; default: one example is a unit"})
    max_examples_per_unit: int | None = field(default=None, metadata={"help": "with privacy_unit: most examples per draw"})
    public_n_units: int | None = field(
        default=None, metadata={"help": "public estimate of the number of units; default: count"}
    )
    unit_loss: UnitLoss = field(default="mean", metadata={"help": "mean over a unit's own labels, or their sum"})
    noise: Noise = field(default="secure", metadata={"help": "secure: from a cryptographic keystream; fast: torch's generator"})
    seed: int | None = field(default=None, metadata={"help": "tests only: replays sampling and noise, so nothing is private"})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            validation.one_of(name, getattr(self, name), choices)
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise invalid(
                "target_epsilon, noise_multiplier",
                expected="exactly one of them",
                actual=(self.target_epsilon, self.noise_multiplier),
                remedy="set target_epsilon to have the noise calibrated, or noise_multiplier to have epsilon computed",
            )
        validation.delta("target_delta", self.target_delta)
        for name in ("target_epsilon", "noise_multiplier", "max_grad_norm"):
            if getattr(self, name) is not None:
                validation.positive(name, getattr(self, name), remedy="give a positive number")
        for name, owner, needed in (
            ("max_batch_size", "sampling='truncated_poisson'", self.sampling == "truncated_poisson"),
            ("max_examples_per_unit", "privacy_unit", self.privacy_unit is not None),
        ):
            value = getattr(self, name)
            if needed and not validation.is_whole_number(value):
                raise invalid(name, expected=f"a whole number >= 1 with {owner}", actual=value, remedy=f"set {name}")
            if not needed and value is not None:
                raise invalid(name, expected=f"None without {owner}", actual=value, remedy=f"set {owner} or drop {name}")
        if self.public_n_units is not None:
            validation.whole_number(
                "public_n_units", self.public_n_units, remedy="estimate the number of units from what is public"
            )
            if self.sampling != "poisson":
                raise invalid(
                    "public_n_units",
                    expected=f"None with sampling={self.sampling!r}, whose cost depends on the true number",
                    actual=self.public_n_units,
                    remedy="use sampling='poisson'",
                )
        if self.seed is not None:
            validation.whole_number("seed", self.seed, least=0, remedy="leave it out outside tests")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as saved beside every checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_CHOICES: dict[str, tuple[str, ...]] = {
    "clipping": get_args(Clipping),
    "sampling": get_args(Sampling),
    "accountant": get_args(AccountantName),
    "unit_loss": get_args(UnitLoss),
    "noise": get_args(Noise),
}
