"""TRL's own trainers, with tiny models, bytes as tokens and texts made up here: no download."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers as hf
import trl
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import SETTINGS, attached, draws, watch, without_dropout

SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant>{% generation %}{{ message['content'] }}"
    "<eos>{% endgeneration %}{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, and four special tokens: no download."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({symbol: index for index, symbol in enumerate([*SPECIAL, *alphabet])}, [])
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT,
    )


def shape(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 260,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **changes,
    }


def randomized(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return without_dropout(model)


def llama(seed: int = 1, attention: str = "dp_flash", **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = randomized(hf.LlamaForCausalLM(hf.LlamaConfig(**shape(**changes))), seed)
    model.set_attn_implementation(attention)
    return model


def scorer(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**shape(num_labels=1)))  # type: ignore[no-untyped-call]
    return randomized(model, seed)


def adapter(**changes: Any) -> Any:
    """Not the identity at first, so that policy and reference differ."""
    chosen = {
        "r": 2,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        **changes,
    }
    return peft.LoraConfig(**chosen)


WORDS = ("ab", "cde ", "x", "yz w", "mnop", "q r ")


def written(row: int, n: int) -> str:
    return "".join(WORDS[(row * 7 + k * k) % len(WORDS)] for k in range(n))


def table(make: Callable[[int], dict[str, Any]], n: int = 24) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**make(row), "user": row // 3} for row in range(n)])


def texts(prefix: str = "") -> datasets.Dataset:
    return table(lambda row: {"text": prefix + written(row, 1 + row % 5)})


def completions() -> datasets.Dataset:
    return table(lambda row: {"prompt": written(row, 1 + row % 3), "completion": written(row + 5, 1 + row % 4)})


def chats() -> datasets.Dataset:
    def turn(row: int, k: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": written(row + k, 1 + row % 3)},
            {"role": "assistant", "content": written(row + 9 * k, 1 + row % 4)},
        ]

    return table(lambda row: {"messages": [message for k in range(1 + row % 2) for message in turn(row, k)]})


def pairs(prefix: str = "") -> datasets.Dataset:
    return table(
        lambda row: {
            "prompt": prefix + written(row, 1 + row % 3),
            "chosen": written(row + 5, 1 + row % 4),
            "rejected": written(row + 8, 1 + (row + 1) % 4),
        }
    )


def margins() -> datasets.Dataset:
    return table(lambda row: {**pairs()[row], "margin": 0.1 * row})


def triples(prefix: str = "") -> datasets.Dataset:
    return table(lambda row: {**pairs(prefix)[row], "reference": written(row + 11, 1 + row % 3)})


def judged(prefix: str = "") -> datasets.Dataset:
    """Answers that somebody liked or not."""
    return table(
        lambda row: {
            "prompt": prefix + written(row, 1 + row % 3),
            "completion": written(row + 5, 1 + row % 4),
            "label": row % 3 > 0,
        }
    )


def sft(path: Path, model: Any = None, data: Any = None, *, cls: Any = trl.SFTTrainer, **changes: Any) -> Any:
    return built(cls, trl.SFTConfig, path, model or llama(), data or texts(), changes)


def dpo(path: Path, model: Any = None, data: Any = None, *, cls: Any = trl.DPOTrainer, **changes: Any) -> Any:
    return built(cls, trl.DPOConfig, path, model or llama(), data or pairs(), changes)


def reward(path: Path, model: Any = None, data: Any = None, *, cls: Any = trl.RewardTrainer, **changes: Any) -> Any:
    return built(cls, trl.RewardConfig, path, model or scorer(), data or pairs(), changes)


def kto(path: Path, model: Any = None, data: Any = None, *, cls: Any = trl.KTOTrainer, **changes: Any) -> Any:
    settings = {
        "loss_type": "apo_zero_unpaired",
        "train_sampling_strategy": "random",
        "desirable_weight": 0.6,
        "ref_model": llama(7),
        **changes,
    }
    return built(cls, trl.KTOConfig, path, model or llama(), data or judged(), settings)


def cpo(path: Path, model: Any = None, data: Any = None, *, cls: Any = CPOTrainer, **changes: Any) -> Any:
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "max_length": 64, **changes}
    return built(cls, CPOConfig, path, model or llama(), data or pairs(), settings)


def orpo(path: Path, model: Any = None, data: Any = None, *, cls: Any = ORPOTrainer, **changes: Any) -> Any:
    return built(cls, ORPOConfig, path, model or llama(), data or pairs(), {"max_length": 64, **changes})


def tpo(path: Path, model: Any = None, data: Any = None, *, cls: Any = TPOTrainer, **changes: Any) -> Any:
    return built(cls, TPOConfig, path, model or llama(), data or triples(), {"tpo_alpha": 0.0, **changes})


def gkd(path: Path, model: Any = None, data: Any = None, *, cls: Any = GKDTrainer, **changes: Any) -> Any:
    settings = {"lmbda": 0.0, "teacher_model": llama(7), **changes}
    return built(cls, GKDConfig, path, model or llama(), data or chats(), settings)


def built(cls: Any, arguments: Any, path: Path, model: Any, data: Any, changes: dict[str, Any]) -> Any:
    given = {
        name: changes.pop(name) for name in ("peft_config", "ref_model", "teacher_model", "eval_dataset") if name in changes
    }
    settings = {
        **SETTINGS,
        "output_dir": str(path),
        "max_steps": 1,
        "bf16": False,
        **changes,
    }
    return cls(model=model, args=arguments(**settings), train_dataset=data, processing_class=tokenizer(), **given)


DRAWN = [0, 3, 4, 9, 11, 17, 20]


def sums_of(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *steps: Sequence[int], **changes: Any) -> Any:
    """(clipped sums of these draws, callback, trainer)."""
    with monkeypatch.context() as patch:
        seen = watch(patch)
        draws(patch, *steps)
        trainer = make()
        trainer.args.max_steps = len(steps)
        dp = attached(trainer, **changes)
        trainer.train()
    return seen.sums, dp, trainer


def alone(make: Callable[[], Any], rows: Sequence[int]) -> list[dict[str, Tensor]]:
    """Gradients of each example by itself, through TRL's own trainer, collator, fused head and loss."""
    trainer = make()
    data = trainer._remove_unused_columns(trainer.train_dataset)
    trainer.model.eval()
    parts = [trainer.data_collator([data[row]]) for row in rows]
    return unit_gradients(trainer.model, lambda batch: trainer.compute_loss(trainer.model, dict(batch)), parts)


def error_of(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> float:
    """Relative error of a step's sum, at a bound that clips about half of its units, against a loop over single examples."""
    single = alone(make, DRAWN)
    bound = float(clipped_sum(single, 1.0)[1].median())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*computed by itself")
        (got,), dp, _ = sums_of(make, monkeypatch, DRAWN, max_grad_norm=bound, **changes)
    assert "microbatch" not in dp.engine.norm_methods().values()
    wanted, norms = clipped_sum(single, bound)
    assert norms.min() < bound < norms.max()
    return distance(got, wanted)
