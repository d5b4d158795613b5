"""Fixtures of the tests of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.attention import EXTRAS


@pytest.fixture(params=EXTRAS)
def extra(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(2)
    return EXTRAS[request.param]()
