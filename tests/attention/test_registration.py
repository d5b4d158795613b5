"""How models come to dp_flash attention, and the check that it really ran."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dp_flash_hf.attention import registration, usage
from dp_flash_hf.attention.function import NAMES
from dp_flash_hf.errors import UnsupportedError
from tests.support.attention import CAUSAL, GQA, IDS, assert_models_agree, build, hooks


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_ask_for_it(name: str, tmp_path: Path) -> None:
    model = build(AutoModelForCausalLM, "llama", GQA, name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    switched = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert switched.config._attn_implementation == "sdpa"
    switched.set_attn_implementation(name)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(IDS).logits
    for asked in (model, loaded, switched):
        assert asked.config._attn_implementation == name
        assert hooks(asked) > 0
        assert_models_agree([expected, asked(IDS).logits], [expected, expected])
        assert usage.any_has_called(asked)
        assert hooks(asked) == 0


def test_registering_again_changes_nothing() -> None:
    before = vars(PreTrainedModel).copy()
    registration.register()
    assert vars(PreTrainedModel) == before


def test_no_kernel_from_the_hub_takes_its_place() -> None:
    model = build(AutoModelForCausalLM, "gpt_oss", CAUSAL["gpt_oss"])
    assert model._compatible_flash_implementations  # what would be chosen instead
    assert model.config._attn_implementation == "dp_flash"


def test_other_names_behave_as_before() -> None:
    with pytest.raises((ImportError, ValueError)):
        build(AutoModelForCausalLM, "llama", GQA, "flash_attention_2")
    with pytest.raises(ValueError, match="not supported"):
        build(AutoModelForCausalLM, "llama", GQA, "dp_flush")
    model = build(AutoModelForCausalLM, "llama", GQA, "sdpa")
    model(IDS)
    assert not usage.any_has_called(model)
    assert hooks(model) == 0


def test_a_changed_transformers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_attn_implementation(self: Any, name: str) -> None: ...

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", set_attn_implementation)
    with pytest.raises(UnsupportedError, match=r"PreTrainedModel\.set_attn_implementation"):
        registration.register()


XLNET = {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
MAMBA = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize(
    ("model_type", "fields", "match"),
    [
        ("xlnet", XLNET, r"XLNetModel .*two-stream attention.*eager"),
        ("mamba", MAMBA, "MambaModel has no softmax attention; leave attn_implementation out"),
    ],
)
def test_a_model_that_never_calls_it_is_refused_on_its_first_forward(
    model_type: str, fields: dict[str, Any], match: str
) -> None:
    model = build(AutoModelForCausalLM, model_type, fields)
    for _ in range(2):  # and stays refused
        with pytest.raises(UnsupportedError, match=match):
            model(IDS)
    model.config._attn_implementation = "eager"
    model(IDS)
    model(IDS)


def test_setting_it_where_it_cannot_be_set_raises() -> None:
    model = build(AutoModelForCausalLM, "xlnet", XLNET, "eager")
    with pytest.raises(UnsupportedError, match="XLNetLMHeadModel"):
        model.set_attn_implementation("dp_flash")


@pytest.mark.parametrize("name", NAMES)
def test_models_with_their_own_table_of_attentions_are_refused_at_once(name: str) -> None:
    fields: dict[str, Any] = {
        "input_vocab_size": 50,
        "output_vocab_size": 50,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
    }
    config = transformers.BarkSemanticConfig(**fields)
    config._attn_implementation = name
    with pytest.raises(UnsupportedError, match="BarkSemanticModel"):
        transformers.BarkSemanticModel(config)


@pytest.mark.parametrize(
    ("model_type", "fields", "name", "before", "after"),
    [
        ("llama", GQA, "dp_flash", "not called yet", "called"),
        ("llama", GQA, "sdpa", "not asked for", "not asked for"),
        (
            "mpt",
            {"vocab_size": 50, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
            "dp_flash",
            "patched",
            "patched",
        ),
        ("bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "eager", *["not asked for"] * 2),
        ("mamba", MAMBA, "eager", *["no softmax attention"] * 2),
        ("xlnet", XLNET, "eager", *["own attention code: two-stream attention with shifted relative logits"] * 2),
    ],
)
def test_status(model_type: str, fields: dict[str, Any], name: str, before: str, after: str) -> None:
    model = build(AutoModelForCausalLM, model_type, fields, name)
    assert registration.status(model) == before
    model(IDS)
    assert registration.status(model) == after


def test_a_model_that_adds_to_its_mask_is_refused() -> None:
    check, config = registration._arm_check(lambda *args: "dp_flash"), SimpleNamespace(model_type="deepseek_v4")
    with pytest.raises(UnsupportedError, match="float mask"):
        check(SimpleNamespace(config=config), "dp_flash")


def test_switching_back_before_the_first_forward_is_fine() -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    model.set_attn_implementation("sdpa")
    model(IDS)
    assert not usage.any_has_called(model)
    assert hooks(model) == 0
    model.set_attn_implementation("dp_flash")
    model(IDS)
    assert usage.any_has_called(model)
    assert hooks(model) == 0


def test_armed_models_can_be_copied_and_pickled() -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(IDS)
        assert hooks(twin) == 0
    assert hooks(model) > 0


class Tower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A vision tower without attention."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.projection = nn.Linear(3, config.hidden_size)

    def forward(self, pixels: Tensor) -> Any:
        return self.projection(pixels)


class Composite(PreTrainedModel):  # type: ignore[no-untyped-call]
    """An attention-free tower in front of a language model."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tower = Tower(config)
        self.text = transformers.LlamaModel(config)

    def forward(self, pixels: Tensor) -> Any:
        return self.text(inputs_embeds=self.tower(pixels)).last_hidden_state


def test_a_part_without_attention_does_not_misfire() -> None:
    config = transformers.AutoConfig.for_model("llama", **GQA)
    config._attn_implementation = "dp_flash"
    model = Composite(config)
    assert Composite.__module__ == Tower.__module__
    model.forward(torch.randn(2, 5, 3))  # as a wrapper calls it: past the outermost hook
    model(torch.randn(2, 5, 3))
    assert usage.any_has_called(model)
    assert hooks(model) == 0
    with pytest.raises(UnsupportedError, match="Tower"):  # on its own it is all there is
        Tower(config)(torch.randn(2, 3))


def test_a_wrapper_that_calls_forward_leaves_no_hook_behind() -> None:
    model = build(AutoModelForCausalLM, "llama", GQA)
    model.forward(IDS)  # past the outermost hook, but not past the body's
    assert usage.any_has_called(model)
    assert hooks(model) == 0


def test_peft_models_are_checked_too() -> None:
    peft = pytest.importorskip("peft")

    def lora(model: Any) -> Any:
        return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))

    model = lora(build(AutoModelForCausalLM, "llama", GQA))
    model(IDS)
    assert usage.any_has_called(model)
    assert hooks(model) == 0
    with pytest.raises(UnsupportedError, match="XLNetModel"):
        lora(build(AutoModelForCausalLM, "xlnet", XLNET))(IDS)
