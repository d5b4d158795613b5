"""A tiny random model and a ragged batch for every class that Transformers registers for a task.

    specimen = build("causal-lm", "LlamaForCausalLM")
    specimen.model(**specimen.batch).loss

Rows of the batch have unequal lengths and are padded on the right; `specimen.alone(row)` is a row cut to its own length.
Nothing is downloaded. `build` raises NotBuiltError, with the reason, for what cannot be made here.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

import dp_flash_hf  # noqa: F401  # registers the attention implementations
from dp_flash_hf.errors import UnsupportedError

TASKS: dict[str, str] = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}
ATTENTION = ("dp_flash", "dp_attention", "eager")  # the first that runs is examined
LENGTHS, TARGETS = (9, 4, 7, 2), (5, 8, 2, 6)  # tokens of each row, and of its answer in sequence-to-sequence models
LENGTHS_OF = {  # by the start of a class's name
    "Canine": (16, 8, 12, 4),
    "Funnel": (16, 8, 12, 8),
    "Kosmos2": (9, 4, 7, 3),
    "Reformer": (12, 4, 8, 4),
}
VOCABULARY, CLASSES = 99, 3
LARGEST = 20_000_000  # parameters; more means a size that the rules below do not know
FIRST_ID, LAST_ID = 5, 85  # what texts are made of: special and placeholder tokens lie outside

Batch = dict[str, Any]


class NotBuiltError(Exception):
    """The class cannot be built, or not run, on this machine or without the company of another model."""


@dataclass
class Specimen:
    """One model in training mode, without dropout, and a batch for it in which every row is a unit.

    lengths: of the tensors that run along the text in dimension 1, the length of each row.
    attention: the implementation asked for; why_not: what was said by those before it.
    """

    model: Any
    batch: Batch
    lengths: dict[str, tuple[int, ...]]
    attention: str
    why_not: str
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return len(LENGTHS)

    def alone(self, row: int, *, cut: bool = True) -> Batch:
        """One row, cut to its own length or padded as in the batch."""
        out: Batch = {}
        for name, value in self.batch.items():
            if not isinstance(value, Tensor):
                out[name] = value
                continue
            per_row = len(value) // self.rows  # tensors of several pictures per row hold them one after the other
            own = value[row * per_row : (row + 1) * per_row]
            out[name] = own[:, : self.lengths[name][row]].contiguous() if cut and name in self.lengths else own
        return out


# What makes a model tiny: sizes by attribute name, applied to a config only where it has that attribute.
_SIZES: dict[str, Any] = {}


def _size(value: Any, names: str) -> None:
    _SIZES.update(dict.fromkeys(names.split(), value))


# Width, depth and heads.
_size(32, "hidden_size hidden_size_global d_model n_embd emb_dim dim embed_dim embedding_size embedding_dim")
_size(32, "word_embed_proj_dim attention_hidden_size lru_width dim_model_base out_hidden_size text_hidden_size")
_size(32, "input_embedding_size output_embedding_size backbone_hidden_size entity_emb_size projection_dim qformer_hidden_size")
_size(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers")
_size(2, "num_blocks depth vision_layers text_encoder_layers")
_size(4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads")
_size(4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads")
_size(2, "num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads num_query_groups")
_size(8, "head_dim d_kv kv_channels attention_head_dim swa_head_dim dim_head d_head attention_head_size global_head_dim")
_size(8, "linear_head_dim swa_v_head_dim query_pre_attn_scalar")
_size(4, "rotary_dim")
# Feed-forward layers.
_size(64, "intermediate_size ffn_hidden_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff dim_ff feed_forward_size")
_size(64, "d_inner mlp_dim hidden_dim intermediate_size_mlp dense_intermediate_size block_multiple_of")
_size(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size")
_size(16, "moe_shared_expert_intermediate_size shared_intermediate_size router_hidden_size")
# Mixtures: 4 experts, 2 of them per token, the first layer dense where the model has such layers.
_size(4, "num_experts num_local_experts n_routed_experts moe_num_experts")
_size(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k")
_size(1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts")
_size(1, "first_k_dense_replace num_dense_layers decoder_sparse_step moe_layer_start_index")
# Latent attention and the indexers of sparse attention.
_size(16, "kv_lora_rank q_lora_rank o_lora_rank")
_size(4, "qk_rope_head_dim qk_nope_head_dim")
_size(8, "v_head_dim index_head_dim index_topk qk_head_dim")
_size(2, "index_n_heads")
# State-space layers: expand * hidden_size = 64 = 8 heads of 8.
_size(8, "mamba_d_state state_size ssm_state_size mamba_headdim mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads")
_size(8, "mamba_chunk_size chunk_size chunk_len linear_key_head_dim linear_value_head_dim")
_size(1, "mamba_n_groups mamba_ngroups n_groups")
_size(2, "mamba_dt_rank time_step_rank n_mamba_heads expand mamba_expand linear_num_key_heads")
_size(4, "linear_num_value_heads linear_num_heads")
_size(64, "mamba_d_ssm")
# Lengths and windows; vocabularies.
_size(64, "max_position_embeddings n_positions n_ctx context_length max_seq_len model_max_length max_source_positions")
_size(64, "max_target_positions original_max_position_embeddings")
_size(8, "sliding_window attention_window_size window_size sliding_window_size attention_chunk_size prompt_length")
_size(VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size")
_size(8, "hidden_size_per_layer_input")
_size(11, "entity_vocab_size")
# Pictures and sounds.
_size(32, "image_size crop_size")
_size(8, "patch_size num_mel_bins")
_size(16, "num_position_embeddings")
_size(32, "audio_hidden_size projector_hidden_size projector_input_dim projector_output_dim vision_output_dim")
_size(32, "alignment_intermediate_size")
_size(8, "downsample_hidden_size")

# One number for each stage of a picture tower, made from how many stages there are.
_STAGES: dict[str, Callable[[int], list[int]]] = {
    **dict.fromkeys(("depths", "depth", "stage_num_blocks"), lambda n: [1] * n),
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim"), lambda n: [8, 16, 32, 32, 32][:n]),
    **dict.fromkeys(("num_attention_heads", "num_heads"), lambda n: [1, 2, 2, 2, 2][:n]),
    "neck_hidden_sizes": lambda n: [8] * n,
}
_ZERO = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate|jitter|mask_time_prob|mask_feature_prob", re.I)
_TOKEN = re.compile(r"_token_id$|_token_index$|_token_ids$|_id$")
# Lists that name the kind of each layer: a tiny model gets every kind once, and two layers at least.
_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attn_layers", "indexer_types")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
# None by default, because another field gives them or a checkpoint always sets them; for others None switches a feature off.
_NEVER_NONE = {
    *("head_dim", "num_key_value_heads", "pad_token_id", "num_labels", "vocab_size", "mamba_dt_rank", "time_step_rank"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts"),
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}  # shares of time, height and width in half a head

# Where the rules do not do, by config class or by the path of a nested one; `...` leaves the default.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "AXK2Config": {"head_dim": 4},
    "BitConfig": {"num_groups": 4},
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 101, "encoder_hash_byte_group_size": [3, 4]},
    "BrosConfig": {"hidden_size": 128},
    "ConvNextConfig": {"patch_size": 2},
    "ConvNextV2Config": {"patch_size": 2},
    "CvtConfig": {"depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "DbrxConfig.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxConfig.ffn_config": {"moe_top_k": 2},
    "DeepseekV32Config": {"head_dim": 4},
    "Dots3NoteTextConfig": {
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16},
        **{
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 8,
            "swa_qk_nope_head_dim": 4,
            "swa_qk_rope_head_dim": 4,
            "swa_v_head_dim": 8,
        },
    },
    "Dots3NoteVisionConfig": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "DonutSwinConfig": {"window_size": 2, "patch_size": 2},
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "EsmConfig": {"mask_token_id": 98},
    "EsmcConfig": {"num_key_value_heads": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
        **{
            "intermediate_size": 64,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    },
    "FSMTConfig": {
        **{"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    },
    "GlmMoeDsaConfig": {"head_dim": 4},
    "Glm5NextTextConfig": {"index_topk": 8, "index_kpool": 4, "qk_rope_head_dim": 0},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HieraConfig": {"image_size": [32, 32], "embed_dim": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    **{key: {"attention_window": 32} for key in ("LEDConfig", "LongformerConfig")},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LevitConfig": {
        "image_size": 64,
        "patch_size": 16,
        "key_dim": [4, 4, 4],
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [2, 2, 2],
    },
    "LiltConfig": {"hidden_size": 48},
    "LongcatFlashConfig": {"head_dim": 4, "zero_expert_num": 2},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "MobileNetV1Config": {"depth_multiplier": 0.125},
    "MobileNetV2Config": {"depth_multiplier": 0.125},
    "MobileViTV2Config": {
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [16, 16, 16],
        "patch_size": 2,
        "image_size": 64,
        "width_multiplier": 0.25,
    },
    "PerceiverConfig": {
        **{"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "max_position_embeddings": max(LENGTHS)},
        **{"num_self_attention_heads": 4, "num_cross_attention_heads": 1},
    },
    "Qwen4ExpTextConfig": {
        **{
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        },
        **{"hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 101, "heads_per_ngram": 2},
        **{"make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2},
    },
    "ReformerConfig": {
        **{"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
        **{"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0},
    },
    "RegNetConfig": {"groups_width": 8, "embedding_size": 8},
    "ResNetConfig": {"embedding_size": 8},
    "RoCBertConfig": {
        **{"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 91, "shape_embed_dim": 8, "shape_vocab_size": 91},
    },
    "SwiftFormerConfig": {"embed_dims": [8, 16, 32, 32]},
    "SwinConfig": {"window_size": 2, "patch_size": 2},
    "Swinv2Config": {"window_size": 2, "patch_size": 2},
    "TextNetConfig": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 8]},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    },
    "Zamba2Config": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        **{"num_key_value_heads": 4, "n_mamba_heads": 8, "mamba_headdim": 8, "adapter_rank": 8, "num_mem_blocks": 1},
        **{"attention_hidden_size": ..., "attention_head_dim": ..., "kv_channels": ..., "num_query_groups": ...},
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}
_EXCEPTIONS |= {
    "Blip2Config": {"image_token_index": VOCABULARY - 1, "num_query_tokens": 4},
    "ChameleonConfig": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "ChameleonVQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Emu3Config": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "Emu3VQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "Ernie4_5_VL_MoeTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "Granite4VisionConfig": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "Granite4VisionConfig.vision_config": {"hidden_size": 64},
    "HGNetV2Config": {"hidden_sizes": ..., "embedding_size": ...},
    "HunYuanVLTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "InstructBlipConfig": {"image_token_index": VOCABULARY - 1, "num_query_tokens": 4},
    "InstructBlipVideoConfig": {"video_token_index": VOCABULARY - 1, "num_query_tokens": 4},
    "JanusVQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "Kosmos2Config": {"latent_query_num": 2},
    "Llama4VisionConfig": {"intermediate_size": 128, "vision_output_dim": 32},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "NeoMMEConfig": {"head_dim": 16},
    "NemotronH_Omni_Reasoning_V3_Config.vision_config": {"video_temporal_patch_size": 2},
    "PaddleOCRTextConfig": _MROPE,
    "PPFormulaNetVisionConfig": {"decoder_hidden_size": 32, "post_conv_mid_channels": 16, "post_conv_out_channels": 32},
    "Qwen2_5OmniTextConfig": _MROPE,
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": VOCABULARY - 9, "vision_end_token_id": VOCABULARY - 10},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": VOCABULARY - 9, "vision_end_token_id": VOCABULARY - 10},
    "Step3p7TextConfig": {"sliding_window": 8},
    "UnlimitedOcrTextConfig": {"num_key_value_heads": 4},
    "VisionEncoderDecoderConfig": {"pad_token_id": 0},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 1},
    **dict.fromkeys(("Glm4vTextConfig", "GlmOcrTextConfig", "Qwen2VLTextConfig", "Qwen2_5_VLTextConfig"), _MROPE),
}
# Classes that are not built, with the reason. Everything else is.
NOT_BUILT: dict[str, str] = {
    "DeiTForImageClassificationWithTeacher": "for inference only: gives no loss",
    "DiffusionGemmaForBlockDiffusion": "gives no loss",
    "DinatForImageClassification": "needs the package natten",
    "FastVlmForConditionalGeneration": "needs the packages Pillow and timm",
    "Gemma3nForConditionalGeneration": "needs the packages Pillow and timm",
    "LayoutLMv2ForQuestionAnswering": "needs the package detectron2",
    "LayoutLMv2ForSequenceClassification": "needs the package detectron2",
    "LayoutLMv2ForTokenClassification": "needs the package detectron2",
    "LevitForImageClassificationWithTeacher": "for inference only: gives no loss",
    "PPLCNetForImageClassification": "gives no loss",
    "PI0ForConditionalGeneration": "steers a robot: takes its state and actions",
    "PerceptionLMForConditionalGeneration": "needs the packages Pillow and timm",
    "ShieldGemma2ForImageClassification": "takes prompts about policies, and computes no loss from image labels",
    "VoxtralRealtimeForConditionalGeneration": "reads sounds in step with its text",
    "TimmWrapperForImageClassification": "needs the packages Pillow and timm",
    "Gemma4AssistantForCausalLM": "a drafter: reads the keys and values that a larger model cached",
    "Gemma4UnifiedAssistantForCausalLM": "a drafter: reads the keys and values that a larger model cached",
}


# Classes and configs.


def _mapping(task: str) -> Any:
    return getattr(modeling_auto, TASKS[task])


def class_names(task: str) -> list[str]:
    """Every class of a task, sorted; imports none of them."""
    registered = getattr(modeling_auto, TASKS[task] + "_NAMES").values()
    return sorted({name for names in registered for name in (names if isinstance(names, tuple) else (names,))})


@cache
def _class_of(task: str, name: str) -> tuple[type[PreTrainedConfig], Any]:
    """(config class, model class); a class registered for several configs gets its own."""
    found = []
    for model_type, names in getattr(modeling_auto, TASKS[task] + "_NAMES").items():
        if name == names or (isinstance(names, tuple) and name in names):
            config_class = CONFIG_MAPPING[model_type]
            loaded = _mapping(task)[config_class]
            classes = loaded if isinstance(loaded, tuple) else (loaded,)
            found.append((config_class, next(one for one in classes if one.__name__ == name)))
    own = [pair for pair in found if getattr(pair[1], "config_class", None) is pair[0]]
    return (own or found)[0]


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = {field.name for field in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()
    return names | set(inspect.signature(config_class.__init__).parameters)


def tiny_config(config_class: type[PreTrainedConfig], path: str = "", **extra: Any) -> PreTrainedConfig:
    """A config of this class with every size reduced and every dropout zero."""
    path = path or config_class.__name__
    try:
        default = config_class()
    except Exception:  # some cannot be made without arguments
        default = None
    names = _fields(config_class)
    present = vars(default) if default is not None else {}  # not getattr: reading a per-layer attribute raises
    stored = getattr(config_class, "attribute_map", {})  # the name under which an alias is kept
    values: dict[str, Any] = {}
    placeholders = VOCABULARY - 1
    for name in sorted(names):
        current = present.get(stored.get(name, name))
        number = current if isinstance(current, (int, float)) and not isinstance(current, bool) else None
        if name in _SIZES and not isinstance(current, (list, tuple)):
            if current is not None or name in extra or name in _NEVER_NONE:
                values[name] = _SIZES[name]
        elif name in _STAGES and isinstance(current, (list, tuple)):
            values[name] = _STAGES[name](len(current))
        elif _ZERO.search(name) and number is not None:
            values[name] = 0 if isinstance(number, int) else 0.0
        elif _TOKEN.search(name) and number is not None and number >= FIRST_ID:
            values[name] = placeholders  # each its own
            placeholders -= 1
    values.update({name: i for i, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")) if name in names})
    for name, sub_class in getattr(config_class, "sub_configs", {}).items():
        current = present.get(name)
        sub_class = type(current) if isinstance(current, PreTrainedConfig) else sub_class
        known = isinstance(sub_class, type) and issubclass(sub_class, PreTrainedConfig) and sub_class is not PreTrainedConfig
        if name in names and known and current is not None:
            values[name] = tiny_config(sub_class, f"{path}.{name}")
    kinds = {n: list(dict.fromkeys(present[n])) for n in _KINDS if n in names and isinstance(present.get(n), (list, tuple))}
    kinds = {n: kind for n, kind in kinds.items() if kind and all(isinstance(one, str) for one in kind)}
    if kinds:
        depth = max(2, *(len(kind) for kind in kinds.values()))
        values.update({n: depth for n in _DEPTHS if n in values})
        values.update({n: [kind[i % len(kind)] for i in range(depth)] for n, kind in kinds.items()})
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # latent attention expands to one key for each query
        values["num_key_value_heads"] = _SIZES["num_attention_heads"]
    rope = present.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(_SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        values["rope_parameters"] = {**rope, "mrope_section": [half // 3 + (axis < half % 3) for axis in range(3)]}
    values.update(extra if path == config_class.__name__ else {})
    for key in dict.fromkeys((config_class.__name__, path)):
        values.update(copy.deepcopy(_EXCEPTIONS.get(key, {})))
    return config_class(**{name: value for name, value in values.items() if value is not Ellipsis})


def _config(task: str, config_class: type[PreTrainedConfig], model_class: Any) -> PreTrainedConfig:
    n_labels = {"question-answering": 2}.get(task, CLASSES)
    extra: dict[str, Any] = {"num_labels": n_labels} if "labels" in _label_kind(task) else {}
    if task == "causal-lm" and "is_decoder" in _fields(config_class):
        extra["is_decoder"] = True
    config = tiny_config(config_class, **extra)
    wanted = getattr(model_class, "config_class", None) or config_class
    if not isinstance(config, wanted):  # a decoder registered under the config of its composite model
        parts = [getattr(config, name) for name in getattr(config, "sub_configs", {})]
        config = next((part for part in parts if isinstance(part, wanted)), config)
    config.use_cache = False  # as Trainer does
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    if "labels" in _label_kind(task):
        config.num_labels = n_labels
    if task in ("sequence-classification", "image-classification"):
        config.problem_type = "single_label_classification"
    return config


def _label_kind(task: str) -> str:
    return "labels" if task.endswith(("classification", "answering")) else "tokens"


# Batches.


def _mask(lengths: tuple[int, ...]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()


def _texts(lengths: tuple[int, ...], generator: torch.Generator, pad: int, eos: int | None) -> Tensor:
    """Ids (rows, longest) ending with `eos` if there is one, padded on the right."""
    ids = torch.randint(FIRST_ID, LAST_ID, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        if eos is not None:
            ids[row, length - 1] = eos
        ids[row, length:] = pad
    return ids


def _special(config: PreTrainedConfig, name: str) -> int | None:
    text = config.get_text_config()
    found = [getattr(part, name, None) for part in (config, text)]
    return next((token for token in found if isinstance(token, int) and 0 <= token < VOCABULARY), None)


Lengths = dict[str, tuple[int, ...]]
Inputs = tuple[Batch, Lengths]


def _text_inputs(task: str, config: Any, lengths: tuple[int, ...], pictures: int) -> Inputs:
    """Texts with the labels of a task. pictures: how many placeholder tokens stand before each of them."""
    generator = torch.Generator().manual_seed(2)
    lengths = tuple(length + pictures for length in lengths)
    eos = _special(config, "eos_token_id")
    ids, mask = _texts(lengths, generator, _special(config, "pad_token_id") or 0, eos), _mask(lengths)
    token = next((t for t in (_special(config, f"image_token_{what}") for what in ("id", "index")) if t is not None), None)
    if token is not None:
        ids[:, :pictures] = token
    batch: Batch = {"input_ids": ids, "attention_mask": mask}
    along = {"input_ids": lengths, "attention_mask": lengths}
    rows = len(lengths)
    if task == "question-answering":
        ends = torch.tensor(lengths) - 2  # the last token separates
        batch["start_positions"], batch["end_positions"] = ends // 3, ends
        return batch, along
    if task == "sequence-classification":
        return {**batch, "labels": torch.arange(rows) % CLASSES}, along
    if task in ("seq2seq", "image-text-to-text") and config.is_encoder_decoder:
        return {**batch, "labels": _texts(TARGETS, generator, -100, eos)}, {**along, "labels": TARGETS}
    if task == "token-classification":
        labels = torch.randint(0, CLASSES, ids.shape, generator=generator)
    elif task == "masked-lm":
        labels = torch.randint(FIRST_ID, LAST_ID, ids.shape, generator=generator)
        labels[:, 1::2] = -100
    else:
        labels = ids.clone()
        labels[:, :pictures] = -100
    return {**batch, "labels": labels.masked_fill(mask == 0, -100)}, {**along, "labels": lengths}


def _pixels(config: Any, *more: int) -> Tensor:
    """Pictures (rows, *more, channels, height, width)."""
    vision = getattr(config, "vision_config", None) or config
    size, channels = getattr(vision, "image_size", None) or 32, getattr(vision, "num_channels", 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(len(LENGTHS), *more, channels, height, width, generator=torch.Generator().manual_seed(3))


# How models take one picture for each row, beside the text.
_PICTURES: tuple[Callable[[Any], Batch], ...] = (
    lambda config: {"pixel_values": _pixels(config)},
    lambda config: {"pixel_values": _pixels(config, 1)},
    lambda config: {
        "pixel_values": _pixels(config, 2),
        "image_sizes": torch.full((len(LENGTHS), 2), _pixels(config).shape[-1]),
    },
)


def _fsmt(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    answers = batch["labels"].masked_fill(batch["labels"] == -100, config.pad_token_id)
    answers = answers.roll(1, dims=1)  # it does not shift the labels itself, which end with the token it starts from
    return {**batch, "decoder_input_ids": answers}, {**lengths, "decoder_input_ids": lengths["labels"]}


def _molmo2(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    kinds = torch.zeros_like(batch["input_ids"])  # all of them text
    return {**batch, "mm_token_type_ids": kinds}, {**lengths, "mm_token_type_ids": lengths["input_ids"]}


def _musicgen(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    ids, codebooks = batch["input_ids"], config.num_codebooks
    stacked = torch.stack([(ids + k) % VOCABULARY for k in range(codebooks)], dim=1)  # (batch, codebook, position)
    labels = stacked.transpose(1, 2).masked_fill(batch["attention_mask"].unsqueeze(2) == 0, -100)
    return {**batch, "input_ids": stacked.flatten(0, 1), "labels": labels.contiguous()}, lengths


def _perceiver(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    renamed = {"inputs" if name in ("input_ids", "pixel_values") else name: value for name, value in batch.items()}
    lengths = {"inputs" if name == "input_ids" else name: own for name, own in lengths.items()}
    lengths.pop("labels", None)  # it decodes as many positions as it has, whatever the text
    return renamed, lengths


def _lxmert(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    seen = {"visual_feats": torch.rand(len(LENGTHS), 3, config.visual_feat_dim), "visual_pos": torch.rand(len(LENGTHS), 3, 4)}
    text = {name: batch[name] for name in lengths}
    return {**text, **seen, "labels": torch.arange(len(LENGTHS)) % config.num_qa_labels}, lengths


def _longformer(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    everywhere = torch.zeros_like(batch["input_ids"])
    everywhere[:, 0] = 1
    return {**batch, "global_attention_mask": everywhere}, {**lengths, "global_attention_mask": lengths["input_ids"]}


def _clusters(config: Any, inputs: Inputs) -> Inputs:
    ids = torch.randint(0, VOCABULARY - 1, (len(LENGTHS), 16), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": inputs[0]["labels"]}, {}


def _siglip2(config: Any, inputs: Inputs) -> Inputs:
    vision = config.vision_config
    patches = torch.randn(
        len(LENGTHS), 16, vision.num_channels * vision.patch_size**2, generator=torch.Generator().manual_seed(3)
    )
    mask, shapes = torch.ones(len(LENGTHS), 16, dtype=torch.long), torch.full((len(LENGTHS), 2), 4)
    return {**inputs[0], "pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}, {}


def _idefics(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    seen = batch["attention_mask"].unsqueeze(2)  # (rows, length, pictures)
    pictures = {"pixel_values": _pixels(config, 1), "image_attention_mask": seen}
    return {**batch, **pictures}, {**lengths, "image_attention_mask": lengths["input_ids"]}


def _instruct_blip(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    asked = {"qformer_input_ids": batch["input_ids"] % FIRST_ID, "qformer_attention_mask": batch["attention_mask"]}
    return {**batch, **asked}, {**lengths, **dict.fromkeys(asked, lengths["input_ids"])}


def _kosmos2(config: Any, inputs: Inputs) -> Inputs:
    batch, lengths = inputs
    places = torch.zeros_like(batch["input_ids"])
    places[:, : config.latent_query_num] = 1
    pictures = {"pixel_values": _pixels(config), "image_embeds_position_mask": places}
    return {**batch, **pictures}, {**lengths, "image_embeds_position_mask": lengths["input_ids"]}


def _pix2struct(config: Any, inputs: Inputs) -> Inputs:
    patches = torch.randn(len(LENGTHS), 5, 2 + config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = torch.arange(5).unsqueeze(1)  # row and column of each patch
    return {"flattened_patches": patches, "labels": inputs[0]["labels"]}, {"labels": inputs[1]["labels"]}


def _picture_to_text(config: Any, inputs: Inputs) -> Inputs:
    batch = {"pixel_values": _pixels(getattr(config, "encoder", config)), "labels": inputs[0]["labels"]}
    if config.model_type == "pp_formulanet":  # shifts these instead of the labels
        batch["decoder_input_ids"] = batch["labels"].masked_fill(batch["labels"] == -100, 0)
    return batch, dict.fromkeys(("labels", "decoder_input_ids"), inputs[1]["labels"])


# What a class takes beside, or instead of, token ids, a mask and labels.
_INPUTS: dict[str, Callable[[Any, Inputs], Inputs]] = {
    "FSMTForConditionalGeneration": _fsmt,
    "GitForCausalLM": lambda config, inputs: ({**inputs[0], "pixel_values": _pixels(config)}, inputs[1]),
    "ImageGPTForImageClassification": _clusters,
    "IdeficsForVisionText2Text": _idefics,
    "InstructBlipForConditionalGeneration": _instruct_blip,
    "InstructBlipVideoForConditionalGeneration": _instruct_blip,
    "Kosmos2ForConditionalGeneration": _kosmos2,
    "LongformerForQuestionAnswering": _longformer,
    "LxmertForQuestionAnswering": _lxmert,
    "Molmo2ForConditionalGeneration": _molmo2,
    "MusicgenForCausalLM": _musicgen,
    "MusicgenMelodyForCausalLM": _musicgen,
    "PerceiverForSequenceClassification": _perceiver,
    "PerceiverForMaskedLM": _perceiver,
    "PerceiverForImageClassificationConvProcessing": _perceiver,
    "PerceiverForImageClassificationFourier": _perceiver,
    "PerceiverForImageClassificationLearned": _perceiver,
    "Pix2StructForConditionalGeneration": _pix2struct,
    "PPFormulaNetForConditionalGeneration": _picture_to_text,
    "Siglip2ForImageClassification": _siglip2,
    "VisionEncoderDecoderModel": _picture_to_text,
}


def _inputs(task: str, model: nn.Module, pictures: int = 0) -> Inputs:
    config: Any = model.config
    name = type(model).__name__
    if task == "image-classification":
        inputs: Inputs = {"pixel_values": _pixels(config), "labels": torch.arange(len(LENGTHS)) % CLASSES}, {}
    else:
        own = next((lengths for start, lengths in LENGTHS_OF.items() if name.startswith(start)), LENGTHS)
        inputs = _text_inputs(task, config, own, pictures)
    batch, lengths = _INPUTS[name](config, inputs) if name in _INPUTS else inputs
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "attention_mask" not in parameters and not takes_any:
        batch.pop("attention_mask", None)
    if "bbox" in parameters:  # where on the page each word stands
        corner = torch.randint(0, 90, (*batch["input_ids"].shape, 2), generator=torch.Generator().manual_seed(3))
        boxes = torch.cat([corner, corner + 9], dim=-1)
        batch["bbox"] = boxes / 100 if name.startswith(("Bros", "Udop")) else boxes
        lengths = {**lengths, "bbox": lengths["input_ids"]}
    return batch, {name: own for name, own in lengths.items() if name in batch}


# Models.


def _model(task: str, config_class: type[PreTrainedConfig], model_class: Any, attention: str, dtype: torch.dtype) -> Any:
    config = _config(task, config_class, model_class)
    config._attn_implementation = attention
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except Exception:  # some constructors compute with real numbers
        size = 0
    if size > LARGEST:
        raise NotBuiltError(f"not tiny: {size:,} parameters")
    torch.manual_seed(1)
    model = model_class(config).float().train()
    with torch.no_grad():  # norms that are not ones and biases that are not zeros: no gradient is zero for a trivial reason
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():  # rates that no config sets
        for name, value in vars(module).items():
            if (isinstance(value, float) and _ZERO.search(name)) or (name == "p" and "Drop" in type(module).__name__):
                setattr(module, name, 0.0)
    return model.to(dtype)


def _fitted(task: str, model: Any, dtype: torch.dtype) -> Inputs:
    """Inputs on which the model runs forward and backward; with pictures, if it says how many tokens one is worth."""
    if task == "image-text-to-text":
        own = _INPUTS.get(type(model).__name__)
        for picture in () if own in (_idefics, _kosmos2, _pix2struct, _picture_to_text) else _PICTURES:
            tokens = 1
            for _ in range(2):
                try:
                    batch, lengths = _inputs(task, model, tokens)
                    return _run(model, {**batch, **picture(model.config)}, dtype), lengths
                except Exception as error:
                    found = re.search(r"do not match, tokens: \d+, features:? ?(\d+)", str(error))
                    if found is None or int(found[1]) % len(LENGTHS):
                        break
                    tokens = int(found[1]) // len(LENGTHS)
    batch, lengths = _inputs(task, model)
    return _run(model, batch, dtype), lengths


def _run(model: Any, batch: Batch, dtype: torch.dtype) -> Batch:
    batch = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()}
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise NotBuiltError("gives no loss")
    if not torch.isfinite(loss):
        raise NotBuiltError(f"its loss is {float(loss)}")
    loss.backward()
    unfit = [name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    model.zero_grad()
    if unfit:  # masks made for float32 overflow in float64, say
        raise NotBuiltError(f"gradients that are not finite: {unfit[0]}")
    return batch


def _attempts() -> Iterator[tuple[str, torch.dtype]]:
    for attention in ATTENTION:
        for dtype in (torch.float64, torch.float32):
            yield attention, dtype


def build(task: str, name: str) -> Specimen:
    """One class as its users would run it: our attention where it can be called, float64 where the model computes in it.

    Raises NotBuiltError, with the first error met without our attention, when nothing runs.
    """
    if name in NOT_BUILT:
        raise NotBuiltError(NOT_BUILT[name])
    errors: dict[tuple[str, torch.dtype], Exception] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config_class, model_class = _class_of(task, name)
        except Exception as error:
            raise NotBuiltError(_short(error)) from error
        for attention, dtype in _attempts():
            first = errors.get((attention, torch.float64))
            if isinstance(first, UnsupportedError):  # does not depend on the dtype
                continue
            try:
                model = _model(task, config_class, model_class, attention, dtype)
                batch, lengths = _fitted(task, model, dtype)
            except Exception as error:
                errors[attention, dtype] = error
                continue
            refused = [_short(said) for (tried, _), said in errors.items() if tried != attention]
            return Specimen(model, batch, lengths, attention, "; ".join(dict.fromkeys(refused)), dtype)
    last = errors.get(("eager", torch.float32), next(iter(errors.values())))
    raise NotBuiltError(_short(last)) from last


def _short(error: Exception) -> str:
    text = str(error) if isinstance(error, (NotBuiltError, UnsupportedError)) else f"{type(error).__name__}: {error}"
    return re.sub(r"\s+", " ", text).strip()[:160]
