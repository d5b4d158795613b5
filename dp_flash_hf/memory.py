"""How much memory a training step needs, before it runs: counted on the meta device, where tensors have shapes and no numbers.

The model's own forward and backward run there, with the layers' own rules, and every storage is counted from the operation that
makes it until nobody holds it. So checkpointing, adapters, large heads and what book-keeping keeps are what they are, and not
what a formula thinks of them.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import DefaultDeviceType
from torch.utils.weak import WeakIdKeyDictionary

from dp_flash_hf import layers
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels.ghost_norm import upcast
from dp_flash_hf.records import EmbeddingUse, HeadUse, LinearUse, Phase, Recorder
from dp_flash_hf.units import Batch, Units, leading_shape

NON_PRIVATE = "non-private"
STRATEGIES: dict[str, Phase] = {"bookkeeping": "record", "two_pass": "sum"}  # and what their backward pass does
GIB = 2**30
_MOMENTS = {"SGD": 0, "ASGD": 1, "Adagrad": 1, "RMSprop": 1, "Lion": 1}  # numbers of state for each trained one; others: 2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak of a step in which gradients of other physical batches wait already.

    parameters: with buffers. gradients: of all trained parameters; privately they are sums in float32, and where parameters are
    narrower, what the optimizer gets besides. optimizer: its state. activations: what a forward and backward pass without
    privacy hold at their peak. records: what the strategy holds beyond that.
    """

    strategy: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    records: int

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.records


def estimate(
    model: nn.Module,
    batch: Batch,
    n_units: int,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    moments: int = 2,
    autocast: torch.dtype | None = None,
) -> list[MemoryEstimate]:
    """Of training without privacy, and of each strategy, for one physical batch.

    model: on any device, an engine's or not; nothing of it is run or changed. Checkpointing is what it says.
    batch: what the model will be given, of which only shapes are used; each of its `n_units` units has as much of it.
    loss_fn: (copy of the model, batch), both without numbers -> scalar.
    moments: numbers of optimizer state for each trained number; AdamW has 2.
    autocast: the dtype of autocast, None without.

    Raises UnsupportedError where shapes are not enough, because the model or its loss look at the data.
    """
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    plain = sum(p.nbytes for p in trained)
    # Sums are float32 or wider, and `.grad` a tensor of its own where the parameter is not.
    sums = sum(p.numel() * max(p.itemsize, 4) + p.nbytes * (p.itemsize < 4) for p in trained)
    # Autocast keeps a narrow copy of every matrix; norms, which it computes in float32, are counted as narrow too.
    casts = 0 if autocast is None else sum(p.numel() * autocast.itemsize for p in model.parameters() if p.dim() > 1)
    found: list[MemoryEstimate] = []
    activations = 0
    for strategy in (NON_PRIVATE, *STRATEGIES):
        peak = casts + _peak(_without_numbers(model, autocast), inputs, n_units, strategy, loss_fn)
        activations = activations if found else peak
        found.append(
            MemoryEstimate(
                strategy=strategy,
                parameters=sum(held.values()),
                gradients=sums if found else plain,
                optimizer=moments * plain,
                activations=min(activations, peak),  # logits of large heads are never all there
                records=max(0, peak - activations),
            )
        )
    return found


def moments_of(optimizer: object) -> int:
    """Numbers that an optimizer, wrapped or not, keeps for each trained one; 2, as AdamW's, where it is not known."""
    inner = getattr(optimizer, "optimizer", optimizer)
    momentum = any(group.get("momentum") for group in getattr(inner, "param_groups", ()))
    return _MOMENTS.get(type(inner).__name__, 2) + (type(inner).__name__ in ("SGD", "RMSprop") and momentum)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate there: torch's own unused blocks too, of a machine's memory its share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _without_numbers(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy on the meta device, in training mode, as it is without an engine; in this dtype."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    copied: Any = copy.deepcopy(model, memo)
    for module in copied.modules():
        if layers.is_attached(module):
            layers.detach(module)
        vars(module).pop("forward", None)  # Accelerate's, under autocast, which would call the original
    if hasattr(copied, "set_attn_implementation"):
        try:
            copied.set_attn_implementation("sdpa")  # dp_flash looks at masks; what it keeps is as much
        except ValueError:
            copied.set_attn_implementation("eager")
    trained: nn.Module = copied.to(dtype).train()
    return trained


def _peak(
    model: nn.Module,
    batch: Mapping[str, Any],
    n_units: int,
    strategy: str,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
) -> int:
    """Bytes that forward and backward hold at their peak, beside parameters and gradients."""
    live = _Live([*model.parameters(), *model.buffers(), *(x for x in batch.values() if isinstance(x, Tensor))])
    recorder: _Shapes | None = None
    if strategy in STRATEGIES:
        recorder = _Shapes(model, n_units)
        # One unit, of which it does not matter where it stands: nothing has to be learnt.
        shape = leading_shape(batch)
        recorder.start(STRATEGIES[strategy], Units.of(torch.zeros(shape[0], dtype=torch.long), shape))
    else:
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
            live.know(p.grad)
    try:
        with live, _as_on_cpu():
            loss_fn(model, batch).backward()
    except Exception as error:
        raise UnsupportedError(
            f"memory cannot be told from shapes alone: {' '.join(str(error).split())[:200]}; choose a strategy by name"
        ) from error
    return live.peak


@contextmanager
def _as_on_cpu() -> Iterator[None]:
    """Answers what torch raises for when tensors without numbers are asked: autocast, and random states to come back to."""
    known: Any = torch
    replaced = {name: getattr(torch, name) for name in ("is_autocast_enabled", "autocast")}
    usual = DefaultDeviceType.get_device_type()
    for name, function in replaced.items():
        setattr(known, name, partial(_named_cpu, function))
    DefaultDeviceType.set_device_type("cpu")
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(known, name, function)
        DefaultDeviceType.set_device_type(usual)


def _named_cpu(function: Callable[..., Any], device: str = "cpu", *args: Any, **kwargs: Any) -> Any:
    device = kwargs.pop("device_type", device)
    return function("cpu" if device == "meta" else device, *args, **kwargs)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages made within, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.know(tensor)

    def know(self, tensor: Tensor | None) -> None:
        """Do not count this one."""
        if tensor is not None:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return args[0].dtype is torch.bool or 1  # whether a mask hides nothing, rows are not packed, ...: full rows
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta" and type(tensor) in (Tensor, nn.Parameter):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


class _Shapes(Recorder):
    """Keeps what a strategy would keep, of as many units as there will be."""

    def __init__(self, model: nn.Module, n_units: int) -> None:
        super().__init__({p: 0 for p in model.parameters() if p.requires_grad})
        self.n_units = n_units
        self.held: list[Any] = []
        for module in list(model.modules()):
            if layers.rule_for(module) is not None or any(p.requires_grad for p in module.parameters(recurse=False)):
                layers.attach(module, self)

    def _add(self, parameter: nn.Parameter, use: LinearUse | HeadUse | EmbeddingUse | Tensor) -> None:
        if isinstance(use, LinearUse):
            rows = sum(use.sizes)
            use = replace(use, sizes=(rows // self.n_units,) * self.n_units)
        if self.phase == "sum":
            if isinstance(use, LinearUse):  # rows times factors
                _ = torch.empty_like(min(use.a, use.g, key=Tensor.numel), dtype=upcast(use.a).dtype)
        elif isinstance(use, Tensor):
            self.held.append(use.new_empty(self.n_units, *use.shape[1:]))
        elif isinstance(use, LinearUse) and use.part is None and use.keeps_gradients:
            self.held.append(torch.empty(self.n_units, *parameter.shape, dtype=upcast(use.a).dtype, device="meta"))
        else:
            self.held.append(use)
