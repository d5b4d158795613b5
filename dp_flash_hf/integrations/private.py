"""`with private(config):` makes every `Trainer` that is built or trained inside train privately, whoever builds it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.replacing import replace_attribute
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.reporting.report import PrivacyReport

_ONE_AT_A_TIME = threading.Lock()


@dataclass
class PrivateRun:
    """The trainers that were built or trained within `private`.

    Attributes:
        callbacks: of each of them, in this order: its own `DPCallback` where it had one.
    """

    callbacks: list[DPCallback] = field(default_factory=list)

    def reports(self) -> list[PrivacyReport]:
        """What those spent that were trained. Trainings on the same data add up: each report speaks of one alone."""
        return [callback.report() for callback in self.callbacks if callback.planned]

    def noted(self, trainer: Any) -> DPCallback | None:
        """The trainer's own callback, which is noted; None where it has none."""
        own = next((found for found in trainer.callback_handler.callbacks if isinstance(found, DPCallback)), None)
        if own is not None and own not in self.callbacks:
            self.callbacks.append(own)
        return own


@contextmanager
def private(config: PrivacyConfig, **options: Any) -> Iterator[PrivateRun]:
    """Within the context, every Transformers `Trainer` that is built or trained is private, or raises.

    For frameworks that build the trainer themselves and do not hand it out::

        with private(PrivacyConfig(target_epsilon=8.0, target_delta=1e-6)) as run:
            train_with_some_framework()
        print(run.reports()[0])

    **Guarantee.** That of `DPCallback`, which each of these trainers is given; one that has a `DPCallback` of its own keeps it.
    Settings and overridden methods under which the guarantee would not hold are refused when `train` is called. Each training
    has a budget of its own: epsilons of trainings on the same data add up.

    **Edge cases.**

    - Afterwards Transformers is as it was before, and so is a trainer that was built outside. One that was built inside stays
      private: `callback.detach()` and `trainer.remove_callback(callback)` undo that.
    - It holds for all threads of this process, and for no other process: not for one that a launcher starts.
    - A training loop that is none of `Trainer`'s is not seen. If no trainer was built or trained inside, leaving is an error.

    Args:
        config: the privacy parameters, of every trainer.
        options: further arguments of `DPCallback`.

    Yields:
        What was trained, with its reports.

    Raises:
        UnsupportedError: inside another `private`, in any thread.
        PrivacyError: when leaving, where there was no trainer.
    """
    DPCallback(config, **options)  # raises for arguments that are none, before anything is changed
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise UnsupportedError(
            "private(...) inside another private(...), or beside one of another thread: whose a trainer would be is not "
            "known; leave the first one, or give one trainer a config of its own with DPCallback(config).attach(trainer)"
        )
    run = PrivateRun()
    build, train = Trainer.__init__, Trainer.train

    @functools.wraps(build)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if run.noted(self) is None:
            self.callback_handler.callbacks.insert(0, DPCallback(config, **options))
            run.noted(self)

    @functools.wraps(train)
    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if run.noted(self) is not None:  # attached, or attaches itself
            return train(self, *args, **kwargs)
        callback = DPCallback(config, **options)
        run.callbacks.append(callback)
        undo.callback(callback.detach)
        return callback.train_with(self, functools.partial(train, self), *args, **kwargs)

    with ExitStack() as undo:
        undo.callback(_ONE_AT_A_TIME.release)
        replace_attribute(undo, Trainer, "__init__", built)
        replace_attribute(undo, Trainer, "train", trained)
        yield run
        if not run.callbacks:
            raise PrivacyError(
                "no transformers.Trainer was built or trained within private(...), so whatever was trained there was not "
                "private: a framework with a training loop of its own needs make_private, and one that starts other processes "
                "has to enter private(...) inside them"
            )
