"""Parameters that a model computes with and the loss does not depend on, such as a pooler whose output nothing reads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dp_flash_hf.distributed import logger_of_all_ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.engine.self_check import UnusedParametersError
from dp_flash_hf.engine.strategies import shown_names
from dp_flash_hf.training.session import PrivateTraining
from dp_flash_hf.training.unit_reader import UnitReader
from dp_flash_hf.training.untraced import untraced
from dp_flash_hf.units import select_unit

logger = logger_of_all_ranks(__name__)

_UNITS = 8  # that are looked at


def start_without_unused(
    training: PrivateTraining, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], undo: ExitStack
) -> None:
    """`start` and `check` this training, with parameters frozen that the model computes with for nothing.

    The optimizer would give these noise alone, where without privacy it leaves them as they are. They are frozen only if their
    modules run for every unit that is looked at, and still the loss depends on none of them: that is how the model is made. A
    module that runs for some units only, as a router's experts, or for none would be chosen by the data, or by mistake.

    Args:
        training, model, optimizer, loader: as of `PrivateTraining.start` and `check`.
        undo: when it is closed, they require gradients again.

    Raises:
        UnusedParametersError: the loss does not depend on parameters of other modules.
        PrivacyError, UnsupportedError: as `start` and `check`.
    """
    training.start(model, optimizer)
    try:
        training.check(loader)
        return
    except UnusedParametersError as error:
        names, engine = set(error.names), training.engine
        assert engine is not None
        unused = [parameter for parameter, name in engine.parameters.items() if name in names]
        if engine.sharded or not _always_run(training, engine, loader, unused):
            raise
    for parameter in unused:
        undo.callback(parameter.requires_grad_)
        parameter.requires_grad_(False)
    logger.warning(
        f"{shown_names(sorted(names))}: the loss does not depend on what the model computes with these; they stay as they are"
    )
    training.start(model, optimizer)
    training.check(loader)


def _always_run(
    training: PrivateTraining, engine: ClippingEngine, loader: DataLoader[Any], parameters: list[nn.Parameter]
) -> bool:
    """Whether the modules of all these parameters run for each of the first units by itself."""
    own = set(parameters)
    owners = {module for module in engine.model.modules() if not own.isdisjoint(module.parameters(recurse=False))}
    reader = UnitReader(
        loader,
        training.adapter,
        rows=training.rows,
        max_examples_per_unit=training.config.max_examples_per_unit,
        n_units=training.n_units,
    )
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        stack.enter_context(untraced(engine, training.adapter))
        stack.enter_context(training_mode(engine.model, False))
        stack.enter_context(engine.eagerly())
        stack.enter_context(torch.no_grad())
        for module in owners:
            stack.callback(module.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        batch, units = reader.batch(list(range(min(_UNITS, training.n_units))))
        for unit in range(units.n):
            ran.clear()
            training.adapter.model_loss(select_unit(batch, units, unit), None)
            if ran != owners:
                return False
    return True
