"""Generation by privatised models: what may read private ids is refused, and what was not verified gets no report."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.forward_privacy.privatize import Privatized, privatize
from dp_flash_hf.forward_privacy.verify_cut import verify_cut
from tests.support.forward_privacy import _SIZES, ATTENTION, RESIDUAL, bart, build, llama, texts

LENGTH: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3}


def private_decoder(model: Any = None) -> Privatized:
    return privatize(model or llama(), RESIDUAL, layers=[0], placement="residual")


def across(model: Any = None) -> Privatized:
    return privatize(model or bart(), ATTENTION, layers="cross")


def verify_generate(privatized: Privatized, **options: Any) -> None:
    verify_cut(privatized, texts(**{**LENGTH, **options}), private=("input_ids",), call="generate")


def generate(privatized: Privatized, **options: Any) -> Any:
    model: Any = privatized.model
    return model.generate(**texts(**{**LENGTH, **options}))


class Streamer:
    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def settings(**options: Any) -> Any:
    config: Any = hf.GenerationConfig
    return config(**options)


def same(*args: Any) -> Any:
    return args[-1]


# --- what reads private ids -----------------------------------------------------------------------------------------------

READ_ANYTHING: dict[str, Any] = {
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "prompt_lookup_num_tokens": 2,
    "logits_processor": [same],
    "stopping_criteria": [same],
    "prefix_allowed_tokens_fn": same,
    "streamer": Streamer(),
    "assistant_model": object(),
    "custom_generate": same,
    "negative_prompt_ids": torch.ones(3, 2, dtype=torch.long),
    "guidance_scale": 2.0,
    "token_healing": True,
    "dola_layers": "low",
    "penalty_alpha": 0.5,
    "force_words_ids": [[4]],
    "constraints": [4],
    "assistant_early_exit": 1,
    "max_time": 9.0,
    "a_hook_of_the_model": same,
}
READ_THE_PROMPT: dict[str, Any] = {
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 1.2,
    "bad_words_ids": [[4, 5]],
    "sequence_bias": [[[4, 5], -9.0]],
    "watermarking_config": hf.WatermarkingConfig(),
    "stop_strings": ["no"],
}


@pytest.mark.parametrize("option", [*READ_ANYTHING, *READ_THE_PROMPT])
def test_options_that_may_read_a_private_prompt_are_refused_by_name(option: str) -> None:
    privatized = private_decoder()
    with pytest.raises(PrivacyError, match=rf"not a cut: {option} may read input_ids"):
        verify_generate(privatized, **{option: {**READ_ANYTHING, **READ_THE_PROMPT}[option]})


@pytest.mark.parametrize("option", READ_ANYTHING)
def test_options_that_may_read_what_an_encoder_is_given_are_refused_by_name(option: str) -> None:
    with pytest.raises(PrivacyError, match=rf"not a cut: {option} may read input_ids"):
        verify_generate(across(), **{option: READ_ANYTHING[option]})


@pytest.mark.parametrize("option", sorted(READ_THE_PROMPT.keys() - {"stop_strings"}))
def test_what_reads_the_beginning_is_harmless_where_that_is_public(option: str) -> None:
    privatized = across()
    verify_generate(privatized, **{option: READ_THE_PROMPT[option]})
    generate(privatized, **{option: READ_THE_PROMPT[option]})
    assert privatized.report(1e-5).calls == 3 * 2
    batch = {**texts(), "decoder_input_ids": texts((2, 2, 2))["input_ids"], **LENGTH, option: READ_THE_PROMPT[option]}
    with pytest.raises(PrivacyError, match=rf"not a cut: {option} may read input_ids, decoder_input_ids"):
        verify_cut(privatized, batch, private=("input_ids", "decoder_input_ids"), call="generate")


def test_the_input_is_private_under_its_other_name_too() -> None:
    batch = {"inputs": texts((4, 4))["input_ids"], **LENGTH}
    for privatized in (across(), private_decoder()):
        verify_cut(privatized, batch, private=("inputs",), call="generate")
        with pytest.raises(PrivacyError, match="encoder_no_repeat_ngram_size may read inputs"):
            verify_cut(privatized, {**batch, "encoder_no_repeat_ngram_size": 2}, private=("inputs",), call="generate")


def test_options_of_the_models_own_generation_config_count_until_they_are_switched_off_there() -> None:
    privatized = across()
    model: Any = privatized.model
    model.generation_config.encoder_no_repeat_ngram_size = 3  # as Blenderbot's is
    with pytest.raises(PrivacyError, match=r"encoder_no_repeat_ngram_size.*switched off by None there"):
        verify_generate(privatized)
    with pytest.raises(PrivacyError, match="encoder_no_repeat_ngram_size"):
        verify_generate(privatized, generation_config=settings(do_sample=True))
    model.generation_config.encoder_no_repeat_ngram_size = None
    verify_generate(privatized)
    model.generation_config.encoder_no_repeat_ngram_size = 3
    generate(privatized)
    with pytest.raises(PrivacyError, match=r"generate\(attention_mask, input_ids, encoder_no_repeat_ngram_size=3"):
        privatized.report(1e-5)


def test_a_model_with_generation_of_its_own_is_refused() -> None:
    base: Any = hf.LlamaForCausalLM
    own = type("Own", (base,), {"_sample": lambda self, *args, **kwargs: base._sample(self, *args, **kwargs)})
    config = hf.LlamaConfig(**_SIZES, num_hidden_layers=1, num_key_value_heads=1, pad_token_id=0)
    models = [build(own, config), llama(), llama()]
    models[1].generate = functools.partial(same, models[1])
    models[2]._get_logits_processor = same
    for model in models:
        with pytest.raises(PrivacyError, match="generates with code of its own"):
            verify_generate(private_decoder(model))


# --- what was verified ----------------------------------------------------------------------------------------------------


def test_generation_is_reported_where_it_was_verified_and_the_prompt_is_not_released() -> None:
    privatized = private_decoder()
    verify_generate(privatized)
    assert not privatized.ledger.calls
    found = generate(privatized, temperature=0.5)  # lengths and values of what reads no ids may differ
    assert torch.equal(found[:, :6], texts()["input_ids"])
    report = privatized.report(1e-5)
    assert (report.calls, report.released) == (3, ("sequences",))
    assert report.verified_calls == ("generate(attention_mask, input_ids, use_cache=True)",)
    generate(privatized, max_new_tokens=5)
    assert privatized.report(1e-5).calls == 3 + 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"no_repeat_ngram_size": 1}, "attention_mask, input_ids, no_repeat_ngram_size=1, use_cache=True"),
        ({"logits_processor": [same]}, "attention_mask, input_ids, logits_processor=..., use_cache=True"),
        ({"stopping_criteria": [lambda *_: False]}, "attention_mask, input_ids, stopping_criteria=..., use_cache=True"),
        ({"use_cache": False}, "attention_mask, input_ids"),
    ],
)
def test_generation_in_another_way_than_verified_gets_no_report(options: dict[str, Any], named: str) -> None:
    privatized = private_decoder()
    verify_generate(privatized)
    generate(privatized)
    privatized.report(1e-5)
    generate(privatized, **options)
    with pytest.raises(PrivacyError, match=re.escape(f"not been verified: generate({named}).")):
        privatized.report(1e-5)


def test_a_forward_that_was_verified_says_nothing_about_generation() -> None:
    privatized = private_decoder()
    verify_cut(privatized, texts(use_cache=False))
    privatized.model(**texts(use_cache=False))
    privatized.report(1e-5)
    generate(privatized)
    with pytest.raises(PrivacyError, match=r'not been verified: generate\(.*call="generate"'):
        privatized.report(1e-5)
    verify_generate(privatized)  # what was released so far was released in this way
    assert privatized.report(1e-5).calls == 1 + 3


def test_a_way_around_that_tokens_hide_is_found_in_the_logits() -> None:
    base: Any = hf.LlamaForCausalLM

    def forward(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        output = base.forward(self, input_ids=input_ids, **kwargs)
        output.logits = output.logits + self.scale * self.model.embed_tokens(input_ids)[:, -1:].sum(-1, keepdim=True)
        return output

    config = hf.LlamaConfig(**_SIZES, num_hidden_layers=2, num_key_value_heads=1, pad_token_id=0)
    verify_generate(private_decoder(build(type("Around", (base,), {"forward": forward, "scale": 0.0}), config)))
    for scale, message in ((1e-9, "logits of pass 1 still depends on"), (1e-40, "logits of pass 1 is computed from")):
        model = build(type("Around", (base,), {"forward": forward, "scale": scale}), config)
        with pytest.raises(PrivacyError, match=message):
            verify_generate(private_decoder(model))


def test_beams_are_verified_without_units_and_released_with_them() -> None:
    privatized = across()
    verify_generate(privatized, num_beams=2)
    with privatized.ledger.units([0, 0, 1, 1, 2, 2]):
        generate(privatized, num_beams=2)
    assert privatized.report(1e-5).calls == 3 * 2


def test_an_adapter_around_the_model_generates_in_the_same_way() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval().requires_grad_(False)
    privatized = privatize(model, RESIDUAL, layers=["base_model.model.model.layers.0"], placement="residual")
    verify_generate(privatized)
    for _ in range(2):
        generate(privatized)
    assert privatized.report(1e-5).calls == 2 * 3
    with pytest.raises(PrivacyError, match="no_repeat_ngram_size"):
        verify_generate(privatized, no_repeat_ngram_size=2)


def test_two_prompts_with_equal_privatised_outputs_are_continued_alike() -> None:
    """What a verdict promises, seen without the verdict's own machinery."""
    privatized = private_decoder()
    verify_generate(privatized)
    model: Any = privatized.model
    tokens = []
    for seed in range(2):
        ids = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(seed))
        with privatized.scope.observed():
            tokens.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **LENGTH)[:, 6:])
    assert torch.equal(*tokens)
