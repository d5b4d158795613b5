"""The engine's promises: sensitivity, edge cases, leaving the model as it was, refusing what it cannot do."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.units import Units
from tests.support.engines import STRATEGIES, backward
from tests.support.models import Batch, Toy, batch_of, loss_of, tiny, toy_batch, toy_loss
from tests.support.oracle import clipped_sum, distance, each_row, grads, rows_of, total_norm, unit_gradients

# Units.


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("ids", "unit_rows"),
    [
        ([0, 1, 0, 1], [[0, 2], [1, 3]]),
        ([3, 0, 3, 0], [[1, 3], [], [], [0, 2]]),
        ([-1, 0, -1, 1], [[1], [3]]),
        ([0, 0, 0, 0], [[0, 1, 2, 3]]),
        ([2, 2, 2, 2], [[], [], [0, 1, 2, 3]]),
        ([-1, 1, -1, -1], [[], [1]]),
    ],
)
def test_rows_grouped_into_units(strategy: Strategy, ids: list[int], unit_rows: list[list[int]]) -> None:
    model, batch = Toy(), toy_batch()
    gradients = unit_gradients(model, toy_loss(model), [rows_of(batch, rows) for rows in unit_rows if rows])
    wanted, some_norms = clipped_sum(gradients, 0.7)
    norms = torch.zeros(len(unit_rows), dtype=torch.float64)
    norms[[unit for unit, rows in enumerate(unit_rows) if rows]] = some_norms
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = engine.backward(toy_loss(model), batch, torch.tensor(ids))
    assert distance(grads(model), wanted) < 1e-12
    torch.testing.assert_close(engine.norms, norms, rtol=1e-12, atol=0.0)
    if -1 not in ids:
        torch.testing.assert_close(loss, toy_loss(model)(batch).detach())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ids", [None, [], [-1, -1]])
def test_a_batch_without_units_adds_nothing(strategy: Strategy, ids: list[int] | None) -> None:
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
    batch = toy_batch(rows=len(ids or []))
    loss = engine.backward(toy_loss(model), batch, None if ids is None else torch.tensor(ids, dtype=torch.long))
    assert float(loss) == 0.0
    assert engine.norms.shape == (0,)
    assert all(not engine.clipped_sum(p).any() for p in engine.parameters)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_select_serves_batches_that_are_not_laid_out_by_rows(strategy: Strategy) -> None:
    model = Toy()
    ids = toy_batch()["input_ids"]
    batch = {"columns": ids.T.contiguous()}  # (length, rows)

    def loss(part: Any) -> Tensor:
        return toy_loss(model)({"input_ids": part["columns"].T})

    wanted, norms = clipped_sum(unit_gradients(model, toy_loss(model), each_row({"input_ids": ids})), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    engine.backward(loss, batch, Units.rows(4), select=lambda whole, unit: {"columns": whole["columns"][:, unit : unit + 1]})
    assert distance(grads(model), wanted) < 1e-12
    torch.testing.assert_close(engine.norms, norms)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_scale_multiplies_before_clipping(strategy: Strategy, clipping: Any) -> None:
    model, batch = Toy(), toy_batch()
    scale = [0.05, 3.0, 0.0, -1.0]
    wanted, norms = clipped_sum(unit_gradients(model, toy_loss(model), each_row(batch)), 0.7, clipping, scale)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy, clipping=clipping)
    engine.backward(toy_loss(model), batch, loss_scale=torch.tensor(scale))
    assert distance(grads(model), wanted) < 1e-7  # the scale came in float32
    torch.testing.assert_close(engine.norms, norms, rtol=1e-7, atol=0.0)
    for bad in (torch.ones(3), torch.tensor([1.0, math.nan, 1.0, 1.0]), torch.tensor([1.0, math.inf, 1.0, 1.0])):
        with pytest.raises(ValueError, match="loss_scale"):
            engine.backward(toy_loss(model), batch, loss_scale=bad)


# Sensitivity.


class Scaled(nn.Module):
    """Everything at once: tied table and head, norm, layers wide enough for ghost norms; the batch brings its own loss."""

    def __init__(self, vocabulary: int = 31, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.wide = nn.Linear(width, 40)
        self.norm = nn.LayerNorm(40)
        self.back = nn.Linear(40, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.back(torch.tanh(self.norm(self.wide(self.table(ids))))))
        return out


def weighted_loss(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: (model(batch["ids"]) * batch["weights"]).sum()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 4),
    length=st.integers(1, 5),
    magnitude=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15, 1e20, 1e30, math.inf, math.nan]),
    alike=st.booleans(),
    clipping=st.sampled_from(["flat", "automatic", "per_layer"]),
    strategy=st.sampled_from(STRATEGIES),
)
def test_one_unit_moves_the_clipped_sum_by_no_more_than_the_bound(
    seed: int, rows: int, length: int, magnitude: float, alike: bool, clipping: Any, strategy: Strategy
) -> None:
    """Adding (removing) the last unit, whatever it holds: |S(with) - S(without)| <= C, and S is finite."""
    C = 0.8
    torch.manual_seed(seed)
    model = Scaled()
    ids = torch.randint(0, 31, (rows + 1, length))
    weights = torch.randn(rows + 1, length, 31)
    if alike:  # the same token over and over, with output gradients that cancel
        ids[-1] = ids[-1, 0]
        weights[-1] -= weights[-1].mean(0)
    weights[-1] *= magnitude
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_it, norms, dropped = backward(
            model, weighted_loss(model), {"ids": ids, "weights": weights}, C=C, clipping=clipping, strategy=strategy
        )
        without, others, _ = backward(
            model, weighted_loss(model), {"ids": ids[:-1], "weights": weights[:-1]}, C=C, clipping=clipping, strategy=strategy
        )
    moved = total_norm({n: with_it[n] - without[n] for n in with_it})
    assert moved <= C * (1 + 1e-2 + rows * 1e-4)  # float32: rounding of the sums themselves, each term at most C
    torch.testing.assert_close(norms[:-1], others, rtol=1e-4, atol=1e-6)
    assert dropped == int(not torch.isfinite(norms[-1]))
    if dropped:
        assert moved <= 1e-5 * C * rows


def _largest_move(model: nn.Module, loss: Callable[[Any], Tensor], batch: Batch) -> float:
    """How far the last unit moves the clipped sum, with C = 1."""
    rows = len(next(iter(batch.values())))
    with_it, without = backward(model, loss, batch)[0], backward(model, loss, rows_of(batch, range(rows - 1)))[0]
    return total_norm({n: with_it[n] - without[n] for n in with_it})


@pytest.mark.parametrize("seed", range(6))
def test_a_linear_layer_whose_tokens_cancel(seed: int) -> None:
    """Gram sums in float32 lose every digit here: the terms are 1e10 times C, what is left of them is at the rounding."""
    torch.manual_seed(seed)
    layer = nn.Linear(64, 64, bias=False)
    a, g = torch.randn(3, 4, 64), torch.randn(3, 4, 64)
    a[2], g[2] = a[2] * 1e5, g[2] * 1e5
    a[2, 1], g[2, 1] = a[2, 0], -g[2, 0]
    a[2, 3], g[2, 3] = a[2, 2] * (1 + 1e-6 * torch.randn(64)), -g[2, 2]
    assert _largest_move(layer, lambda b: (layer(b["a"]) * b["g"]).sum(), {"a": a, "g": g}) <= 1.01


@pytest.mark.parametrize("seed", range(6))
def test_a_table_whose_rows_cancel(seed: int) -> None:
    torch.manual_seed(seed)
    table = nn.Embedding(7, 64)
    ids, g = torch.randint(0, 7, (3, 6)), torch.randn(3, 6, 64)
    ids[2] = 3
    g[2] *= 1e10
    g[2, 5] = -g[2, :5].double().sum(0).float()
    assert _largest_move(table, lambda b: (table(b["ids"]) * b["g"]).sum(), {"ids": ids, "g": g}) <= 1.01


@pytest.mark.parametrize("seed", range(6))
def test_a_tied_table_and_head_that_cancel(seed: int) -> None:
    torch.manual_seed(seed)
    table, head = nn.Embedding(67, 16), nn.Linear(16, 67, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head})
    ids, a, rows = torch.randint(0, 67, (3, 4)), torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    g = F.one_hot(ids, 67).float()
    g[2] *= 1e9
    rows[2] = -1e9 * a[2] * (1 + 1e-7 * torch.randn(4, 16))

    def loss(b: Any) -> Tensor:
        total: Tensor = (head(b["a"]) * b["g"]).sum() + (table(b["ids"]) * b["rows"]).sum()
        return total

    assert _largest_move(model, loss, {"ids": ids, "a": a, "g": g, "rows": rows}) <= 1.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["vit", "toy"])
def test_a_unit_that_is_not_finite_adds_exactly_nothing(name: str, strategy: Strategy, bad: float) -> None:
    """In the loss (toy) and in the input, so that every record of it is poisoned (ViT)."""
    if name == "vit":
        model, batch = tiny("vit"), batch_of("vit")
        loss = loss_of("vit", model)
        batch["pixel_values"][2, 0, 0, 0] = bad
    else:
        model, batch = Toy(), {**toy_batch(rows=5), "weight": torch.tensor([1.0, 1.0, bad, 1.0, 1.0], dtype=torch.float64)}

        def loss(part: Any) -> Tensor:
            total: Tensor = (model(part["input_ids"]).square().sum((1, 2)) * part["weight"]).sum()
            return total

    got, norms, dropped = backward(model, loss, batch, C=0.7, strategy=strategy)
    wanted, finite, _ = backward(model, loss, rows_of(batch, [0, 1, 3, 4]), C=0.7, strategy=strategy)
    assert dropped == 1
    assert not torch.isfinite(norms[2])
    torch.testing.assert_close(norms[[0, 1, 3, 4]], finite, rtol=1e-12, atol=0.0)
    assert distance(got, wanted) < 1e-12


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="loss_fn: expected a scalar"):
        engine.backward(lambda batch: model(batch["input_ids"]), toy_batch())


# The primitive under it.


def test_the_batch_primitive_equals_backward() -> None:
    for name in ("gpt2", "llama_tied"):
        model, batch = tiny(name), batch_of(name)
        loss = loss_of(name, model)
        wanted, norms, _ = backward(model, loss, batch, C=0.6)
        engine = ClippingEngine(model, max_grad_norm=0.6)
        for _ in range(2):
            model.zero_grad()
            with engine.batch():
                loss(batch).backward()
            assert distance(grads(model), wanted) < 1e-12
            torch.testing.assert_close(engine.norms, norms)


def test_the_batch_primitive_leaves_grad_alone_when_it_fails() -> None:
    model, batch = Toy(), toy_batch()
    wanted, _ = clipped_sum(unit_gradients(model, toy_loss(model), each_row(batch)), 1.0)
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with pytest.raises(PrivacyError, match="was not called"), engine.batch():
        pass
    with pytest.raises(PrivacyError, match="no backward"), engine.batch():
        late = toy_loss(model)(batch)
    with pytest.raises(PrivacyError, match="outside engine"):
        late.backward()
    with pytest.raises(KeyError), engine.batch():  # noqa: PT012  # gradients first, then the exception
        toy_loss(model)(batch).backward()
        raise KeyError("the user's own")
    assert not grads(model)
    with engine.batch():
        toy_loss(model)(batch).backward()
    assert distance(grads(model), wanted) < 1e-12


# bf16.


@pytest.mark.parametrize("where", ["in the loss", "around the engine"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_autocast_equals_single_units_under_autocast(strategy: Strategy, where: str) -> None:
    model = tiny("llama_tied", torch.float32)
    batch = batch_of("llama_tied", dtype=torch.float32)
    inner = loss_of("llama_tied", model)

    def autocast(part: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return inner(part)

    # A unit alone and in company differ in how bf16 products are blocked, so by a few bf16 roundings (2^-9 each) per layer.
    tolerance = 8 * 2**-9
    wanted, norms = clipped_sum(unit_gradients(model, autocast, each_row(batch)), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around the engine"):
        engine.backward(autocast if where == "in the loss" else inner, batch)
    assert distance(grads(model), wanted) < tolerance
    torch.testing.assert_close(engine.norms.double(), norms, rtol=tolerance, atol=0.0)


def test_norms_are_float32_under_autocast() -> None:
    """The norm of the very gradient that is summed, to float32 rounding, wherever autocast was turned on."""
    model = nn.Linear(48, 48)
    batch = {"x": torch.randn(1, 5, 48)}
    for around in (False, True):
        engine = ClippingEngine(model, max_grad_norm=1e9)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            engine.backward(lambda b: model(b["x"]).float().square().sum(), batch)
        torch.testing.assert_close(float(engine.norms), total_norm(grads(model)), rtol=1e-5, atol=0.0)
        engine.detach()
        model.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_parameters(strategy: Strategy) -> None:
    """Sums stay in float32 where bf16 would lose small units: 300 units of the same gradient."""
    model = nn.Linear(3, 2, bias=False).bfloat16()
    batch = {"x": torch.ones(300, 1, 3, dtype=torch.bfloat16)}
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
    engine.backward(lambda b: model(b["x"]).float().sum(), batch)
    wanted = torch.full((2, 3), 300 / math.sqrt(6))
    (weight,) = engine.parameters
    torch.testing.assert_close(engine.clipped_sum(weight), wanted, rtol=1e-5, atol=0.0)
    assert weight.grad is not None
    assert torch.equal(weight.grad, engine.clipped_sum(weight).bfloat16())


# The model.


def _attributes(model: nn.Module) -> dict[str, tuple[type, set[str], int]]:
    return {
        name: (
            type(module),
            set(vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "vit", "bert"])
def test_detach_gives_the_model_back(name: str, strategy: Strategy) -> None:
    model, batch = tiny(name).train(), batch_of(name)
    modes = {n: module.training for n, module in model.named_modules()}
    attributes, state = _attributes(model), copy.deepcopy(model.state_dict())
    model.eval()
    wanted = loss_of(name, model)(batch)
    model.train()
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
    assert list(model.state_dict()) == list(state)
    engine.backward(loss_of(name, model), batch)
    engine.detach()
    assert _attributes(model) == attributes
    assert {n: module.training for n, module in model.named_modules()} == modes
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    model.eval()
    assert torch.equal(loss_of(name, model)(batch), wanted)
    with pytest.raises(PrivacyError, match="detached"):
        engine.backward(loss_of(name, model), batch)
    engine.detach()  # once more is harmless
    ClippingEngine(model, max_grad_norm=1.0)


def test_attaching_twice_is_refused_and_leaves_the_first_engine_working() -> None:
    model, batch = Toy(), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    for part in (model, model.inner):
        with pytest.raises(UnsupportedError, match="already has a ClippingEngine"):
            ClippingEngine(part, max_grad_norm=1.0)
    engine.backward(toy_loss(model), batch)
    assert set(grads(model)) == {name for name, _ in model.named_parameters()}


def test_a_deep_copy_is_an_ordinary_model() -> None:
    model, batch = Toy(), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=0.7)
    engine.backward(toy_loss(model), batch)
    held = grads(model)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    toy_loss(twin)(batch).backward()
    plain = Toy()
    plain.load_state_dict(twin.state_dict())
    toy_loss(plain)(batch).backward()
    assert distance(grads(twin), grads(plain)) == 0.0
    assert distance(grads(model), held) == 0.0
    engine.backward(toy_loss(model), batch)
    assert distance(grads(model), {n: 2 * g for n, g in held.items()}) < 1e-12


def test_evaluation_and_generation_while_attached() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    prompt = batch["input_ids"][:2, :3]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **options), model(**batch).logits
    engine = ClippingEngine(model, max_grad_norm=1.0)
    engine.backward(loss_of("llama", model), batch)
    held = grads(model)
    assert torch.equal(model.generate(prompt, **options), wanted[0])
    assert torch.equal(model(**batch).logits, wanted[1])
    assert distance(grads(model), held) == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_get_nothing(strategy: Strategy) -> None:
    model, batch = Toy(), toy_batch()
    model.inner.weight.requires_grad_(False)
    model.table.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    wanted, norms = clipped_sum(unit_gradients(model, toy_loss(model), each_row(batch)), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    engine.backward(toy_loss(model), batch)
    assert set(grads(model)) == {"inner.bias", "norm.weight", "head.weight"}
    assert distance(grads(model), wanted) < 1e-12
    torch.testing.assert_close(engine.norms, norms)
    assert not hasattr(model.table, "_dp_recorder")  # not even looked at


# Refusals.


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"max_grad_norm": "1"}, "max_grad_norm"),
        ({"max_grad_norm": 1.0, "clipping": "normal"}, "clipping"),
        ({"max_grad_norm": 1.0, "strategy": "fast"}, "strategy"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        ClippingEngine(Toy(), **options)


@pytest.mark.parametrize("name", ["max_grad_norm", "clipping", "strategy", "norms", "dropped_units"])
def test_what_noise_and_counts_rely_on_cannot_be_set(name: str) -> None:
    """Noise is drawn for the bound that the engine says it has."""
    engine = ClippingEngine(Toy(), max_grad_norm=1.0)
    with pytest.raises(AttributeError):
        setattr(engine, name, 2.0)
    assert engine.max_grad_norm == 1.0


def test_models_that_cannot_be_trained_privately() -> None:
    norms = (
        nn.BatchNorm1d(3),
        nn.SyncBatchNorm(3),
        nn.BatchNorm2d(3, affine=False),
        nn.InstanceNorm1d(3, track_running_stats=True),
    )
    for norm in norms:
        with pytest.raises(UnsupportedError, match="batch normalisation"):
            ClippingEngine(nn.Sequential(nn.Linear(3, 3), norm), max_grad_norm=1.0)
    with pytest.raises(UnsupportedError, match="no parameter"):
        ClippingEngine(Toy().requires_grad_(False), max_grad_norm=1.0)
    model = Toy()
    model.table.max_norm = 1.0
    with pytest.raises(UnsupportedError, match="max_norm"):
        ClippingEngine(model, max_grad_norm=1.0)
    model.table.max_norm = None
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="batch: expected a mapping"):
        engine.backward(toy_loss(model), [toy_batch()])  # type: ignore[arg-type]


class Pictures(nn.Module):
    """Two pictures for every row, all of them in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.patch, self.out = nn.Embedding(11, 4), nn.Linear(3, 4), nn.Linear(4, 11)
        self.double()

    def forward(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
        seen = self.patch(pictures).unflatten(0, (len(input_ids), -1)).sum(1, keepdim=True)
        out: Tensor = self.out(torch.tanh(self.table(input_ids) + seen))
        return out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tensors_that_cannot_be_divided_among_units_are_refused_without_select(strategy: Strategy) -> None:
    model = Pictures()
    batch = {**toy_batch(), "pictures": torch.randn(8, 3, dtype=torch.float64)}

    def loss(part: Any) -> Tensor:
        return F.cross_entropy(model(**part).flatten(0, 1), part["input_ids"].flatten(), reduction="sum")

    def select(whole: Any, unit: int) -> Batch:
        return {"input_ids": whole["input_ids"][unit : unit + 1], "pictures": whole["pictures"][2 * unit : 2 * unit + 2]}

    wanted, _ = clipped_sum(unit_gradients(model, loss, [select(batch, unit) for unit in range(4)]), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    with pytest.raises(ValueError, match=r"pictures.*select="):
        engine.backward(loss, batch)
    assert not grads(model)
    engine.backward(loss, batch, select=select)
    assert distance(grads(model), wanted) < 1e-12


def test_a_packed_batch_needs_its_units() -> None:
    """Without them its one row, several people's, would be clipped as one unit."""
    engine = ClippingEngine(Toy(), max_grad_norm=1.0)
    batch = {**toy_batch(1, 6), "cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32)}
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        engine.backward(toy_loss(engine.model), batch)
    engine.backward(toy_loss(engine.model), batch, units=batch["cu_seq_lens_q"])
    assert len(engine.norms) == 2
