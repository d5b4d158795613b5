"""The checker for users' own rules: passes what is exact, names what is not, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.layers.rules import layout_of, record, record_bias, register_rule
from dp_flash_hf.testing import check_exact
from tests.support.models import batch_of, loss_of, tiny


class Shift(nn.Module):
    """Adds a vector, by a rule whose gradient is `error` times too large."""

    def __init__(self, width: int, error: float = 1.0) -> None:
        super().__init__()
        self.vector, self.error = nn.Parameter(torch.randn(width)), error

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.vector
        return out


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Any, layout: Any, error: float) -> Tensor:
        ctx.vector, ctx.layout, ctx.error = vector, layout, error
        return x + vector  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        record_bias(ctx.vector, g * ctx.error, ctx.layout)
        return g, None, None, None


@register_rule(Shift)
class PrivateShift(Shift):
    def forward(self, x: Tensor) -> Tensor:
        layout = layout_of(self, x)
        if layout is None:
            return super().forward(x)
        return _Add.apply(x, self.vector, layout, self.error)  # type: ignore[no-any-return, no-untyped-call]


def model_of(error: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), Shift(40, error), nn.Tanh(), nn.Linear(40, 3))


class Named(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_rules_pass_and_nothing_stays_behind(dtype: torch.dtype) -> None:
    model = Named(model_of()).to(dtype)
    kept = torch.ones_like(model.body[0].weight)  # type: ignore[index]
    model.body[0].weight.grad = kept  # type: ignore[index]
    classes = [type(m) for m in model.modules()]
    methods = check_exact(model, {"x": torch.randn(5, 4, 6, dtype=dtype)})
    assert methods["body.1.vector"] == "per-unit gradient"
    assert set(methods) == {name for name, _ in model.named_parameters()}
    assert [type(m) for m in model.modules()] == classes
    assert model.body[0].weight.grad is kept  # type: ignore[index]
    assert bool((kept == 1).all())


@pytest.mark.parametrize("error", [1.001, 0.999, 0.0, -1.0])
def test_wrong_rules_are_named(error: float) -> None:
    with pytest.raises(PrivacyError, match=r"body\.1\.vector \(off by"):
        check_exact(Named(model_of(error)), {"x": torch.randn(5, 4, 6)})


def test_what_escapes_its_rule_is_named_unless_it_may() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))
            self.kept = [self.weight]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x @ self.kept[0]
            return out

    batch = {"x": torch.randn(5, 4, 6)}
    with pytest.raises(PrivacyError, match="no rule covers how the model uses weight"):
        check_exact(Hidden(), batch)
    with pytest.warns(UserWarning, match="no rule covers"):
        assert check_exact(Hidden(), batch, strategy="auto") == {"weight": "microbatch"}


def test_a_loss_of_ones_own_and_units_of_several_rows() -> None:
    model = tiny("gpt2")
    check_exact(model, batch_of("gpt2"), loss_of("gpt2", model))
    units = torch.tensor([0, 1, 0, 2, 1])
    check_exact(model, batch_of("gpt2"), loss_of("gpt2", model), units=units)


def test_record_takes_gradients_back_to_the_parameter_they_came_from() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.root = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.root.square()

    class _Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Any, layout: Any) -> Tensor:
            ctx.save_for_backward(x)
            ctx.scale, ctx.layout = scale, layout
            return x * scale  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            (x,) = ctx.saved_tensors
            record(ctx.scale, ctx.layout.sums(g * x).flatten(1, -2).sum(1))
            return g * ctx.scale.plain, None, None

    @register_rule(Squared)
    class PrivateSquared(Squared):
        def forward(self, x: Tensor) -> Tensor:
            layout = layout_of(self, x)
            if layout is None:
                return super().forward(x)
            return _Multiply.apply(x, self.root.square(), layout)  # type: ignore[no-any-return, no-untyped-call]

    check_exact(nn.Sequential(Squared()), {"input": torch.randn(5, 4, 6)})
