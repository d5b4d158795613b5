"""Who takes part in a step: samplers, the accounting events of their draws, and rows grouped by privacy unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar

import dp_accounting
import torch
from torch import Tensor

from dp_flash_hf.errors import invalid
from dp_flash_hf.mechanisms.config import PrivacyConfig, Sampling


@dataclass(frozen=True)
class PoissonSampler:
    """Every unit joins every step independently, with probability q = expected_batch_size / n_units.

    Raises ValueError unless both are whole numbers with 1 <= expected_batch_size <= n_units.
    """

    n_units: int
    expected_batch_size: int

    kind: ClassVar[Sampling] = "poisson"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise invalid(name, expected="a whole number >= 1", actual=value, remedy="count privacy units")
        if self.expected_batch_size > self.n_units:
            raise invalid(
                "expected_batch_size",
                expected=f"at most the {self.n_units} units of the dataset",
                actual=self.expected_batch_size,
                remedy="use a smaller batch size or less gradient accumulation",
            )

    @property
    def sampling_rate(self) -> float:
        """The probability q that a unit is drawn for a step."""
        return self.expected_batch_size / self.n_units

    def draw(self, generator: torch.Generator) -> Tensor:
        """The units of one step: int64[size] on the CPU, ascending. Size 0 is a valid draw, and a noisy step like any other.

        `generator` lies on the CPU.
        """
        return self._included(self._uniforms(generator))

    def events(self, noise_multiplier: float) -> tuple[dp_accounting.DpEvent, dp_accounting.DpEvent]:
        """The privacy events of one step with noise std = noise_multiplier * sensitivity: (a unit removed, a unit added)."""
        event = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        return event, event

    def to_dict(self) -> dict[str, Any]:
        """The sampler as plain data; `sampler_from_dict` reads it."""
        return {"kind": self.kind, **asdict(self)}

    def _uniforms(self, generator: torch.Generator) -> Tensor:
        # float32 uniforms are multiples of 2^-24: for a q of that size units would be drawn at another rate than is accounted.
        return torch.rand(self.n_units, dtype=torch.float64, generator=generator)

    def _included(self, uniforms: Tensor) -> Tensor:
        return (uniforms < self.sampling_rate).nonzero().flatten()


@dataclass(frozen=True)
class TruncatedPoissonSampler(PoissonSampler):
    """A Poisson draw of which, beyond max_batch_size units, a uniformly random subset of max_batch_size stays.

    Ganesh (2025), arXiv 2508.15089. When a draw is truncated, one unit more displaces another, which moves the clipped sum by
    2C instead of C: leave max_batch_size several sqrt(expected_batch_size) above expected_batch_size, or epsilon grows fast.

    Raises ValueError as PoissonSampler does, and if max_batch_size is below expected_batch_size.
    """

    max_batch_size: int

    kind: ClassVar[Sampling] = "truncated_poisson"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_batch_size < self.expected_batch_size:
            raise invalid(
                "max_batch_size",
                expected=f"at least expected_batch_size, {self.expected_batch_size}",
                actual=self.max_batch_size,
                remedy="raise it: several times sqrt(expected_batch_size) above costs almost no privacy",
            )

    def draw(self, generator: torch.Generator) -> Tensor:
        """As PoissonSampler.draw, with at most max_batch_size units."""
        uniforms = self._uniforms(generator)
        included = self._included(uniforms)
        if included.numel() > self.max_batch_size:
            # Below q the uniforms are again independent and uniform, so the smallest belong to a uniformly random subset.
            kept = uniforms[included].topk(self.max_batch_size, largest=False).indices
            included = included[kept].sort().values
        return included

    def events(self, noise_multiplier: float) -> tuple[dp_accounting.DpEvent, dp_accounting.DpEvent]:
        """As PoissonSampler.events. The two differ: dp-accounting's `dataset_size` is that of the larger of two neighbours."""
        removed, added = (
            dp_accounting.TruncatedSubsampledGaussianDpEvent(size, self.sampling_rate, self.max_batch_size, noise_multiplier)
            for size in (self.n_units, self.n_units + 1)
        )
        return removed, added


def sampler_from(config: PrivacyConfig, *, n_units: int, expected_batch_size: int) -> PoissonSampler:
    """The sampler that `config` asks for, over `n_units` units."""
    if config.max_batch_size is not None:
        return TruncatedPoissonSampler(n_units, expected_batch_size, config.max_batch_size)
    return PoissonSampler(n_units, expected_batch_size)


def sampler_from_dict(data: dict[str, Any]) -> PoissonSampler:
    """The sampler that `to_dict` described. Raises ValueError for anything else."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    for cls in (PoissonSampler, TruncatedPoissonSampler):
        if kind == cls.kind and fields.keys() == {field.name for field in dataclass_fields(cls)}:
            return cls(**fields)
    raise invalid("sampler", expected="what to_dict() returned", actual=data, remedy="load an unedited checkpoint")


def group_rows(column: Iterable[object]) -> list[Tensor]:
    """The rows of each unit: int64[rows of the unit], ascending, one tensor per distinct value by order of appearance.

    `column` names each row's unit by str, int or bytes. Raises ValueError for any other value: rows without a name may be
    anybody's, and values that are never equal to another (NaN, tensors) would make every row a unit of its own.
    """
    rows: dict[str | int | bytes, list[int]] = {}
    for row, unit in enumerate(column):
        if not isinstance(unit, (str, int, bytes)):
            raise invalid(f"unit of row {row}", expected="a str, int or bytes", actual=unit, remedy="name a unit for every row")
        rows.setdefault(unit, []).append(row)
    return [torch.tensor(of_unit) for of_unit in rows.values()]


def choose_rows(rows: Sequence[Tensor], units: Tensor, max_per_unit: int, generator: torch.Generator) -> list[Tensor]:
    """The rows that each drawn unit contributes: at most max_per_unit of its own, a new uniformly random subset per draw.

    `rows` comes from `group_rows`, `units` (int64[k]) from a sampler's draw; the k results are int64, ascending.
    """
    chosen = []
    for unit in units.tolist():
        own = rows[unit]
        if len(own) > max_per_unit:
            own = own[torch.rand(len(own), dtype=torch.float64, generator=generator).topk(max_per_unit).indices].sort().values
        chosen.append(own)
    return chosen
