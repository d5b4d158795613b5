"""Privatised models: where the noise goes, and that nothing is reported unless it is a cut."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf import AttentionPrivacy, PrivacyError, Privatized, UnsupportedError, privatize, verify_cut
from dp_flash_hf.attention.function import SITE
from tests.support import zoo
from tests.support.models import VOCABULARY

GOOD: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 2.0}
ATTENTION = AttentionPrivacy(**GOOD, max_length=32)
RESIDUAL = AttentionPrivacy(**GOOD)
SILENT = 1e-30  # a noise multiplier that leaves numbers as they are
EPS64 = torch.finfo(torch.float64).eps

_SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": VOCABULARY}
_BART: dict[str, Any] = {
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("ffn_dim", 24), ("attention_heads", 2))
    },
    **{"d_model": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0, "dropout": 0.0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}


def build(model_class: Any, config: Any, *, trained: bool = False) -> Any:
    torch.manual_seed(1)
    model = model_class._from_config(config, attn_implementation="dp_flash").double().eval()
    return model.requires_grad_(trained)


def llama(**changes: Any) -> Any:
    config = hf.LlamaConfig(
        **_SIZES, num_hidden_layers=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return build(hf.LlamaForCausalLM, config, **changes)


def bart(layers: int = 2, **changes: Any) -> Any:
    return build(hf.BartForConditionalGeneration, hf.BartConfig(**{**_BART, "decoder_layers": layers}), **changes)


def texts(lengths: tuple[int, ...] = (6, 3, 5), **others: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, **others}


def pairs(**others: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return texts(decoder_input_ids=torch.randint(3, VOCABULARY, (3, 4), generator=generator), use_cache=False, **others)


def plain_output(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


ACROSS: dict[str, Any] = {"private": ("input_ids",), "released": ("logits",)}

# --- ten architectures and more -------------------------------------------------------------------------------------------

ONE_STACK = {
    **dict.fromkeys(("LlamaForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM", "Gemma2ForCausalLM"), "causal-lm"),
    **dict.fromkeys(("Qwen2ForCausalLM", "Qwen3ForCausalLM", "PhiForCausalLM", "OPTForCausalLM"), "causal-lm"),
    **dict.fromkeys(("GPTNeoXForCausalLM", "FalconForCausalLM"), "causal-lm"),
    **dict.fromkeys(("BertForMaskedLM", "RobertaForMaskedLM", "MPNetForMaskedLM"), "masked-lm"),
}
TWO_STACKS = (
    *("BartForConditionalGeneration", "T5ForConditionalGeneration", "MarianMTModel", "PegasusForConditionalGeneration"),
    *("MBartForConditionalGeneration", "M2M100ForConditionalGeneration", "MvpForConditionalGeneration"),
)


@pytest.mark.parametrize("name", ONE_STACK)
def test_noise_in_the_attention_of_one_stack_is_no_cut_but_noise_on_its_residual_stream_is(name: str) -> None:
    specimen = zoo.build(ONE_STACK[name], name)
    model = specimen.model.requires_grad_(False)
    batch = {key: value for key, value in specimen.batch.items() if key != "labels"}
    before = plain_output(model, batch)

    privatized = privatize(model, ATTENTION)
    with pytest.raises(PrivacyError, match=r"not a cut: .* logits still depends on input_ids"):
        verify_cut(privatized, batch)
    with pytest.raises(PrivacyError, match="verify_cut"):
        privatized.report(1e-5)
    privatized.remove()

    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    verify_cut(privatized, batch)
    assert not privatized.ledger.calls  # nothing left the model
    noised = plain_output(model, batch)
    assert not torch.equal(noised, plain_output(model, batch))
    report = privatized.report(1e-5)
    assert report.calls == 2
    assert report.rho == pytest.approx(2 / 2 / GOOD["noise_multiplier"] ** 2)
    privatized.remove()
    assert torch.equal(plain_output(model, batch), before)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_cross_attention_and_the_last_block_of_the_encoder_are_cuts_between_two_stacks(name: str) -> None:
    specimen = zoo.build("seq2seq", name)
    model = specimen.model.requires_grad_(False)
    batch = {key: value for key, value in specimen.batch.items() if key != "labels"}
    batch["decoder_input_ids"] = specimen.batch["labels"].clamp(min=0)
    before = plain_output(model, batch)
    everywhere = privatize(model, ATTENTION)
    everywhere.remove()
    for privacy, layers, placement in ((ATTENTION, "cross", "attention"), (RESIDUAL, [1], "residual")):
        privatized = privatize(model, privacy, layers=layers, placement=placement)  # type: ignore[arg-type]
        assert len(privatized.places) < len(everywhere.places) / 2
        verify_cut(privatized, batch, **ACROSS)
        plain_output(model, batch)
        assert 0 < privatized.report(1e-5).epsilon < math.inf
        privatized.remove()
    assert torch.equal(plain_output(model, batch), before)


def test_sound_is_cut_off_from_text_by_cross_attention() -> None:
    config = hf.WhisperConfig(**{**_BART, "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 16})
    model = build(hf.WhisperForConditionalGeneration, config)
    privatized = privatize(model, ATTENTION, layers="cross")
    batch = {"input_features": torch.randn(3, 4, 20).double(), "decoder_input_ids": pairs()["decoder_input_ids"]}
    verify_cut(privatized, batch, private=("input_features",), released=("logits",))
    model(**batch)
    assert privatized.report(1e-5).public_inputs == ("decoder_input_ids",)


def test_an_encoder_that_is_read_at_a_public_token_is_a_cut() -> None:
    """A classification token's own stream is public, and all else reaches it through attention."""
    config = hf.BertConfig(**_SIZES, num_hidden_layers=2, pad_token_id=0)
    model = build(hf.BertForSequenceClassification, config)
    batch = texts()
    batch["input_ids"][:, 0] = 3
    privatized = privatize(model, ATTENTION)
    with pytest.raises(PrivacyError, match="not a cut"):
        verify_cut(privatized, batch)
    verify_cut(privatized, batch, special_ids=(3,))


# --- what is not a cut ----------------------------------------------------------------------------------------------------


def test_what_an_encoder_decoder_returns_besides_is_private() -> None:
    model = bart()
    privatized = privatize(model, ATTENTION, layers="cross")
    with pytest.raises(PrivacyError, match="encoder_last_hidden_state"):
        verify_cut(privatized, pairs(), private=("input_ids",))
    with pytest.raises(PrivacyError, match=r"past_key_values\.cross_attention_cache"):
        verify_cut(privatized, {**pairs(), "use_cache": True}, private=("input_ids",), released=("logits", "past_key_values"))
    with pytest.raises(PrivacyError, match="logits still depends on input_ids, decoder_input_ids"):
        verify_cut(privatized, pairs(), released=("logits",))
    without = {name: value for name, value in pairs().items() if name != "decoder_input_ids"}  # BART shifts input_ids then
    with pytest.raises(PrivacyError, match="logits still depends on input_ids"):
        verify_cut(privatized, without, **ACROSS)
    with pytest.raises(ValueError, match="released: expected"):
        verify_cut(privatized, pairs(), released=("scores",))
    with pytest.raises(ValueError, match="private: expected"):
        verify_cut(privatized, pairs(), private=("pixel_values",))


def test_what_a_decoder_returns_besides_is_private() -> None:
    model = llama()
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    with pytest.raises(PrivacyError, match="past_key_values"):
        verify_cut(privatized, texts())
    with pytest.raises(PrivacyError, match="hidden_states"):
        verify_cut(privatized, texts(use_cache=False, output_hidden_states=True))
    verify_cut(privatized, texts(use_cache=False))


def test_one_layer_without_noise_is_a_way_through() -> None:
    model = bart()
    privatized = privatize(model, ATTENTION, layers=["model.decoder.layers.0.encoder_attn"])
    with pytest.raises(PrivacyError, match="not a cut"):
        verify_cut(privatized, pairs(), **ACROSS)


class Around(nn.Module):
    """A decoder, and a way around it."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.way = llama(), way

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).logits
        return logits + self.way(self.model.model.embed_tokens(input_ids)).sum(-1, keepdim=True)


def test_a_way_around_that_rounding_hides_is_found_by_autograd_and_one_without_gradient_by_trying() -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "is computed from input_ids around": lambda x: 1e-40 * x,
        "still depends on input_ids": lambda x: x.detach(),
    }
    for message, way in ways.items():
        privatized = privatize(Around(way), RESIDUAL, layers=["model.model.layers.0"], placement="residual")
        with pytest.raises(PrivacyError, match=message):
            verify_cut(privatized, texts())
    verify_cut(privatize(Around(torch.zeros_like), RESIDUAL, layers=["model.model.layers.0"], placement="residual"), texts())


def test_parameters_before_the_noise_have_to_be_frozen() -> None:
    model = llama(trained=True)
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    with pytest.raises(PrivacyError, match=r"trained before the noise: model\.embed_tokens\.weight.*and 2 more"):
        verify_cut(privatized, texts(use_cache=False))
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    model.lm_head.requires_grad_(True)
    verify_cut(privatized, texts(use_cache=False))
    model(**texts(use_cache=False)).logits.sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None
    privatized.report(1e-5)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.raises(PrivacyError, match="verify_cut"):  # no longer the model that was verified
        privatized.report(1e-5)


def test_a_tied_head_is_trained_before_the_noise_too_and_so_are_queries_of_public_text() -> None:
    model = bart()
    privatized = privatize(model, ATTENTION, layers="cross")
    verify_cut(privatized, pairs(), **ACROSS)
    model.lm_head.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"trained before the noise: model\.(shared|encoder\.embed_tokens)\.weight"):
        verify_cut(privatized, pairs(), **ACROSS)
    model.requires_grad_(False)
    model.model.decoder.layers[0].self_attn.q_proj.requires_grad_(True)  # its gradient comes through private keys
    with pytest.raises(PrivacyError, match=r"trained before the noise: model\.decoder\.layers\.0\.self_attn\.q_proj"):
        verify_cut(privatized, pairs(), **ACROSS)
    model.requires_grad_(False)
    model.model.decoder.layers[1].fc1.requires_grad_(True)
    verify_cut(privatized, pairs(), **ACROSS)


def test_rows_that_see_each_other_before_the_noise_are_refused() -> None:
    model = llama()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(0), *args[1:]))
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    with pytest.raises(PrivacyError, match="of one row depends on other rows"):
        verify_cut(privatized, texts(use_cache=False))


class Twice(Around):
    """A decoder that runs again where its text says so."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
        output = super().forward(input_ids, attention_mask, use_cache)
        return super().forward(input_ids, attention_mask, use_cache) * 0 + output if int(input_ids[0, 0]) % 2 else output


def test_how_often_a_place_runs_may_not_depend_on_the_text() -> None:
    privatized = privatize(Twice(torch.zeros_like), RESIDUAL, layers=["model.model.layers.0"], placement="residual")
    with pytest.raises(PrivacyError, match="which calls the model makes depends"):
        verify_cut(privatized, texts(), replacements=8)


def test_inputs_that_do_not_reach_the_noise_are_no_test_of_it() -> None:
    privatized = privatize(bart(), ATTENTION, layers=[0])  # the encoder's own attention
    batch = pairs()
    batch["encoder_outputs"] = (torch.randn(3, 6, 16).double(),)
    with pytest.raises(PrivacyError, match="never called"):
        verify_cut(privatized, batch, private=("decoder_input_ids",), released=("logits",))
    privatized = privatize(bart(), ATTENTION, layers=["model.encoder"])
    with pytest.raises(PrivacyError, match="nothing that the privatised places are given depends on extra"):
        verify_cut(_with_extra(privatized), {**pairs(), "extra": torch.rand(3, 2)}, private=("extra",), released=("logits",))


def _with_extra(privatized: Privatized) -> Privatized:
    forward = privatized.model.forward
    privatized.model.forward = lambda extra=None, **kwargs: forward(**kwargs)
    return privatized


def test_only_what_can_be_replaced_can_be_verified() -> None:
    privatized = privatize(llama(), RESIDUAL, layers=[0], placement="residual")
    with pytest.raises(ValueError, match="can be replaced"):
        verify_cut(privatized, {"input_ids": torch.zeros(2, 3, dtype=torch.long), "use_cache": False})


# --- tokens ---------------------------------------------------------------------------------------------------------------

TOKEN = AttentionPrivacy(**GOOD, max_length=32, unit="token", logit_cap=1.0)


def test_tokens_are_protected_where_attention_reads_embeddings_and_nothing_else_does() -> None:
    specimen = zoo.build("masked-lm", "PerceiverForMaskedLM")
    model = specimen.model.requires_grad_(False)
    batch = {key: value for key, value in specimen.batch.items() if key != "labels"}
    with pytest.raises(UnsupportedError, match=r'unit="token" at \d places'):
        privatize(model, TOKEN)
    privatized = privatize(model, TOKEN, layers=[0])
    verify_cut(privatized, batch)
    model(**batch)
    assert privatized.report(1e-5).adjacency == "replace one token of a sequence by another"


def test_tokens_are_not_protected_where_an_encoder_mixed_them() -> None:
    privatized = privatize(bart(layers=1), TOKEN, layers="cross")
    with pytest.raises(PrivacyError, match="one token of input_ids changes"):
        verify_cut(privatized, pairs(), **ACROSS)


def test_tokens_are_not_protected_by_a_decoder_whose_residual_stream_goes_around() -> None:
    with pytest.raises(PrivacyError, match="not a cut"):
        verify_cut(privatize(llama(), TOKEN, layers=[0]), texts(use_cache=False))


# --- noise on hidden states -----------------------------------------------------------------------------------------------


def states_after(model: Any, block: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What a block returns, after its hooks."""
    found: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(**batch)
    handle.remove()
    return found[0]


def test_hidden_states_of_a_sequence_are_clipped_as_one_and_padding_is_zeroed() -> None:
    for model, batch, layer in (
        (llama(), texts(use_cache=False), 0),
        (bart(), pairs(), 1),  # the encoder's
        (bart(), pairs(decoder_attention_mask=(torch.arange(4) < torch.tensor([[4], [2], [3]])).long()), 2),
    ):
        mask = batch["decoder_attention_mask" if layer == 2 else "attention_mask"]
        blocks = dict(model.named_modules())
        norm = 0.01
        privatized = privatize(
            model, AttentionPrivacy(clip_norm=norm, noise_multiplier=SILENT), layers=[layer], placement="residual"
        )
        (name,) = privatized.places
        found = states_after(model, blocks[name], batch)
        privatized.remove()
        plain = states_after(model, blocks[name], batch) * mask[:, :, None]
        factors = (norm / plain.flatten(1).norm(dim=1)).clamp(max=1)
        assert (factors < 1).all()
        torch.testing.assert_close(found, plain * factors[:, None, None], rtol=0, atol=16 * EPS64)
        assert (found[mask == 0] == 0).all()


def test_hidden_states_are_clipped_with_their_exact_gradient() -> None:
    model = llama()
    batch = texts()
    embeds = model.model.embed_tokens(batch.pop("input_ids"))
    privatized = privatize(model, AttentionPrivacy(clip_norm=0.5, noise_multiplier=SILENT), layers=[0], placement="residual")

    def after(x: Tensor) -> Tensor:
        return states_after(model, model.model.layers[0], {**batch, "inputs_embeds": x, "use_cache": False})

    x = embeds.detach().clone().requires_grad_()
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad(after(x), x, direction)
    privatized.remove()
    plain = after(x) * batch["attention_mask"][:, :, None]
    expected = plain * (0.5 / plain.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    torch.testing.assert_close(found, torch.autograd.grad(expected, x, direction)[0], rtol=1e-10, atol=1e-12)


def test_noise_on_hidden_states_has_its_scale() -> None:
    model = llama()
    batch = texts((40,) * 16, use_cache=False)
    privatized = privatize(model, AttentionPrivacy(clip_norm=0.5, noise_multiplier=3.0), layers=[0], placement="residual")
    one, other = (states_after(model, model.model.layers[0], batch) for _ in range(2))
    drawn = (one - other) / (math.sqrt(2) * 2 * 0.5 * 3.0)
    # 10,240 squares; 4 standard deviations.
    assert abs(float(drawn.square().mean()) - 1) < 4 * math.sqrt(2 / drawn.numel())
    assert privatized.ledger.squared_mu == pytest.approx(2 / 3.0**2)


def test_without_a_mask_every_row_is_real() -> None:
    model = llama()
    privatize(model, RESIDUAL, layers=[0], placement="residual")
    batch = texts(use_cache=False)
    model(**batch)
    assert (states_after(model, model.model.layers[0], {"input_ids": batch["input_ids"], "use_cache": False}) != 0).all()


def test_infinite_hidden_states_stay_within_the_bound() -> None:
    model = llama()
    privacy = AttentionPrivacy(clip_norm=0.5, noise_multiplier=SILENT)
    privatize(model, privacy, layers=[0], placement="residual")
    embeds = model.model.embed_tokens(texts()["input_ids"]).detach()
    embeds[0, 1] = math.inf
    found = states_after(model, model.model.layers[0], {"inputs_embeds": embeds, "use_cache": False})
    assert (found.flatten(1).norm(dim=1) <= 0.5 * (1 + 16 * EPS64)).all()


# --- the handle -----------------------------------------------------------------------------------------------------------


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


def verify_cut_or_not(privatized: Privatized) -> None:
    """So that there was a verdict before."""
    if privatized.placement == "attention":
        verify_cut(privatized, pairs(), **ACROSS)


def test_a_report_says_what_was_promised() -> None:
    model = bart()
    privacy = AttentionPrivacy(clip_norm=1.0, max_length=4, target_epsilon=4.0, target_delta=1e-6, passes=2, secure=True)
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
        assert [name for name, module in model.named_modules() if hasattr(module, SITE)] == expected
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
    assert privatized.ledger.squared_mu == pytest.approx(5 / GOOD["noise_multiplier"] ** 2)


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
    assert privatized.ledger.squared_mu == pytest.approx(3 / GOOD["noise_multiplier"] ** 2)
    with pytest.raises(PrivacyError, match="depends on other rows"):
        verify_cut(privatized, {"input_ids": _ids(3, 5)})
