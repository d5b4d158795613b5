"""Physical batches: every unit whole and once, as many as fit, and no padding that need not be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.training.batches import (
    UNITS,
    FreshCollator,
    PoissonBatches,
    Read,
    UnitCollator,
    WithUnits,
    is_empty,
    physical_batches,
    steps_per_epoch,
    text_lengths,
    units_of,
    without_trailing_padding,
)
from dp_flash_hf.training.draws import DRAW, Part
from dp_flash_hf.units import Units, select_items, select_unit
from tests.support.models import tiny
from tests.support.trainers import Pad, attached, draws, texts, trainer_for, without_dropout

LENGTHS = (3, 9, 4, 8, 1, 2, 9)


def examples(lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    return [{"input_ids": [3 + row] * n, "labels": [3 + row] * n} for row, n in enumerate(lengths)]


def padded(lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    return Pad()([{**example, "label": 0} for example in examples(lengths)])


def flat(lengths: Sequence[int] = LENGTHS, **options: Any) -> dict[str, Any]:
    out: dict[str, Any] = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True, **options)(examples(lengths))  # type: ignore[no-untyped-call]
    return out


def cut(batch: dict[str, Any], of_example: Sequence[int], **limits: Any) -> list[tuple[dict[str, Any], Units]]:
    ids = torch.tensor(of_example)
    counts = torch.bincount(ids).tolist()
    return list(physical_batches(batch, units_of(batch, ids), counts, **{"max_examples": 99, **limits}))


def tokens(parts: list[tuple[dict[str, Any], Units]]) -> list[int]:
    """Of every part, sorted: which example each belongs to is written in it."""
    return sorted(int(token) for part, _ in parts for token in part["input_ids"].flatten() if token)


@pytest.mark.parametrize("budget", [1, 8, 9, 18, 20, 27, 63, 1000])
def test_rows_times_length_stay_within_the_budget(budget: int) -> None:
    batch = padded()
    parts = cut(batch, range(7), max_tokens=budget)
    assert tokens(parts) == tokens([(batch, Units.rows(7))])
    for part, units in parts:
        assert part["input_ids"].numel() <= budget or len(part["input_ids"]) == 1
        assert units.n == len(part["input_ids"])
        assert bool(part["attention_mask"][:, -1].any())  # no column of padding only
        assert all(value.shape == part["input_ids"].shape for value in part.values())
    assert len(parts) == {1: 7, 8: 5, 9: 5, 18: 3, 20: 3, 27: 2, 63: 1, 1000: 1}[budget]


@pytest.mark.parametrize("budget", [1, 8, 12, 20, 36, 1000])
def test_texts_of_a_packed_row_stay_within_the_budget(budget: int) -> None:
    batch = flat(return_seq_idx=True)
    parts = cut(batch, range(7), max_tokens=budget)
    assert tokens(parts) == tokens([(batch, Units.rows(7))])
    assert len(parts) == {1: 7, 8: 6, 12: 3, 20: 2, 36: 1, 1000: 1}[budget]
    for part, units in parts:
        total = part["input_ids"].numel()
        assert total <= budget or units.n == 1
        assert units.shape == part["labels"].shape == part["position_ids"].shape == part["seq_idx"].shape == (1, total)
        ends = part["cu_seq_lens_q"].tolist()
        assert (ends[0], ends[-1], len(ends)) == (0, total, units.n + 1)
        assert part["max_length_q"] == max(units.sizes)
        assert part["cu_seq_lens_q"].dtype == torch.int32
        for (start, end), size in zip(itertools.pairwise(ends), units.sizes, strict=True):
            assert len(set(part["input_ids"][0, start:end].tolist())) == 1
            assert part["position_ids"][0, start:end].tolist() == list(range(size))


@pytest.mark.parametrize("batch", [padded(), flat()], ids=["padded", "flat"])
@pytest.mark.parametrize("limits", [{"max_examples": 3}, {"max_examples": 1}, {"max_tokens": 12}, {"max_tokens": 1}], ids=str)
def test_a_unit_is_never_split(batch: dict[str, Any], limits: dict[str, int]) -> None:
    owners = [0, 1, 0, 2, 2, 2, 1]
    parts = cut(batch, owners, **limits)
    assert tokens(parts) == tokens([(batch, Units.rows(7))])
    met = [{owners[token - 3] for token in tokens([part])} for part in parts]
    assert sorted(itertools.chain(*met)) == [0, 1, 2]
    assert all(len(found) == units.n for found, (_, units) in zip(met, parts, strict=True))
    assert len(parts) == (3 if set(limits.values()) & {1, 3} or limits.get("max_tokens") == 12 else 2)


@pytest.mark.parametrize(("most", "sizes"), [(3, [3, 3, 1]), (4, [4, 3]), (6, [4, 3]), (7, [7]), (1, [1] * 7)])
def test_parts_are_as_few_as_fit_and_about_equal(most: int, sizes: list[int]) -> None:
    parts = cut(padded(), range(7), max_examples=most)
    assert [units.n for _, units in parts] == sizes
    assert all(part["input_ids"].shape[1] == 9 for part, _ in parts)  # padding stays where no budget asks for less


def test_texts_of_one_unit_keep_their_boundaries() -> None:
    batch = flat()
    units = units_of(batch, torch.tensor([0, 1, 0, 1, 0, 1, 0]))
    part = select_unit(batch, units, 0)
    assert part["cu_seq_lens_q"].tolist() == part["cu_seq_lens_k"].tolist() == [0, 3, 7, 8, 17]
    assert part["max_length_q"] == 9
    assert part["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, *range(9)]]


def test_padding_is_cut_only_where_it_is_known_to_be() -> None:
    batch = padded((3, 2, 5))
    first = select_items(batch, Units.rows(3), torch.tensor([0, 1]))
    assert text_lengths(first).tolist() == [3, 2]
    assert without_trailing_padding(first)["labels"].shape == (2, 3)
    assert text_lengths({"input_ids": torch.ones(3, 4, dtype=torch.long)}).tolist() == [4, 4, 4]  # without a mask
    labelled = {**first, "labels": first["labels"].index_fill(1, torch.tensor([3]), 7)}  # padding that has a label
    assert without_trailing_padding(labelled)["input_ids"].shape == (2, 4)
    left = {name: value.flip(1) for name, value in first.items()}
    for kept in (
        {**first, "boxes": torch.zeros(2, 5)},  # as wide as the texts are, by chance or not
        {name: value for name, value in first.items() if name != "attention_mask"},
        {**first, "attention_mask": torch.ones(2, 1, 5, 5)},
        left,
    ):
        assert without_trailing_padding(kept) is kept
    assert text_lengths({**first, "boxes": torch.zeros(2, 5)}).tolist() == [5, 5]
    assert without_trailing_padding({**first, "inputs_embeds": torch.zeros(2, 5, 7)})["inputs_embeds"].shape == (2, 3, 7)
    pictures = {**first, "pixel_values": torch.zeros(2, 3, 5, 5), "labels": torch.tensor([0, 1])}
    short = without_trailing_padding(pictures)
    assert short["input_ids"].shape == (2, 3)
    assert short["pixel_values"].shape == (2, 3, 5, 5)


def test_a_decoders_tokens_count_too() -> None:
    """Encoder texts of 3, 2 and 5 tokens, and labels of another width, which stay as they are."""
    batch = {**padded((3, 2, 5)), "labels": torch.ones(3, 4, dtype=torch.long)}
    shapes = [(tuple(p["input_ids"].shape), tuple(p["labels"].shape)) for p, _ in cut(batch, range(3), max_tokens=14)]
    assert shapes == [((2, 3), (2, 4)), ((1, 5), (1, 4))]
    assert len(cut(batch, range(3), max_tokens=13)) == 3
    labels_first = {"labels": batch["labels"], **{name: batch[name] for name in ("input_ids", "attention_mask")}}
    assert [units.n for _, units in cut(labels_first, range(3), max_tokens=14)] == [2, 1]


def test_boundaries_are_read_off_positions_or_lengths() -> None:
    wanted = torch.repeat_interleave(torch.arange(7), torch.tensor(LENGTHS)).tolist()
    for batch in (flat(), flat(position_ids_start=2), flat(return_position_ids=False)):
        assert units_of(batch, torch.arange(7)).of_item.tolist() == wanted
    positions = {name: value for name, value in flat(position_ids_start=2).items() if "seq_lens" not in name}
    assert units_of(positions, torch.arange(7)).of_item.tolist() == wanted


def test_rows_without_a_unit_are_refused() -> None:
    batch = flat()
    padding = {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in ("input_ids", "position_ids", "labels")}
    with pytest.raises(UnsupportedError, match=r"1 rows of 7 examples.*without pad_to_multiple_of"):
        units_of(padding, torch.arange(7))
    with pytest.raises(UnsupportedError, match="1 rows of 7 examples"):
        units_of({**padding, "cu_seq_lens_q": batch["cu_seq_lens_q"]}, torch.arange(7))
    with pytest.raises(UnsupportedError, match="1 rows of 7 examples"):
        units_of({"input_ids": batch["input_ids"]}, torch.arange(7))


def test_a_budget_bounds_what_the_model_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole draw, sorted, in place of accumulation's parts; and the loss shown is that of the step."""
    shapes: list[torch.Size] = []
    backward = ClippingEngine.backward

    def recorded(self: ClippingEngine, loss: Any, batch: Any, *args: Any) -> Any:
        if self.model.training:
            shapes.append(batch["input_ids"].shape)
        return backward(self, loss, batch, *args)

    shown = []
    for budget in (24, None):
        with monkeypatch.context() as patch:
            draws(patch, list(range(0, 24, 2)))
            trainer = trainer_for(
                "gpt2",
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=12 if budget is None else 1,
                gradient_accumulation_steps=2,
            )
            attached(trainer, max_tokens_per_device=budget)
            patch.setattr(ClippingEngine, "backward", recorded)
            for check in ("preflight.check_training_mode", "preflight.check_interaction", "session.shares_random_numbers"):
                patch.setattr(f"dp_flash_hf.training.{check}", lambda *args, **kwargs: None)
            shapes.clear()
            trainer.train()
            if budget is not None:
                assert all(shape.numel() <= budget for shape in shapes)
                assert sum(shape[0] for shape in shapes) == 12
                assert [shape[1] for shape in shapes] == sorted(shape[1] for shape in shapes)
                assert len(shapes) < 12
            shown.append(trainer.state.log_history[0]["not_private/loss"])
    assert shown[0] == pytest.approx(shown[1], rel=0.05)  # means over all labels, and over two parts


class Felt(torch.nn.Module):
    """Every row sees how long it is padded."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1]


def test_padding_that_units_feel_is_not_cut_off(tmp_path: Path) -> None:
    """Padded to one length such a model is isolated; not so when a budget cuts the padding off again."""

    def to_one_length(chosen: Any) -> Any:
        return {name: value[:-1] for name, value in Pad()([*chosen, *texts(1, shortest=9, longest=9)]).items()}

    model = without_dropout(tiny("gpt2"))
    model.transformer.drop = Felt()
    trainer = trainer_for(model, tmp_path, collator=to_one_length)
    attached(trainer)
    trainer.train()
    trainer = trainer_for(model, tmp_path / "budget", collator=to_one_length)
    dp = attached(trainer, max_tokens_per_device=30)
    with pytest.raises(PrivacyError, match=r"depends on the others' lengths.*without max_tokens"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


@pytest.mark.parametrize("budget", [0, -1, 2.5, True])
def test_budgets_are_whole_numbers(budget: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_device: expected a whole number"):
        attached(trainer_for("gpt2", tmp_path), max_tokens_per_device=budget)


N, EXPECTED, DRAWS = 60, 12, 5


def batches(**changes: Any) -> PoissonBatches:
    options: dict[str, Any] = {
        **{"population": N, "steps": DRAWS, "splits": 3, "in_one_part": False, "rows": None, "max_examples_per_unit": None},
        **{"lengths": None, "seed": 1, "first_step": 4},
    }
    return PoissonBatches(PoissonSampler(N, EXPECTED), **{**options, **changes})


def drawn_of(parts: Sequence[Part], splits: int = 3) -> list[list[int]]:
    """The rows of each draw."""
    return [[row for part in parts[first : first + splits] for row, _ in part] for first in range(0, len(parts), splits)]


@pytest.mark.parametrize("seed", [1, None])
@pytest.mark.parametrize("in_one_part", [False, True])
def test_every_draw_is_split_into_as_many_parts_and_each_knows_which_it_is(in_one_part: bool, seed: int | None) -> None:
    own = batches(in_one_part=in_one_part, seed=seed)
    parts = list(own)
    assert len(parts) == len(own) == 3 * DRAWS
    assert [(part.number, part.part, part.parts) for part in parts] == [(4 + n, k, 3) for n in range(DRAWS) for k in range(3)]
    for part in parts:
        assert [unit for _, unit in part] == list(range(len(part)))  # units are numbered from 0 in each
    for first in range(0, len(parts), 3):
        sizes = [len(part) for part in parts[first : first + 3]]
        assert sizes[1:] == [0, 0] if in_one_part else max(sizes) - min(sizes) <= 1
    draws = drawn_of(parts)
    assert len({tuple(draw) for draw in draws}) == DRAWS  # independent: all of them differ, but with probability 1e-14
    assert all(draw == sorted(set(draw)) for draw in draws)
    assert 20 < sum(map(len, draws)) < 110  # 60 expected, of standard deviation 7


def test_a_seed_repeats_its_draws_and_a_resumed_training_goes_on_with_them() -> None:
    whole = drawn_of(list(batches()))
    assert drawn_of(list(batches())) == whole
    assert drawn_of(list(batches(steps=2, first_step=7))) == whole[3:]
    assert drawn_of(list(batches(seed=2))) != whole
    assert drawn_of(list(batches(seed=None))) != drawn_of(list(batches(seed=None)))
    own = batches(steps=1)
    assert [drawn_of(list(own))[0] for _ in range(3)] == whole[:3]  # an epoch each


def test_draws_are_from_the_true_population() -> None:
    assert max(row for draw in drawn_of(list(batches(population=90))) for row in draw) >= N


def test_a_unit_brings_some_of_its_own_rows() -> None:
    rows = [torch.arange(3 * unit, 3 * unit + 3) for unit in range(N)]
    draws = drawn_of(list(batches()))
    parts = list(batches(rows=rows, max_examples_per_unit=2))
    for part in parts:
        owners = {unit: {row // 3 for row, of in part if of == unit} for _, unit in part}
        assert all(len(owned) == 1 for owned in owners.values())
        assert all([unit for _, unit in part].count(unit) == 2 for unit in owners)
    assert [sorted({row // 3 for row in draw}) for draw in drawn_of(parts)] == draws


def test_units_of_like_length_come_into_one_part() -> None:
    lengths = torch.arange(N, 0, -1)
    assert [draw[::-1] for draw in drawn_of(list(batches(lengths=lengths)))] == drawn_of(list(batches()))


@pytest.mark.parametrize("seed", [1, None])
def test_ranks_share_a_draw(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "secret", lambda self: b"of all ranks")
    shares = []
    for rank in range(3):
        own = batches(seed=seed)
        own.ranks.size, own.ranks.rank = 3, rank
        shares.append(drawn_of(list(own)))
    if seed is not None:
        assert [sorted(itertools.chain(*of_ranks)) for of_ranks in zip(*shares, strict=True)] == drawn_of(list(batches()))
    for of_ranks in zip(*shares, strict=True):
        assert len(set(itertools.chain(*of_ranks))) == sum(map(len, of_ranks))
        assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


@pytest.mark.parametrize(("ranks", "secrets"), [(1, 1 + DRAWS), (2, 1)])
def test_one_process_has_a_secret_for_every_draw_and_ranks_share_one(
    ranks: int, secrets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork of one process between two draws then draws others."""
    asked: list[int] = []

    def secret(self: Ranks) -> bytes:
        asked.append(len(asked))
        return repr(asked).encode()

    monkeypatch.setattr(Ranks, "secret", secret)
    own = batches(seed=None)
    own.ranks.size = ranks
    list(own)
    assert len(asked) == secrets


@pytest.mark.parametrize("changes", [{"rows": [torch.arange(3)] * N}, {"max_examples_per_unit": 2}], ids=["rows", "most"])
def test_rows_are_chosen_where_units_have_some_and_a_most(changes: dict[str, Any]) -> None:
    assert drawn_of(list(batches(**changes))) == drawn_of(list(batches()))


class Rows(list[dict[str, Any]]):
    """A dataset that reads several rows at once, and counts how often."""

    calls = 0

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        self.calls += 1
        return [self[row] for row in rows]


@pytest.mark.parametrize("kind", [list, Rows])
def test_examples_are_read_with_their_units_and_know_their_draw(kind: Any) -> None:
    data = kind(examples())
    reader = WithUnits(data)
    assert len(reader) == 7
    part = Part([(2, 0), (5, 1), (1, 1)], number=4, part=1, parts=3)
    read = reader.__getitems__(part)
    assert read == [(data[2], 0), (data[5], 1), (data[1], 1)]
    assert (read.rows, read.part) == ([2, 5, 1], part)
    assert read.part is part
    assert reader.__getitems__([(2, 0)]).part is None
    assert reader[3, 6] == (data[3], 6)
    assert list(reader.__getitems__(Part())) == []
    if kind is Rows:
        assert data.calls == 3  # not for an empty draw


def test_a_batch_has_the_units_of_texts_that_are_not_empty_and_the_tag_of_its_draw() -> None:
    seen: list[Any] = []

    def collator(chosen: list[Any]) -> dict[str, Any]:
        seen.append(chosen)
        return {"rows": torch.tensor([len(example["input_ids"]) for example in chosen])}

    texts = [{"input_ids": [3, 4]}, {"input_ids": []}, {"input_ids": [5]}]
    pairs = [(texts[0], 0), (texts[1], 1), (texts[2], 2)]
    collate = UnitCollator(collator)
    assert {name: value.tolist() for name, value in collate(pairs).items()} == {"rows": [2, 1], UNITS: [0, 2]}
    assert seen == [[texts[0], texts[2]]]
    part = Part([(0, 0)], number=4, part=1, parts=3)
    tagged = collate(Read(pairs, [0, 1, 2], part))
    assert tagged[DRAW][:3].tolist() == [4, 1, 3]
    assert DRAW not in collate(Read(pairs, [0, 1, 2]))
    empty = collate([])
    assert list(empty) == [UNITS]
    assert empty[UNITS].tolist() == []
    assert len(seen) == 3  # never with an empty list
    assert not is_empty({"labels": []})
    assert not is_empty(["input_ids"])
    assert not is_empty({"input_ids": 0})
    assert is_empty({"input_ids": torch.zeros(0)})


def test_reading_and_collating_draw_fresh_numbers_or_those_of_the_seed_and_the_rows() -> None:
    class Noisy:
        def __init__(self) -> None:
            self.own: torch.Generator | None = None

        def __len__(self) -> int:
            return 9

        def __getitem__(self, row: int) -> float:
            self.own = self.own or torch.Generator().manual_seed(0)
            return float(torch.rand((), generator=self.own)) + float(torch.rand(()))

    def read(rows: list[int], seed: int | None) -> list[float]:
        torch.manual_seed(0)
        return [value for value, _ in WithUnits(Noisy(), seed=seed).__getitems__([(row, 0) for row in rows])]

    assert read([1, 2], 5) == read([1, 2], 5)
    assert len({tuple(read(rows, seed)) for rows, seed in (([1, 2], 5), ([2, 1], 5), ([1, 2], 6), *[([1, 2], None)] * 2)}) == 5

    def collated(rows: list[int], seed: int | None) -> float:
        torch.manual_seed(0)
        collate = UnitCollator(lambda chosen: {"x": torch.rand(())})
        return float(FreshCollator(collate, seed=seed)(Read([({}, 0)], rows))["x"])

    assert collated([1, 2], 5) == collated([1, 2], 5)
    assert len({collated(rows, seed) for rows, seed in (([1, 2], 5), ([2, 1], 5), ([1, 2], 6), *[([1, 2], None)] * 2)}) == 5


def test_a_new_generator_for_every_batch_is_refused() -> None:
    class Renewing:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, row: int) -> float:
            self.own = torch.Generator().manual_seed(0)
            return float(torch.rand((), generator=self.own))

    with pytest.raises(UnsupportedError, match="Renewing makes itself a new random generator"):
        WithUnits(Renewing())[0, 0]


def test_pairs_are_laid_out_one_after_the_other() -> None:
    rows = {"input_ids": torch.ones(6, 4, dtype=torch.long)}
    assert units_of(rows, torch.arange(3), 2).of_item.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UnsupportedError, match="6 rows of 3 examples"):
        units_of(rows, torch.arange(3))
    with pytest.raises(UnsupportedError, match="1 rows of 7 examples"):
        units_of(flat(), torch.arange(7), 2)


def test_an_epoch_sees_every_unit_once_on_average() -> None:
    assert [steps_per_epoch(n, 10) for n in (3, 14, 16, 1000)] == [1, 1, 2, 100]
