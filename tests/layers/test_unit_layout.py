"""Where the rows of units stand: all views of a layout agree."""

from __future__ import annotations

import pytest
import torch

from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.layers.unit_layout import Layout
from dp_flash_hf.units import Units

WIDTH = 4


@pytest.mark.parametrize(
    ("ids", "lead", "dims"),
    [
        ([0, 1, 2], (3, 4), (0,)),
        ([0, 1, 0], (4, 3), (1,)),
        ([1, -1, 0], (6, 2), (0,)),
        ([0, 0, 0], (3, 2), ()),
        ([2, 2, 2], (5,), ()),
    ],
)
def test_all_views_of_a_layout_agree(ids: list[int], lead: tuple[int, ...], dims: tuple[int, ...]) -> None:
    units = Units.of(torch.tensor(ids), (3,))
    layout = Layout(units, lead, dims)
    x = torch.randn(*lead, 5, dtype=torch.float64)
    arranged = layout.arrange(x)
    assert len(arranged) == sum(layout.sizes)
    per_unit = torch.stack([rows.sum(0) for rows in arranged.split(list(layout.sizes))])
    sums = layout.sums(x)
    torch.testing.assert_close(sums.reshape(units.n, -1, 5).sum(1), per_unit)
    parts = layout.parts(x)
    torch.testing.assert_close(parts.reshape(units.n, -1, 5).sum(1), per_unit)
    chosen = torch.tensor([4, 0, 2, 3])
    kept = torch.zeros(*lead, 1, dtype=x.dtype).view(-1, 1).index_fill(0, chosen, 1.0).view(*lead, 1)
    own = layout.of_rows(chosen)
    rows = own.arrange(x.reshape(-1, 5)[chosen])
    assert len(rows) == sum(own.sizes)
    alone = torch.stack([of_unit.sum(0) for of_unit in rows.split(list(own.sizes))])
    torch.testing.assert_close(alone, layout.sums(x * kept).reshape(units.n, -1, 5).sum(1))
    if not layout.whole:
        for unit in set(ids) - {-1}:
            torch.testing.assert_close(layout.take(x, unit).reshape(-1, 5).sum(0), per_unit[unit])
    assert upcast(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
