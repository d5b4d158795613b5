"""Parameters used in every way torch offers: exact whatever happens, and in one pass where they can be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.layers.tracking import Tracked
from tests.support.layer_checks import how
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients

D = 6
Use = Callable[[Any, Tensor], Tensor]


class Uses(nn.Module):
    """A vector, a square matrix, stacked matrices and a table; `use` says what becomes of them and the data (rows, T, D)."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.v, self.m = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D))
        self.stack, self.table = nn.Parameter(torch.randn(3, D, D)), nn.Parameter(torch.randn(9, D))
        self.use = use
        self.double()
        self.hidden = [self.v]

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def _changed_in_place(s: Any, x: Tensor) -> Tensor:
    doubled = s.v * 2
    doubled.add_(1)
    out: Tensor = x * doubled
    return out


def _added_in_place(s: Any, x: Tensor) -> Tensor:
    out = x * 1.0
    out += s.v
    out.mul_(s.v)
    return out


def _low_rank(s: Any, x: Tensor) -> Tensor:
    return F.linear(x, s.m + s.table[:D].T @ s.table[3:])


def _first_token(s: Any, x: Tensor) -> Tensor:
    return torch.cat([s.v.expand(len(x), 1, -1), x], 1)


def _stored(s: Any, x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, 0] = s.v
    return out


def _query_over_the_text(s: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(s.m.expand(len(x), -1, -1), x, x)


def _attention(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, *args, **kwargs)


FOLLOWED: dict[str, Use] = {
    "product": lambda s, x: x @ s.m,
    "product_transposed": lambda s, x: F.linear(x, s.m.T),
    "einsum": lambda s, x: torch.einsum("btd,de->bte", x, s.m),
    "einsum_of_three": lambda s, x: torch.einsum("btd,kde,btf->bf", x, s.stack, x),
    "batched": lambda s, x: torch.bmm(x, s.m.expand(len(x), -1, -1)),
    "baddbmm": lambda s, x: torch.baddbmm(s.v, x, s.m.expand(len(x), -1, -1), beta=2.0),
    "addmm_of_flattened_rows": lambda s, x: torch.addmm(s.v, x.flatten(0, 1), s.m).view(x.shape),
    "addmm_scaled": lambda s, x: torch.addmm(s.v, x.flatten(0, 1), s.m, alpha=3.0).view(x.shape),
    "halves_of_a_matrix": lambda s, x: F.linear(x, s.m[:2]).sum(-1, keepdim=True) * F.linear(x, s.m[2:]),
    "overlapping_parts": lambda s, x: F.linear(x, s.m[:4]).sum(-1, keepdim=True) * F.linear(x, s.m[2:]),
    "part_and_whole": lambda s, x: F.linear(F.linear(x, s.m), s.m[:3]),
    "columns": lambda s, x: F.linear(x[..., :3], s.m[:, :3]),
    "stacked": lambda s, x: x + sum(F.linear(x, s.stack[e]) * e for e in range(3)),
    "stacked_transposed": lambda s, x: x @ s.stack[0] + x @ s.stack[2].mT,
    "stacked_twice": lambda s, x: F.linear(torch.tanh(F.linear(x, s.stack[1])), s.stack[1]),
    "unbound": lambda s, x: sum(F.linear(x, w) for w in s.stack.unbind()) + x,
    "chunks": lambda s, x: torch.cat([x * c.sum() for c in s.v.chunk(2)], -1),
    "low_rank": _low_rank,
    "lookup": lambda s, x: s.table[(x[..., 0] > 0).long()] * x,
    "lookup_by_function": lambda s, x: F.embedding((x[..., 0] > 0).long(), s.table) * x,
    "lookup_of_a_sum": lambda s, x: F.embedding((x[..., 0] > 0).long(), s.table + s.v) * x,
    "tied": lambda s, x: F.linear(F.embedding((x[..., 0] > 0).long(), s.table), s.table),
    "positions": lambda s, x: x * s.table[: x.shape[1]],
    "positions_in_order": lambda s, x: x * s.table[torch.arange(x.shape[1])],
    "where": lambda s, x: torch.where(x > 0, s.v, x),
    "lerp": lambda s, x: torch.lerp(x, s.v, 0.3),
    "addcmul": lambda s, x: torch.addcmul(s.v, x, s.v),
    "scaled_power": lambda s, x: (s.v.abs() + 1) ** x,
    "scalar": lambda s, x: x * s.v[0] + s.v.sum(),
    "negative_exponential": lambda s, x: x * -torch.exp(s.v),
    "softmax_of_itself": lambda s, x: x * s.m.softmax(-1)[0],
    "as_another": lambda s, x: x + s.v.expand_as(x) + x.type_as(s.v),
    "view_as": lambda s, x: x + s.m.view_as(s.m.T) @ s.v,
    "more_dimensions_than_the_data": lambda s, x: (x[:, 0] * s.stack[:, :1]).sum(0),
    "along_the_text": lambda s, x: x * s.v[: x.shape[1], None],
    "rows_only": lambda s, x: x[:, 0, 0, None] * s.v,
    "first_token": _first_token,
    "query_over_the_text": _query_over_the_text,
    "added_in_place": _added_in_place,
    "bias_of_logits": lambda s, x: _attention(x, s.m[: x.shape[1], : x.shape[1]]),
    "bias_of_the_heads": lambda s, x: _attention(x, attn_mask=s.stack[:2, : x.shape[1], : x.shape[1]]),
    "by_its_largest": lambda s, x: F.linear(x, s.m / s.m.abs().max(1, keepdim=True).values),
    "orthogonal": lambda s, x: F.linear(x, torch.linalg.qr(s.m).Q * s.v),
    "sorted": lambda s, x: x * s.v.sort().values,
    "sum_used_twice": lambda s, x: F.linear(torch.tanh(F.linear(x, s.m + s.stack[0])), s.m + s.stack[0]),
    "lookup_padded_at_the_end": lambda s, x: F.embedding((x[..., 0] > 0).long() * 8, s.table, padding_idx=-1) * x,
    "lookup_from_the_end": lambda s, x: s.table[-1 - (x[..., 0] > 0).long()] * x,
    "by_name": lambda s, x: torch.matmul(F.linear(input=x, weight=s.m, bias=s.v), other=s.m),
    "prelu": lambda s, x: F.prelu(x.mT, s.v),
    "convolution_by_a_permuted_weight": lambda s, x: F.conv2d(x[:, None], s.stack[:, None].transpose(2, 3), padding=2),
    "bilinear": lambda s, x: F.bilinear(x, x, s.stack, s.v[:3]),
    "group_norm": lambda s, x: F.group_norm(x.mT, 2, s.v, s.v * 2),
    "layer_norm_of_parameters": lambda s, x: x + F.layer_norm(s.table[: x.shape[1]], (D,), s.v, s.v.exp()),
    "layer_norm_over_two": lambda s, x: F.layer_norm(x, x.shape[1:], s.table[: x.shape[1]]),
    "depthwise": lambda s, x: F.conv1d(x.mT, s.m[:, None, :2], s.v, padding=1, groups=D),
    "convolution_with_a_made_weight": lambda s, x: F.conv1d(x.mT, s.stack.permute(1, 2, 0) * s.v[:, None, None]),
    "cumulated": lambda s, x: x * s.v.cumsum(0).flip(0),
    "kronecker": lambda s, x: x @ torch.kron(s.m[:2, :2], s.m[:3, :3]),
    "sequence_first": lambda s, x: (x.transpose(0, 1) @ s.m + s.v).transpose(0, 1),
    "scattered": lambda s, x: x + torch.gather(s.table.expand(len(x), -1, -1), 1, (x > 0).long()),
}


def _view_changed(s: Any, x: Tensor) -> Tensor:
    positions = F.embedding(torch.arange(x.shape[1]), s.table)
    positions[:, :2].mul_(0.5)
    return x + positions


def _hooked(s: Any, x: Tensor) -> Tensor:
    matrix = s.m * 1.0
    if matrix.requires_grad:
        matrix.register_hook(lambda g: g * 0.1)
    return F.linear(x, matrix)


NOT_FOLLOWED: dict[str, Use] = {
    "stored": _stored,
    "changed_in_place": _changed_in_place,
    "changed_in_place_and_times_another": lambda s, x: x * ((s.v * 2).add_(1) * s.m[0]),
    "through_a_view": _view_changed,
    "hooked": _hooked,
    "beside_a_hidden_one": lambda s, x: x * (s.v * vars(s)["hidden"][0]),
}


@pytest.mark.parametrize("shape", [(3, 4, D), (D, D, D), (1, 4, D)], ids=str)
@pytest.mark.parametrize("use", FOLLOWED)
def test_followed(use: str, shape: tuple[int, ...]) -> None:
    for strategy in ("bookkeeping", "two_pass"):
        model = Uses(FOLLOWED[use])
        reached = torch.autograd.grad(model(torch.randn(shape).double()).sum(), list(model.parameters()), allow_unused=True)
        for parameter, gradient in zip(model.parameters(), reached, strict=True):
            parameter.requires_grad_(gradient is not None)
        assert how(model, torch.randn(shape, dtype=torch.float64), strategy=strategy, tolerance=1e-10) == "fast"


@pytest.mark.parametrize("use", ["bilinear", "low_rank", "einsum_of_three", "baddbmm", "stacked", "group_norm"])
def test_beside_frozen_parameters(use: str) -> None:
    for frozen in ("v", "m", "stack", "table"):
        model = Uses(FOLLOWED[use])
        getattr(model, frozen).requires_grad_(False)
        used = torch.autograd.grad(
            model(torch.randn(3, 4, D).double()).sum() + sum(0 * p.sum() for p in model.parameters()),
            [p for p in model.parameters() if p.requires_grad],
        )
        if any(g.any() for g in used):
            assert how(model, torch.randn(3, 4, D, dtype=torch.float64), tolerance=1e-10) == "fast"


@pytest.mark.parametrize("use", NOT_FOLLOWED)
def test_not_followed_and_exact(use: str) -> None:
    """Least of all where it would be taken for a constant."""
    assert how(Uses(NOT_FOLLOWED[use]), torch.randn(3, 4, D, dtype=torch.float64)) == "unit by unit"


@pytest.mark.parametrize("use", FOLLOWED)
def test_users_with_several_rows(use: str) -> None:
    model, x = Uses(FOLLOWED[use]), torch.randn(5, 4, D, dtype=torch.float64)
    units, weights = torch.tensor([1, 0, 1, -1, 2]), torch.rand(5, dtype=torch.float64)

    def loss(batch: Any) -> Tensor:
        out = model(batch["x"])
        total: Tensor = (out.square().flatten(1).sum(1) * batch["weights"]).sum()
        return total

    rows = each_row({"x": x, "weights": weights})
    alone = unit_gradients(model, loss, rows)
    gradients = [{n: alone[a][n] + alone[b][n] for n in alone[a]} if a != b else alone[a] for a, b in ((1, 1), (0, 2), (4, 4))]
    C = float(clipped_sum(gradients, 1.0)[1].median())
    wanted, norms = clipped_sum(gradients, C)
    engine = ClippingEngine(model, max_grad_norm=C)
    engine.backward(loss, {"x": x, "weights": weights}, units)
    assert not engine.uncovered
    found = {**{name: torch.zeros_like(g) for name, g in wanted.items()}, **grads(model)}
    assert distance(found, wanted) < 1e-10
    torch.testing.assert_close(engine.norms.double(), norms)


@pytest.mark.parametrize(
    "use", ["first_token", "negative_exponential", "stacked", "depthwise", "query_over_the_text", "low_rank"]
)
def test_under_checkpointing_and_autocast(use: str) -> None:
    model, x = Uses(FOLLOWED[use]), torch.randn(3, 4, D, dtype=torch.float64)

    def checkpointed(x: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(model, x * 1.0, use_reentrant=False)
        return out

    assert how(model, x, forward=checkpointed) == "fast"
    half = Uses(FOLLOWED[use]).float()

    def loss(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            total: Tensor = half(batch["x"]).float().square().sum()
        return total

    wanted, _ = clipped_sum(unit_gradients(half, loss, each_row({"x": x.float()})), 1.0)
    engine = ClippingEngine(half, max_grad_norm=1.0, strategy="bookkeeping")
    engine.backward(loss, {"x": x.float()})
    found = {**{name: torch.zeros_like(g) for name, g in wanted.items()}, **grads(half)}
    assert distance(found, wanted) < 16 * 2**-9  # a few roundings to bfloat16's 8 bits


@pytest.mark.parametrize(
    "use",
    [
        lambda s, x: x * F.dropout(s.v, 0.5, True),
        lambda s, x: x * F.rrelu(-s.v.abs(), training=True),
        lambda s, x: F.scaled_dot_product_attention(x @ s.m, x, s.m.expand(len(x), -1, -1)[:, :4], dropout_p=0.5),
    ],
)
def test_random_functions_of_parameters_are_left_to_single_units(use: Use) -> None:
    """Backward would have to repeat them, and draw other numbers."""
    model = Uses(use)
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="no rule covers how the model uses [vm]"):
        engine.backward(lambda batch: model(batch["x"]).sum(), {"x": torch.randn(3, 4, D, dtype=torch.float64)})


SECOND = {use: FOLLOWED[use] for use in ("product", "layer_norm_over_two", "depthwise", "einsum", "lookup", "scalar")}
SECOND["layer_norm"] = lambda s, x: F.layer_norm(x, (D,), s.v)


@pytest.mark.parametrize("second", ["backward", "saliency"])
@pytest.mark.parametrize("use", SECOND)
def test_a_second_backward_inside_the_batch_primitive(use: str, second: str) -> None:
    """What is recorded twice would count twice, so it is refused. A gradient of the input may pass nothing that records."""
    model, x = Uses(SECOND[use]), torch.randn(3, 4, D, dtype=torch.float64, requires_grad=True)
    engine = ClippingEngine(model, max_grad_norm=1.0)

    def twice() -> None:
        with engine.batch():
            loss = model(x).square().sum()
            if second == "saliency":
                torch.autograd.grad(loss, x, retain_graph=True)
            else:
                loss.backward(retain_graph=True)
            loss.backward()

    with engine.batch():
        model(x).square().sum().backward()
    once = grads(model)
    if second == "saliency" and use in ("lookup", "scalar"):
        model.zero_grad()
        twice()
    else:
        with pytest.raises(PrivacyError, match="taken twice"):
            twice()
    after = grads(model)
    assert after.keys() == once.keys()
    assert all(torch.equal(after[name], once[name]) for name in once)


def test_a_list_that_grows_after_the_call_does_not_change_what_was_recorded() -> None:
    """Of parameters alone, and with the data among them: what backward repeats is the call as it was."""

    def use(s: Any, x: Tensor) -> Tensor:
        halves = [s.m[:2], s.m[2:]]
        matrix = torch.cat(halves)
        halves.append(s.m)
        halves[0] = s.m[:1]
        parts = [s.v.expand(len(x), 1, -1), x]
        longer = torch.cat(parts, 1)
        parts.append(x)
        parts[0] = x
        return F.linear(longer, matrix)

    for strategy in ("bookkeeping", "two_pass"):
        assert how(Uses(use), torch.randn(3, 4, D, dtype=torch.float64), strategy=strategy, tolerance=1e-10) == "fast"


def test_a_scalar_does_not_widen_the_result() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(D, D, dtype=torch.bfloat16), nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) * self.scale
            assert out.dtype == torch.bfloat16
            return out

    model = Scaled()
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy="bookkeeping")
    engine.backward(lambda b: model(b["x"]).float().square().sum(), {"x": torch.randn(3, 4, D, dtype=torch.bfloat16)})
    assert grads(model).keys() == {"inner.weight", "inner.bias", "scale"}


def test_outside_an_engine_nothing_is_tracked() -> None:
    model = Uses(FOLLOWED["product"])
    assert not isinstance(model.m, Tracked)
    engine = ClippingEngine(model, max_grad_norm=1.0)
    assert not isinstance(model.m, Tracked)
    assert model.m is dict(model.named_parameters())["m"]
    engine.detach()
    assert type(model) is Uses
