"""Compiled models: the numbers of the oracle, in one graph, and whatever compiled code does not show is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.pytorch_utils import Conv1D

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.layers.compiled import EmbeddingVariant, LayerNormVariant, LinearVariant, is_compiled
from tests.support.models import Batch, batch_of, loss_of, tiny
from tests.support.oracle import clipped_sum, distance, each_row, grads, rows_of, unit_gradients

Loss = Callable[[Any], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests, and counters at zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """Words at positions, a norm and two products."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, width, padding_idx=0), nn.Embedding(9, width)
        self.norm, self.hidden, self.out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0))
        return self.last(self.norm(x).relu())

    def last(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.hidden(x).tanh())
        return out


class OtherNorm(Small):
    """With torch's own RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6)  # type: ignore[assignment]


class UsedElsewhere(Small):
    """Uses a weight of a layer without the layer."""

    def last(self, x: Tensor) -> Tensor:
        return super().last(x) + F.linear(x, self.out.weight)


class Halved(Conv1D):
    """Says what comes out of the layer it is made of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2  # type: ignore[no-any-return, no-untyped-call]


class WithSubclass(Small):
    """With a product of a subclass's own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = Halved(6, 6)  # type: ignore[assignment, no-untyped-call]


class Twice(Small):
    """Calls a layer twice with the same input, which a compiler merges into one call, forward and backward."""

    def last(self, x: Tensor) -> Tensor:
        x = self.hidden(x) + self.hidden(x)
        out: Tensor = self.out(x)
        return out


class OwnParameter(Small):
    """Holds a parameter that no variant knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def last(self, x: Tensor) -> Tensor:
        return super().last(x * self.scale)


class Softmax(nn.Module):
    """Multiplies by numbers that depend on all of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.softmax(0)


class ScaledBySoftmax(Small):
    """Has a scale whose numbers do not stay in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Softmax()

    def last(self, x: Tensor) -> Tensor:
        return super().last(self.scale(x))


class PlacesMixed(Small):
    """Computes more of the positions, for all rows at once, than a sum."""

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]).unsqueeze(0))
        return self.last(self.norm(self.words(ids) + places.softmax(0) * places.cumsum(1)).relu())


class OtherwiseInTraining(Small):
    """Calls its layers with rows of tokens while layouts are learnt, in evaluation mode, and with flat ones in training."""

    def last(self, x: Tensor) -> Tensor:
        return super().last(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.training else super().last(x)


def small(kind: type[Small] = Small, dtype: torch.dtype = torch.float64) -> Small:
    torch.manual_seed(0)
    return kind().to(dtype).eval()


def ids_of(rows: int, length: int) -> Batch:
    return {"ids": torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(rows))}


def squares(run: Callable[..., Tensor]) -> Loss:
    def loss(batch: Any) -> Tensor:
        return run(batch["ids"]).square().sum()

    return loss


def assert_exact(
    engine: ClippingEngine, model: nn.Module, loss: Loss, plain: Loss, batch: Batch, tolerance: float, owners: Any = None
) -> None:
    """In the engine, a batch gives norms and sum of the oracle, which runs `plain`, at a bound that clips half of the units."""
    parts: Sequence[Batch] = each_row(batch)
    if owners is not None:
        parts = [rows_of(batch, (owners == unit).nonzero().flatten()) for unit in range(int(owners.max()) + 1)]
    with engine.eagerly():
        gradients = unit_gradients(model, plain, parts)
    scale = [engine.max_grad_norm / float(clipped_sum(gradients, 1.0)[1].median())] * len(parts)
    wanted, norms = clipped_sum(gradients, engine.max_grad_norm, scale=scale)
    engine.backward(loss, batch, owners, torch.tensor(scale, dtype=torch.float64))
    torch.testing.assert_close(engine.norms.double(), norms, rtol=tolerance, atol=0.0)
    assert distance(grads(model), {name: wanted[name] for name in grads(model)}) < tolerance
    model.zero_grad()


SOME = ("words.weight", "norm.weight", "hidden.weight", "places.weight")
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "dp_flash"])


def check_family(
    name: str, attention: str, *, backend: str, dtype: torch.dtype, strategy: Any = "bookkeeping", tolerance: float
) -> None:
    """Ragged batches of a family, all in the graphs of the first."""
    check_model(
        tiny(name, dtype, attention=attention), name, backend=backend, dtype=dtype, strategy=strategy, tolerance=tolerance
    )


def check_model(model: Any, name: str, *, backend: str, dtype: torch.dtype, strategy: Any, tolerance: float) -> None:
    compiled: Any = torch.compile(model, backend=backend, dynamic=True)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy=strategy)
    shapes = ((5, 7), (3, 7), (4, 9), (7, 6))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compiled code does not show|.*computed by itself")
        for number, (rows, length) in enumerate(shapes):
            batch = batch_of(name, rows, length, dtype, seed=number)
            assert_exact(engine, model, loss_of(name, compiled), loss_of(name, model), batch, tolerance)
            assert counters["stats"]["unique_graphs"] == 1, counters["graph_break"]
    assert engine.runs_compiled
    assert not counters["graph_break"]


@pytest.mark.complete
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("gpt2", "dp_flash"),
        pytest.param("gpt2", "sdpa", marks=pytest.mark.complete),
        pytest.param("qwen3", "dp_flash", marks=pytest.mark.complete),
    ],
)
def test_ragged_batches_of_one_graph_equal_the_oracle(name: str, attention: str) -> None:
    """Positions for all rows, Conv1D, biases and tied embeddings; norms of rows and of heads."""
    check_family(name, attention, backend="aot_eager", dtype=torch.float64, tolerance=1e-11)


@pytest.mark.coverage
@ATTENTION
@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "qwen3", "bert", "gemma3", "opt", "roberta", "distilbert", "bert_classifier"]
)
def test_more_families_equal_the_oracle(name: str, attention: str) -> None:
    """Gemma 3 with masks of two kinds, of which one is a window."""
    check_family(name, attention, backend="aot_eager", dtype=torch.float64, tolerance=1e-11)


@pytest.mark.coverage
@ATTENTION
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3"])
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_families_compiled_by_inductor_equal_the_oracle(name: str, strategy: str, attention: str) -> None:
    """Float32, of which the oracle's gradients have some thousand roundings as well."""
    check_family(name, attention, backend="inductor", dtype=torch.float32, strategy=strategy, tolerance=2e-5)


@pytest.mark.complete
def test_adapters_equal_the_oracle() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), adapters).double().eval()
    check_model(model, "llama", backend="aot_eager", dtype=torch.float64, strategy="bookkeeping", tolerance=1e-11)


@pytest.mark.complete
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_checkpointed_layers_equal_the_oracle(strategy: str) -> None:
    model = tiny("llama").train()  # it has no dropout
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_model(model, "llama", backend="aot_eager", dtype=torch.float64, strategy=strategy, tolerance=1e-11)


@pytest.mark.complete
def test_a_small_model_compiled_by_inductor_equals_the_oracle() -> None:
    model = small()
    compiled: Any = torch.compile(model, dynamic=True)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy="bookkeeping")
    for rows, length in ((5, 7), (4, 9)):
        assert_exact(engine, model, squares(compiled), squares(model), ids_of(rows, length), 1e-11)
    assert engine.runs_compiled
    assert counters["stats"]["unique_graphs"] == 1


def test_a_subclass_keeps_its_own_forward() -> None:
    model = small(WithSubclass)
    compiled = compile_whole(model)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy="bookkeeping")
    assert_exact(engine, model, squares(compiled), squares(model), ids_of(3, 2), 1e-11)
    assert engine.runs_compiled


def test_what_is_recorded_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code may write other numbers over the inputs of layers as soon as it is done with them: here NaN."""
    for variant in (LinearVariant, EmbeddingVariant, LayerNormVariant):

        def clobbering(module: Any, recorder: Any, x: Tensor, g: Tensor, original: Any = variant.record) -> None:
            x, g = x.clone(), g.clone()
            original(module, recorder, x, g)
            x.fill_(torch.nan if x.is_floating_point() else 0)
            g.fill_(torch.nan)

        monkeypatch.setattr(variant, "record", staticmethod(clobbering))
    torch.manual_seed(0)
    model = Small(width=64).double()
    compiled = compile_whole(model)
    for strategy in ("bookkeeping", "two_pass"):
        engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy=strategy)
        assert_exact(engine, model, squares(compiled), squares(model), ids_of(3, 2), 1e-11)
        assert engine.runs_compiled
        assert engine.norm_methods()["hidden.weight"].startswith("ghost norm")
        engine.detach()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("strategy", "frozen"),
    [
        ("two_pass", ()),
        ("bookkeeping", SOME),
        pytest.param("bookkeeping", (), marks=pytest.mark.complete),
        pytest.param("two_pass", SOME, marks=pytest.mark.complete),
    ],
)
def test_units_of_several_rows_of_one_row_and_of_none(strategy: Any, frozen: tuple[str, ...]) -> None:
    model = small()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy=strategy)
    for owners in (None, torch.tensor([1, 0, 1, 2, 0]), torch.tensor([0, 0, 0, 0, 0]), torch.tensor([1, -1, 0, 0, 1])):
        assert_exact(engine, model, squares(compiled), squares(model), ids_of(5, 7), 1e-11, owners)
    assert_exact(engine, model, squares(compiled), squares(model), ids_of(1, 7), 1e-11)
    assert engine.runs_compiled
    assert counters["stats"]["unique_graphs"] == 2  # one row is compiled by itself


@pytest.mark.parametrize("kind", [UsedElsewhere, Twice, OwnParameter, ScaledBySoftmax, PlacesMixed])
def test_what_compiled_code_does_not_show_is_found_and_runs_eagerly(kind: type[Small]) -> None:
    model = small(kind)
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy="bookkeeping")
    with pytest.warns(UserWarning, match="runs eagerly from now on"):
        assert_exact(engine, model, squares(compiled), squares(model), ids_of(5, 7), 1e-11)
    assert not engine.runs_compiled
    graphs = counters["stats"]["unique_graphs"]
    assert_exact(engine, model, squares(compiled), squares(model), ids_of(4, 9), 1e-11)
    assert counters["stats"]["unique_graphs"] == graphs
    assert engine.dropped_units == 0


def test_a_layer_whose_layout_is_unknown_is_not_recorded() -> None:
    model = small(OtherwiseInTraining).train()
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    engine = ClippingEngine(compiled, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="computed by itself"):
        assert_exact(engine, model, squares(compiled), squares(model), ids_of(5, 7), 1e-11)
    assert engine.runs_compiled  # it may be known in the next batch


def compile_whole(model: Small) -> Any:
    return torch.compile(model, backend="aot_eager", dynamic=True)


def compile_in_place(model: Small) -> Any:
    model.compile(backend="aot_eager", dynamic=True)
    return model


def compile_parts(model: Small) -> Any:
    for part in (model.norm, model.hidden, model.out):
        part.compile(backend="aot_eager", dynamic=True)
    return model


def compile_forward(model: Small) -> Any:
    model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=True)  # type: ignore[method-assign]
    return model


def test_a_norm_of_torch() -> None:
    model = small(OtherNorm)
    compiled = compile_whole(model)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy="bookkeeping")
    assert_exact(engine, model, squares(compiled), squares(model), ids_of(5, 7), 1e-11)
    assert engine.runs_compiled


@pytest.mark.complete
@pytest.mark.parametrize("compile_it", [compile_whole, compile_in_place, compile_parts, compile_forward])
def test_however_a_model_was_compiled(compile_it: Callable[[Small], Any]) -> None:
    model = small()
    assert not is_compiled(model)
    compiled = compile_it(model)
    assert is_compiled(compiled)
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy="bookkeeping")
    for rows, length in ((5, 7), (4, 9)):
        assert_exact(engine, model, squares(compiled), squares(model), ids_of(rows, length), 1e-11)
    assert engine.runs_compiled
    assert counters["stats"]["unique_graphs"] == (3 if compile_it is compile_parts else 1)


@pytest.mark.complete
def test_a_compiled_loss_function() -> None:
    """The engine sees that the loss function is compiled, not the model; hidden in another function it sees neither."""
    model = small()
    loss = torch.compile(squares(model), backend="aot_eager", dynamic=True)
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy="bookkeeping")
    assert_exact(engine, model, loss, squares(model), ids_of(5, 7), 1e-11)
    assert counters["stats"]["unique_graphs"] == 1
    engine.detach()

    def hidden(batch: Any) -> Tensor:
        out: Tensor = loss(batch)
        return out

    for strategy in ("bookkeeping", "auto"):
        engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
        if strategy == "bookkeeping":
            with pytest.raises(PrivacyError, match="no rule covers"):
                engine.backward(hidden, ids_of(5, 7))
        else:
            with pytest.warns(UserWarning, match="computed by itself"):
                assert_exact(engine, model, hidden, squares(model), ids_of(5, 7), 1e-11)
        engine.detach()


@pytest.mark.complete
def test_outside_the_engine_a_compiled_model_is_what_it_was() -> None:
    """Graphs of the one never serve the other, whichever was first, and a forgotten loss cannot be taken back through taps."""
    model = small()
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    batch = ids_of(5, 7)
    squares(model)(batch).backward()
    wanted = grads(model)

    def assert_plain() -> None:
        model.zero_grad()
        squares(compiled)(batch).backward()
        assert distance(grads(model), wanted) < 1e-12
        model.zero_grad()

    assert_plain()
    engine = ClippingEngine(compiled, max_grad_norm=1.0, strategy="bookkeeping")
    assert_exact(engine, model, squares(compiled), squares(model), batch, 1e-11)
    assert_plain()
    assert_exact(engine, model, squares(compiled), squares(model), batch, 1e-11)
    assert engine.runs_compiled
    assert not counters["graph_break"]

    forgotten: list[Tensor] = []

    def failing(part: Any) -> Tensor:
        forgotten.append(squares(compiled)(part))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.backward(failing, batch)
    with pytest.raises(PrivacyError, match=r"outside engine\.backward"):
        forgotten[0].backward()
    assert not grads(model)

    with engine.batch():  # runs eagerly
        squares(compiled)(batch).backward()
    engine.detach()
    assert all(type(module).__mro__[1] is not type(module) and "_dp_number" not in vars(module) for module in model.modules())
    assert_plain()


def test_dropout_is_repeated_in_the_second_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for strategy in ("bookkeeping", "two_pass"):
        engine = ClippingEngine(compiled, max_grad_norm=0.5, strategy=strategy)
        torch.manual_seed(3)
        engine.backward(lambda batch: compiled(batch["x"]).square().sum(), {"x": x})
        assert engine.runs_compiled
        found.append((engine.norms, grads(model)))
        model.zero_grad()
        engine.detach()
    torch.testing.assert_close(found[0][0], found[1][0])
    assert distance(found[0][1], found[1][1]) < 1e-12


@pytest.mark.complete
def test_autocast_rounds_as_it_does_eagerly() -> None:
    model = tiny("llama", torch.float32)
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    batch, found = batch_of("llama", 5, 7, torch.float32), []
    for run in (model, compiled):
        engine = ClippingEngine(run, max_grad_norm=1.0, strategy="bookkeeping")

        def loss(part: Any, run: Any = run) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of("llama", run)(part)

        engine.backward(loss, batch)
        found.append((engine.norms, grads(model)))
        model.zero_grad()
        engine.detach()
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-2, atol=0.0)
    assert distance(found[1][1], found[0][1]) < 2e-2
