"""Units: reading what the user passes, arranging by unit, and cutting one unit out of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.training.batches import units_of
from dp_flash_hf.units import Units, inner_sizes, leading_shape, restarts, select_items, select_unit, subset, text_starts


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def test_every_row_is_a_unit_unless_told_otherwise() -> None:
    units = Units.of(None, (3, 7))
    assert (units.kind, units.n, units.of_item.tolist(), units.sizes) == ("rows", 3, [0, 1, 2], (1, 1, 1))
    assert units.identity
    assert not units.is_single
    assert Units.of(units, (99,)) is units


@pytest.mark.parametrize(
    ("given", "n", "sizes", "identity", "single", "last"),
    [
        (ids(0, 1, 0, 1), 2, (2, 2), False, False, 1),
        (ids(3, 0, 3, 0), 4, (2, 0, 0, 2), False, False, 0),
        (ids(-1, 1, -1, 0), 2, (1, 1), False, False, 0),
        (ids(0, 0, 0, 0), 1, (4,), False, True, 0),
        (ids(2, 2, 2, 2), 3, (0, 0, 4), False, True, 2),
        (ids(0, -1, -1, 0), 1, (2,), False, False, 0),
        (ids(0, 1, 2, 3), 4, (1, 1, 1, 1), True, False, 3),
    ],
)
def test_unit_ids_by_row(given: Tensor, n: int, sizes: tuple[int, ...], identity: bool, single: bool, last: int) -> None:
    units = Units.of(given, (4, 9))
    assert (units.kind, units.n, units.sizes, units.identity, units.is_single, units.last) == (
        "rows",
        n,
        sizes,
        identity,
        single,
        last,
    )
    for unit in range(n):
        assert units.items(unit).tolist() == [row for row, owner in enumerate(given.tolist()) if owner == unit]


def test_boundaries_of_a_packed_row() -> None:
    units = Units.of(torch.tensor([0, 3, 3, 5], dtype=torch.int32), (1, 7))
    assert (units.kind, units.n, units.sizes, units.shape) == ("tokens", 3, (3, 0, 2), (1, 7))
    assert units.of_item.tolist() == [0, 0, 0, 2, 2, -1, -1]


def test_unit_ids_by_token() -> None:
    units = Units.of(torch.tensor([[0, 0, 2], [2, -1, 1]]), (2, 3))
    assert (units.kind, units.n, units.sizes, units.shape) == ("tokens", 3, (2, 1, 2), (2, 3))
    assert units.items(2).tolist() == [2, 3]


@pytest.mark.parametrize(
    "bad",
    [
        [0, 1],
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        ids(0, 1, 2),
        ids(0, -2),
        torch.zeros(2, 4, dtype=torch.long),
        torch.zeros(2, 3, 1, dtype=torch.long),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([1, 3], dtype=torch.int32),
        torch.tensor([0, 4, 3], dtype=torch.int32),
        torch.tensor([0, 7], dtype=torch.int32),
        torch.tensor([[0, 3], [3, 6]], dtype=torch.int32),
    ],
    ids=repr,
)
def test_anything_else_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="units: expected"):
        Units.of(bad, (2, 3))


def test_padding_only() -> None:
    for given in (ids(), ids(-1, -1)):
        units = Units.of(given, (len(given), 5))
        assert (units.n, units.sizes, units.is_single) == (0, (), False)


@pytest.mark.parametrize("given", [ids(0, 1, 2), ids(1, 0, 1), ids(2, -1, 0), ids(0, 0, 0)])
def test_arrange_puts_each_units_rows_together(given: Tensor) -> None:
    units = Units.of(given, (3,))
    x = torch.arange(3 * 2 * 4).view(3, 2, 4)
    wanted = [x[row].tolist() for unit in range(units.n) for row in range(3) if given[row] == unit]
    assert units.arrange(x).view(-1, 2, 4).tolist() == wanted


def test_one_unit_of_a_batch_of_rows() -> None:
    batch: dict[str, Any] = {
        "input_ids": torch.arange(12).view(4, 3),
        "pixels": torch.arange(4.0).view(4, 1, 1),
        "nested": {"labels": ids(5, 6, 7, 8)},
        "names": ["a", "b", "c", "d"],
        "shared": torch.arange(6.0).view(1, 6),
        "scalar": torch.tensor(3.0),
        "flag": True,
    }
    units = Units.of(ids(1, 0, 1, -1), (4,))
    part = select_unit(batch, units, 1)
    assert part["input_ids"].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert part["pixels"].flatten().tolist() == [0.0, 2.0]
    assert part["nested"]["labels"].tolist() == [5, 7]
    assert part["names"] == ["a", "c"]
    assert part["shared"] is batch["shared"]
    assert part["scalar"] is batch["scalar"]
    assert part["flag"] is True
    assert select_items(batch, units, ids(3, 0))["names"] == ["d", "a"]


def test_one_unit_of_a_packed_row() -> None:
    batch: dict[str, Any] = {
        "input_ids": torch.arange(6).view(1, 6),
        "hidden": torch.arange(12.0).view(1, 6, 2),
        "cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32),
        "max_length_q": 4,
        "max_length_k": torch.tensor(4),
        "weights": torch.zeros(6),
    }
    part = select_unit(batch, Units.of(batch["cu_seq_lens_q"], (1, 6)), 1)
    assert part["input_ids"].tolist() == [[2, 3, 4, 5]]
    assert part["hidden"].shape == (1, 4, 2)
    assert part["cu_seq_lens_q"].tolist() == [0, 4]
    assert part["cu_seq_lens_q"].dtype == torch.int32
    assert (part["max_length_q"], int(part["max_length_k"])) == (4, 4)
    assert part["weights"] is batch["weights"]


def test_tensors_laid_out_otherwise_cannot_be_divided() -> None:
    for units, shape in (
        (Units.rows(3), (6, 2)),
        (Units.rows(3), (2, 3, 5)),
        (Units.of(torch.tensor([0, 2, 6], dtype=torch.int32), (1, 6)), (1, 1, 6, 6)),
        (Units.of(torch.tensor([0, 2, 6], dtype=torch.int32), (1, 6)), (2, 6)),
    ):
        for batch in ({"pictures": torch.zeros(shape)}, {"nested": {"pictures": torch.zeros(shape)}}):
            with pytest.raises(ValueError, match=r"batch\['pictures'\].*select="):
                select_unit(batch, units, 0)


def test_leading_shape() -> None:
    assert leading_shape({"pixel_values": torch.zeros(4, 3, 8, 8), "labels": ids(1, 2, 3, 4)}) == (4, 3)
    assert leading_shape({"mask": torch.zeros(2, 5), "input_ids": torch.zeros(2, 7, dtype=torch.long)}) == (2, 7)
    assert leading_shape({"labels": ids(1, 2), "note": "x"}) == (2,)
    assert leading_shape({"question": ["a", "b", "c"], "answer": ["d", "e", "f"]}) == (3,)
    for empty in ({}, {"a": 1}, {"a": torch.tensor(1.0)}):
        with pytest.raises(ValueError, match="batch: expected"):
            leading_shape(empty)


def test_a_subset_is_renumbered() -> None:
    units = Units.of(ids(4, 1, 4, 0), (4,))
    part = subset(units, ids(2, 1))
    assert (part.of_item.tolist(), part.n) == ([1, 0], 2)


def test_boundaries_are_of_one_row() -> None:
    """int32 ids of several rows would be read as boundaries."""
    for rows in ((4,), (4, 3)):
        with pytest.raises(ValueError, match="one packed row"):
            Units.of(torch.tensor([0, 0, 1, 2], dtype=torch.int32), rows)


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([0, 1, 2, 0, 0, 1], [3, 4]),
        ([2, 3, 4, 2, 2, 3], [3, 4]),  # counted from 2
        ([0, 1, 1, 1, 2, 0, 1], [5]),  # a picture, whose tokens share a position
        ([0, 1, 5, 6], []),  # a gap within a text
        ([5, 6, 7, 7, 9, 10, 3, 4, 5], [6]),
        ([0, 1, 2, -1, -1], [3, 4]),
        ([-1, -1, 0, 1], [1]),
        ([1, 1, 1, 0, 1, 2], [1, 2, 3]),  # padding on the left, as Transformers counts it
        ([4], []),
    ],
)
def test_positions_that_restart_begin_a_text(positions: list[int], starts: list[int]) -> None:
    ids = torch.tensor([positions])
    assert restarts(ids).nonzero()[:, 1].add(1).tolist() == starts
    found = text_starts({"input_ids": torch.zeros_like(ids), "position_ids": ids})
    jumps = [place for place in range(1, len(positions)) if positions[place] - positions[place - 1] != 1]
    # Where a position jumps without restarting, a text could begin or not: nothing is said of the row.
    assert (None if found is None else found.nonzero().flatten().tolist()) == ([0, *starts] if jumps == starts else None)


@pytest.mark.parametrize("positions", [[0, 1, 0, 1, 5, 6], [0, 1, 5, 6, 0, 1], [0, 1, 1, 2, 0, 1]])
def test_tokens_are_not_counted_as_another_units_where_positions_jump(positions: list[int]) -> None:
    batch = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "position_ids": torch.tensor([positions])}
    with pytest.raises(UnsupportedError, match="unknown which is whose"):
        units_of(batch, torch.tensor([0, 1]))


def test_every_row_restarts_by_itself() -> None:
    found = restarts(torch.tensor([[0, 1, 2, 0], [3, 4, 5, 6], [7, 7, 8, 8]]))
    assert found.tolist() == [[False, False, True], [False] * 3, [True, False, False]]


def test_text_starts_come_from_boundaries_before_positions() -> None:
    ids, positions = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1, 2]])
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    found = text_starts({"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": boundaries})
    assert found is not None
    assert found.nonzero().flatten().tolist() == [0, 2, 5]  # what follows the last boundary counts as a text too
    assert text_starts({"input_ids": ids}) is None
    assert text_starts({"input_ids": torch.zeros(2, 3, dtype=torch.long), "position_ids": positions.view(2, 3)}) is None


def test_the_sizes_of_a_packed_batch_do_not_count_its_texts() -> None:
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    batch = {"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": ends, "max_length_q": 5}
    assert inner_sizes(batch, Units.of(ends, (1, 9))) == (("input_ids[0]", 1), ("input_ids[1]", 9))
