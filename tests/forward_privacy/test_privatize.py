"""The handle of a privatised model: places, reports, removal, copies, generation, and calls that are not what they seem."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.privatize import Privatized, privatize
from dp_flash_hf.forward_privacy.sites import is_private
from dp_flash_hf.forward_privacy.verify_cut import verify_cut
from tests.support.forward_privacy import (
    _SIZES,
    ACROSS,
    ATTENTION,
    NOISE,
    RESIDUAL,
    TOKEN,
    bart,
    build,
    llama,
    pairs,
    plain_output,
    texts,
)
from tests.support.models import VOCABULARY


def hooks(model: nn.Module) -> list[Any]:
    return [list(table) for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)] + [
        sorted(vars(m)) for m in model.modules()
    ]


def test_removing_leaves_nothing_behind() -> None:
    model = bart()
    plain_output(model, pairs())
    before, keys = hooks(model), list(model.state_dict())
    for privacy, layers, placement in ((ATTENTION, "cross", "attention"), (RESIDUAL, [0], "residual")):
        privatized = privatize(model, privacy, layers=layers, placement=placement)  # type: ignore[arg-type]
        assert hooks(model) != before
        assert list(model.state_dict()) == keys
        verify_cut_or_not(privatized)
        privatized.remove()
        assert hooks(model) == before
        with pytest.raises(PrivacyError, match="verify_cut"):
            privatized.report(1e-5)


def test_a_transformers_that_would_repeat_units_unseen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hf.GenerationMixin, "_expand_inputs_for_generation")
    model = llama()
    before = hooks(model)
    with pytest.raises(UnsupportedError, match="repeats rows by something else"):
        privatize(model, RESIDUAL, layers=[0], placement="residual")
    assert hooks(model) == before


def verify_cut_or_not(privatized: Privatized) -> None:
    """So that there was a verdict before."""
    if privatized.placement == "attention":
        verify_cut(privatized, pairs(), **ACROSS)


def test_a_report_says_what_was_promised() -> None:
    model = bart()
    privacy = AttentionPrivacy(clip_norm=1.0, max_length=4, target_epsilon=4.0, target_delta=1e-6, passes=2, noise="secure")
    privatized = privatize(model, privacy, layers="cross")
    with pytest.raises(PrivacyError, match="verify_cut"):
        privatized.report()
    verify_cut(privatized, pairs(), **ACROSS)
    assert privatized.report().epsilon == 0
    for _ in range(2):
        plain_output(model, pairs())
    report = privatized.report()
    assert 4.0 * (1 - 1e-5) <= report.epsilon <= 4.0
    text = str(report)
    for words in ("epsilon <= 4", "replace one sequence", "encoder_attn", "ChaCha20", "input_ids", "Lengths"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100
    assert '"epsilon"' in report.to_json()
    with pytest.raises(PrivacyError, match="not a cut"):
        verify_cut(privatized, pairs(), released=("logits",))
    with pytest.raises(PrivacyError, match="verify_cut"):  # a failure takes the verdict back
        privatized.report()
    other = privatize(bart(), ATTENTION, layers="cross")
    verify_cut(other, pairs(), **ACROSS)
    with pytest.raises(ValueError, match="delta: expected"):
        other.report()


def test_places_can_be_named_numbered_and_asked_for_across() -> None:
    model = bart()
    across = [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    selections: list[tuple[Any, list[str]]] = [
        ("cross", across),
        ([0, 3], ["model.encoder.layers.0.self_attn", across[0]]),
        (["model.decoder.layers.1"], ["model.decoder.layers.1.self_attn", across[1]]),
    ]
    for layers, expected in selections:
        privatized = privatize(model, ATTENTION, layers=layers)
        assert list(privatized.places) == expected
        assert [name for name, module in model.named_modules() if is_private(module)] == expected
        privatized.remove()


def test_what_cannot_be_privatised_is_refused_and_leaves_nothing_behind() -> None:
    model = llama()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    refused: list[tuple[Any, AttentionPrivacy, dict[str, Any], type[Exception], str]] = [
        (eager, ATTENTION, {}, UnsupportedError, "does not run attn_implementation"),
        (model, RESIDUAL, {}, ValueError, "max_length: expected"),
        (model, ATTENTION, {"layers": [2]}, ValueError, "layers: expected"),
        (model, ATTENTION, {"layers": [-1]}, ValueError, "layers: expected"),
        (model, ATTENTION, {"layers": ["model.layers.7"]}, ValueError, "layers: expected"),
        (model, ATTENTION, {"layers": "cross"}, ValueError, "layers: expected"),
        (model, ATTENTION, {"layers": []}, ValueError, "layers: expected"),
        (model, RESIDUAL, {"placement": "residual"}, ValueError, "layers: expected"),
        (model, RESIDUAL, {"placement": "residual", "layers": ["nowhere"]}, ValueError, "layers: expected"),
        (model, RESIDUAL, {"placement": "output", "layers": [0]}, ValueError, "placement: expected"),
        (model, ATTENTION, {"placement": "residual", "layers": [0]}, ValueError, "max_length: expected"),
        (model, TOKEN, {"placement": "residual", "layers": [0]}, UnsupportedError, "only unit="),
        (
            model,
            AttentionPrivacy(clip_norm=[1.0, 1.0], noise_multiplier=1.0),
            {"placement": "residual", "layers": [0]},
            ValueError,
            "clip_norm: expected",
        ),
    ]
    before = hooks(model)
    for one, privacy, options, kind, message in refused:
        with pytest.raises(kind, match=message):
            privatize(one, privacy, **options)
    assert hooks(model) == before
    privatize(model, RESIDUAL, layers=[0], placement="residual")
    with pytest.raises(ValueError, match="model: expected"):
        privatize(model, ATTENTION)


def test_a_place_that_never_releases_is_an_error_of_the_first_forward() -> None:
    config = hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=32, add_cross_attention=True)
    model = build(hf.GPT2LMHeadModel, config)
    privatize(model, ATTENTION)
    with pytest.raises(PrivacyError, match=r"nothing was released there: transformer\.h\.0\.crossattention"):
        model(**texts())
    model(**texts(), encoder_hidden_states=torch.randn(3, 2, 16).double())


def test_another_attention_implementation_later_is_an_error() -> None:
    model = llama()
    privatized = privatize(model, ATTENTION)
    model.set_attn_implementation("eager")
    for _ in range(2):
        with pytest.raises(PrivacyError, match='became "eager"'):
            model(**texts())
    model.set_attn_implementation("dp_attention")
    model(**texts())
    assert len(privatized.ledger.calls) == 2


def test_attention_dropout_and_gradient_checkpointing_are_refused() -> None:
    config = hf.LlamaConfig(**_SIZES, num_hidden_layers=1, num_key_value_heads=1, pad_token_id=0, attention_dropout=0.1)
    model = build(hf.LlamaForCausalLM, config)
    privatize(model, ATTENTION)
    with pytest.raises(UnsupportedError, match="dropout"):
        model.train()(**texts())
    model = llama(trained=True).train()
    privatize(model, ATTENTION)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(**texts(use_cache=False)).logits.sum().backward()


def test_checkpointing_draws_no_second_noise_for_hidden_states() -> None:
    model = llama(trained=True).train()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with contextlib.suppress(UnsupportedError):  # where a version of Transformers recomputes a block with its hooks
        model(**texts(use_cache=False)).logits.sum().backward()
    assert sum(privatized.ledger.calls.values()) == 1


def test_a_copy_is_private_and_recorded() -> None:
    model = llama()
    privatized = privatize(model, ATTENTION)
    outputs = [plain_output(twin, texts()) for twin in (model, copy.deepcopy(model))]
    assert not torch.equal(*outputs)
    assert sum(privatized.ledger.calls.values()) == 4


def test_rows_are_units_only_if_all_inputs_have_as_many() -> None:
    text = {**_SIZES, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**_SIZES, "num_hidden_layers": 1, "image_size": 4, "patch_size": 2}
    vision.pop("vocab_size")
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = build(hf.CLIPModel, config)
    privatized = privatize(model, ATTENTION, layers=["vision_model"])
    ids, pixels = texts((4, 4))["input_ids"], torch.randn(3, 3, 4, 4).double()
    model(input_ids=ids, pixel_values=pixels)  # whose the three pictures are is not known: five rows each
    assert privatized.ledger.squared_mu == pytest.approx(15 / 32 / 4)
    model(input_ids=ids, pixel_values=pixels[:2])
    assert privatized.ledger.squared_mu == pytest.approx((15 + 5) / 32 / 4)
    with privatized.ledger.units(["a", "b", "a"]):
        model(input_ids=ids, pixel_values=pixels)
    assert privatized.ledger.squared_mu == pytest.approx((15 + 5 + 10) / 32 / 4)


# --- generation -----------------------------------------------------------------------------------------------------------


def generate(model: Any, **options: Any) -> None:
    batch = texts()
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)


def test_every_generated_token_is_a_release() -> None:
    model = bart()
    privatized = privatize(model, ATTENTION, layers="cross")
    generate(model)
    assert sum(privatized.ledger.calls.values()) == 3 * 2
    assert privatized.ledger.squared_mu == pytest.approx(3 * 2 * 1 / 32 / 4)  # a row for each token and layer


def test_beams_have_to_say_whose_they_are() -> None:
    model = bart()
    privatized = privatize(model, ATTENTION, layers="cross")
    with pytest.raises(PrivacyError, match=r"ledger\.units"):
        generate(model, num_beams=2)
    with privatized.ledger.units([0, 0, 1, 1, 2, 2]):
        generate(model, num_beams=2)
    assert privatized.ledger.squared_mu == pytest.approx(2 * 3 * 2 * 1 / 32 / 4)
    privatized.remove()
    generate(model, num_beams=2)


def test_an_encoder_that_is_called_by_itself_is_recorded_by_rows() -> None:
    model = bart()
    privatized = privatize(model, RESIDUAL, layers=[1], placement="residual")
    generate(model)
    assert privatized.ledger.squared_mu == pytest.approx(1 / 4)


# --- calls that are not what they seem ------------------------------------------------------------------------------------


class _Embedded(nn.Module):
    """Embeddings, and a block behind them; `arrange` lays out what the block is given."""

    def __init__(self, arrange: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.embedding, self.norm, self.block = nn.Embedding(50, 4), nn.BatchNorm1d(4), nn.Identity()
        self.arrange, self.interrupted = arrange, False
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.interrupted:
            raise KeyboardInterrupt
        states: Tensor = self.block(self.arrange(self.norm(self.embedding(input_ids).flatten(0, -2)).view(*input_ids.shape, 4)))
        return states


def _ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


def _released_after(model: nn.Module) -> Privatized:
    return privatize(model, RESIDUAL, layers=["block"], placement="residual")


@pytest.mark.parametrize("how", ["traced", "exported", "mapped"])
def test_what_would_add_the_same_noise_again_is_refused(how: str) -> None:
    model = _Embedded()
    privatized = _released_after(model)
    ways: dict[str, Callable[[], Any]] = {
        "traced": lambda: torch.jit.trace(model, (_ids(2, 5),)),
        "exported": lambda: torch.export.export(model, (_ids(2, 5),)),
        "mapped": lambda: torch.vmap(model)(_ids(3, 1, 5)),
    }
    with pytest.raises(Exception, match="the same noise again and again"):
        ways[how]()
    assert not privatized.ledger.calls


def test_an_interrupted_call_does_not_say_whose_rows_the_next_ones_are() -> None:
    model = _Embedded(lambda x: x.flatten(0, -3))
    privatized = _released_after(model)
    model(_ids(2, 4, 5))
    before = privatized.ledger.squared_mu
    model.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        model(_ids(8, 5))
    model.interrupted = False
    model(_ids(2, 4, 5))
    assert privatized.ledger.squared_mu == pytest.approx(2 * before)


def test_rows_that_are_tokens_are_one_unit_also_where_there_are_as_many_as_texts() -> None:
    privatized = _released_after(_Embedded(lambda x: x.transpose(0, 1)))
    verify_cut(privatized, {"input_ids": _ids(3, 5)})
    privatized.model(_ids(5, 5))
    assert privatized.ledger.squared_mu == pytest.approx(5 / NOISE["noise_multiplier"] ** 2)


def test_a_batch_that_is_normalised_by_itself_has_to_be_verified_again() -> None:
    privatized = _released_after(_Embedded())
    verify_cut(privatized, {"input_ids": _ids(3, 5)})
    privatized.model.train()
    privatized.model(_ids(3, 5))
    with pytest.raises(PrivacyError, match="has not been verified"):
        privatized.report(1e-5)
    with pytest.raises(PrivacyError, match="batch normalisation"):
        verify_cut(privatized, {"input_ids": _ids(3, 5)})


def test_one_row_does_not_show_that_rows_do_not_mix() -> None:
    privatized = _released_after(_Embedded(lambda x: x.cumsum(0)))
    verify_cut(privatized, {"input_ids": _ids(1, 5)})
    privatized.model(_ids(3, 5))
    assert privatized.ledger.squared_mu == pytest.approx(3 / NOISE["noise_multiplier"] ** 2)
    with pytest.raises(PrivacyError, match="depends on other rows"):
        verify_cut(privatized, {"input_ids": _ids(3, 5)})
