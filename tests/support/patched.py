"""Models of families with attention code of their own, and how they are compared with that code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dp_flash_hf.attention import patching
from tests.support.attention import ENCDEC, GPT2, TEXT

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


def build_patched(case: Case, name: str = "dp_flash") -> Any:
    """`build`; skips the test where the installed Transformers has the family use its attention interface."""
    model = build(case, name)
    if not patching.has_patch(type(model)):
        pytest.skip(f"transformers {transformers.__version__} needs no patch here")
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
