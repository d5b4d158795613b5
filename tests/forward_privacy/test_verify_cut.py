"""Privatised models: what is a cut, what is not, and that nothing is reported unless it is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.forward_privacy.privatize import Privatized, privatize
from dp_flash_hf.forward_privacy.verify_cut import verify_cut
from tests.support import zoo
from tests.support.forward_privacy import (
    _BART,
    _SIZES,
    ACROSS,
    ATTENTION,
    CACHE,
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
    assert report.rho == pytest.approx(2 / 2 / NOISE["noise_multiplier"] ** 2)
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
    with pytest.raises(PrivacyError, match=rf"{CACHE}\.cross_attention_cache"):
        verify_cut(privatized, {**pairs(), "use_cache": True}, private=("input_ids",), released=("logits", CACHE))
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
    with pytest.raises(PrivacyError, match=CACHE):
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


class Gated(nn.Module):
    """A decoder, and a way around it that a trained gate closes as yet."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.gate, self.shift = llama(), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).logits
        around: Tensor = self.model.model.embed_tokens(input_ids).sum(-1, keepdim=True)
        return logits + self.gate * around + self.shift


def test_a_parameter_that_is_trained_around_the_noise_has_to_be_frozen() -> None:
    model = Gated()
    privatized = privatize(model, RESIDUAL, layers=["model.model.layers.0"], placement="residual")
    with pytest.raises(PrivacyError, match=r"trained around the noise: the gradient that output gives gate depends"):
        verify_cut(privatized, texts())
    model.gate.requires_grad_(False)  # and shift may be trained
    verify_cut(privatized, texts())


def test_rows_that_see_each_other_are_seen_in_half_precision_too() -> None:
    model = llama().bfloat16()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(0), *args[1:]))
    privatized = privatize(model, RESIDUAL, layers=[0], placement="residual")
    with pytest.raises(PrivacyError, match="of one row depends on other rows"):
        verify_cut(privatized, texts(use_cache=False))


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
