"""What a Transformers model says its loss is: the one definition, for training, memory estimates and commands alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.units import Batch

# (batch, num_items_in_batch) -> scalar loss; with None the division is left to the model.
ModelLoss = Callable[[dict[str, Any], Tensor | None], Tensor]


def model_loss(model: Any, batch: Batch, num_items: Tensor | None = None) -> Tensor:
    """The loss that a Transformers model computes of a batch, without a key-value cache.

    Nothing is undone or checked here: models divide by `num_items_in_batch`, or by what the batch holds, which depends on
    other units. `training.losses.learn_loss` finds out which, and makes it a sum over units.

    Args:
        model: a Transformers model, compiled or not, an adapter's or not, called as `model(**batch)`.
        batch: model inputs with labels.
        num_items: a scalar tensor, what to divide a sum of label losses by. It is passed on where the model's forward takes
            `num_items_in_batch`; other models ignore it.

    Returns:
        A scalar with gradient.

    Raises:
        UnsupportedError: the model returned no loss, for want of labels, say.
    """
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT's forward takes anything
    forward = type(inner).forward
    given = dict(batch)
    if "use_cache" in inspect.signature(forward).parameters:
        given.setdefault("use_cache", False)  # with a cache, models do not look for the texts of a flattened row
    if num_items is not None and takes(forward, "num_items_in_batch"):
        given["num_items_in_batch"] = num_items
    loss = getattr(model(**given), "loss", None)
    if not isinstance(loss, Tensor):
        raise UnsupportedError(
            f"{type(inner).__name__} returned no loss for the inputs {sorted(batch)}: let the collator return labels, or give "
            "make_private a loss_fn"
        )
    return loss


def stand_in_loss(model: Any, batch: Batch) -> Tensor:
    """A scalar of everything that a model computes without labels, which holds about as much memory as a loss would.

    For estimates, where the loss itself is not the model's, or looks at values. Of each output its logarithmic softmax is taken
    in float32, as a cross entropy does.

    Args:
        model: called with those of the inputs that its forward names; with the tensors by position if it names none of them.
        batch: model inputs.

    Returns:
        A scalar with gradient.

    Raises:
        UnsupportedError: no output has a gradient.
    """
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    inputs = {name: value for name, value in batch.items() if "label" not in name}
    named = {name: value for name, value in inputs.items() if takes(type(inner).forward, name)}
    outputs = model(**named) if named else model(*(value for value in inputs.values() if isinstance(value, Tensor)))
    found = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    if not found:
        raise UnsupportedError(f"{type(inner).__name__} returned nothing with a gradient for the inputs {sorted(inputs)}")
    total = sum((x.float().log_softmax(-1) if x.dim() else x.float()).sum() for x in found)
    assert isinstance(total, Tensor)
    return total


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function may be called with a keyword argument of this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(own.name == name or own.kind is own.VAR_KEYWORD for own in parameters)
