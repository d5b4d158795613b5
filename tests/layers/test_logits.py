"""Logits that are deferred: the same gradients, whatever a model or a loss does to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.kernels import linear_cross_entropy as kernels
from dp_flash_hf.layers import logits as subject
from dp_flash_hf.layers.recorder import Recorder
from tests.end_to_end.test_exactness import assert_exact
from tests.support.models import batch_of, packed_batch
from tests.support.oracle import clipped_sum, distance, each_row, grads, rows_of, unit_gradients

VOCABULARY = 61
FAST: Any = ("bookkeeping", "two_pass")
FLAT_WAYS = tuple(product(("flat",), FAST))
FAST_WAYS = tuple(product(("flat", "per_layer"), FAST))
THRESHOLD = 16 * VOCABULARY * 4  # bytes


def defer_from(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are made from now on, by whatever helper, defer logits of so many bytes."""
    initialise: Any = ClippingEngine.__init__
    monkeypatch.setitem(initialise.__kwdefaults__, "max_logit_bytes", size)


class Seen:
    """What became of products that were deferred."""

    def __init__(self) -> None:
        self.blocks, self.formed = 0, 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Logits of these tests are deferred, and no output of smaller layers."""
    seen = Seen()
    defer_from(THRESHOLD, monkeypatch)
    blocks, form_all = kernels.linear_cross_entropy, subject.Product.form_all

    def counted(*args: Any) -> Any:
        seen.blocks += 1
        return blocks(*args)

    def counted_form(self: subject.Product) -> None:
        seen.formed += 1
        form_all(self)

    monkeypatch.setattr(subject, "linear_cross_entropy", counted)
    monkeypatch.setattr(subject.Product, "form_all", counted_form)
    return seen


def _config(width: int = 16) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 12,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }


_GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32, "n_inner": 12}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_config())),
    "llama, stored gradients": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_config(96))),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_config())),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_config(), final_logit_softcapping=0.7, sliding_window=4)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_config(), logit_scale=0.3)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_config(), logits_scaling=3.0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT2, rotary_dim=4)),  # a head with a bias
}
TIED = ("gemma2", "cohere", "gpt2")
WIDE = "llama, stored gradients"  # so are its other layers, which are deferred too


def built(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def own_loss(model: Any) -> Callable[[Any], Tensor]:
    """As Trainer calls it."""
    return lambda batch: model(**batch, num_items_in_batch=1, use_cache=False).loss


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, seen: Seen) -> None:
    model, batch = built(name, torch.float32), batch_of("llama")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (name in TIED)
    assert_exact(model, own_loss(model), batch, each_row(batch), 1e-5, ways=FAST_WAYS)
    assert seen.blocks > 0
    assert (seen.formed == 0) == (name != WIDE)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_with_all_logits_there(name: str, seen: Seen) -> None:
    """In float64 throughout: what both ways compute differs by rounding only."""
    model, batch = built(name), batch_of("llama")

    def loss(batch: Any) -> Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), batch["labels"][:, 1:].flatten(), reduction="sum")

    assert_exact(model, loss, batch, each_row(batch), 1e-12, ways=FAST_WAYS)
    assert seen.blocks > 0
    assert (seen.formed == 0) == (name != WIDE)


@pytest.mark.parametrize("width", [16, 96])
def test_gradients_of_logits_are_stored_where_the_head_is_larger(
    width: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    gradients = kernels.gradients

    def spy(*args: Any, keep: bool = False, **options: Any) -> Any:
        asked.append(keep)
        return gradients(*args, keep=keep, **options)

    monkeypatch.setattr(subject, "gradients", spy)
    model, batch = hf.LlamaForCausalLM(hf.LlamaConfig(**_config(width))), batch_of("llama")
    for strategy in FAST:
        engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
        engine.backward(own_loss(model), batch)
        assert "logits in blocks" in engine.norm_methods()["lm_head.weight"]
        engine.detach()
        model.zero_grad()
    assert asked == [width == 96, False, False]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_rows_and_unassigned_tokens(name: str, seen: Seen) -> None:
    model = built(name)
    batch, boundaries = packed_batch((9, 1, 6, 4))
    ends = boundaries.tolist()

    def loss(batch: Any) -> Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")

    parts = [{k: v[:, a:b] for k, v in batch.items()} for a, b in pairwise(ends)]
    tolerance = 1e-5 if name == "gemma2" else 1e-12  # Gemma's norms round to float32 whatever the model's dtype
    assert_exact(model, loss, batch, parts, tolerance, units=boundaries, ways=FLAT_WAYS)
    batch["labels"][:, ends[3] :] = -100  # the last text is no one's, and so is its loss
    assert_exact(model, loss, batch, parts[:3], tolerance, units=boundaries[:4], ways=FLAT_WAYS)
    assert seen.formed == 0


def test_units_of_several_rows_in_any_order(seen: Seen) -> None:
    model, batch = built("gemma2", torch.float32), batch_of("llama", rows=6)
    ids = torch.tensor([0, 1, 0, 2, 1, 2])
    parts = [rows_of(batch, rows) for rows in ([0, 2], [1, 4], [3, 5])]
    assert_exact(model, own_loss(model), batch, parts, 1e-5, units=ids, ways=FLAT_WAYS)
    assert seen.formed == 0
    ids[3] = ids[5] = -1
    batch["labels"][[3, 5]] = -100
    assert_exact(model, own_loss(model), batch, parts[:2], 1e-5, units=ids, ways=FLAT_WAYS)


# --- whatever is done to them ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Embedding, a layer and a head, and a parameter to combine with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.shift = nn.Parameter(torch.randn(VOCABULARY) * 0.1)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(self.table(input_ids))))
        return out


class _Custom(torch.autograd.Function):
    """A cross entropy that torch functions do not show."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        return g * (logits.softmax(1) - F.one_hot(labels, VOCABULARY)), None


def _entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.flatten(), reduction="sum", **options)


def _masked_in_place(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    logits[..., 5:9] = -3.0
    return _entropy(logits, labels)


def _view_changed(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    flat = logits.view(-1, VOCABULARY)
    wide = logits / 2
    flat[:, :7] *= 0.5  # seen through `logits`, and not through `wide`
    return _entropy(logits, labels) + _entropy(wide, labels)


def _changed_through_an_unknown_view(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    copied = (logits * 1.5).contiguous()
    logits.transpose(0, 1).mul_(0.5)
    return _entropy(logits, labels) + _entropy(copied, labels)


def _copied_without_gradient(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    with torch.no_grad():
        target = (logits.double() / 2).view(-1, VOCABULARY)
    return _entropy(logits, labels) + (target * logits.view(-1, VOCABULARY)).sum() + F.cross_entropy(target, labels.flatten())


def _listed(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    both = torch.stack([logits, logits * 2]).sum(0)
    return _entropy(both, labels)


def _by_row(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    return torch.stack([F.cross_entropy(own, label, reduction="sum") for own, label in zip(logits, labels, strict=True)]).sum()


BLOCKS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "sum": lambda z, y, m: _entropy(z, y),
    "each": lambda z, y, m: (F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none") * y.flatten()).sum(),
    "shifted": lambda z, y, m: _entropy(z[..., :-1, :].contiguous(), y[:, 1:]),
    "first": lambda z, y, m: F.cross_entropy(z[:, 0], y[:, 0], reduction="sum"),
    "every other": lambda z, y, m: _entropy(z[:, ::2].reshape(-1, VOCABULARY), y[:, ::2]),
    "ignored": lambda z, y, m: _entropy(z, y, ignore_index=7),
    "scaled": lambda z, y, m: _entropy(-2 * z * 0.5 / 3, y),
    "soft-capped": lambda z, y, m: _entropy(torch.tanh(z * 2 / 0.6) * 0.6 / 2, y),
    "twice": lambda z, y, m: _entropy(z, y) + 2 * _entropy(z / 2, (y + 1) % VOCABULARY),
    "module": lambda z, y, m: nn.CrossEntropyLoss(reduction="sum")(
        z.to(z.device).to(torch.float64).flatten(0, -2), y.flatten()
    ),
    "keyword": lambda z, y, m: F.cross_entropy(input=z.flatten(0, 1), target=y.flatten(), reduction="sum"),
    "not at all, but for another": lambda z, y, m: _entropy(m(y), y),
}
FORMED: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "label smoothing": lambda z, y, m: _entropy(z, y, label_smoothing=0.1),
    "class weights": lambda z, y, m: _entropy(z, y, weight=torch.linspace(0.5, 1.5, VOCABULARY, dtype=torch.float64)),
    "classes second": lambda z, y, m: F.cross_entropy(z.transpose(1, 2), y, reduction="sum"),
    "probabilities": lambda z, y, m: F.cross_entropy(
        z.flatten(0, 1), F.one_hot(y, VOCABULARY).double().flatten(0, 1), reduction="sum"
    ),
    "by hand": lambda z, y, m: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum(),
    "and a penalty": lambda z, y, m: _entropy(z, y) + 0.1 * z.logsumexp(-1).square().sum(),
    "a penalty first": lambda z, y, m: 0.1 * z.logsumexp(-1).square().sum() + _entropy(z, y),
    "a penalty of a copy": lambda z, y, m: _entropy(z, y) + 0.1 * (z * 3).square().sum(),
    "in place": _masked_in_place,
    "a view in place": _view_changed,
    "an unknown view in place": _changed_through_an_unknown_view,
    "in place by a number": lambda z, y, m: _entropy(z.mul_(2), y),
    "some words": lambda z, y, m: z[..., 3:8].square().sum() + _entropy(z, y),
    "some rows by a mask": lambda z, y, m: F.cross_entropy(z[y > 20], y[y > 20], reduction="sum"),
    "narrower": lambda z, y, m: _entropy(z.float(), y),
    "detached": lambda z, y, m: _entropy(z, y) + (z.detach() * z).sum(),
    "copied without gradient": _copied_without_gradient,
    "listed": _listed,
    "row by row": _by_row,
    "soft-capped twice": lambda z, y, m: _entropy(z.tanh().tanh(), y),
    "with a parameter": lambda z, y, m: _entropy(z + m.shift, y),
    "a function of its own": lambda z, y, m: _Custom.apply(z.flatten(0, 1), y.flatten()),  # type: ignore[no-untyped-call]
    "a function of its own, and another": lambda z, y, m: (
        _Custom.apply(z.flatten(0, 1) / 2, y.flatten()) + _entropy(z, y)  # type: ignore[no-untyped-call]
    ),
}


BELOW: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {  # where another tensor class comes first
    "with a parameter before": lambda z, y, m: _entropy(m.shift * z, y),
    "a parameter to their power": lambda z, y, m: _entropy((1 + m.shift.square()) ** z, y) + _entropy(z, y),
}


@pytest.mark.parametrize("use", [*BLOCKS, *FORMED, *BELOW])
def test_whatever_is_done_to_them(use: str, seen: Seen) -> None:
    torch.manual_seed(3)
    model = Small()
    how = (BLOCKS | FORMED | BELOW)[use]
    batch = {"input_ids": torch.randint(0, VOCABULARY, (4, 5)), "labels": torch.randint(0, VOCABULARY, (4, 5))}

    def loss(batch: Any) -> Tensor:
        return how(model(batch["input_ids"]), batch["labels"], model)

    tolerance = 1e-5 if use == "narrower" else 1e-12
    parts = each_row(batch)
    if use != "with a parameter" and use not in BELOW:
        model.shift.requires_grad_(False)
    assert_exact(model, loss, batch, parts, tolerance, ways=FLAT_WAYS)
    assert (seen.formed > 0) == (use in FORMED)
    if use in BLOCKS:
        assert seen.blocks > 0


def test_a_unit_that_is_not_a_number_is_dropped_and_no_other(seen: Seen) -> None:
    model, ids = Small(), torch.randint(0, VOCABULARY, (4, 5))
    model.shift.requires_grad_(False)

    def loss(batch: Any) -> Tensor:
        hidden = torch.tanh(model.inner(model.table(batch["input_ids"]))) * batch["times"]
        return _entropy(model.head(hidden), batch["input_ids"])

    clean = {"input_ids": ids, "times": torch.linspace(0.5, 1.5, 4, dtype=torch.float64).view(4, 1, 1)}
    poisoned = {**clean, "times": clean["times"].index_fill(0, torch.tensor([2]), float("nan"))}
    truth = unit_gradients(model, loss, each_row(clean))
    wanted, norms = clipped_sum([truth[unit] for unit in (0, 1, 3)], 0.5)
    for strategy in FAST:
        engine = ClippingEngine(model, max_grad_norm=0.5, strategy=strategy)
        engine.backward(loss, clean)
        model.zero_grad()
        engine.backward(loss, poisoned)
        assert engine.dropped_units == 1
        assert distance(grads(model), wanted) <= 1e-12
        torch.testing.assert_close(engine.norms[[0, 1, 3]], norms, rtol=1e-12, atol=0.0)
        engine.detach()
        model.zero_grad()
    assert seen.blocks > 0
    assert seen.formed == 0


def test_one_word_of_as_many_rows_as_words(seen: Seen) -> None:
    model, ids = Small(), torch.randint(0, VOCABULARY, (2, VOCABULARY))
    model.shift.requires_grad_(False)

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"])[..., 3], batch["input_ids"][:, 0], reduction="sum")

    batch = {"input_ids": ids}
    assert_exact(model, loss, batch, each_row(batch), 1e-12, ways=FLAT_WAYS)
    assert seen.formed > 0


def test_what_comes_back_to_unassigned_rows(seen: Seen) -> None:
    model, ids = Small(), torch.randint(0, VOCABULARY, (4, 5))
    model.shift.requires_grad_(False)
    times = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)

    def loss(batch: Any) -> Tensor:
        return _entropy(model.head(model.table(batch["input_ids"]) * batch["times"]), batch["input_ids"])

    found = []
    for threshold in (THRESHOLD, 2**60):
        engine = ClippingEngine(model, max_grad_norm=1.0, strategy="bookkeeping", max_logit_bytes=threshold)
        engine.backward(loss, {"input_ids": ids, "times": times}, torch.tensor([1, -1, 0, 1]))
        assert times.grad is not None
        found.append(times.grad)
        times.grad = None
        engine.detach()
        model.zero_grad()
    assert seen.blocks > 0
    torch.testing.assert_close(*found, rtol=1e-12, atol=0.0)


def test_a_hook_on_logits_runs(seen: Seen) -> None:
    model, called = Small(), list[Tensor]()
    model.shift.requires_grad_(False)

    def doubled(g: Tensor) -> Tensor:
        called.append(g)
        return 2 * g

    def loss(batch: Any) -> Tensor:
        logits = model(batch["input_ids"])
        if logits.requires_grad:
            logits.register_hook(doubled)
        return _entropy(logits, batch["labels"])

    batch = {"input_ids": torch.randint(0, VOCABULARY, (4, 5)), "labels": torch.randint(0, VOCABULARY, (4, 5))}
    assert_exact(model, loss, batch, each_row(batch), 1e-12, ways=FLAT_WAYS)
    assert called


def deferred(seen: Seen) -> tuple[Small, Tensor]:
    """Logits of a model as an engine sees them, and never read so far."""
    model, out = Small(), list[Tensor]()
    model.shift.requires_grad_(False)
    batch = {"input_ids": torch.randint(0, VOCABULARY, (4, 5))}

    def loss(batch: Any) -> Tensor:
        out[:] = [model(batch["input_ids"])]
        return _entropy(out[0], batch["input_ids"])

    ClippingEngine(model, max_grad_norm=1.0).backward(loss, batch)
    assert seen.formed == 0
    return model, out[0]


@pytest.mark.parametrize(
    "read",
    [
        repr,
        lambda t: copy.deepcopy(t.detach()),
        lambda t: t.detach().numpy(),
        lambda t: t.tolist(),
        lambda t: t.clone(),
        lambda t: t.argmax(-1),
    ],
    ids=["repr", "deepcopy", "numpy", "tolist", "clone", "argmax"],
)
def test_who_reads_them_later_gets_the_numbers(read: Callable[[Tensor], Any], seen: Seen) -> None:
    _, logits = deferred(seen)
    assert logits.shape == (4, 5, VOCABULARY)
    assert logits.dtype == torch.float64
    with torch.no_grad():
        assert logits.is_contiguous()
    assert seen.formed == 0
    assert read(logits) is not None
    assert seen.formed == 1
    assert type(logits + 0) is Tensor


def test_numbers_that_are_no_more_are_refused(seen: Seen) -> None:
    model, logits = deferred(seen)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(PrivacyError, match="before the optimizer's step"):
        logits.sum()


def test_a_change_that_others_cannot_see_is_refused(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "read", lambda self, parameters: None)  # deferred again though it was in vain before
    model = Small()
    model.shift.requires_grad_(False)

    def loss(batch: Any) -> Tensor:
        logits = model(batch["input_ids"]).flatten(0, 1)
        logits.mul_(2)
        return _Custom.apply(logits, batch["input_ids"].flatten())  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(PrivacyError, match="microbatch"):
        ClippingEngine(model, max_grad_norm=1.0).backward(loss, {"input_ids": torch.randint(0, VOCABULARY, (4, 5))})


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant: bool, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0 every output of a linear layer is deferred, and formed by what comes next."""
    defer_from(threshold, monkeypatch)
    model, batch = built("qwen2"), batch_of("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    assert_exact(model, own_loss(model), batch, each_row(batch), 1e-5, ways=FLAT_WAYS)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast: bool, seen: Seen) -> None:
    """Blocks round less than whole logits do: both are compared with float64."""
    model, batch = built("gemma2", torch.float32 if autocast else torch.bfloat16), batch_of("llama", rows=6)

    def loss(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**batch, num_items_in_batch=1, use_cache=False).loss  # type: ignore[no-any-return]

    exact = copy.deepcopy(model).double()
    _, norms = clipped_sum(unit_gradients(exact, own_loss(exact), each_row(batch)), 1.0)
    errors = []
    for threshold in (THRESHOLD, 2**60):
        engine = ClippingEngine(model, max_grad_norm=1.0, strategy="bookkeeping", max_logit_bytes=threshold)
        assert engine.backward(loss, batch).dtype == torch.float32
        errors.append(float((engine.norms.double() / norms - 1).abs().max()))
        engine.detach()
        model.zero_grad()
    assert seen.blocks > 0
    assert seen.formed == 0
    assert errors[0] <= 2 * errors[1] + 2.0**-8, errors


def test_adapters_leave_a_frozen_head_alone(seen: Seen) -> None:
    model = get_peft_model(built("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    batch = batch_of("llama")
    ClippingEngine(model, max_grad_norm=1.0).backward(own_loss(model), batch)
    assert seen.blocks == seen.formed == 0


def test_what_was_deferred_in_vain_is_formed_at_once_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers inside a model too, so that two_pass can let go of their records one after the other."""
    defer_from(0, monkeypatch)
    deferred, made = list[Tensor](), subject.Product.__init__

    def counted(self: subject.Product, x: Tensor, *rest: Any) -> None:
        deferred.append(x)
        made(self, x, *rest)

    monkeypatch.setattr(subject.Product, "__init__", counted)
    model, batch = built("llama").float(), batch_of("llama")
    engine = ClippingEngine(model, max_grad_norm=1.0, strategy="two_pass")
    engine.backward(own_loss(model), batch)
    assert len(deferred) > 7  # every linear layer, once
    deferred.clear()
    engine.backward(own_loss(model), batch)
    assert len(deferred) == 2  # the output layer, in either pass
    assert "blocks" in engine.norm_methods()["lm_head.weight"]


def test_small_heads_are_formed_at_once() -> None:
    model, batch = built("llama"), batch_of("llama")
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.backward(own_loss(model), batch)
    assert "blocks" not in engine.norm_methods()["lm_head.weight"]


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made, in backward too."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if type(t) is Tensor and not t.is_meta:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("strategy", FAST)
def test_memory(strategy: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as half of the logits is ever made, not while layouts are learnt either."""
    monkeypatch.setattr(kernels, "FEWEST_COLUMNS", 4)
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 1)
    model, ids = Small(), torch.randint(0, VOCABULARY, (4, 50))
    model.shift.requires_grad_(False)
    largest = {}
    for threshold in (THRESHOLD, 2**60):
        engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy, max_logit_bytes=threshold)
        with _Largest() as mode:  # type: ignore[no-untyped-call]
            engine.backward(lambda batch: _entropy(model(batch["input_ids"]), batch["input_ids"]), {"input_ids": ids})
        largest[threshold] = mode.bytes
        engine.detach()
        model.zero_grad()
    logits = ids.numel() * VOCABULARY * 8
    assert largest[2**60] >= logits
    assert max(size for threshold, size in largest.items() if threshold < 2**60) < logits / 2


def test_a_reader_in_inference_mode_takes_no_gradient_away(seen: Seen) -> None:
    model = Small()
    model.shift.requires_grad_(False)

    def loss(batch: Any) -> Tensor:
        logits, labels = model(batch["input_ids"]), batch["input_ids"]
        entropy = _entropy(logits, labels)
        with torch.inference_mode():
            assert logits.argmax(-1).shape == labels.shape
        return entropy + 0.1 * logits.logsumexp(-1).square().sum()  # type: ignore[no-any-return]

    batch = {"input_ids": torch.randint(0, VOCABULARY, (4, 5))}
    assert_exact(model, loss, batch, each_row(batch), 1e-12, ways=FLAT_WAYS)
    assert seen.blocks > 0
    assert seen.formed > 0


@pytest.mark.parametrize("ask", [lambda t: t.register_hook(lambda g: 2 * g), lambda t: t.retain_grad()], ids=["hook", "retain"])
def test_a_gradient_of_logits_that_will_not_come_by_is_refused(ask: Callable[[Tensor], Any], seen: Seen) -> None:
    model = Small()
    model.shift.requires_grad_(False)

    def loss(batch: Any) -> Tensor:
        logits = model(batch["input_ids"])
        entropy = _entropy(logits, batch["input_ids"])
        if logits.requires_grad:
            ask(logits)
        return entropy

    batch = {"input_ids": torch.randint(0, VOCABULARY, (4, 5))}
    with pytest.raises(PrivacyError, match="before the loss"):
        ClippingEngine(model, max_grad_norm=1.0).backward(loss, batch)


def test_cross_entropies_of_other_weights_are_refused(seen: Seen) -> None:
    model, logits = deferred(seen)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(PrivacyError, match="before the optimizer's step"):
        _entropy(logits, torch.zeros(4, 5, dtype=torch.long))
