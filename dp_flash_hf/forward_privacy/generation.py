"""What `generate` reads besides the model's outputs: which of its settings are known not to read private ids."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.forward_privacy.scope import Scope

# What these do depends on scores, lengths and generated tokens only, whatever their values; without an assistant model, those
# of assistants do nothing.
_VALUES = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "length_penalty"),
        *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping"),
        *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "renormalize_logits"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "remove_invalid_values"),
        *("transformers_version", "_from_model_config", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    }
)
# The same, but other code runs, or more is returned.
_SWITCHES = frozenset(
    {
        *("do_sample", "num_beams", "num_return_sequences", "use_cache", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    }
)
# These read what is continued: the prompt, or what a decoder begins with.
_READ_BEGINNING = frozenset(
    {
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "watermarking_config"),
        "stop_strings",
    }
)
_READ_INPUT = frozenset({"encoder_repetition_penalty", "encoder_no_repeat_ngram_size"})
_ARGUMENTS = (  # of `generate` itself: code that is given ids, and texts beside the input
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "streamer"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"),
)
_HARMLESS_ARGUMENTS = ("synced_gpus", "use_model_defaults")
_OFF_AT_1 = frozenset(
    {
        *("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"),
        *("num_beams", "num_beam_groups", "num_return_sequences"),
    }
)
_METHODS = ("_prepare_generation_config", "_get_logits_processor", "_get_stopping_criteria", "_sample", "_beam_search")


def generator_of(model: nn.Module) -> Any:
    """The model that generates: itself, or the one that an adapter wraps; None if there is none."""
    return next((part for part in model.modules() if isinstance(part, GenerationMixin)), None)


def settings_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` will go by, by name: its arguments, and every setting that is on and whose value decides what runs.

    Settings are merged as `generate` does: arguments, a `generation_config` among them, the model's own, defaults.
    """
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    generator = generator_of(model)
    if generator is None:
        return given
    if "inputs" in given:
        given[generator.main_input_name] = given.pop("inputs")
    direct = {name: given.pop(name) for name in (*_ARGUMENTS, *_HARMLESS_ARGUMENTS) if name in given}
    config, arguments = generator._prepare_generation_config(given.pop("generation_config", None), **given)
    arguments.update({name: value for name, value in direct.items() if not (isinstance(value, list) and not value)})
    settings = {name: getattr(config, name, None) for name in _all_settings() - _VALUES}
    on = {name: value for name, value in settings.items() if not _is_off(name, value)}
    return {name: value for name, value in {**arguments, **on}.items() if value is not None}


def _all_settings() -> set[str]:
    config: Any = GenerationConfig
    return set(config().to_dict())


def _is_off(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and value == (name in _OFF_AT_1)


def refuse_reading(model: nn.Module, settings: Mapping[str, Any], private: Collection[str]) -> None:
    """Raise PrivacyError if generating with these settings is not known to read none of the private ids.

    Args:
        model: What `generate` is called of.
        settings: From `settings_of`.
        private: Names of the protected inputs.
    """
    generator = generator_of(model)
    if generator is None or not _is_known(model, generator):
        raise PrivacyError(
            f"{type(model).__name__} generates with code of its own, which may read {', '.join(private)} anywhere; call the "
            "model itself, and choose tokens from its released logits"
        )
    hidden = {generator.main_input_name if name == "inputs" else name for name in private}
    given = {"input_ids", generator.main_input_name}
    beginning = {"decoder_input_ids"} if generator.config.is_encoder_decoder else given
    readers = settings.keys() & ((_all_settings() - _SWITCHES - _READ_INPUT - _READ_BEGINNING) | set(_ARGUMENTS))
    readers |= settings.keys() & _READ_INPUT if given & hidden else set()
    readers |= settings.keys() & _READ_BEGINNING if beginning & hidden else set()
    readers |= {name for name, value in settings.items() if callable(value) and name != "tokenizer"}
    if readers:
        raise PrivacyError(
            f"not a cut: {', '.join(sorted(readers))} may read {', '.join(private)} around the privatised places. Leave it "
            "out of generate; what stands in model.generation_config is switched off by None there"
        )


def _is_known(model: Any, generator: Any) -> bool:
    """Whether what runs is Transformers' own generation, through PEFT at most."""
    own = [getattr(type(generator), name).__module__ for name in (*_METHODS, "generate")]
    replaced = [vars(part).get("generate") for part in (model, generator)]
    return (
        set(own) == {"transformers.generation.utils"}
        and not any(name in vars(generator) for name in _METHODS)
        and all(one is None or (isinstance(one, Recorded) and one.original is None) for one in replaced)
        and (model is generator or type(model).generate.__module__ == "peft.peft_model")
    )


class Recorded:
    """In place of a model's `generate`: the same, and what is released in it was released by generating in this way.

    Args:
        part: The model, or one in it.
        scope: What the places share.
        original: What stood in the place of the class's method, or None.
    """

    def __init__(self, part: Any, scope: Scope, original: Any) -> None:
        self.part, self.scope, self.original = part, scope, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns."""
        method = "generate" if self.part is self.scope.root else f"generate of a {type(self.part).__name__}"
        if self.scope.is_observed:  # where verify_cut wants gradients, which the method switches off
            return inspect.unwrap(type(self.part).generate)(self.part, *args, **kwargs)
        generate = self.original or functools.partial(type(self.part).generate, self.part)
        with self.scope.within(method, lambda: settings_of(self.part, args, kwargs)):
            return generate(*args, **kwargs)
