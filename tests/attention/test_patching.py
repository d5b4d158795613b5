"""Families with a patch of their own: equal to their eager code, isolated, cached, reversible, and exact under an engine."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from dp_flash_hf import ClippingEngine, UnsupportedError
from dp_flash_hf.attention import patching, registration, usage
from dp_flash_hf.attention.function import NAMES, dp_flash_attention
from dp_flash_hf.attention.patching import patch, unpatch
from tests.support import ROOT
from tests.support.attention import ENCDEC, GPT2, GQA, MOE, TEXT, hooks, packed_inputs, padded
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients

NAN = math.nan
BERT = {**TEXT, "is_decoder": False}
DECODER = {**TEXT, "is_decoder": True}
FALCON = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"alibi": False, "new_decoder_architecture": False, "multi_query": False},
}
XLM = {
    **{"vocab_size": 50, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "n_langs": 1},
    **{"pad_index": 0, "bos_index": 1, "eos_index": 2, "unk_index": 3, "mask_index": 4},
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 8,
}


@dataclass(frozen=True)
class Case:
    """A family or a variant of one."""

    model_type: str
    fields: dict[str, Any]
    auto: Any = AutoModelForCausalLM
    dtype: torch.dtype = torch.float64  # the best that the family's own code computes in
    oracle: str = "eager"
    packed: bool = False  # keeps units of one row apart
    inputs: Callable[[Tensor], dict[str, Any]] = lambda real: {}


def entities(real: Tensor) -> dict[str, Any]:
    spans = torch.full((3, 2, 4), -1)
    spans[:, 0, 0], spans[:, 1, :2] = 2, torch.tensor([4, 5])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    return {"entity_ids": torch.tensor([[3, 4], [5, 0], [6, 7]]), "entity_position_ids": spans, "entity_attention_mask": mask}


def boxes(real: Tensor) -> dict[str, Any]:
    corner = torch.randint(0, 20, (*real.shape, 2), generator=torch.Generator().manual_seed(6))
    return {"bbox": torch.cat([corner, corner + 5], -1)}


def image(real: Tensor) -> dict[str, Any]:
    return {"pixel_values": torch.randn(len(real), 3, 8, 8, generator=torch.Generator().manual_seed(6))}


def encoded(real: Tensor) -> dict[str, Any]:
    states = torch.randn(len(real), 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return {"encoder_hidden_states": states, "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 4 + [0]])}


def answered(real: Tensor) -> dict[str, Any]:
    ids = torch.randint(3, 50, (len(real), 4), generator=torch.Generator().manual_seed(6))
    return {"decoder_input_ids": ids, "decoder_attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0], [1] * 4])}


F32 = torch.float32
BOX = {**BERT, "max_2d_position_embeddings": 64, "channel_shrink_ratio": 2}
CASES: dict[str, Case] = {
    "falcon": Case("falcon", FALCON, packed=True),
    "falcon multi-query": Case("falcon", {**FALCON, "multi_query": True}, packed=True),
    "falcon new": Case("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, packed=True),
    # Its eager code adds alibi to the mask, and then once more to the logits.
    "falcon alibi": Case("falcon", {**FALCON, "alibi": True}, oracle="sdpa"),
    "gptj": Case("gptj", {**GPT2, "rotary_dim": 4}, dtype=F32, packed=True),
    "codegen": Case("codegen", {**GPT2, "rotary_dim": 4, "n_ctx": 64}, dtype=F32, packed=True),
    "gpt_neo": Case(
        "gpt_neo",
        {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        dtype=F32,
        packed=True,
    ),
    "gpt_neox_japanese": Case("gpt_neox_japanese", TEXT, packed=True),
    "bloom": Case("bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, dtype=F32),
    "bloom 3 heads": Case("bloom", {"vocab_size": 50, "hidden_size": 36, "n_layer": 2, "n_head": 3}, dtype=F32),
    "mpt": Case("mpt", {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, dtype=F32),
    "mpt clipped": Case(
        "mpt",
        {
            **{"vocab_size": 50, "d_model": 36, "n_layers": 2, "n_heads": 3, "max_seq_len": 64},
            **{"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.7}},
        },
        dtype=F32,
    ),
    "openai-gpt": Case("openai-gpt", {**GPT2, "afn": "gelu"}),
    "xglm": Case("xglm", {**TEXT, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, dtype=F32),
    "trocr": Case("trocr", {**ENCDEC, "cross_attention_hidden_size": 32}),
    "trocr across": Case("trocr", {**ENCDEC, "cross_attention_hidden_size": 32}, inputs=encoded),
    "mvp": Case("mvp", ENCDEC),
    "mvp prompt": Case(
        "mvp", {**ENCDEC, "use_prompt": True, "prompt_length": 3, "prompt_mid_dim": 8}, AutoModelForSeq2SeqLM, inputs=answered
    ),
    "roformer": Case("roformer", {**DECODER, "embedding_size": 16}),
    "roformer encoder": Case("roformer", {**BERT, "rotary_value": True}, AutoModel),
    "rembert": Case("rembert", {**DECODER, "input_embedding_size": 16, "output_embedding_size": 16}),
    "rembert encoder": Case("rembert", {**BERT, "input_embedding_size": 16, "output_embedding_size": 16}, AutoModel),
    "rembert across": Case("rembert", {**DECODER, "add_cross_attention": True}, AutoModel, inputs=encoded),
    "megatron-bert": Case("megatron-bert", DECODER),
    "megatron-bert encoder": Case("megatron-bert", BERT, AutoModel),
    "git": Case("git", {**TEXT, "vision_config": {**VISION, "patch_size": 4}}, dtype=F32, inputs=image),
    "git text": Case("git", {**TEXT, "vision_config": {**VISION, "patch_size": 4}}, AutoModel),
    "tapas": Case("tapas", BERT, AutoModel),
    "layoutlmv3": Case(
        "layoutlmv3",
        {**BOX, "coordinate_size": 6, "shape_size": 4, "visual_embed": False},
        AutoModel,
        inputs=boxes,
    ),
    "lilt": Case("lilt", {**BOX, "hidden_size": 48}, AutoModel, inputs=boxes),
    "luke": Case("luke", {**BERT, "entity_vocab_size": 9, "entity_emb_size": 32}, AutoModel),
    "luke entities": Case("luke", {**BERT, "entity_vocab_size": 9, "entity_emb_size": 32}, AutoModel, inputs=entities),
    "luke plain": Case(
        "luke",
        {**BERT, "entity_vocab_size": 9, "entity_emb_size": 32, "use_entity_aware_attention": False},
        AutoModel,
        inputs=entities,
    ),
    "mpnet": Case("mpnet", BERT, AutoModel),
    "squeezebert": Case("squeezebert", {**BERT, "embedding_size": 32}, AutoModel),
    "xlm": Case("xlm", XLM, AutoModel, dtype=F32),
    "xlm causal": Case("xlm", {**XLM, "causal": True}, AutoModel, dtype=F32),
    "flaubert": Case("flaubert", XLM, AutoModel, dtype=F32),
}
GENERATING = [
    name for name, case in CASES.items() if case.auto is AutoModelForCausalLM and case.model_type not in ("git", "trocr", "mvp")
]


def build(case: Case, name: str = "dp_flash") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.model_type, **copy.deepcopy(case.fields))
    model = case.auto.from_config(config, attn_implementation=name).to(case.dtype).eval()
    with torch.no_grad():
        for parameter in (
            p for p in model.parameters() if p.requires_grad
        ):  # far from the initialisers', which leave attention nearly uniform
            parameter.normal_(std=0.25)
    return model


def to_oracle(model: Any, case: Case) -> None:
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert not patching.is_patched(model)
    model.config._attn_implementation = case.oracle


def outputs_and_gradients(model: Any, real: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    output = model(**inputs)[0]
    output = output[:, -real.shape[1] :]  # an image comes first
    kept = output[real] if output.shape[:2] == real.shape else output
    (kept * torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype).view(kept.shape).sin()).sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [kept.detach(), *(g.clone() for g in gradients)]


def assert_models_agree(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """An output and gradients, of two orders of the same sums: a few hundred roundings of the largest number.

    A tensor's own largest number is no measure: the gradient of a bias of keys is zero but for roundings of its terms, which
    are as large as other gradients.
    """
    largest = max([x.abs().max().item() for x in theirs[1:]], default=0.0)
    for a, b, scale in zip(ours, theirs, [theirs[0].abs().max().item(), *[largest] * len(theirs[1:])], strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= 300 * torch.finfo(dtype).eps * scale


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# --- equal to the family's own code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_outputs_and_gradients_equal_eager(case: Case, side: str) -> None:
    model = build(case)
    real, inputs = padded(side)
    inputs |= case.inputs(real)
    if side == "none":
        del inputs["attention_mask"]
    if case.inputs is answered:
        real = inputs["decoder_attention_mask"].bool()
    if case.model_type in ("xlm", "flaubert") and side == "left":
        pytest.skip("positions count from the left, so padding goes to the right")
    assert model.config._attn_implementation == "dp_flash"
    assert hooks(model) > 0  # the first forward checks that it ran
    ours = outputs_and_gradients(model, real, inputs)
    assert usage.any_has_called(model)
    assert hooks(model) == 0
    to_oracle(model, case)
    assert_models_agree(ours, outputs_and_gradients(model, real, inputs), case.dtype)


def test_perceiver_equals_eager() -> None:
    fields = {
        "d_latents": 32,
        "d_model": 24,
        "num_latents": 6,
        "num_self_attends_per_block": 2,
        "vocab_size": 50,
        "num_blocks": 1,
    }
    heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "max_position_embeddings": 64}
    case = Case("perceiver", {**fields, **heads}, transformers.AutoModelForSequenceClassification)
    model = build(case)
    real, inputs = padded("right")
    inputs = {"inputs": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    ours = outputs_and_gradients(model, real, inputs)
    assert usage.any_has_called(model)
    to_oracle(model, case)
    assert_models_agree(ours, outputs_and_gradients(model, real, inputs), torch.float64)


def test_cpmant_equals_eager() -> None:
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "dim_head": 8,
        "dim_ff": 48,
        "num_hidden_layers": 2,
    }
    case = Case("cpmant", {**fields, "prompt_length": 4, "prompt_types": 4, "segment_types": 4})
    model = build(case)
    real, inputs = padded("left")
    ours = outputs_and_gradients(model, real, {"input_ids": inputs["input_ids"]})
    assert usage.any_has_called(model)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = model.generate(inputs["input_ids"], **settings)
    to_oracle(model, case)
    assert_models_agree(ours, outputs_and_gradients(model, real, {"input_ids": inputs["input_ids"]}), torch.float64)
    assert torch.equal(written, model.generate(inputs["input_ids"], **settings))


SPECIAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
REDIRECTED = {
    "gpt_oss": {**MOE, "sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granite_swa": {**GQA, **SPECIAL},
    "granitemoe_swa": {**MOE, **SPECIAL},
}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("model_type", REDIRECTED)
def test_models_with_a_kernel_from_the_hub_equal_eager(model_type: str, side: str) -> None:
    case = Case(model_type, REDIRECTED[model_type], dtype=F32)
    model = build(case)
    assert model._compatible_flash_implementations
    real, inputs = padded(side)
    ours = outputs_and_gradients(model, real, inputs)
    assert registration.status(model) == "called"
    model.set_attn_implementation("eager")
    assert_models_agree(ours, outputs_and_gradients(model, real, inputs))


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision(case: Case, how: str) -> None:
    """Within the few roundings to 8 bits that two layers make."""
    model = build(case).float()
    real, inputs = padded("right")
    inputs |= {k: v.float() if v.is_floating_point() else v for k, v in case.inputs(real).items()}
    if case.inputs is answered:
        real = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        full = model(**inputs)[0][:, -real.shape[1] :][real]
        if how == "bfloat16":
            model.bfloat16()
            inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            half = model(**inputs)[0][:, -real.shape[1] :][real]
    assert (half.float() - full).norm() <= 20 * torch.finfo(torch.bfloat16).eps * full.norm()


def test_activation_checkpointing_changes_nothing(case: Case) -> None:
    model = build(case).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("not offered by the family")
    for module in model.modules():
        for name in ("p", "dropout", "attn_dropout_p", "hidden_dropout", "layerdrop", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    real, inputs = padded("right")
    inputs |= case.inputs(real)
    if case.inputs is answered:
        real = inputs["decoder_attention_mask"].bool()
    if getattr(model.config, "is_decoder", False) or case.model_type == "git":
        inputs["use_cache"] = False
    plain = outputs_and_gradients(model, real, inputs)
    model.gradient_checkpointing_enable()
    assert_models_agree(outputs_and_gradients(model, real, inputs), plain, case.dtype)


@pytest.mark.parametrize("name", ["gptj", "bloom", "mpt", "falcon alibi", "xglm", "rembert encoder", "luke", "xlm"])
def test_attention_dropout_is_the_familys(name: str) -> None:
    case = CASES[name]
    model = build(case)
    real, inputs = padded("right")
    seen = []
    for part in (p for p in model.modules() if patching.follows_patch(p)):
        for attribute in ("attn_dropout", "attention_dropout", "dropout", "attn_dropout_p"):
            if isinstance(getattr(part, attribute, None), torch.nn.Dropout):
                getattr(part, attribute).p = 0.75
            elif hasattr(part, attribute):
                setattr(part, attribute, 0.75)
        part.train()

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["dropout"])
        return dp_flash_attention(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for part in model.modules():
            if patching.follows_patch(part):
                monkeypatch.setattr(f"{type(part).__mro__[1].__module__}.dp_flash_attention", spy)
        model(**inputs, **case.inputs(real))
    assert set(seen) == {0.75}


# --- caches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_equals_eager(name: str, side: str, cache: str | None) -> None:
    case = CASES[name]
    if cache == "static" and (not build(case)._can_compile_fullgraph or name == "falcon alibi"):
        pytest.skip("no static cache in this family")
    model = build(case)
    _, inputs = padded(side)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"cache_implementation": cache, "disable_compile": True, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(**inputs, **settings)
    to_oracle(model, case)
    theirs = model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_models_agree([torch.stack(ours.logits)], [torch.stack(theirs.logits)], case.dtype)


@pytest.mark.parametrize("name", [name for name in GENERATING if name not in ("openai-gpt",)])
def test_a_cache_filled_in_chunks_changes_nothing(name: str) -> None:
    model = build(CASES[name])
    _, inputs = padded("none")
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache: Any = None
        parts: list[Tensor] = []
        for chunk in ids.split([5, 4, 1, 2], 1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache, parts = output.past_key_values, [*parts, output.logits]
    assert_models_agree([torch.cat(parts, 1)], [whole], CASES[name].dtype)


@pytest.mark.parametrize("name", ["git", "mvp prompt"])
def test_generation_from_something_else_equals_eager(name: str) -> None:
    case = CASES[name]
    model = build(case)
    real, inputs = padded("right")
    inputs |= {k: v for k, v in case.inputs(real).items() if not k.startswith("decoder")}
    if name == "git":
        inputs = {"pixel_values": inputs["pixel_values"]}
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(**inputs, **settings)
    to_oracle(model, case)
    assert torch.equal(ours, model.generate(**inputs, **settings))


# --- isolation -------------------------------------------------------------------------------------------------------------

PACKED = [name for name, case in CASES.items() if case.packed]


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_equal_separate_rows(name: str, use_cache: bool | None) -> None:
    case = CASES[name]
    model = build(case)
    inputs, rows = packed_inputs([5, 1, 9])
    ours = outputs_and_gradients(model, torch.ones(1, 15).bool(), {**inputs, "use_cache": use_cache})
    to_oracle(model, case)
    model.zero_grad()
    logits = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape).sin()).sum().backward()
    assert_models_agree(ours, [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], case.dtype)


@pytest.mark.parametrize("name", PACKED)
def test_nothing_crosses_in_a_packed_row(name: str) -> None:
    model = build(CASES[name])
    inputs, _ = packed_inputs([4, 3, 5])

    def once(poison: bool) -> list[Tensor]:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        embeds[:, 4:7] = NAN if poison else 0.1
        embeds.requires_grad_()
        logits = model(inputs_embeds=embeds, position_ids=inputs["position_ids"]).logits
        (grad,) = torch.autograd.grad(logits.square().sum(), embeds)
        keep = [*range(4), *range(7, 12)]
        return [logits.detach()[:, keep], grad[:, keep]]

    for clean, dirty in zip(once(poison=False), once(poison=True), strict=True):
        assert dirty.isfinite().all()
        assert_models_agree([dirty], [clean], CASES[name].dtype)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.packed])
def test_a_packed_row_is_refused_where_units_would_see_each_other(name: str) -> None:
    case = CASES[name]
    model = build(case)
    inputs, _ = packed_inputs([4, 3, 5])
    with pytest.raises(UnsupportedError, match="see each other"):
        model(**inputs)
    if name == "falcon alibi" or case.inputs(torch.ones(3, 12)):
        return
    model(**{**inputs, "position_ids": torch.arange(12)[None]})
    positions, mask = torch.tensor([[1, 1, 1, *range(9)]]), torch.tensor([[0, 0, 0] + [1] * 9])
    model(input_ids=inputs["input_ids"], position_ids=positions, attention_mask=mask)  # padding, not a second unit


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [n for n in GENERATING if n != "trocr"] + ["rembert encoder", "mpnet", "squeezebert", "xlm"])
def test_rows_and_padding_reach_no_other_token(name: str, side: str) -> None:
    model = build(CASES[name])
    real, inputs = padded(side)
    causal = CASES[name].auto is AutoModelForCausalLM

    def once(poison: bool) -> tuple[Tensor, Tensor]:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        if causal:  # in other models padding tokens see their row, and only no token sees them
            embeds[~real] = NAN if poison else 0.1
        embeds[0] = NAN if poison else 0.1
        embeds.requires_grad_()
        output = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])[0]
        kept = real & (torch.arange(3) > 0)[:, None]
        (grad,) = torch.autograd.grad(output[real].square().sum(), embeds)
        return output.detach()[kept], grad[kept]

    dirty = once(poison=True)
    assert all(x.isfinite().all() for x in dirty)
    torch.testing.assert_close(dirty, once(poison=False), rtol=0, atol=0)


# --- there and back --------------------------------------------------------------------------------------------------------


def states(model: Any) -> Iterator[tuple[str, type, dict[str, Any]]]:
    for name, module in model.named_modules():
        yield name, type(module), {k: v for k, v in vars(module).items() if k not in ("_forward_hooks", "_modules")}


@pytest.mark.parametrize("way", ["patch", "set"])
def test_there_and_back_leaves_the_model_as_it_was(case: Case, way: str) -> None:
    model = build(case, "eager")
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before = [(name, kind, dict(values)) for name, kind, values in states(model)]
    config = copy.deepcopy(model.config.to_dict())
    for name in NAMES:
        (patch if way == "patch" else type(model).set_attn_implementation)(model, name)
        assert model.config._attn_implementation == name
        assert patching.is_patched(model)
        assert list(model.state_dict()) == list(tensors)
    real, inputs = padded("right")
    inputs |= case.inputs(real)
    if case.model_type != "git" or way == "set":
        model(**inputs)
    if way == "patch":
        unpatch(model)
        if case.model_type == "git":
            model.set_attn_implementation("eager")
    else:
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert model.config.to_dict() == config
    for (_, kind, values), (name, was, old) in zip(states(model), before, strict=True):
        assert kind is was, name
        if case.model_type != "git":  # its vision tower is on the interface
            assert values.keys() == old.keys(), name
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key])


def test_unpatching_gives_back_the_implementation_from_before() -> None:
    model = build(CASES["falcon"], "sdpa")
    patch(model)
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("dp_flash")
    model.set_attn_implementation("dp_attention")
    unpatch(model)
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_ask_for_it(name: str, tmp_path: Path) -> None:
    case = CASES["gptj"]
    model = build(case, name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    switched = AutoModelForCausalLM.from_pretrained(tmp_path)
    switched.set_attn_implementation(name)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert list(eager.state_dict()) == list(model.state_dict())
    expected = eager(padded("none")[1]["input_ids"]).logits
    for asked in (model, loaded, switched):
        assert asked.config._attn_implementation == name
        assert registration.status(asked) == "patched"
        assert hooks(asked) > 0
        assert_models_agree([asked(padded("none")[1]["input_ids"]).logits], [expected])
        assert hooks(asked) == 0


def test_patched_models_can_be_copied_and_pickled(case: Case, tmp_path: Path) -> None:
    model = build(case)
    real, inputs = padded("right")
    inputs |= case.inputs(real)
    expected = model(**inputs)[0]
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(**inputs)[0], expected)
        twin.set_attn_implementation("eager")
        assert not patching.is_patched(twin)
    assert patching.is_patched(model)


def test_attention_weights_cannot_be_had(case: Case) -> None:
    model = build(case)
    real, inputs = padded("right")
    with pytest.raises(UnsupportedError, match="forms no attention weights"):
        model(**inputs, **case.inputs(real), output_attentions=True)


def test_masks_that_mean_something_else_are_refused() -> None:
    model = build(CASES["mpt"])
    with pytest.raises(UnsupportedError, match="turns a 4-D attention_mask around"):
        model(padded("none")[1]["input_ids"], attention_mask=torch.ones(3, 1, 12, 12).bool().tril())
    fields = {**CASES["bloom"].fields, "slow_but_exact": True, "pretraining_tp": 2}
    with pytest.raises(UnsupportedError, match="slow_but_exact"):
        build(Case("bloom", fields))(padded("none")[1]["input_ids"])


def test_a_changed_transformers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class XGLMAttention(torch.nn.Module):
        def forward(self, hidden_states: Tensor, attention_sink: Tensor | None = None) -> None: ...

    XGLMAttention.__module__, XGLMAttention.__qualname__ = "transformers.models.xglm.modeling_xglm", "XGLMAttention"
    model = build(CASES["xglm"], "eager")
    model.model.layers[1].self_attn = XGLMAttention()
    with pytest.raises(UnsupportedError, match=r"XGLMAttention of transformers .* takes attention_sink"):
        patch(model)
    assert not patching.is_patched(model)
    assert model.config._attn_implementation == "eager"


def test_the_example_in_the_documentation_is_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending" / "attention_family.md").read_text(encoding="utf-8")
    (example,) = (text for text in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if "MPNet" in text)
    monkeypatch.setattr(patching, "_MIXINS", dict(patching._MIXINS))
    names: dict[str, Any] = {}
    exec(example, names)
    case = CASES["mpnet"]
    model = build(case)
    assert any(isinstance(module, names["FlashMPNetAttention"]) for module in model.modules())
    real, inputs = padded("right")
    ours = outputs_and_gradients(model, real, inputs)
    to_oracle(model, case)
    assert_models_agree(ours, outputs_and_gradients(model, real, inputs), case.dtype)


def test_adapters_leave_patches_in_place() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(CASES["gptj"]), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert patching.is_patched(model)
    model(padded("none")[1]["input_ids"])
    assert usage.any_has_called(model)
    assert hooks(model) == 0
    model.set_attn_implementation("eager")
    assert not patching.is_patched(model)


def test_a_model_that_holds_a_patched_one_is_patched() -> None:
    encoder = transformers.ViTConfig(**VISION, patch_size=4)
    decoder = transformers.TrOCRConfig(**CASES["trocr"].fields)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config._attn_implementation = "dp_flash"
    model: Any = transformers.VisionEncoderDecoderModel(config)
    model.eval()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "decoder_input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    assert patching.is_patched(model.decoder)
    ours = model(**inputs).logits
    assert hooks(model) == 0
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1, "decoder_start_token_id": 2, "eos_token_id": None}
    written = model.generate(inputs["pixel_values"], **settings)
    model.set_attn_implementation("eager")
    assert {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)} == {"eager"}
    assert not patching.is_patched(model)
    assert_models_agree([ours], [model(**inputs).logits])
    assert torch.equal(written, model.generate(inputs["pixel_values"], **settings))


def test_a_model_that_is_never_finished_does_not_run_something_else_in_silence() -> None:
    class Unfinished(transformers.GPTJPreTrainedModel):  # type: ignore[no-untyped-call]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.body = transformers.GPTJModel(config)

        def forward(self, ids: Tensor) -> Any:
            return self.body(ids).last_hidden_state

    config = transformers.AutoConfig.for_model("gptj", **CASES["gptj"].fields)
    config._attn_implementation = "dp_flash"
    model = Unfinished(config)
    ids = padded("none")[1]["input_ids"]
    with pytest.raises(UnsupportedError, match="post_init"):
        model(ids)
    model.set_attn_implementation("dp_flash")
    model(ids)
    assert usage.any_has_called(model)
    assert hooks(model) == 0


# --- under an engine -------------------------------------------------------------------------------------------------------


def lm_loss(model: Any) -> Callable[[dict[str, Any]], Tensor]:
    def loss(batch: dict[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")

    return loss


def lm_batch() -> dict[str, Any]:
    real, inputs = padded("right")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~real, -100)}


@pytest.mark.parametrize("name", ["falcon new", "gptj", "gpt_neo", "gpt_neox_japanese", "bloom", "mpt", "xglm", "rembert"])
def test_clipped_sums_of_patched_models_are_exact(name: str) -> None:
    """Against plain autograd on the family's own code, one unit at a time."""
    case = CASES[name]
    model = build(case)
    batch = lm_batch()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    engine.check(lm_loss(model), batch)
    engine.backward(lm_loss(model), batch)
    ours, norms = grads(model), engine.norms
    engine.detach()
    to_oracle(model, case)
    wanted, wanted_norms = clipped_sum(unit_gradients(model, lm_loss(model), each_row(batch)), 1.0)
    precision = 300 * torch.finfo(case.dtype).eps
    assert distance(ours, {n: g for n, g in wanted.items() if n in ours}) < precision
    assert norms is not None
    torch.testing.assert_close(norms.double(), wanted_norms, rtol=max(precision, 1e-6), atol=0)


@pytest.mark.parametrize("first", ["engine", "patch"])
@pytest.mark.parametrize("leaves_first", ["engine", "patch"])
@pytest.mark.parametrize("name", ["gptj", "codegen", "bloom"])
def test_engine_and_patch_come_and_go_in_any_order(name: str, first: str, leaves_first: str) -> None:
    case = CASES[name]
    model = build(case, "eager")
    kinds = [type(module) for module in model.modules()]
    if first == "patch":
        patch(model)
    engine = ClippingEngine(model, max_grad_norm=1.0)
    patch(model)
    patched = model(padded("none")[1]["input_ids"]).logits
    engine.backward(lm_loss(model), lm_batch())
    if leaves_first == "engine":
        engine.detach()
        assert patching.is_patched(model)
        assert torch.equal(model(padded("none")[1]["input_ids"]).logits, patched)
        unpatch(model)
    else:
        unpatch(model)
        assert not patching.is_patched(model)
        engine.backward(lm_loss(model), lm_batch())
        engine.detach()
    assert [type(module) for module in model.modules()] == kinds


def test_an_engine_on_the_attention_itself_must_leave_first() -> None:
    model = build(CASES["gpt_neox_japanese"])  # whose attention owns a bias
    engine = ClippingEngine(model, max_grad_norm=1.0)
    for change in (unpatch, lambda model: model.set_attn_implementation("eager")):
        with pytest.raises(UnsupportedError, match="detach"):
            change(model)
    assert patching.is_patched(model)
    assert model.config._attn_implementation == "dp_flash"
    engine.detach()
    unpatch(model)
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with pytest.raises(UnsupportedError, match="detach"):
        patch(model)
    assert not patching.is_patched(model)
    engine.detach()
