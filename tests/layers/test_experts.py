"""Mixtures of experts whose weights are stacked, against the loop over single units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.layers.experts import routes
from dp_flash_hf.layers.unit_layout import Layout
from dp_flash_hf.units import Units, leading_shape, select_unit
from tests.support.oracle import clipped_sum, distance, grads, unit_gradients

D, EXPERTS, K = 6, 4, 2
STRATEGIES = ("bookkeeping", "two_pass")
# GPT-OSS: biases, weights stored (experts, d, p), gate and up interleaved. Mixtral: neither.
FAMILIES: dict[str, tuple[Any, Any]] = {
    "gpt_oss": (GptOssExperts, GptOssConfig(hidden_size=D, intermediate_size=5, num_local_experts=EXPERTS)),
    "mixtral": (MixtralExperts, MixtralConfig(hidden_size=D, intermediate_size=5, num_local_experts=EXPERTS)),
}


class Mixture(nn.Module):
    """A linear layer and experts behind it. Which ones a token goes to is an input, so that a test can choose."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        layer, config = FAMILIES[family]
        config._experts_implementation = "eager"
        self.first, self.experts = nn.Linear(D, D), layer(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.7)
        self.to(dtype)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x: (rows, length, D), index and weights: (rows, length, K)."""
        tokens = torch.tanh(self.first(x)).flatten(0, 1)
        out: Tensor = self.experts(tokens, index.flatten(0, 1), weights.flatten(0, 1))
        return out.view(x.shape)


def batch_of(rows: int, length: int, reached: tuple[int, ...] = (0, 1, 2, 3), dtype: torch.dtype = torch.float64) -> Any:
    """Tokens that each go to K different experts among those `reached`; `seed` makes every token's loss its own."""
    choices = torch.rand(rows, length, len(reached)).argsort(-1)[..., :K]
    return {
        "x": torch.randn(rows, length, D, dtype=dtype),
        "index": torch.tensor(reached)[choices],
        "weights": torch.rand(rows, length, K, dtype=dtype) + 0.1,
        "seed": torch.randn(rows, length, D, dtype=dtype),
    }


def loss_of(model: nn.Module, *, autocast: bool = False) -> Any:
    def loss(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(batch["x"], batch["index"], batch["weights"]).to(batch["x"].dtype)
        total: Tensor = (out.square() + out * batch["seed"]).sum()
        return total

    return loss


def agree(
    model: nn.Module,
    batch: Any,
    units: Tensor | None = None,
    *,
    strategy: Any = "bookkeeping",
    autocast: bool = False,
    tolerance: float = 1e-11,
    oracle_batch: Any = None,
) -> dict[str, Tensor]:
    """The clipped sums, once they and the norms agree with those of every unit alone. The strategy runs or raises."""
    alone = oracle_batch or batch
    loss, resolved = loss_of(model, autocast=autocast), Units.of(units, leading_shape(batch))
    owners = [unit for unit, size in enumerate(resolved.sizes) if size]
    found_alone = unit_gradients(model, loss, [select_unit(alone, resolved, unit) for unit in owners])
    nothing = {name: torch.zeros_like(g) for name, g in found_alone[0].items()}
    gradients = [found_alone[owners.index(unit)] if unit in owners else nothing for unit in range(resolved.n)]
    C = float(clipped_sum(gradients, 1.0)[1].median())
    wanted, norms = clipped_sum(gradients, C)
    engine = ClippingEngine(model, max_grad_norm=C, strategy=strategy)
    engine.backward(loss, batch, units)
    torch.testing.assert_close(engine.norms.double(), norms, rtol=tolerance, atol=1e-12)
    found = grads(model)
    assert distance(found, wanted) < tolerance
    engine.detach()
    model.zero_grad()
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_a_unit(family: str, strategy: str) -> None:
    agree(Mixture(family), batch_of(4, 5), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_several_rows_and_unassigned_rows(family: str, strategy: str) -> None:
    agree(Mixture(family), batch_of(5, 3), torch.tensor([1, 0, 1, -1, 3]), strategy=strategy)  # unit 2 has no row


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "ids",
    [
        [[0, 0, 0, 0, 1, 2, 2]],
        [[-1, 1, 1, -1, 0, 0, 0, 0, 0, 3, -1]],  # unit 2 has no token
        [[0, 0, 1, 1, 1, -1], [2, 0, 0, 0, 3, 3]],  # a unit in two rows
    ],
    ids=["ragged", "unassigned", "two rows"],
)
def test_packed_rows(ids: list[list[int]], family: str, strategy: str) -> None:
    agree(Mixture(family), batch_of(len(ids), len(ids[0])), torch.tensor(ids), strategy=strategy)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reached", [(0, 2), (1, 3), (3, 0, 1)], ids=str)
def test_experts_that_no_token_reaches_get_no_gradient(reached: tuple[int, ...], family: str) -> None:
    found = agree(Mixture(family), batch_of(3, 4, reached))
    for name in (name for name in found if name.startswith("experts")):
        for expert in range(EXPERTS):
            assert bool(found[name][expert].any()) == (expert in reached), (name, expert)


def test_experts_that_only_one_unit_reaches() -> None:
    batch = batch_of(3, 4, (0, 1))
    batch["index"][1] = torch.tensor([2, 3])
    agree(Mixture("gpt_oss"), batch)


def test_a_choice_beyond_the_last_expert_adds_nothing() -> None:
    """As expert parallelism marks choices of experts that another rank has."""
    batch = batch_of(3, 4)
    left_out = torch.rand(batch["index"].shape) < 0.4
    none = {**batch, "weights": batch["weights"].masked_fill(left_out, 0.0)}
    batch["index"] = batch["index"].masked_fill(left_out, EXPERTS)
    agree(Mixture("gpt_oss"), batch, oracle_batch=none)


@pytest.mark.parametrize("frozen", ["bias", "proj", "first", "gate_up"])
def test_beside_frozen_parameters(frozen: str) -> None:
    model = Mixture("gpt_oss")
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if (last.endswith(frozen) if frozen in ("bias", "proj") else frozen in name) or name.startswith(frozen):
            parameter.requires_grad_(False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for strategy in STRATEGIES:
        assert agree(model, batch_of(3, 4), strategy=strategy).keys() == trained


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family: str, strategy: str) -> None:
    """A unit alone and in company differ by where bfloat16 rounds, 2^-9 of a number each, a few times on the way."""
    batch = batch_of(4, 5, dtype=torch.float32)
    agree(Mixture(family, torch.float32), batch, strategy=strategy, autocast=True, tolerance=16 * 2**-9)


def test_routes_sort_by_expert_and_then_by_unit() -> None:
    ids = torch.tensor([1, -1, 0, 1])
    layout = Layout(Units("rows", ids, 2), (4,), (0,))
    route = routes(torch.tensor([[2, 0], [0, 2], [2, 3], [0, 2]]), layout, 3)  # 3: no expert
    assert route.ends == [0, 3, 3, 7]
    assert list(zip(route.tokens.tolist(), route.slots.tolist(), route.units.tolist(), strict=True)) == [
        *((0, 1, 1), (3, 0, 1), (1, 0, 2)),
        *((2, 0, 0), (0, 0, 1), (3, 1, 1), (1, 1, 2)),
    ]
