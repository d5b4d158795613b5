"""A callback that attaches itself: handed over to a trainer like any other, it is attached when `train` is called.

Callbacks are never told whose they are, and their first event of a training comes after the data loader was made. In
`Trainer.train` the trainer is known and nothing was drawn yet, so that method looks among the callbacks first.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

from dp_flash_hf.errors import UnsupportedError


class SelfAttaching(TrainerCallback):
    """A callback that takes a training over, whoever made the trainer."""

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether it has a trainer."""

    @abstractmethod
    def attach(self, trainer: Trainer) -> Any:
        """Take this trainer over."""

    @abstractmethod
    def train_with(self, trainer: Trainer, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attach to this trainer, and train it by `train`, a method of it."""


def attach_when_trained() -> None:
    """From now on `Trainer.train` attaches a `SelfAttaching` callback of the trainer that is not attached; called once."""
    given = Trainer.train

    @functools.wraps(given)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SelfAttaching) and not callback.attached:
                return callback.train_with(self, functools.partial(given, self), *args, **kwargs)
        return given(self, *args, **kwargs)

    setattr(Trainer, "train", train)  # noqa: B010


def require_transformers_trainer(trainer: Any) -> None:
    """Raise UnsupportedError for what is called a trainer and is none of Transformers', and for parts of what is none.

    setfit's holds one of Transformers' for its encoder, to which it hands the callbacks on: that part would look private.
    """
    if any(base.__module__.partition(".")[0] == "setfit" for base in type(trainer).__mro__):
        raise UnsupportedError(
            "setfit trains its encoder on pairs of texts, so that one text is in many rows and a row is no unit, and then fits "
            "its classification head without noise: train AutoModelForSequenceClassification with Trainer and DPCallback "
            "instead, where each text is one row and the head is trained privately too"
        )
    if not isinstance(trainer, Trainer):
        raise UnsupportedError(
            f"{type(trainer).__module__}.{type(trainer).__name__} is no transformers.Trainer, so its training loop is not "
            "known; for a loop of your own there is make_private"
        )


attach_when_trained()
