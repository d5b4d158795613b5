"""What the user decides about privacy, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from dp_flash_hf.errors import invalid

Clipping = Literal["flat", "automatic", "per_layer"]
Sampling = Literal["poisson", "truncated_poisson"]
AccountantName = Literal["pld", "prv", "rdp"]
UnitLoss = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """The privacy parameters of a training run; every field is public information.

    Raises ValueError for a field outside its range, and for anything but exactly one of `target_epsilon` and
    `noise_multiplier`.
    """

    target_delta: float = field(metadata={"help": "delta of the guarantee; well below 1 / number of privacy units"})
    target_epsilon: float | None = field(default=None, metadata={"help": "epsilon to calibrate the noise to, never exceeded"})
    noise_multiplier: float | None = field(default=None, metadata={"help": "noise standard deviation / max_grad_norm"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "C: the L2 norm each unit's gradient is clipped to"})
    clipping: Clipping = field(default="flat", metadata={"help": "flat: min(1, C/n); automatic: C/(n+0.01); per_layer"})
    sampling: Sampling = field(default="poisson", metadata={"help": "how each step's units are drawn"})
    max_batch_size: int | None = field(default=None, metadata={"help": "truncated_poisson: most units in one draw"})
    accountant: AccountantName = field(default="pld", metadata={"help": "pld (dp-accounting), prv or rdp (opacus)"})
    privacy_unit: str | None = field(default=None, metadata={"help": "column naming the unit; default: one example is a unit"})
    max_examples_per_unit: int | None = field(default=None, metadata={"help": "with privacy_unit: most examples per draw"})
    unit_loss: UnitLoss = field(default="mean", metadata={"help": "mean over a unit's own labels, or their sum"})
    seed: int | None = field(default=None, metadata={"help": "tests only: replays sampling and noise, so nothing is private"})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise invalid(
                    name, expected=f"one of {', '.join(choices)}", actual=getattr(self, name), remedy="choose one of them"
                )
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise invalid(
                "target_epsilon, noise_multiplier",
                expected="exactly one of them",
                actual=(self.target_epsilon, self.noise_multiplier),
                remedy="set target_epsilon to have the noise calibrated, or noise_multiplier to have epsilon computed",
            )
        if not _is_number(self.target_delta) or not 0 < self.target_delta < 1:
            raise invalid("target_delta", expected="0 < delta < 1", actual=self.target_delta, remedy="use well below 1 / units")
        for name in ("target_epsilon", "noise_multiplier", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise invalid(name, expected="a finite number above 0", actual=value, remedy="give a positive number")
        for name, owner, needed in (
            ("max_batch_size", "sampling='truncated_poisson'", self.sampling == "truncated_poisson"),
            ("max_examples_per_unit", "privacy_unit", self.privacy_unit is not None),
        ):
            value = getattr(self, name)
            if needed and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise invalid(name, expected=f"a whole number >= 1 with {owner}", actual=value, remedy=f"set {name}")
            if not needed and value is not None:
                raise invalid(name, expected=f"None without {owner}", actual=value, remedy=f"set {owner} or drop {name}")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise invalid("seed", expected="None or a whole number >= 0", actual=self.seed, remedy="leave it out outside tests")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as saved beside every checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHOICES: dict[str, tuple[str, ...]] = {
    "clipping": get_args(Clipping),
    "sampling": get_args(Sampling),
    "accountant": get_args(AccountantName),
    "unit_loss": get_args(UnitLoss),
}
