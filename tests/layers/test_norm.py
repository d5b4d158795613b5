"""Norms, and layers with a vector used in every way: all exact, and fast unless units see each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from tests.support.layer_checks import how

D = 5
t5_norm: Callable[[int], nn.Module] = T5LayerNorm


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module.double()


class Vector(nn.Module):
    """A layer with one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))


class LayerScale(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class TwiceNonlinearly(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight) + self.weight.exp()


class SoftmaxOverTheFeatures(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.softmax(self.weight, -1)


class ScaleAndShift(Vector):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class SoftmaxOverTheFirst(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.softmax(self.weight, 0)


class FirstOnly(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


class Mean(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean()


class Total(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


class Matrix(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.outer(self.weight, self.weight)


class Dot(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x @ self.weight).unsqueeze(-1)


class AcrossRows(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)) * self.weight


class AddsTheOtherRows(Vector):
    """Right gradients of its vector, and an output that depends on the other rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + x.mean(0, keepdim=True)


class AlongTheRows(Vector):
    """Its vector runs over tokens, which are as many as features."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None]


class Noisy(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * torch.rand(())


class Gated(Vector):
    """Called with a gate and without."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * self.weight if gate is None else x * self.weight * torch.sigmoid(gate * self.weight.mean())


FITS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaRMSNorm(D),
    "gemma3": lambda: Gemma3RMSNorm(D),
    "t5": lambda: t5_norm(D),
    "layer_scale": LayerScale,
    "twice_nonlinearly": TwiceNonlinearly,
    "softmax_over_the_features": SoftmaxOverTheFeatures,
    "scale_and_shift": ScaleAndShift,
}
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "softmax_over_the_first": SoftmaxOverTheFirst,
    "first_only": FirstOnly,
    "mean": Mean,
    "total": Total,
    "matrix": Matrix,
    "dot": Dot,
    "along_the_rows": AlongTheRows,
}
TORCH: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(D),
    "layer_norm_without_bias": lambda: nn.LayerNorm(D, bias=False),
    "rms_norm": lambda: nn.RMSNorm(D),
    "rms_norm_eps": lambda: nn.RMSNorm(D, eps=1e-3),
}
SHAPES = [(3, 4, D), (3, D), (2, 3, 4, D), (D, D, D), (1, 4, D)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*FITS, *TORCH])
def test_exact_and_fast(name: str, shape: tuple[int, ...]) -> None:
    module = randomised({**FITS, **TORCH}[name]())
    # Gemma's and Llama's norms compute in float32 whatever they are given.
    assert how(module, torch.randn(shape, dtype=torch.float64), tolerance=1e-5) == "fast"


def test_layer_norm_partly_frozen() -> None:
    for frozen in ("weight", "bias"):
        module = randomised(nn.LayerNorm(D))
        getattr(module, frozen).requires_grad_(False)
        assert how(module, torch.randn(3, 4, D, dtype=torch.float64)) == "fast"


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_used_in_any_way(name: str) -> None:
    for shape in ((3, D, D), (1, D, D)):
        assert how(randomised(VECTORS[name]()), torch.randn(shape, dtype=torch.float64)) == "fast"


def test_units_that_see_each_other() -> None:
    x = torch.randn(3, 4, D, dtype=torch.float64)
    apart = ClippingEngine(randomised(AcrossRows()), max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="no rule covers"):
        apart.backward(lambda batch: apart.model(batch["x"]).square().sum(), {"x": x})
    assert not apart.norms.any()  # a row alone is its own mean
    module = randomised(AddsTheOtherRows())
    engine = ClippingEngine(module, max_grad_norm=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PrivacyError):
            engine.check(lambda batch: module(batch["x"]).square().sum(), {"x": x})


def test_random_numbers_beside_a_parameter() -> None:
    """Each call draws its own: what the parameter is multiplied by comes from the forward pass, and not again."""
    module: Any = randomised(Noisy())
    x = torch.randn(3, 4, D, dtype=torch.float64)
    engine = ClippingEngine(module, max_grad_norm=1e9)
    torch.manual_seed(3)
    engine.backward(lambda batch: module(batch["x"]).sum(), {"x": x})
    drawn = []
    torch.manual_seed(3)
    for _ in range(20):
        drawn.append(float(torch.rand(())))
    got = module.weight.grad / x.sum((0, 1))
    assert any(torch.allclose(got, torch.full_like(got, number)) for number in drawn)


def test_a_second_argument() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gated = Gated()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.gated(self.gated(x), gate=x) + self.gated(x, x)
            return out

    assert how(randomised(Model()), torch.randn(3, 4, D, dtype=torch.float64)) == "fast"
