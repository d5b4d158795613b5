"""Units that see each other are refused whoever is tried, and honest losses are not."""

from __future__ import annotations

from typing import Any

import pytest

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from tests.support.coupled_losses import COUSINS, HONEST, NAMED, Loss, checked, rows

SEEDS = range(20)


def name_of(loss: Any) -> str:
    return str(getattr(loss, "__name__", loss))


@pytest.mark.parametrize("loss", [*NAMED, *COUSINS], ids=name_of)
def test_a_loss_that_compares_units_is_refused_whatever_labels_the_tried_ones_have(loss: Loss) -> None:
    """A tenth of the rows is positive: four of them taken blindly share a label two times in three."""
    for seed in SEEDS:
        with pytest.raises((PrivacyError, UnsupportedError)):
            checked(loss, rows(seed), seed=seed)


@pytest.mark.parametrize("loss", [*NAMED, *COUSINS], ids=name_of)
def test_it_is_refused_also_where_all_rows_that_can_be_looked_at_share_a_label(loss: Loss) -> None:
    for seed in range(3):
        with pytest.raises((PrivacyError, UnsupportedError)):
            checked(loss, rows(seed, positives=0.0), seed=seed)


@pytest.mark.parametrize("loss", HONEST, ids=name_of)
def test_an_honest_loss_of_every_kind_of_label_is_accepted(loss: Loss) -> None:
    for seed in SEEDS[:3]:
        assert checked(loss, rows(seed), seed=seed).checked
    assert checked(loss, rows(0, positives=0.0)).checked
    assert checked(loss, rows(0, n=2)).checked
