"""Attacks on the engine's knowledge of which unit owns which row: every one must end exact, or in an error."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from tests.support.layer_checks import squares
from tests.support.models import Batch
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients

WIDTH = 4


def outcome(model: nn.Module, *batches: Batch, units: Tensor | None = None, parts: list[Batch] | None = None) -> str:
    """'fast' or 'unit by unit' for the last batch, after the ones before it; every one of them is compared with the oracle."""
    model = model.double()
    reference = copy.deepcopy(model)
    engine = ClippingEngine(model, max_grad_norm=0.5)
    how = "fast"
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        pieces = parts if last and parts is not None else each_row(batch)
        gradients = unit_gradients(reference, squares(reference), pieces)
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.backward(squares(model), batch, units if last else None)
        how = "unit by unit" if engine.uncovered or any("exact, but slower" in str(w.message) for w in caught) else "fast"
        if all(torch.isfinite(g).all() for unit in gradients for g in unit.values()):
            wanted, norms = clipped_sum(gradients, 0.5)
            assert distance(grads(model), wanted) < 1e-10
            torch.testing.assert_close(engine.norms, norms, rtol=1e-10, atol=1e-12)
    return how


def numbers(rows: int, length: int) -> Batch:
    return {"x": torch.randn(rows, length, WIDTH, dtype=torch.float64)}


class Body(nn.Module):
    """Two linear layers; subclasses move rows about around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def layers(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Interleaved(Body):
    """(rows, length, d) -> (length * rows, d): the flattening whose row r belongs to unit r % rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length, d = x.shape
        return self.layers(x.transpose(0, 1).reshape(-1, d)).view(length, rows, d).transpose(0, 1)


class SequenceFirst(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)).transpose(0, 1)


class Flattened(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(0, 1)).view(x.shape)


@pytest.mark.parametrize(("rows", "length"), [(3, 5), (4, 4), (2, 6)])
def test_layouts_that_are_understood(rows: int, length: int) -> None:
    for model in (SequenceFirst(), Flattened()):
        assert outcome(model, numbers(rows, length)) == "fast"
    assert outcome(SequenceFirst(), numbers(4, 3), numbers(3, 4), numbers(1, 4), numbers(4, 4)) == "fast"
    assert outcome(Flattened(), numbers(4, 3), numbers(3, 4), numbers(1, 4), numbers(4, 4)) == "fast"


FIRST: dict[str, Callable[[], Batch]] = {
    "one token, where both flattenings agree": lambda: numbers(3, 1),
    "equal rows": lambda: {"x": torch.ones(3, 5, WIDTH, dtype=torch.float64)},
    "zeros": lambda: {"x": torch.zeros(3, 5, WIDTH, dtype=torch.float64)},
    "NaN": lambda: {"x": torch.full((3, 5, WIDTH), float("nan"), dtype=torch.float64)},
    "one unit only": lambda: numbers(1, 5),
    "as many rows as tokens": lambda: numbers(5, 5),
}


@pytest.mark.parametrize("first", FIRST)
def test_interleaved_rows_are_never_taken_for_flattened_ones(first: str) -> None:
    assert outcome(Interleaved(), numbers(3, 5)) == "unit by unit"
    assert outcome(Interleaved(), FIRST[first](), numbers(3, 5)) == "unit by unit"


@pytest.mark.parametrize("first", FIRST)
def test_a_first_batch_that_tells_nothing_does_not_make_the_next_ones_slow(first: str) -> None:
    assert outcome(Flattened(), FIRST[first](), numbers(3, 5)) == "fast"


class Reordered(Body):
    """The second layer sees the rows in another order than the first."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        out: Tensor = self.second(torch.tanh(self.first(x))[order])
        return out[order.argsort()]


def _all_but_the_last(x: Tensor) -> Tensor:
    return torch.cat([torch.arange(len(x) - 1).roll(1), torch.tensor([len(x) - 1])])


def _by_size(x: Tensor) -> Tensor:
    order: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1).argsort()
    return order


@pytest.mark.parametrize("order", [_all_but_the_last, _by_size], ids=["last_stays", "by_size"])
def test_rows_reordered_inside(order: Callable[[Tensor], Tensor]) -> None:
    batch = numbers(4, 5)
    assert outcome(Reordered(order), batch) == "unit by unit"


class Experts(nn.Module):
    """Hard routing to linear layers, which get as many rows as the data say."""

    def __init__(self, learned_router: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 1) if learned_router else None
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        score = rows[:, 0] if self.router is None else self.router(rows)[:, 0]
        out = torch.zeros_like(rows)
        for chosen, expert in zip((score > 0, score <= 0), self.experts, strict=True):
            index = chosen.nonzero().flatten()
            out = out.index_add(0, index, expert(rows[index]) * (1 + score[index].square()).unsqueeze(1))
        return torch.tanh(out).view(x.shape)


def _routed(*counts: int, length: int = 6) -> Batch:
    """A batch whose rows send so many tokens each to the first expert."""
    x = numbers(len(counts), length)["x"]
    for row, count in zip(x, counts, strict=True):
        row[:, 0] = -1
        row[:count, 0] = 1
    return {"x": x}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "counts",
    [
        [(3, 3), (2, 4)],  # as many rows in all, which is what the second batch cannot tell by its shape
        [(2, 4, 3)],
        [(1, 1, 1), (0, 3, 0)],
        [(6, 6), (5, 1)],
        [(0, 0), (6, 6), (2, 4)],
    ],
)
def test_routed_rows(counts: list[tuple[int, ...]], seed: int) -> None:
    torch.manual_seed(seed)
    assert outcome(Experts(), *(_routed(*row) for row in counts)) == "unit by unit"


def test_routed_rows_of_another_length() -> None:
    assert outcome(Experts(), _routed(3, 3), _routed(4, 6, length=10)) == "unit by unit"


def test_rows_routed_by_a_layer() -> None:
    model = Experts(learned_router=True).double()
    assert model.router is not None
    with torch.no_grad():
        model.router.weight.zero_()[0, 0] = 1.0
        model.router.bias.zero_()
    assert outcome(model, _routed(3, 3), _routed(2, 4)) == "unit by unit"


class Unpadded(Body):
    """Drops padding, as models with variable-length attention do."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(x[attention_mask.bool()])


def test_padding_dropped_inside() -> None:
    def masked(*lengths: int) -> Batch:
        mask = (torch.arange(6) < torch.tensor(lengths).unsqueeze(1)).long()
        return {**numbers(len(lengths), 6), "attention_mask": mask}

    assert outcome(Unpadded(), masked(6, 6), masked(6, 6)) == "unit by unit"
    assert outcome(Unpadded(), masked(4, 4), masked(3, 5)) == "unit by unit"


class Positions(nn.Module):
    """Token and position tables; `how` adds the second to the first."""

    def __init__(self, how: Callable[[Tensor, nn.Embedding], Tensor]) -> None:
        super().__init__()
        self.tokens, self.positions, self.out = nn.Embedding(12, WIDTH), nn.Embedding(16, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.how(self.tokens(ids), self.positions)))
        return out


class Segments(nn.Module):
    """Texts cut into segments of three tokens, the first segments of all texts before the second ones, with their places."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        segments = x.unflatten(1, (-1, 3)).transpose(0, 1).flatten(0, 2)
        placed: Tensor = segments * self.places(torch.arange(3).repeat(len(segments) // 3))
        return placed.view(-1, len(x), 3, WIDTH).transpose(0, 1).flatten(1, 2)


def test_places_that_are_alike_in_all_texts_do_not_tell_whose_they_are() -> None:
    assert outcome(Segments(), numbers(4, 6)) == "unit by unit"


def _range(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


SHARED_TABLES: dict[str, Callable[[Tensor, nn.Embedding], Tensor]] = {
    "(1, T)": lambda h, table: h + table(_range(h)[None]),
    "(1, T) squeezed": lambda h, table: h + table(_range(h)[None]).squeeze(0),
    "(1, T) transposed": lambda h, table: (h.transpose(0, 1) + table(_range(h)[None]).transpose(0, 1)).transpose(0, 1),
    "(1, 1)": lambda h, table: h + table(torch.zeros(1, 1, dtype=torch.long)),
    "(1, T)[0]": lambda h, table: h + table(_range(h)[None])[0],
    "(1, T) mean": lambda h, table: h + table(_range(h)[None]).mean(0),
    "(1, T) flipped": lambda h, table: h + table(_range(h)[None]).flip(0),
    "(T,)": lambda h, table: h + table(_range(h)),
    "(T, 1)": lambda h, table: (h.transpose(0, 1) + table(_range(h)[:, None])).transpose(0, 1),
    "(T, T)": lambda h, table: h + table((_range(h)[None] - _range(h)[:, None]).abs()).sum(0),
}


@pytest.mark.parametrize(("rows", "length"), [(3, 5), (4, 4), (3, 1)])
@pytest.mark.parametrize("how", SHARED_TABLES)
def test_tables_looked_up_once_for_all_rows(how: str, rows: int, length: int) -> None:
    assert outcome(Positions(SHARED_TABLES[how]), {"ids": torch.randint(0, 12, (rows, length))}) == "fast"


class Sorted(nn.Module):
    """Rows in the order of their lengths, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(12, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def order(self, lengths: Tensor) -> Tensor:
        return lengths.argsort(descending=True, stable=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        order = self.order(lengths)
        summed = torch.tanh(self.inner(self.table(ids[order]))).sum(1)
        out: Tensor = self.out(summed)[order.argsort()]
        return out


class SortedByMask(Sorted):
    def order(self, lengths: Tensor) -> Tensor:
        return super().order(lengths.sum(1))


class Compacted(nn.Module):
    """Drops padding by the ids themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(12, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        kept = input_ids != 0
        out = torch.zeros(*input_ids.shape, WIDTH, dtype=self.table.weight.dtype)
        out[kept] = torch.tanh(self.inner(self.table(input_ids)[kept]))
        return out


def _lengths(*lengths: int) -> Batch:
    return {"ids": torch.randint(1, 12, (len(lengths), 6)), "lengths": torch.tensor(lengths)}


def _mask(*lengths: int) -> Batch:
    batch = _lengths(*lengths)
    return {"ids": batch["ids"], "some_mask": (torch.arange(6) < batch["lengths"].unsqueeze(1)).long()}


def _ids(*lengths: int) -> Batch:
    batch = _mask(*lengths)
    return {"input_ids": batch["ids"] * batch["some_mask"]}


def test_rows_that_move_or_are_dropped_by_their_length() -> None:
    """The first batch does not show it: all texts are equally long."""
    assert outcome(Sorted(), _lengths(6, 6, 6), _lengths(4, 6, 5)) == "unit by unit"
    assert outcome(SortedByMask(), _mask(6, 6, 6), _mask(4, 6, 5)) == "unit by unit"
    assert outcome(Compacted(), _ids(5, 5), _ids(4, 6)) == "unit by unit"
    assert outcome(Compacted(), _ids(5, 5, 5, 5), _ids(3, 5, 7, 5)) == "unit by unit"


class TokensMoved(nn.Module):
    """Transposes, or turns upside down, the rows of tokens."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.out, self.move = nn.Embedding(12, WIDTH), nn.Linear(WIDTH, WIDTH), move

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.table(self.move(ids)))
        return out


def test_token_units_of_several_rows() -> None:
    units = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3], [4, 4, -1, 4], [5, 6, 6, 0]])
    batch = {"ids": torch.randint(0, 12, (4, 4))}
    parts: list[Batch] = [{"ids": batch["ids"][units == unit][None]} for unit in range(7)]
    assert outcome(Positions(lambda h, table: h), batch, units=units, parts=parts) == "fast"
    for move in (torch.t, torch.flipud):
        assert outcome(TokensMoved(move), batch, units=units, parts=parts) == "unit by unit"


class TwoLayouts(Body):
    """One layer, called with rows first and with rows second."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(torch.tanh(self.first(x)).transpose(0, 1))
        return out


class LayoutByLength(Body):
    """Rows first or second as the length decides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)).transpose(0, 1) if x.shape[1] > 5 else self.layers(x)


def test_a_layer_called_in_two_layouts() -> None:
    assert outcome(TwoLayouts(), numbers(3, 5)) == "unit by unit"
    assert outcome(LayoutByLength(), numbers(3, 4), numbers(3, 6)) == "unit by unit"
    assert outcome(LayoutByLength(), numbers(3, 6), numbers(3, 4)) == "unit by unit"


class LayoutIf(Body):
    """Rows second where the sizes say so, else first."""

    def __init__(self, second: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.second_if = second

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.second_if(x.shape[1], 0 if y is None else y.shape[1]):
            return self.layers(x.transpose(0, 1)).transpose(0, 1)
        return self.layers(x)


def test_another_layout_at_a_length_that_equals_the_number_of_rows() -> None:
    """Between two lengths that were proven, and no number tells rows from tokens."""
    model = LayoutIf(lambda length, _: length == 6)
    assert outcome(model, numbers(3, 4), numbers(3, 8), numbers(6, 6)) == "unit by unit"
    assert outcome(LayoutIf(lambda length, _: False), numbers(3, 4), numbers(3, 8), numbers(6, 6)) == "fast"


def pair(rows: int, length: int, other: int) -> Batch:
    return {**numbers(rows, length), "y": torch.randn(rows, other, WIDTH, dtype=torch.float64)}


def test_another_layout_because_of_another_sequence() -> None:
    """Which is as long as before, and the other one beyond what was proven, with as many rows as tokens."""
    model = LayoutIf(lambda _, other: other > 5)
    assert outcome(model, pair(3, 4, 3), pair(3, 4, 5), pair(4, 4, 7)) == "unit by unit"
    assert outcome(LayoutIf(lambda *_: False), pair(3, 4, 3), pair(3, 4, 5), pair(4, 4, 7)) == "fast"


class Turned(nn.Module):
    """Scales the mean of a text, turned round where texts are long: the same shape where there are as many rows as features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.tanh().mean(1)
        return (mean.T * self.scale).T if x.shape[1] > 5 else mean * self.scale


def test_as_many_rows_as_features() -> None:
    assert outcome(Turned(), numbers(3, 4), numbers(WIDTH, 5)) == "fast"
    assert outcome(Turned(), numbers(3, 4), numbers(WIDTH, 5), numbers(WIDTH, 7)) == "unit by unit"


class ReversedIfLong(Body):
    """Turns the rows round where texts are long: nothing in the shapes shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flip(0)).flip(0) if x.shape[1] > 5 else self.layers(x)


def test_rows_in_another_order_at_new_lengths() -> None:
    assert outcome(ReversedIfLong(), numbers(5, 4), numbers(5, 7)) == "unit by unit"
    assert outcome(ReversedIfLong(), numbers(5, 7), numbers(5, 4)) == "unit by unit"


class TableOfRows(nn.Module):
    """Looks up places by the text, or from a length on by something of each row that has the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.out = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        if length > 5 and rows == length:
            places = self.places((x[:, 0, 0] > 0).long()).unsqueeze(1)
        else:
            places = self.places(torch.arange(length))
        out: Tensor = self.out(torch.tanh(x + places))
        return out


def test_what_all_rows_shared_is_each_ones_own_at_another_length() -> None:
    assert outcome(TableOfRows(), numbers(3, 4), numbers(3, 8), numbers(6, 6)) in ("fast", "unit by unit")
    assert outcome(TableOfRows(), numbers(3, 4), numbers(3, 8), numbers(5, 5)) == "fast"


def test_flattened_layers_see_new_lengths_inside_the_batch_primitive() -> None:
    model = Flattened().double()
    engine = ClippingEngine(model, max_grad_norm=0.5)
    for rows, length in ((3, 4), (2, 6), (5, 1), (3, 4)):
        batch = numbers(rows, length)
        with engine.batch():
            squares(model)(batch).backward()
        got = grads(model)
        model.zero_grad()
        twin = Flattened().double()
        twin.load_state_dict(model.state_dict())
        assert distance(got, clipped_sum(unit_gradients(twin, squares(twin), each_row(batch)), 0.5)[0]) < 1e-12


class Deeper(Body):
    """Calls its second layer once more in training mode than learning, in eval mode, has seen."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.second(x) if self.training else x


@pytest.mark.parametrize("strategy", ["auto", "bookkeeping", "two_pass", "microbatch"])
def test_a_layer_called_more_often_than_seen(strategy: Any) -> None:
    model = Deeper().double()
    batch = numbers(3, 5)
    wanted, _ = clipped_sum(unit_gradients(model, squares(model), each_row(batch)), 0.5)
    engine = ClippingEngine(model, max_grad_norm=0.5, strategy=strategy)
    if strategy == "two_pass":
        with pytest.raises(PrivacyError, match="more often"):
            engine.backward(squares(model), batch)
        assert not grads(model)
    else:
        engine.backward(squares(model), batch)
        assert distance(grads(model), wanted) < 1e-12


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_a_named_strategy_never_guesses(strategy: Any) -> None:
    for model, batches in (
        (Interleaved(), [numbers(3, 5)]),
        (Interleaved(), [numbers(3, 1), numbers(3, 5)]),
        (Experts(), [_routed(3, 3), _routed(2, 4)]),
        (TwoLayouts(), [numbers(3, 5)]),
    ):
        engine = ClippingEngine(model.double(), max_grad_norm=0.5, strategy=strategy)
        for batch in batches[:-1]:
            with contextlib.suppress(PrivacyError):
                engine.backward(squares(model), batch)
            model.zero_grad()
        with pytest.raises(PrivacyError, match="no rule covers"):
            engine.backward(squares(model), batches[-1])
        assert not grads(model)
