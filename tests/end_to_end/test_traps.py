"""The promises of the library, one by one, through the real `Trainer`; and that each test fails without the protection."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from scipy import stats
from torch import Tensor, nn

from dp_flash_hf.accounting.run_account import RunAccount
from dp_flash_hf.engine import clipper
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.logs import PrivateLogs
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.training import dp_sgd as mechanism_module
from dp_flash_hf.training import preflight as preflight_module
from tests.support.models import batch_of, loss_of, tiny
from tests.support.oracle import apart, clipped_sum, distance, total_norm, unit_gradients
from tests.support.trainers import Pad, ZeroGradient, attached, config, draws, texts, trainer_for, watch, without_dropout

# Factors 1 / labels, and the cross entropy of Transformers' causal models, are float32 even where the model is float64.
ROUNDING = 4 * float(torch.finfo(torch.float32).eps)
FLOAT64 = 1e-12
C = 0.5


def unit_means(name: str, model: Any, data: Any, rows: list[int]) -> list[dict[str, Tensor]]:
    """Gradients of each row's mean loss, by a loop over single rows with a loss of our own."""
    pad = Pad(classes=name == "bert_classifier")
    loss = loss_of(name, model)

    def mean(batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][:, 1:] if name in ("gpt2", "llama") else batch["labels"]
        return loss(batch) / (labels != -100).sum()

    return unit_gradients(model, mean, [pad([data[row]]) for row in rows])


# 6.1


def worst_error(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any] | None = None, **changes: Any
) -> float:
    """Largest relative error of three steps' sums, at a bound that clips about half of the units."""
    seen, data = watch(monkeypatch), texts()
    cls = hf.Seq2SeqTrainer if name == "t5" else hf.Trainer
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, **(settings or {})}
    trainer = trainer_for(name, path, data, cls=cls, **settings)
    single = unit_means(name, trainer.model.eval(), data, list(range(len(data))))
    bound = float(clipped_sum(single, 1.0)[1].median())
    attached(trainer, max_grad_norm=bound, **changes)
    trainer.train()
    assert len(seen.drawn) == len(seen.sums) == 3
    errors = []
    for rows, got in zip(seen.drawn, seen.sums, strict=True):
        wanted, norms = clipped_sum([single[row] for row in rows], bound)
        assert norms.min() < bound < norms.max()
        errors.append(distance(got, wanted))
    return max(errors)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bert_classifier", "t5"])
def test_6_1_the_sum_that_gets_noise_is_that_of_the_drawn_units_clipped_one_by_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 1: exactness, through sampler, collator, split, loss, engine and mechanism."""
    assert worst_error(name, tmp_path, monkeypatch, seed=3) <= ROUNDING


@pytest.mark.complete
def test_6_1_also_of_a_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight runs compiled too, and none of it falls back to eager."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the settings of a process's first trainer
    torch._dynamo.reset()
    running: list[bool] = []
    take = ClippingEngine.take_sums

    def taken(self: ClippingEngine) -> Any:
        running.append(self.runs_compiled)
        return take(self)

    monkeypatch.setattr(ClippingEngine, "take_sums", taken)
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert worst_error("llama", tmp_path, monkeypatch, compiling, seed=3) <= ROUNDING
    assert len(running) >= 3
    assert all(running)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


def test_6_1_would_fail_without_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipper, "clip_factors", lambda squared, *args, **kwargs: torch.ones_like(squared))
    assert worst_error("gpt2", tmp_path, monkeypatch, seed=3) > 0.1


# 6.2


class Pictures:
    """Images, of which the last ones are as bad as they come."""

    bad = (1e30, math.inf, math.nan)

    def __init__(self) -> None:
        batch = batch_of("vit", rows=12)
        self.pixels, self.labels = batch["pixel_values"], batch["labels"]
        for row, value in enumerate(self.bad, start=9):
            self.pixels[row, :, row - 6 :, :4] = value

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[row], "labels": self.labels[row]}


STEPS = ([1, 2, 5, 7, 8], [1, 2, 3, 5, 7, 8], [1, 2, 4, 5, 7, 8], [1, 2, 5, 7, 8, 9], [1, 2, 5, 7, 8, 10], [1, 2, 5, 7, 8, 11])


def moves(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far each further step's sum is from the first's, which has one unit less. Physical batches hold at most 2 rows."""
    seen = watch(monkeypatch)
    draws(monkeypatch, *STEPS)
    data = Pictures() if name == "vit" else texts(12)
    collator = hf.default_data_collator if name == "vit" else None
    monkeypatch.setattr(preflight_module, "choose_units", lambda examples: [0, 3, 6, 8])  # none that is not finite
    trainer = trainer_for(name, path, data, collator=collator, max_steps=len(STEPS), per_device_train_batch_size=2)
    attached(trainer, max_grad_norm=C, target_delta=1e-2)
    trainer.train()
    return [apart(sums, seen.sums[0]) for sums in seen.sums[1:]]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_6_2_one_unit_moves_the_sum_by_at_most_the_bound(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 2: sensitivity C whatever the unit is; one with a gradient that is not finite contributes nothing."""
    moved = moves(name, tmp_path, monkeypatch)
    assert all(move <= C * (1 + ROUNDING) for move in moved)
    assert moved[0] == pytest.approx(C)  # an ordinary unit is clipped here, so the bound is reached
    if name == "vit":
        assert moved[-2:] == [pytest.approx(0.0, abs=FLOAT64)] * 2


def test_6_2_would_fail_without_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipper, "clip_factors", lambda squared, *args, **kwargs: torch.ones_like(squared))
    assert max(moves("gpt2", tmp_path, monkeypatch)) > 2 * C


# 6.4


def p_values(loader: Any, sampler: PoissonSampler, splits: int) -> tuple[list[float], list[list[int]]]:
    """Chi-square p-values of draw sizes, of how often each unit came, and of overlaps of consecutive draws; and the draws."""
    drawn: list[list[int]] = []
    while len(drawn) < 1500:
        parts = [batch["row"].tolist() if len(batch["dp_units"]) else [] for batch in loader]
        drawn += [list(chain(*parts[i : i + splits])) for i in range(0, len(parts), splits)]
    n, q = sampler.n_units, sampler.sampling_rate

    def fit(values: list[int], probability: float) -> float:
        low, high = (int(edge) for edge in stats.binom.interval(0.96, n, probability))
        edges = [-0.5, *(k + 0.5 for k in range(low, high)), n + 0.5]
        seen = torch.histogram(torch.tensor(values, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64)).hist.numpy()
        wanted = [stats.binom.cdf(b, n, probability) - stats.binom.cdf(a, n, probability) for a, b in pairwise(edges)]
        return float(stats.chisquare(seen, [len(values) * w for w in wanted]).pvalue)

    counts = torch.bincount(torch.tensor(list(chain(*drawn))), minlength=n).double()
    expected = len(drawn) * q
    units = float(stats.chi2.sf(float(((counts - expected) ** 2).sum() / (expected * (1 - q))), n))
    overlaps = [len(set(a) & set(b)) for a, b in pairwise(drawn)]
    return [fit([len(units) for units in drawn], q), units, fit(overlaps[::2], q * q)], drawn


def rows_only(examples: Any) -> dict[str, Tensor]:
    return {"row": torch.tensor([example["row"] for example in examples])}


def sampling_test(path: Path) -> tuple[list[float], list[list[int]]]:
    trainer = trainer_for("gpt2", path, [{"row": row} for row in range(40)], collator=rows_only, gradient_accumulation_steps=3)
    dp = attached(trainer, seed=11)
    return p_values(trainer.get_train_dataloader(), dp.mechanism.account.plan.sampler, splits=3)


def test_6_4_the_loader_draws_poisson_batches_and_splits_them_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 4: what is drawn is what is accounted. The seed is fixed, so the test cannot fail by bad luck."""
    seen = watch(monkeypatch)
    values, drawn = sampling_test(tmp_path)
    assert min(values) > 1e-3
    assert drawn == seen.drawn[: len(drawn)]  # in parts, no unit is lost, repeated or moved


def test_6_4_would_fail_for_shuffled_batches_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(self: PoissonSampler, generator: torch.Generator, *_: Any) -> Tensor:
        return torch.randperm(self.n_units, generator=generator)[: self.expected_batch_size]

    monkeypatch.setattr(PoissonSampler, "draw", shuffled)
    assert min(sampling_test(tmp_path)[0]) < 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sizes", [(9, 0, 1), (0, 0, 0), (24, 5, 4)])
def test_6_4_physical_batches_hold_each_drawn_unit_once(
    sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [sorted(torch.randperm(24)[:size].tolist()) for size in sizes]
    draws(monkeypatch, *steps)
    parts: list[Tensor] = []
    backward = ClippingEngine.backward

    def recorded(self: ClippingEngine, loss: Any, batch: Any, *args: Any) -> Any:
        if self.model.training:
            parts.append(batch["input_ids"])
        return backward(self, loss, batch, *args)

    data = texts(shortest=3, longest=3)
    for row, example in enumerate(data):
        example["input_ids"] = [3 + row] * 3
    trainer = trainer_for("gpt2", tmp_path, data, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for check in ("check_training_mode", "check_alone", "check_interaction"):
        monkeypatch.setattr(preflight_module, check, lambda *args, **kwargs: None)
    monkeypatch.setattr("dp_flash_hf.training.session.shares_random_numbers", lambda *args, **kwargs: False)
    dp = attached(trainer)
    monkeypatch.setattr(ClippingEngine, "backward", recorded)
    trainer.train()
    assert all(len(part) <= 2 for part in parts)
    assert [int(row) - 3 for part in parts for row in part[:, 0]] == list(chain(*steps))
    assert dp.mechanism.account.steps == 3


def test_6_4_empty_draws_take_noisy_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4: a step without units is a step like any other, or its absence would tell that there were none."""
    seen = watch(monkeypatch)
    trainer = trainer_for("gpt2", tmp_path, texts(3000), per_device_train_batch_size=1, max_steps=8, learning_rate=1.0)
    dp = attached(trainer, target_delta=1e-5, seed=0)
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert [] in seen.drawn
    assert all(total_norm(gradient) > 1.0 for gradient in seen.released)
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert dp.mechanism.account.steps == dp.report().steps == trainer.state.global_step == 8


# 6.5


def updates(path: Path, accumulation: int, steps: int = 8, **changes: Any) -> Tensor:
    """(steps, parameters): what plain SGD of rate 1 did to a model whose gradient is zero."""
    weights: list[Tensor] = []

    class Weights(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    trainer = trainer_for(
        "gpt2",
        path,
        cls=ZeroGradient,
        max_steps=steps,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
        **changes,
    )
    attached(trainer, noise_multiplier=1.5, max_grad_norm=2.0)
    weights.append(nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone())
    trainer.add_callback(Weights())
    trainer.train()
    return torch.stack(weights).diff(dim=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_6_5_noise_has_std_sigma_times_bound_over_the_expected_batch_once_a_step(accumulation: int, tmp_path: Path) -> None:
    """Promise 5: within 2 %, which is more than 6 standard errors of the estimate."""
    moved = updates(tmp_path, accumulation)
    assert 6 / math.sqrt(2 * moved.numel()) < 0.02
    wanted = 1.5 * 2.0 / 4
    assert float(moved.std()) == pytest.approx(wanted, rel=0.02)
    assert abs(float(moved.mean())) < 6 * wanted / math.sqrt(moved.numel())
    between = torch.corrcoef(moved) - torch.eye(len(moved))  # independent from step to step
    assert float(between.abs().max()) < 6 / math.sqrt(moved.shape[1])


def test_6_5_would_fail_with_noise_for_every_physical_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = vars(mechanism_module)["add_gaussian_noise_"]

    def four_times(tensors: Any, **kwargs: Any) -> None:
        for _ in range(4):
            add(tensors, **kwargs)

    monkeypatch.setattr(mechanism_module, "add_gaussian_noise_", four_times)
    assert float(updates(tmp_path, 4, steps=2).std()) == pytest.approx(2 * 1.5 * 2.0 / 4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_6_5_noise_is_added_in_float32(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noised: list[torch.dtype] = []
    add = vars(mechanism_module)["add_gaussian_noise_"]

    def recorded(tensors: list[Tensor], **kwargs: Any) -> None:
        noised.extend(tensor.dtype for tensor in tensors)
        add(tensors, **kwargs)

    monkeypatch.setattr(mechanism_module, "add_gaussian_noise_", recorded)
    trainer = trainer_for(without_dropout(tiny("gpt2", dtype)), tmp_path)
    attached(trainer)
    trainer.train()
    assert set(noised) == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {dtype}


def noise_of_step_two_twice(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[Tensor], DPCallback]:
    """The noise of a run's two steps, and of the second when the run is resumed after its first."""
    noise: list[Tensor] = []
    for resume in (None, str(path / "checkpoint-1")):
        with monkeypatch.context() as patch:
            seen = watch(patch)
            trainer = trainer_for("gpt2", path, cls=ZeroGradient, save_strategy="steps", save_steps=1)
            dp = attached(trainer, **changes)
            trainer.train(resume_from_checkpoint=resume)
            noise += [torch.cat([gradient.flatten() for gradient in step.values()]) for step in seen.released]
    assert len(noise) == 3
    return noise, dp


def test_6_5_noise_is_fresh_after_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 5: noise seen twice can be subtracted. The seeds of `Trainer`, which a resumed run restores, do not reach it."""
    noise, dp = noise_of_step_two_twice(tmp_path, monkeypatch)
    assert float(torch.corrcoef(torch.stack(noise)).triu(1).abs().max()) < 6 / math.sqrt(noise[0].numel())
    assert dp.report().private


def test_6_5_two_runs_of_the_same_arguments_get_different_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            seen = watch(patch)
            trainer = trainer_for("gpt2", tmp_path, cls=ZeroGradient, max_steps=1, full_determinism=True)
            attached(trainer)
            trainer.train()
            noise.append(torch.cat([gradient.flatten() for gradient in seen.released[0].values()]))
    torch.use_deterministic_algorithms(False)
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 6 / math.sqrt(noise[0].numel())


def test_6_5_a_fixed_seed_replays_noise_and_is_marked_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, first, resumed), dp = noise_of_step_two_twice(tmp_path, monkeypatch, seed=5)
    assert torch.equal(first, resumed)
    assert not dp.report().private
    assert "NOT PRIVATE" in dp.report().to_text()


def test_6_5_a_fixed_seed_draws_the_same_units_after_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        with monkeypatch.context() as patch:
            seen = watch(patch)
            trainer = trainer_for("gpt2", tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
            attached(trainer, seed=5)
            trainer.train(resume_from_checkpoint=resume)
            drawn.append(seen.drawn[:3])
    assert drawn[0] == drawn[1]


# 6.6


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.SyncBatchNorm(16)], ids=["BatchNorm1d", "SyncBatchNorm"])
def test_6_6_batch_normalisation_is_refused_by_name(norm: nn.Module, tmp_path: Path) -> None:
    model = without_dropout(tiny("gpt2"))
    model.transformer.extra = norm
    trainer = trainer_for(model, tmp_path)
    attached(trainer)
    with pytest.raises(UnsupportedError, match=r"transformer\.extra: batch normalisation"):
        trainer.train()


DRAWN = [0, 2, 3, 7, 8, 11, 15]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["gpt2", "bert", "bert_classifier"])
def test_6_6_label_smoothing_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 6: handled exactly, against a smoothed loss written out."""
    seen, data = watch(monkeypatch), texts()
    draws(monkeypatch, DRAWN)
    trainer = trainer_for(name, tmp_path, data, max_steps=1, label_smoothing_factor=0.3)
    model = trainer.model.eval()

    def smoothed(batch: dict[str, Tensor]) -> Tensor:
        labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs).logits
        if name == "gpt2":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.3)

    pad = Pad(classes=name == "bert_classifier")
    single = unit_gradients(model, smoothed, [pad([data[row]]) for row in DRAWN])
    bound = float(clipped_sum(single, 1.0)[1].median())
    attached(trainer, max_grad_norm=bound)
    trainer.train()
    wanted, _ = clipped_sum(single, bound)
    # LabelSmoother adds up the log-probabilities of the vocabulary in float32.
    assert distance(seen.sums[0], wanted) <= ROUNDING


def test_6_6_max_grad_norm_of_the_arguments_does_not_clip_the_noised_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping what has its noise would be harmless, but the optimizer would not get what was planned."""
    seen = watch(monkeypatch)
    used: list[float] = []

    class Given(hf.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            used.append(total_norm({name: p.grad.double() for name, p in model.named_parameters()}))

    trainer = trainer_for("gpt2", tmp_path, max_grad_norm=1e-6)
    trainer.add_callback(Given())
    attached(trainer)
    trainer.train()
    assert used == [total_norm(gradient) for gradient in seen.released]
    assert min(used) > 1.0


# 6.7


RAW = {"loss", "grad_norm", "train_loss", "total_flos", "num_input_tokens_seen"}


def logged(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, float]], DPCallback, Any]:
    """Everything that reporters, the history, the returned metrics and the checkpoint hold."""
    everything: list[dict[str, float]] = []

    class Reporter(hf.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            everything.append(dict(logs))

    trainer = trainer_for("gpt2", path, save_strategy="steps", save_steps=1)
    trainer.add_callback(Reporter())
    dp = attached(trainer)
    result = trainer.train()
    saved = json.loads((path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["total_flos"] == 0
    return [*everything, *trainer.state.log_history, result.metrics, *saved["log_history"]], dp, trainer


def test_6_7_nothing_without_noise_is_logged_unmarked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 7: the loss is marked, gradient norms and token counts are gone, epsilon is everywhere."""
    everything, dp, trainer = logged(tmp_path, monkeypatch)
    assert not RAW & {name for logs in everything for name in logs}
    assert sum("not_private/loss" in logs for logs in everything) == 6
    assert all("privacy/epsilon" in logs for logs in everything)
    assert {logs["privacy/epsilon"] for logs in everything} == {dp.report().epsilon}  # the promise, from the first step on
    assert min(logs["privacy/spent_epsilon"] for logs in everything) < dp.report().spent_epsilon == dp.report().epsilon
    assert max(logs["privacy/spent_epsilon"] for logs in everything) == dp.report().spent_epsilon
    trainer.create_model_card()  # reads the history
    assert "train_loss" not in (tmp_path / "README.md").read_text()


def test_6_7_would_fail_with_the_trainers_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateLogs, "log", lambda self, trainer, own, mechanism, logs, start_time=None: own(logs))
    everything, _, _ = logged(tmp_path, monkeypatch)
    assert {"loss", "train_loss"} <= {name for logs in everything for name in logs}


def test_6_7_other_callbacks_see_noised_gradients_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that logs gradient norms just before the update must not come before the noise, whoever was first."""
    seen = watch(monkeypatch)
    shown: list[float] = []

    class Norms(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            shown.append(total_norm({name: p.grad.double() for name, p in model.named_parameters()}))

    trainer = trainer_for("gpt2", tmp_path)
    trainer.add_callback(Norms())
    attached(trainer)
    trainer.train()
    assert shown == [total_norm(gradient) for gradient in seen.released]


def test_6_7_the_progress_bar_shows_epsilon(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_for("gpt2", tmp_path, disable_tqdm=False)
    dp = attached(trainer)
    trainer.train()
    report = dp.report()
    assert f"epsilon={report.epsilon:.3f}, spent={report.spent_epsilon:.3f}" in capfd.readouterr().err


# 6.8


def frozen(trainer: Any) -> None:
    trainer.create_optimizer()
    trainer.model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    trainer.model.transformer.h[1].ln_1.weight = nn.Parameter(torch.ones(16, dtype=torch.float64))  # as wrapping late does


def other_parameters(trainer: Any) -> None:
    trainer.optimizer = torch.optim.SGD([*trainer.model.parameters(), nn.Parameter(torch.ones(3))], lr=1.0)


def too_few(trainer: Any) -> None:
    trainer.optimizer = torch.optim.SGD(list(trainer.model.parameters())[1:], lr=1.0)


def dead(trainer: Any) -> None:
    trainer.model.transformer.unused = nn.Linear(2, 2).double()


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        (frozen, "optimizer must update exactly"),
        (other_parameters, "1 are not the model's"),
        (too_few, r"lacks \['transformer.wte.weight'\]"),
        (dead, r"does not depend on them: \['transformer.unused.weight', 'transformer.unused.bias'\]"),
        (lambda trainer: trainer.model.requires_grad_(False), "requires_grad=True|empty parameter list"),
    ],
    ids=["wrapped late", "foreign", "missing", "dead", "all frozen"],
)
def test_6_8_a_silent_no_op_is_an_error(mistake: Callable[[Any], None], match: str, tmp_path: Path) -> None:
    """Promise 8: every trained parameter gets a gradient and the optimizer's parameters are exactly the engine's."""
    trainer = trainer_for("gpt2", tmp_path)
    mistake(trainer)
    dp = attached(trainer)
    with pytest.raises((PrivacyError, ValueError), match=match):
        trainer.train()
    assert dp.mechanism.account.steps == 0


class Unfreeze(hf.TrainerCallback):
    """Gradual unfreezing, as is common."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            model.transformer.h[0].mlp.c_fc.weight.requires_grad_(True)


def test_6_8_parameters_unfrozen_while_training_are_not_updated_without_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine and mechanism both refuse; tests/test_mechanism.py shows what the update would be if they did not."""
    draws(monkeypatch, [1, 2], [3])
    trainer = trainer_for("gpt2", tmp_path)
    weight = trainer.model.transformer.h[0].mlp.c_fc.weight
    weight.requires_grad_(False)
    before = weight.detach().clone()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.add_callback(Unfreeze())
    attached(trainer)
    with pytest.raises(PrivacyError, match=r"trainable since the engine was made|they were unfrozen"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert torch.equal(weight, before)


# 6.9


def test_6_9_the_budget_is_never_exceeded(tmp_path: Path) -> None:
    """Promise 9: the plan's last step is the last, whatever the arguments say later."""
    trainer = trainer_for("gpt2", tmp_path, max_steps=3, learning_rate=1.0)
    dp = DPCallback(config(target_epsilon=2.0, noise_multiplier=None)).attach(trainer)
    trainer.args.max_steps = 10
    trainer.train()
    assert trainer.state.global_step == dp.report().steps == 3
    assert 0.99 * 2.0 < dp.report().epsilon <= 2.0
    weights = trainer.model.lm_head.weight.clone()
    with pytest.raises(PrivacyError, match="3 planned steps are spent"):
        trainer.train()
    assert torch.equal(weights, trainer.model.lm_head.weight)


class Stubborn(hf.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = False


def test_6_9_not_by_one_step_even_if_another_callback_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> DPCallback:
        trainer = trainer_for("gpt2", tmp_path, max_steps=2, learning_rate=1.0)
        trainer.add_callback(Stubborn())
        dp = attached(trainer)
        trainer.args.max_steps = 3
        at_two: list[Tensor] = []
        trainer.add_callback(Snapshot(at_two))
        try:
            trainer.train()
        finally:
            weights.extend([at_two[1], trainer.model.lm_head.weight.detach()])
        return dp

    weights: list[Tensor] = []
    with pytest.raises(PrivacyError, match="2 planned steps are spent"):
        run()
    assert torch.equal(*weights)
    monkeypatch.setattr(RunAccount, "steps_left", 1)
    weights.clear()
    assert run().mechanism.account.steps > 2


class Snapshot(hf.TrainerCallback):
    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kept.append(model.lm_head.weight.detach().clone())


# 6.10
