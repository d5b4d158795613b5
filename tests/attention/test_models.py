"""Whole models with dp_flash attention: equal to their own eager attention, and isolated."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dp_flash_hf.attention import usage
from dp_flash_hf.attention.backends import use
from tests.support import ROOT
from tests.support.attention import (
    CAUSAL,
    ENCDEC,
    ENCODERS,
    GQA,
    IDS,
    NAN,
    SEQ2SEQ,
    TEXT,
    assert_models_agree,
    build,
    logits_and_gradients,
    packed_inputs,
    padded,
    padding,
)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("model_type", CAUSAL | ENCODERS)
def test_models_equal_eager(model_type: str, side: str) -> None:
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModel
    model = build(auto, model_type, (CAUSAL | ENCODERS)[model_type])
    real, inputs = padded(side)
    ours = logits_and_gradients(model, real, inputs)
    assert usage.any_has_called(model)
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, real, inputs))


def test_a_causal_model_that_says_it_is_not_equals_eager() -> None:
    model = build(AutoModelForCausalLM, "bigbird_pegasus", {**ENCDEC, "attention_type": "original_full"})
    assert not any(getattr(module, "is_causal", False) for module in model.modules())  # only its mask knows
    real, inputs = padded("none")
    ours = logits_and_gradients(model, real, inputs)
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, real, inputs))


UNMASKED = """
import pickle, sys
import dp_flash_hf
from tests.support.attention import IDS
model = pickle.load(open(sys.argv[1], "rb"))
pickle.dump(model(IDS).logits.detach(), open(sys.argv[2], "wb"))
"""


@pytest.mark.complete
@pytest.mark.parametrize("switched", [False, True], ids=["built with it", "switched to it"])
def test_such_a_model_is_causal_in_another_process_too(switched: bool, tmp_path: Path) -> None:
    """Nothing about it is kept in the process that built it."""
    name = "eager" if switched else "dp_flash"
    model = build(AutoModelForCausalLM, "bigbird_pegasus", {**ENCDEC, "attention_type": "original_full"}, name)
    model.set_attn_implementation("dp_flash")
    source, target = tmp_path / "model", tmp_path / "logits"
    source.write_bytes(pickle.dumps(model))
    subprocess.run([sys.executable, "-c", UNMASKED, str(source), str(target)], cwd=ROOT, check=True)
    torch.testing.assert_close(pickle.loads(target.read_bytes()), model(IDS).logits.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_encoder_decoders_equal_eager(model_type: str, side: str) -> None:
    model = build(AutoModelForSeq2SeqLM, model_type, SEQ2SEQ[model_type])
    _, inputs = padded(side)
    labelled = torch.ones(3, 5).bool() if side == "none" else padding([5, 2, 4], size=5)
    inputs |= {"decoder_input_ids": IDS[:, :5].where(labelled, 0), "decoder_attention_mask": labelled.long()}
    ours = logits_and_gradients(model, labelled, inputs)
    if model_type == "t5":
        assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.abs().sum() > 0
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, labelled, inputs))


def test_vit_equals_eager() -> None:
    fields = {**TEXT, "image_size": 12, "patch_size": 4}
    model = build(AutoModel, "vit", {k: v for k, v in fields.items() if not k.endswith(("_id", "_embeddings", "vocab_size"))})
    inputs = {"pixel_values": torch.randn(3, 3, 12, 12)}
    real = torch.ones(3, 10).bool()
    ours = logits_and_gradients(model, real, inputs)
    model.set_attn_implementation("eager")
    assert_models_agree(ours, logits_and_gradients(model, real, inputs))


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_packed_rows_equal_separate_rows(model_type: str, given: str) -> None:
    if given == "cu_seq_lens" and model_type in ("gpt2", "opt"):
        pytest.skip("its own position embeddings would still count across units")
    model = build(AutoModelForCausalLM, model_type, CAUSAL[model_type])
    lengths = [5, 1, 9]
    inputs, rows = packed_inputs(lengths)
    if given == "cu_seq_lens":  # rotary positions are relative, so the boundaries alone are enough
        del inputs["position_ids"]
        cuts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 9, "max_length_k": 9}
    ours = logits_and_gradients(model, torch.ones(1, 15).bool(), {**inputs, "use_cache": False})

    model.set_attn_implementation("eager")
    model.zero_grad()
    logits = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    torch.cat(logits).square().mean().backward()
    assert_models_agree(ours, [torch.cat(logits).detach(), *(p.grad for p in model.parameters() if p.grad is not None)])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_models_equal_the_oracle_in_float64(model_type: str) -> None:
    model = build(AutoModelForCausalLM, model_type, CAUSAL[model_type]).double()
    packed, _ = packed_inputs([5, 1, 6])
    for real, inputs in (padded("left"), padded("right"), (torch.ones(1, 12).bool(), packed)):
        inputs = {**inputs, "use_cache": False}
        ours = logits_and_gradients(model, real, inputs)
        with use("reference"):
            oracle = logits_and_gradients(model, real, inputs)
        # Rotary tables and norms are float32 in the model, but the same ones on both sides.
        assert_models_agree(ours, oracle, torch.float64 if model_type == "llama" else torch.float32)


@pytest.mark.parametrize(("cache", "side"), [(None, "left"), ("static", "left"), ("static", "none")])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_generation_equals_eager(model_type: str, cache: str | None, side: str) -> None:
    model = build(AutoModelForCausalLM, model_type, CAUSAL[model_type])
    _, inputs = padded(side)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"cache_implementation": cache, "disable_compile": True, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(**inputs, **settings)
    model.set_attn_implementation("eager")
    eager = model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, eager.sequences)
    assert_models_agree(list(ours.logits), list(eager.logits))


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_seq2seq_generation_equals_eager(model_type: str) -> None:
    model = build(AutoModelForSeq2SeqLM, model_type, SEQ2SEQ[model_type])
    _, inputs = padded("right")
    ours = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1))


def test_activation_checkpointing_changes_nothing() -> None:
    model = build(AutoModelForCausalLM, "mistral", CAUSAL["mistral"]).train()
    real, inputs = padded("right")
    plain = logits_and_gradients(model, real, {**inputs, "use_cache": False})
    model.gradient_checkpointing_enable()
    assert_models_agree(logits_and_gradients(model, real, {**inputs, "use_cache": False}), plain)


def test_models_keep_the_units_of_a_packed_row_apart() -> None:
    for model_type in ("llama", "gpt2", "mistral", "gpt_oss"):  # gpt2 does not hand position_ids to its attention
        model = build(
            AutoModelForCausalLM,
            model_type,
            {**CAUSAL[model_type], **({"num_experts_per_tok": 4} if "oss" in model_type else {})},
        )
        inputs, _ = packed_inputs([4, 3, 5])

        def once(poison: bool, model: Any = model, inputs: dict[str, Any] = inputs) -> tuple[Tensor, Tensor]:
            embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
            embeds[:, 4:7] = NAN if poison else 0.1
            embeds.requires_grad_()
            logits = model(inputs_embeds=embeds, position_ids=inputs["position_ids"], use_cache=False).logits
            (grad,) = torch.autograd.grad(logits.square().sum(), embeds)
            keep = [*range(4), *range(7, 12)]
            return logits.detach()[:, keep], grad[:, keep]

        clean, dirty = once(poison=False), once(poison=True)
        assert all(x.isfinite().all() for x in dirty), model_type
        assert_models_agree([x.cpu() for x in dirty], list(clean))


@pytest.mark.parametrize("side", ["right", "left"])
def test_models_keep_rows_and_padding_apart(side: str) -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    real, inputs = padded(side)

    def once(poison: bool) -> tuple[Tensor, Tensor]:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        embeds[~real] = NAN if poison else 0.1
        embeds[0] = NAN if poison else 0.1
        embeds.requires_grad_()
        logits = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False).logits
        kept = real & (torch.arange(3) > 0)[:, None]
        (grad,) = torch.autograd.grad(logits[real].square().sum(), embeds)
        return logits.detach()[kept], grad[kept]

    torch.testing.assert_close(once(poison=True), once(poison=False), rtol=0, atol=0)
