"""How much memory a training step needs, before it runs, and which strategy fits.

Counted on the meta device, where tensors have shapes and no values: the model's own forward and backward run there, with the
layers' own rules, and every storage is counted from the operation that makes it until it is freed. So checkpointing, adapters,
large heads and what book-keeping keeps are what they are, and not what a formula thinks of them. So is what FSDP2 gathers and
adds up (`engine.fsdp_memory`): storages that live as long as its own would.
"""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import DefaultDeviceType

from dp_flash_hf.distributed import Ranks, device_of
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.fsdp_memory import FSDPSimulator, Sharding
from dp_flash_hf.engine.live_storages import LiveStorages
from dp_flash_hf.engine.model_loss import stand_in_loss
from dp_flash_hf.engine.strategies import WholeBatchStrategy
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.layers import rules
from dp_flash_hf.layers.class_swap import take_off_mixin
from dp_flash_hf.layers.gradient_records import EmbeddingUse, HeadUse, LinearUse
from dp_flash_hf.layers.recorder import Phase, Recorder
from dp_flash_hf.units import Batch, Units, leading_shape

NON_PRIVATE = "non-private"
STRATEGIES: dict[str, Phase] = {"bookkeeping": "record", "two_pass": "sum"}  # and what their backward pass does
GIB = 2**30
_MOMENTS = {"SGD": 0, "ASGD": 1, "Adagrad": 1, "RMSprop": 1, "Lion": 1}  # elements of state for each trained one; others: 2
# Estimates of book-keeping on sharded models were up to 9 % low, and out of memory ends training there.
_MARGIN_OF_SHARDED = 1.15


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that one rank holds at the peak of a step in which gradients of other physical batches are waiting already.

    Attributes:
        strategy: "non-private", "bookkeeping" or "two_pass".
        parameters: with buffers.
        gradients: of all trained parameters; privately they are sums in float32 (float64), and where parameters are narrower,
            the `.grad` that the optimizer gets besides.
        optimizer: its state.
        activations: what a forward and backward pass without privacy hold at their peak, with what FSDP2 gathers.
        records: what the strategy holds beyond that.
    """

    strategy: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    records: int

    @property
    def total(self) -> int:
        """The sum of all of these, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.records


def estimate(
    model: nn.Module,
    batch: Batch,
    n_units: int,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    moments: int = 2,
    autocast: torch.dtype | None = None,
    ranks: int = 1,
) -> list[MemoryEstimate]:
    """Estimate the memory of one physical batch, without privacy and by each strategy for whole batches.

    Nothing of the model is run or changed, and no communication takes place. Measured on GPT-2 and Llama, with and without
    checkpointing, estimates are within 15 % of what a process holds.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    >>> batch = {"x": torch.zeros(8, 64)}
    >>> for found in estimate(model, batch, 8, loss_fn=lambda copy, batch: copy(batch["x"]).sum(), moments=2):
    ...     print(found.strategy, found.parameters, found.optimizer)
    non-private 16900 33800
    bookkeeping 16900 33800
    two_pass 16900 33800

    Args:
        model: on any device, with an engine or without. One that FSDP2 sharded is taken as it is sharded. Checkpointing is what
            the model says.
        batch: what the model will be given; only shapes are used.
        n_units: how many units it holds, each with as much of it as the others.
        loss_fn: (copy of the model, batch), both without values -> scalar.
        moments: optimizer state, in elements for each trained element; AdamW has 2, see `moments_of`.
        autocast: the dtype of autocast, None without.
        ranks: over how many FSDP2 would shard a whole model, in the pieces that Accelerate makes of it: each of the modules
            that Transformers names in `_no_split_modules`, the embedding and the head. Ranks of DDP hold what one alone holds.

    Returns:
        Three estimates, in bytes: "non-private", "bookkeeping", "two_pass".

    Raises:
        UnsupportedError: where shapes are not enough, because the model or its loss look at the data.
    """
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in batch.items()}
    sharding = Sharding.of(model, ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {id(t): sharding.own(t) * t.itemsize for t in (*model.parameters(), *model.buffers())}
    plain = sum(sharding.own(p) * p.itemsize for p in trained)
    # Sums are float32 or wider, and `.grad` a tensor of its own where the parameter is not.
    sums = sum(sharding.own(p) * (max(p.itemsize, 4) + p.itemsize * (p.itemsize < 4)) for p in trained)
    # Autocast keeps a narrow copy of every matrix; norms, which it computes in float32, are counted as narrow too. Of one that
    # FSDP2 gathers narrow it keeps none.
    casts = 0
    if autocast is not None and sharding.dtype is None:
        casts = sum(p.numel() * autocast.itemsize for p in model.parameters() if p.dim() > 1)
    found: list[MemoryEstimate] = []
    activations = 0
    for strategy in (NON_PRIVATE, *STRATEGIES):
        copied = _without_values(model, sharding.dtype or autocast)
        peak = casts + _peak(copied, FSDPSimulator(sharding, model, copied), inputs, n_units, strategy, loss_fn)
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
    """Elements that an optimizer, wrapped or not, keeps for each trained one; 2, as AdamW's, where it is not known.

    >>> moments_of(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    1
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    momentum = any(group.get("momentum") for group in getattr(inner, "param_groups", ()))
    return _MOMENTS.get(type(inner).__name__, 2) + (type(inner).__name__ in ("SGD", "RMSprop") and momentum)


def choose_by_memory(
    engine: ClippingEngine,
    batch: Mapping[str, Any],
    units: Units,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    max_rows: int,
    max_tokens: int | None,
    moments: int = 2,
    autocast: torch.dtype | None = None,
) -> tuple[WholeBatchStrategy, str]:
    """Book-keeping if its estimate fits in free memory, else two passes; for `ClippingEngine.choose`.

    Where the loss cannot be computed without values, `stand_in_loss` takes its place, and the reason says so. What cannot be
    estimated can still be trained: the answer is then book-keeping, which is computed in halves where it does
    not fit, or on sharded models, where that is impossible, two passes. All ranks of a sharded model have to call this,
    and get the same answer: two passes if any of them needs them.

    Args:
        engine: whose model is to be trained.
        batch: of one unit, a long one; only shapes are used.
        units: that unit's.
        max_rows, max_tokens: the largest physical batch, in rows or, if max_tokens is not None, in tokens.
        loss_fn, moments, autocast: as of `estimate`.

    Returns:
        The strategy, and the reason in words.
    """
    choice = _choice_of_this_rank(
        engine, batch, units, max_rows, max_tokens, loss_fn=loss_fn, moments=moments, autocast=autocast
    )
    if engine.sharded:
        return next((other for other in Ranks().gathered(choice) if other[0] == "two_pass"), choice)
    return choice


def _choice_of_this_rank(
    engine: ClippingEngine,
    batch: Mapping[str, Any],
    units: Units,
    max_rows: int,
    max_tokens: int | None,
    **settings: Any,
) -> tuple[WholeBatchStrategy, str]:
    """It raises nothing, for other ranks may wait for the answer."""
    try:
        wide, n_units = widest(batch, units, max_rows=max_rows, max_tokens=max_tokens)
        beside_loss = ""
        try:
            _, *private = estimate(engine.model, wide, n_units, **settings)
        except UnsupportedError:  # the loss is not the model's, or looks at values
            _, *private = estimate(engine.model, wide, n_units, **{**settings, "loss_fn": stand_in_loss})
            beside_loss = " (the memory of the loss is that of a cross entropy of all outputs)"
        parameter = next(iter(engine.parameters))
        device = device_of(parameter)
        # Where parameters are offloaded, so are their sums and the optimizer's state.
        here = device.type == parameter.device.type
        recorded, passes = (e.activations + e.records + here * (e.gradients + e.optimizer) for e in private)
        free = free_memory(device)
    except Exception as error:
        return "two_pass" if engine.sharded else "bookkeeping", " ".join(str(error).split())
    margin, beside, each = 1.0, "the model", ""
    if engine.sharded:
        margin, beside = _MARGIN_OF_SHARDED, "its part of the model"
        each = f" on every rank (book-keeping has to fit with {margin - 1:.0%} to spare)"
    return "bookkeeping" if recorded * margin <= free else "two_pass", (
        f"beside {beside}, a step needs about {recorded / GIB:.2f} GiB with bookkeeping and {passes / GIB:.2f} GiB with "
        f"two_pass{beside_loss}{each}, and {free / GIB:.2f} GiB are free on {device}"
    )


def widest(batch: Mapping[str, Any], units: Units, *, max_rows: int, max_tokens: int | None) -> tuple[dict[str, Any], int]:
    """The largest physical batch of units like this one, in tensors without values, and how many units it has."""
    rows = units.n_items if units.kind == "rows" else 1
    length = rows * math.prod(leading_shape(batch)[1:])
    times = max(1, max_rows // rows if max_tokens is None else max_tokens // max(1, length))
    out: dict[str, Any] = {}
    for name, value in batch.items():
        if name.startswith(("cu_seq_lens", "max_length")):
            continue  # where texts end: there are other texts then
        out[name] = value
        if isinstance(value, Tensor) and units.kind == "rows" and value.dim() > 0 and len(value) == units.n_items:
            out[name] = value.new_empty(len(value) * times, *value.shape[1:], device="meta")
        elif isinstance(value, Tensor) and units.kind == "tokens" and tuple(value.shape[:2]) == units.shape:
            out[name] = value.new_empty(1, value.shape[1] * times, *value.shape[2:], device="meta")
    return out, times


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate there: torch's own unused blocks too, of a machine's memory its share.

    The machine's is that of the container, where one is limited (by cgroups, version 2), divided by LOCAL_WORLD_SIZE.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
    return int(min(available, _left_in_container())) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container's limit leaves; what it caches of files can be given up."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max": no limit
        return math.inf
    return limit - used + int(counts.get("inactive_file", 0))


def _without_values(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy on the meta device, in training mode, as it is without an engine and FSDP2; in this dtype."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:  # FSDP2 refuses copies, and its hooks would gather
        memo[id(module)] = object.__new__(type(module))
        memo[id(module._get_fsdp_state())] = module._get_fsdp_state()
        memo |= {id(hooks): _not_of_fsdp(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)}
    for module in sharded:
        vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
    copied: Any = copy.deepcopy(model, memo)
    for module in copied.modules():
        if rules.is_attached(module):
            rules.detach(module)
        if isinstance(module, FSDPModule):
            take_off_mixin(module, FSDPModule)
        vars(module).pop("forward", None)  # Accelerate's, under autocast, which would call the original
    if hasattr(copied, "set_attn_implementation"):
        try:
            copied.set_attn_implementation("sdpa")  # dp_flash looks at masks; what it keeps is as much
        except ValueError:
            copied.set_attn_implementation("eager")
    trained: nn.Module = copied.to(dtype).train()
    return trained


def _not_of_fsdp(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    own = {key for key, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")}
    return OrderedDict((key, hook) for key, hook in hooks.items() if key not in own)


def _peak(
    model: nn.Module,
    simulator: FSDPSimulator,
    batch: Mapping[str, Any],
    n_units: int,
    strategy: str,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
) -> int:
    """Bytes that forward and backward hold at their peak, beside a rank's own parameters and gradients."""
    live = LiveStorages([*model.parameters(), *model.buffers(), *(x for x in batch.values() if isinstance(x, Tensor))])
    recorder: _Shapes | None = None
    if strategy in STRATEGIES:
        recorder = _Shapes(model, n_units, simulator)
        # One unit, and it does not matter where it stands: nothing has to be learnt.
        shape = leading_shape(batch)
        recorder.start(STRATEGIES[strategy], Units.of(torch.zeros(shape[0], dtype=torch.long), shape))
    else:
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad and p not in simulator.parameters else None
            live.know(p.grad)
    try:
        with live, _as_on_cpu():
            simulator.backward(loss_fn(model, batch))
            if recorder is not None:
                recorder.add_up()
    except Exception as error:
        raise UnsupportedError(
            f"memory cannot be estimated from shapes alone: {' '.join(str(error).split())[:200]}; choose a strategy by name"
        ) from error
    return live.peak


@contextmanager
def _as_on_cpu() -> Iterator[None]:
    """Autocast, and the random states of checkpointing, for which torch raises on the meta device, are as on the CPU."""
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


class _Shapes(Recorder):
    """Keeps what a strategy would keep, of as many units as there will be."""

    def __init__(self, model: nn.Module, n_units: int, simulator: FSDPSimulator) -> None:
        super().__init__({p: 0 for p in model.parameters() if p.requires_grad})
        self.n_units, self.simulator = n_units, simulator
        self.held: dict[nn.Parameter, list[Any]] = {}
        for module in list(model.modules()):
            if rules.rule_for(module) is not None or any(p.requires_grad for p in module.parameters(recurse=False)):
                rules.attach(module, self)

    def defers(self, parameters: Sequence[nn.Parameter]) -> bool:
        """As of a sharded model, whose gathered parameters may be gone when the result is formed."""
        return self.simulator.parameters.isdisjoint(parameters) and super().defers(parameters)

    def add_up(self) -> None:
        """What the engine makes of the records of sharded parameters, in its order."""
        for parameter in self._groups:
            uses = self.held.pop(parameter, None)
            if self.phase == "record":
                self.simulator.add_sum(parameter)
            del uses

    def _add(self, parameter: nn.Parameter, use: LinearUse | HeadUse | EmbeddingUse | Tensor) -> None:
        if isinstance(use, LinearUse):
            rows = sum(use.sizes)
            use = replace(use, sizes=(rows // self.n_units,) * self.n_units)
        if self.phase == "sum":
            self.simulator.hold_sum(parameter)
            if isinstance(use, LinearUse):  # rows times factors
                _ = torch.empty_like(min(use.a, use.g, key=Tensor.numel), dtype=upcast(use.a).dtype)
            return
        held = self.held.setdefault(parameter, [])
        if isinstance(use, Tensor):
            held.append(use.new_empty(self.n_units, *use.shape[1:]))
        elif isinstance(use, LinearUse) and use.part is None and use.keeps_gradients:
            held.append(torch.empty(self.n_units, *parameter.shape, dtype=upcast(use.a).dtype, device="meta"))
        else:
            held.append(use)
