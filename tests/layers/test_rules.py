"""What may be registered as a rule."""

from __future__ import annotations

import pytest
from torch import nn

from dp_flash_hf.layers.rules import register_rule, rule_for


class Layer(nn.Module):
    pass


class NotDerived(nn.Module):
    pass


class Mixin:
    pass


@pytest.mark.parametrize(
    ("layer", "rule"),
    [(Layer, NotDerived), (Layer, Mixin), (f"{__name__}.Layer", NotDerived)],
    ids=["another module", "a mixin for a class", "a module for a name"],
)
def test_a_rule_that_would_never_run_is_refused(layer: type[nn.Module] | str, rule: type) -> None:
    with pytest.raises(ValueError, match=rf"rule: expected .*Layer, got .*{rule.__name__}"):
        register_rule(layer)(rule)
    assert rule_for(Layer()) is None
