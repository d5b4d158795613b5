"""Norms, and layers recognised as elementwise: what fits is exact, what only looks so is not taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dp_flash_hf.layers import rule_for
from dp_flash_hf.layers.norm import Elementwise, fits_elementwise
from tests.layers.checks import how

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


class ConstantWeight(Vector):
    """Uses another number than its parameter: no gradient at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.detach()


class Noisy(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * torch.rand(())


class Gated(Vector):
    """Recognised without its gate, and called with one."""

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
ONLY_LOOKS_SO: dict[str, Callable[[], nn.Module]] = {
    "softmax_over_the_first": SoftmaxOverTheFirst,
    "first_only": FirstOnly,
    "mean": Mean,
    "total": Total,
    "matrix": Matrix,
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


@pytest.mark.parametrize("name", FITS)
def test_recognised(name: str) -> None:
    module = FITS[name]()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    assert rule_for(module) is Elementwise
    assert type(module) is type(FITS[name]())
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", ONLY_LOOKS_SO)
def test_what_only_looks_elementwise(name: str) -> None:
    assert not fits_elementwise(ONLY_LOOKS_SO[name]())
    for shape in ((3, D, D), (1, D, D)):
        assert how(randomised(ONLY_LOOKS_SO[name]()), torch.randn(shape, dtype=torch.float64)) == "unit by unit"


@pytest.mark.parametrize("layer", [AcrossRows, AddsTheOtherRows, ConstantWeight, Noisy])
def test_layers_no_rule_may_serve(layer: type[nn.Module]) -> None:
    assert not fits_elementwise(layer())


def test_exact_even_where_the_vector_meets_every_feature() -> None:
    for shape in ((3, 4, D), (1, 4, D)):
        how(randomised(Dot()), torch.randn(shape, dtype=torch.float64))


def test_a_second_argument_was_not_tried() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gated = Gated()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.gated(self.gated(x), gate=x) + self.gated(x, x)
            return out

    assert fits_elementwise(Gated())
    assert how(randomised(Model()), torch.randn(3, 4, D, dtype=torch.float64)) == "unit by unit"


def test_modules_that_are_no_candidates() -> None:
    for module in (nn.Linear(3, 3), nn.Tanh(), nn.Bilinear(2, 2, 2), nn.PReLU(3).to("meta"), nn.Sequential(LayerScale())):
        assert not fits_elementwise(module)
