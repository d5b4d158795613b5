"""Who takes part in a step: samplers, and rows grouped by privacy unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.errors import invalid
from dp_flash_hf.mechanisms.config import PrivacyConfig, Sampling


@dataclass(frozen=True)
class PoissonSampler:
    """Every unit joins every step independently, with probability q = expected_batch_size / n_units.

    This is the sampling that privacy accounting of DP-SGD assumes (Abadi et al. 2016, arXiv 1607.00133). Shuffled batches of a
    fixed size are not, and their epsilon can be much larger (Chua et al. 2024, arXiv 2403.17673).

    The size of a draw varies, with mean expected_batch_size and standard deviation at most its square root. It is computed from
    private data (who took part), so it must not be published: divide by expected_batch_size, never by the drawn size.

    >>> sampler = PoissonSampler(n_units=1000, expected_batch_size=20)
    >>> sampler.sampling_rate
    0.02
    >>> sampler.draw(torch.Generator().manual_seed(0)).dtype  # in training: fresh_generator()
    torch.int64

    Attributes:
        n_units: Privacy units in the dataset, or a public estimate of their number; public, and the same for all steps.
        expected_batch_size: Units in a draw on average, over all processes.
        kind: "poisson", as in saved states and reports.

    Raises:
        ValueError: Unless both are whole numbers with 1 <= expected_batch_size <= n_units.
    """

    n_units: int
    expected_batch_size: int

    kind: ClassVar[Sampling] = "poisson"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            validation.whole_number(name, value, remedy="give a number of privacy units")
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

    @property
    def hardly_more(self) -> int:
        """Units that a draw from n_units exceeds with probability below 1e-30 (Bernstein's inequality)."""
        return math.ceil(self.expected_batch_size + 12 * math.sqrt(self.expected_batch_size) + 72)

    def draw(self, generator: torch.Generator, population: int | None = None) -> Tensor:
        """The units of one step.

        Args:
            generator: On the CPU, from `fresh_generator`; never one whose state is saved or logged.
            population: How many units there are to draw from, each at the sampling rate; None: n_units.

        Returns:
            int64 (size,) on the CPU, ascending, without repetition. Size 0 is a valid draw, and a noisy step like any other.
        """
        return self._included(self._uniforms(generator, population))

    def to_dict(self) -> dict[str, Any]:
        """The sampler as plain data; `sampler_from_dict` reads it."""
        return {"kind": self.kind, **asdict(self)}

    def _uniforms(self, generator: torch.Generator, population: int | None) -> Tensor:
        # float32 uniforms are multiples of 2^-24: for a q of that size units would be drawn at another rate than is accounted.
        return torch.rand(self.n_units if population is None else population, dtype=torch.float64, generator=generator)

    def _included(self, uniforms: Tensor) -> Tensor:
        return (uniforms < self.sampling_rate).nonzero().flatten()


@dataclass(frozen=True)
class TruncatedPoissonSampler(PoissonSampler):
    """A Poisson draw; of one larger than max_batch_size a uniformly random subset of max_batch_size units stays.

    For computations of a fixed size (Ganesh 2025, arXiv 2508.15089). When a draw is truncated, one unit more displaces another,
    which moves the clipped sum by 2C instead of C: leave max_batch_size several sqrt(expected_batch_size) above
    expected_batch_size, or epsilon grows fast. Only accountant "pld" knows this sampling.

    >>> sampler = TruncatedPoissonSampler(n_units=100, expected_batch_size=50, max_batch_size=60)
    >>> max(len(sampler.draw(torch.Generator().manual_seed(seed))) for seed in range(100))
    60

    Attributes:
        max_batch_size: Most units in one draw.
        kind: "truncated_poisson".

    Raises:
        ValueError: As PoissonSampler does, and if max_batch_size is below expected_batch_size.
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

    def draw(self, generator: torch.Generator, population: int | None = None) -> Tensor:
        """As `PoissonSampler.draw`, with at most max_batch_size units; accounted only where the population is n_units."""
        uniforms = self._uniforms(generator, population)
        included = self._included(uniforms)
        if included.numel() > self.max_batch_size:
            # Below q the uniforms are again independent and uniform, so the smallest belong to a uniformly random subset.
            kept = uniforms[included].topk(self.max_batch_size, largest=False).indices
            included = included[kept].sort().values
        return included


def sampler_from(config: PrivacyConfig, *, n_units: int, expected_batch_size: int) -> PoissonSampler:
    """The sampler that `config` asks for, over `n_units` units. Raises ValueError for sizes out of range, see the samplers."""
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
    """The rows of each unit.

    >>> group_rows(["ann", "bob", "ann"])
    [tensor([0, 2]), tensor([1])]

    Args:
        column: Each row's unit, named by a str, int or bytes.

    Returns:
        One int64 tensor (rows of the unit,) for each distinct value, ascending, by order of appearance.

    Raises:
        ValueError: A value of another type. Rows without a name could belong to anyone, and values that are never equal to
            another (NaN, tensors) would make every row a unit of its own.
    """
    rows: dict[str | int | bytes, list[int]] = {}
    for row, unit in enumerate(column):
        if not isinstance(unit, (str, int, bytes)):
            raise invalid(f"unit of row {row}", expected="a str, int or bytes", actual=unit, remedy="name a unit for every row")
        rows.setdefault(unit, []).append(row)
    return [torch.tensor(of_unit) for of_unit in rows.values()]


def choose_rows(rows: Sequence[Tensor], units: Tensor, max_per_unit: int, generator: torch.Generator) -> list[Tensor]:
    """The rows that each drawn unit contributes: at most max_per_unit of its own, a new uniformly random subset per draw.

    Args:
        rows: From `group_rows`.
        units: int64 (k,), from a sampler's draw.
        max_per_unit: `PrivacyConfig.max_examples_per_unit`.
        generator: On the CPU.

    Returns:
        k int64 tensors, each ascending.
    """
    chosen = []
    for unit in units.tolist():
        own = rows[unit]
        if len(own) > max_per_unit:
            own = own[torch.rand(len(own), dtype=torch.float64, generator=generator).topk(max_per_unit).indices].sort().values
        chosen.append(own)
    return chosen
