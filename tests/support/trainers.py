"""Tiny private trainings through the real `Trainer`, and a record of what they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.models import PADDING, VOCABULARY, Batch, tiny

Example = dict[str, Any]


# Of every tiny training: weights stay, and nothing is written or shown.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.0,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


def texts(n: int = 24, *, seed: int = 0, shortest: int = 3, longest: int = 9) -> list[Example]:
    """Documents of unequal length with a class each; every fourth has a prompt that takes no part in the loss."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(n):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :] if row % 4 == 3 else ids
        examples.append({"input_ids": ids, "labels": labels, "label": row % 3})
    return examples


@dataclass(frozen=True)
class Pad:
    """Pads to the longest text of the batch; `classes` takes the class instead of the text as label."""

    padding: int = 0
    classes: bool = False

    def __call__(self, examples: Sequence[Example]) -> Batch:
        length = max(len(example["input_ids"]) for example in examples)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([[*e[name], *[value] * (length - len(e[name]))] for e in examples])

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {
            "input_ids": padded("input_ids", self.padding),
            "attention_mask": (torch.arange(length) < lengths.unsqueeze(1)).long(),
            "labels": torch.tensor([e["label"] for e in examples]) if self.classes else padded("labels", -100),
        }


def without_dropout(model: Any) -> Any:
    """Training mode then computes the same as eval mode, so that a brute-force loop can be compared."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def trainer_for(
    model: Any,
    path: Path,
    data: Any = None,
    *,
    cls: type[hf.Trainer] = hf.Trainer,
    collator: Callable[[Any], Any] | None = None,
    evaluation: Any = None,
    **settings: Any,
) -> Any:
    """A stock trainer of class `cls`: `model` is a name of tests.support.models (built in float64, without dropout) or a model.

    SGD with learning rate 0 unless said otherwise, so that every step sees the same weights.
    """
    name = model if isinstance(model, str) else ""
    chosen: dict[str, Any] = {
        **SETTINGS,
        "output_dir": str(path),
        "max_steps": 2,
        "remove_unused_columns": False,
        **settings,
    }
    arguments = hf.Seq2SeqTrainingArguments if issubclass(cls, hf.Seq2SeqTrainer) else hf.TrainingArguments
    return cls(
        model=without_dropout(tiny(name)) if name else model,
        args=arguments(**chosen),
        train_dataset=texts() if data is None else data,
        eval_dataset=evaluation,
        data_collator=collator or Pad(PADDING.get(name, 0), classes=name == "bert_classifier"),
    )


def config(**changes: Any) -> PrivacyConfig:
    """Noise of a fixed size, so that nothing has to be calibrated."""
    return PrivacyConfig(**{"target_delta": 1e-3, "noise_multiplier": 1.0, "accountant": "rdp", **changes})


def attached(trainer: hf.Trainer, *, max_tokens_per_device: int | None = None, **changes: Any) -> DPCallback:
    return DPCallback(config(**changes), max_tokens_per_device=max_tokens_per_device).attach(trainer)


@dataclass
class Seen:
    """One entry for every step: the units drawn, the clipped sums before noise, the gradients given to the optimizer."""

    drawn: list[list[int]] = field(default_factory=list)
    sums: list[dict[str, Tensor]] = field(default_factory=list)
    released: list[dict[str, Tensor]] = field(default_factory=list)


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Record what the real sampler draws and the real engine hands over, without changing either."""
    seen = Seen()
    draw, release = PoissonSampler.draw, DPSGD.release

    def drawn(self: PoissonSampler, generator: torch.Generator, population: int | None = None) -> Tensor:
        units = draw(self, generator, population)
        seen.drawn.append(units.tolist())
        return units

    def released(self: DPSGD) -> None:
        assert self._engine is not None
        names = self._engine.parameters
        seen.sums.append({name: self._engine.clipped_sum(p).clone().double() for p, name in names.items()})
        release(self)
        seen.released.append({name: p.grad.clone().double() for p, name in names.items() if p.grad is not None})

    monkeypatch.setattr(PoissonSampler, "draw", drawn)
    monkeypatch.setattr(DPSGD, "release", released)
    return seen


def draws(monkeypatch: pytest.MonkeyPatch, *steps: Sequence[int]) -> None:
    """Let the sampler draw these units, one list for every step, and none afterwards: workers fetch in advance."""
    upcoming = iter(steps)
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, *_: torch.tensor(next(upcoming, []), dtype=torch.long))


class ZeroGradient(hf.Trainer):
    """The model's loss, with a gradient too small to be seen beside noise; none at all would be refused by the checks."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss.detach() + 1e-30 * loss
