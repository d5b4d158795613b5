"""Families with a patch of their own: equal to their eager code, isolated, cached, reversible, and exact under an engine."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dp_flash_hf import ClippingEngine, UnsupportedError
from dp_flash_hf.attention import patching, registration, usage
from dp_flash_hf.attention.function import NAMES, dp_flash_attention
from dp_flash_hf.attention.masks import mark_made_here
from dp_flash_hf.attention.patching import patch, unpatch
from dp_flash_hf.patches.guards import one_unit_per_row
from tests.support import ROOT
from tests.support.attention import GQA, MOE, hooks, packed_inputs, padded
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients
from tests.support.patched import (
    CASES,
    F32,
    GENERATING,
    NAN,
    VISION,
    Case,
    answered,
    assert_models_agree,
    build,
    build_patched,
    outputs_and_gradients,
    to_oracle,
)


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


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "bloom", "mpt", "falcon alibi", "xglm", "rembert encoder", "luke", "xlm"])
def test_attention_dropout_is_the_familys(name: str) -> None:
    case = CASES[name]
    model = build_patched(case)
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
    model = build_patched(case, "eager")
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
    case = CASES["bloom"]
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
    model = build_patched(case)
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


class Changed:
    """What a family's attention may take in another version of Transformers: more, in another order, by other names."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_sink: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        raise AssertionError("the patch stands in front of it")


def changed(layer: torch.nn.Module) -> None:
    """Give a layer the class that it would have in another version."""
    own = type(layer)
    layer.__class__ = type(own.__name__, (Changed, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


@pytest.mark.parametrize(
    ("name", "attention"), [("xglm", "XGLMAttention"), ("rembert", "RemBertSelfAttention"), ("mpt", "MptAttention")]
)
def test_arguments_that_a_patch_does_not_know_are_refused_only_when_they_are_given(name: str, attention: str) -> None:
    models = [build(CASES[name], "eager") for _ in range(2)]
    before, after = (next(part for part in model.modules() if type(part).__name__ == attention) for model in models)
    changed(after)
    for model in models:
        patch(model)
    given = {"position_bias": None} if name == "mpt" else {}
    states = torch.randn(3, 5, 32, dtype=CASES[name].dtype)
    mask = mark_made_here(torch.ones(3, 1, 5, 5).bool().tril())
    expected = before(hidden_states=states, attention_mask=mask, **given)[0]
    cache = transformers.DynamicCache()
    for found in (
        after(states, None, None, mask, **given),
        after(states, None, cache, mask, 1.0, **given),
        after(hidden_states=states, attention_mask=mask, temperature=None, **given),
    ):
        assert torch.equal(found[0], expected)
    assert cache.get_seq_length(after.layer_idx) == 5
    for unknown in ({"attention_sink": torch.zeros(4)}, {"temperature": 0.5}):
        with pytest.raises(UnsupportedError, match=rf"{attention} of transformers .* was given {next(iter(unknown))}"):
            after(states, attention_mask=mask, **unknown, **given)
    with pytest.raises(UnsupportedError, match="was given attention_sink"):
        after(states, torch.zeros(4), None, mask, **given)
    with pytest.raises(UnsupportedError, match="forms no attention weights"):
        after(states, attention_mask=mask, output_attentions=True, **given)


def test_a_family_that_comes_to_use_the_attention_interface_needs_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPT-J, CodeGen and LayoutLMv3 did in one version of Transformers: their own code stays, and calls our attention."""

    class Unneeded:
        def forward(self) -> None: ...

    name = "transformers.models.llama.modeling_llama.LlamaAttention"
    monkeypatch.setattr(patching, "_MIXINS", {**patching._MIXINS, name: Unneeded})
    model = build(Case("llama", GQA))
    assert not patching.has_patch(type(model))
    assert not patching.is_patched(model)
    model(padded("none")[1]["input_ids"])
    assert registration.status(model) == "called"


@pytest.mark.parametrize("when", ["built", "set"])
def test_a_guard_looks_also_where_no_patch_is_needed(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_GUARDS", {**patching._GUARDS, "llama": one_unit_per_row})
    model = build(Case("llama", GQA), "dp_flash" if when == "built" else "eager")
    if when == "set":
        model.set_attn_implementation("dp_flash")
    inputs, _ = packed_inputs([4, 3, 5])
    with pytest.raises(UnsupportedError, match="see each other"):
        model(**inputs)
    model.set_attn_implementation("sdpa")
    model(**inputs)
    assert not any(part._forward_pre_hooks for part in model.modules())


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
    model = peft.get_peft_model(build(CASES["bloom"]), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
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
    class Unfinished(transformers.BloomPreTrainedModel):  # type: ignore[no-untyped-call]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.body = transformers.BloomModel(config)

        def forward(self, ids: Tensor) -> Any:
            return self.body(ids).last_hidden_state

    config = transformers.AutoConfig.for_model("bloom", **CASES["bloom"].fields)
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
@pytest.mark.parametrize("name", ["gptj", "codegen", "bloom", "gpt_neo"])
def test_engine_and_patch_come_and_go_in_any_order(name: str, first: str, leaves_first: str) -> None:
    model = build_patched(CASES[name], "eager")
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
