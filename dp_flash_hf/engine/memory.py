"""How much memory a training step needs, before it runs: counted on the meta device, where tensors have shapes and no numbers.

The model's own forward and backward run there, with the layers' own rules, and every storage is counted from the operation that
makes it until nobody holds it. So checkpointing, adapters, large heads and what book-keeping keeps are what they are, and not
what a formula thinks of them. So is what FSDP2 gathers and adds up: storages that live as long as its own would.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
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
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import DefaultDeviceType
from torch.utils.weak import WeakIdKeyDictionary

from dp_flash_hf.distributed import with_end
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.layers import rules
from dp_flash_hf.layers.gradient_records import EmbeddingUse, HeadUse, LinearUse
from dp_flash_hf.layers.recorder import Phase, Recorder
from dp_flash_hf.units import Batch, Units, leading_shape

NON_PRIVATE = "non-private"
STRATEGIES: dict[str, Phase] = {"bookkeeping": "record", "two_pass": "sum"}  # and what their backward pass does
GIB = 2**30
_MOMENTS = {"SGD": 0, "ASGD": 1, "Adagrad": 1, "RMSprop": 1, "Lion": 1}  # numbers of state for each trained one; others: 2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak of a step in which gradients of other physical batches wait already; of one rank.

    parameters: with buffers. gradients: of all trained parameters; privately they are sums in float32, and where parameters are
    narrower, what the optimizer gets besides. optimizer: its state. activations: what a forward and backward pass without
    privacy hold at their peak, with what FSDP2 gathers. records: what the strategy holds beyond that.
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
    ranks: int = 1,
) -> list[MemoryEstimate]:
    """Of training without privacy, and of each strategy, for one physical batch.

    model: on any device, an engine's or not, whole or split up by FSDP2, which is then taken as it is split; nothing of it is
        run or changed. Checkpointing is what it says.
    batch: what the model will be given, of which only shapes are used; each of its `n_units` units has as much of it.
    loss_fn: (copy of the model, batch), both without numbers -> scalar.
    moments: numbers of optimizer state for each trained number; AdamW has 2.
    autocast: the dtype of autocast, None without.
    ranks: over how many FSDP2 would split up a whole model, in the pieces that Accelerate makes of it: each of the modules that
        Transformers names in `_no_split_modules`, the embedding and the head. Ranks of DDP hold what one alone holds.

    Raises UnsupportedError where shapes are not enough, because the model or its loss look at the data.
    """
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in batch.items()}
    split = _Split.of(model, ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {id(t): split.own(t) * t.itemsize for t in (*model.parameters(), *model.buffers())}
    plain = sum(split.own(p) * p.itemsize for p in trained)
    # Sums are float32 or wider, and `.grad` a tensor of its own where the parameter is not.
    sums = sum(split.own(p) * (max(p.itemsize, 4) + p.itemsize * (p.itemsize < 4)) for p in trained)
    # Autocast keeps a narrow copy of every matrix; norms, which it computes in float32, are counted as narrow too. Of one that
    # FSDP2 gathers narrow it keeps none.
    casts = 0
    if autocast is not None and split.dtype is None:
        casts = sum(p.numel() * autocast.itemsize for p in model.parameters() if p.dim() > 1)
    found: list[MemoryEstimate] = []
    activations = 0
    for strategy in (NON_PRIVATE, *STRATEGIES):
        copied = _without_numbers(model, split.dtype or autocast)
        peak = casts + _peak(copied, _Gathering(split, model, copied), inputs, n_units, strategy, loss_fn)
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
    """Bytes that this process could still allocate there: torch's own unused blocks too, of a machine's memory its share.

    The machine's is that of the container, where one is limited (by cgroups, version 2).
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


@dataclass(frozen=True, eq=False)
class _Group:
    """Parameters that FSDP2 gathers together, when the first of these modules is called."""

    modules: Sequence[nn.Module]
    parameters: Sequence[nn.Parameter]
    size: int  # of them gathered, in bytes
    stays: bool  # whether they are kept from forward to backward


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How FSDP2 splits a model up, or would."""

    ranks: int
    parameters: set[Tensor]  # that are split up
    groups: list[_Group]  # inner modules come first
    dtype: torch.dtype | None  # in which parameters are gathered, None: their own

    @classmethod
    def of(cls, model: nn.Module, ranks: int) -> _Split:
        split_up = [p for p in model.parameters() if isinstance(p, DTensor)]
        parameters: set[Tensor] = set(split_up)
        wrapped: list[tuple[list[nn.Module], bool]] = []
        dtype = None
        if split_up:
            ranks = split_up[0].device_mesh.size(-1)  # HSDP's other dimension is of replicas
            wrapped, dtype = _wrapped(model)
        elif ranks > 1:
            parameters, wrapped = {p for p in model.parameters() if p.dim()}, _to_be_wrapped(model)
        split = cls(ranks=ranks, parameters=parameters, groups=[], dtype=dtype)
        seen: set[Tensor] = set()
        for modules, stays in wrapped:
            own = [p for p in dict.fromkeys(p for m in modules for p in m.parameters()) if p in parameters and p not in seen]
            size = sum(ranks * split.own(p) * (dtype or p.dtype).itemsize for p in own)
            split.groups.append(_Group(modules, own, size, stays))
            seen.update(own)
        return split

    def own(self, t: Tensor) -> int:
        """How many numbers of this tensor a rank holds: of a split one rows, as many as the first rank."""
        return -(-len(t) // self.ranks) * t.shape[1:].numel() if t in self.parameters else t.numel()


def _wrapped(model: nn.Module) -> tuple[list[tuple[list[nn.Module], bool]], torch.dtype | None]:
    """The modules that `fully_shard` was given, inner ones first, with whether they stay gathered; and the dtype of that."""
    together: dict[Any, list[nn.Module]] = {}
    for module in reversed(list(model.modules())):
        if isinstance(module, FSDPModule):
            together.setdefault(module._get_fsdp_state(), []).append(module)
    found = []
    for state, modules in together.items():
        parts = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # older ones have one
        # What is to be freed in part after forward counts as kept. The outermost module's are needed again at once.
        stays = model in modules or any(part and part.post_forward_mesh_info is not part.mesh_info for part in parts)
        found.append((modules, stays))
    return found, next((state._mp_policy.param_dtype for state in together), None)


def _to_be_wrapped(model: nn.Module) -> list[tuple[list[nn.Module], bool]]:
    """The modules that Accelerate gives to `fully_shard`, inner ones first, each with whether it stays gathered."""
    known: Any = model
    layers_of_model = getattr(model, "_no_split_modules", None) or ()
    found = [([m], False) for m in reversed(list(model.modules())) if type(m).__name__ in layers_of_model]
    table, head = (getattr(known, f"get_{way}_embeddings", lambda: None)() for way in ("input", "output"))
    if table is not None and head is not None and table.weight is head.weight:
        found.append(([table, head], True))
    else:
        found += [([module], module is head) for module in (table, head) if module is not None]
    return [*found, ([model], True)]


def _without_numbers(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy on the meta device, in training mode, as it is without an engine and FSDP2; in this dtype."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    split = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in split:  # FSDP2 refuses copies, and its hooks would gather
        memo[id(module)] = object.__new__(type(module))
        memo[id(module._get_fsdp_state())] = module._get_fsdp_state()
        memo |= {id(hooks): _not_of_fsdp(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)}
    for module in split:
        vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
    copied: Any = copy.deepcopy(model, memo)
    for module in copied.modules():
        if rules.is_attached(module):
            rules.detach(module)
        if isinstance(module, FSDPModule):
            bases = type(module).__mro__
            module.__class__ = bases[bases.index(FSDPModule) + 1]
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
    gathering: _Gathering,
    batch: Mapping[str, Any],
    n_units: int,
    strategy: str,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
) -> int:
    """Bytes that forward and backward hold at their peak, beside a rank's own parameters and gradients."""
    live = _Live([*model.parameters(), *model.buffers(), *(x for x in batch.values() if isinstance(x, Tensor))])
    recorder: _Shapes | None = None
    if strategy in STRATEGIES:
        recorder = _Shapes(model, n_units, gathering)
        # One unit, of which it does not matter where it stands: nothing has to be learnt.
        shape = leading_shape(batch)
        recorder.start(STRATEGIES[strategy], Units.of(torch.zeros(shape[0], dtype=torch.long), shape))
    else:
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad and p not in gathering.parameters else None
            live.know(p.grad)
    try:
        with live, _as_on_cpu():
            gathering.backward(loss_fn(model, batch))
            if recorder is not None:
                recorder.add_up()
    except Exception as error:
        raise UnsupportedError(
            f"memory cannot be told from shapes alone: {' '.join(str(error).split())[:200]}; choose a strategy by name"
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


class _Gathering:
    """Holds what FSDP2 and the engine hold of a split model, beside this rank's parts, when they do.

    In forward a group's parameters are copied out of what was gathered, which stays until the next group's is there; in
    backward they are gathered again, and what comes before them is already on its way. Gradients are whole until all of the
    group's are there, then added up in one piece that stays until the next group's. Sums of strategy "two_pass" are whole until
    their module's backward pass ends, as `Shards.at_ends` has it, and those of "bookkeeping" one after the other.
    """

    def __init__(self, split: _Split, model: nn.Module, copied: nn.Module) -> None:
        modules = dict(zip(model.modules(), copied.modules(), strict=True))
        same: dict[Tensor, nn.Parameter] = dict(zip(model.parameters(), copied.parameters(), strict=True))
        self.ranks = split.ranks
        self.parameters = {same[p] for p in split.parameters}
        self.sums: dict[nn.Parameter, Tensor] = {}
        self._parts: list[Tensor] = []
        self._whole: dict[_Group, Tensor] = {}
        self._coming: dict[_Group, Tensor] = {}
        self._last: Tensor | None = None  # gathered in forward
        self._adding: Tensor | None = None  # gradients
        self._order: list[_Group] = []  # of forward
        self._entered: set[_Group] = set()
        self._begun: set[_Group] = set()
        self._in_backward = False
        self._groups = [
            replace(group, modules=[modules[m] for m in group.modules], parameters=[same[p] for p in group.parameters])
            for group in split.groups
        ]
        for group in self._groups:
            for module in group.modules:
                module.register_forward_pre_hook(partial(self._enter, group), with_kwargs=True)
                module.register_forward_hook(partial(self._leave, group))

    def backward(self, loss: Tensor) -> None:
        """The backward pass, and what FSDP2 and the engine do when it is done."""
        self._last = None
        self._in_backward = True
        loss.backward()
        for group in self._groups:
            self._free(group)
        self._coming, self._adding = {}, None
        for parameter in list(self.sums):
            self._parts.append(self.own_part(self.sums.pop(parameter)))

    def own_part(self, whole: Tensor) -> Tensor:
        """What `own_part_of_sum` makes."""
        rows = len(whole)
        _ = torch.empty_like(whole) if rows % self.ranks else None  # padded
        return whole.new_empty(-(-rows // self.ranks), *whole.shape[1:])

    def _gather(self, group: _Group) -> None:
        gathered = self._coming.pop(group, None)
        if gathered is None:
            gathered = _bytes(group.size)
        self._last = None
        self._whole[group] = _bytes(group.size)
        self._last = None if self._in_backward else gathered

    def _enter(self, group: _Group, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if group not in self._whole:
            self._gather(group)
        if group in self._begun:  # computed again
            return None
        # Of several modules the first one called ends last, if its inputs have gradients at all.
        ends = len(group.modules) == 1 or group not in self._entered
        self._entered.add(group)
        return with_end(partial(self._end, group if ends else None, module, set(group.parameters)), module, args, kwargs)

    def _leave(self, group: _Group, module: nn.Module, args: Any, out: Any) -> None:
        if not self._in_backward:
            self._order.append(group)
            if not group.stays:
                self._whole.pop(group, None)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._begin, group))

    def _begin(self, group: _Group, gradient: Tensor) -> None:
        if group in self._begun:
            return
        self._begun.add(group)
        if group not in self._whole:
            self._gather(group)
        while self._order and self._order.pop() is not group:
            pass
        before = self._order[-1] if self._order else group
        if before not in self._whole and before not in self._coming:
            self._coming[before] = _bytes(before.size)

    def _end(self, group: _Group | None, module: nn.Module, parameters: set[nn.Parameter]) -> None:
        for parameter in module.parameters():
            if parameter in parameters and parameter in self.sums:
                self._parts.append(self.own_part(self.sums.pop(parameter)))
        if group is not None:
            self._free(group)

    def _free(self, group: _Group) -> None:
        self._whole.pop(group, None)
        self._begun.discard(group)
        gradients = [p for p in group.parameters if p.grad is not None]
        if gradients:
            self._adding = None
            sizes = [(-(-len(p) // self.ranks) * p.shape[1:].numel() * p.itemsize) for p in gradients]
            self._adding = _bytes(self.ranks * sum(sizes))
            for p in gradients:
                p.grad = None
            _ = _bytes(sum(sizes))


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


class _Shapes(Recorder):
    """Keeps what a strategy would keep, of as many units as there will be."""

    def __init__(self, model: nn.Module, n_units: int, gathering: _Gathering) -> None:
        super().__init__({p: 0 for p in model.parameters() if p.requires_grad})
        self.n_units, self.gathering = n_units, gathering
        self.held: dict[nn.Parameter, list[Any]] = {}
        for module in list(model.modules()):
            if rules.rule_for(module) is not None or any(p.requires_grad for p in module.parameters(recurse=False)):
                rules.attach(module, self)

    def defers(self, parameters: Sequence[nn.Parameter]) -> bool:
        """As of a model that FSDP2 split up, whose gathered parameters may be gone when the result is formed."""
        return self.gathering.parameters.isdisjoint(parameters) and super().defers(parameters)

    def add_up(self) -> None:
        """What the engine makes of the records of split parameters, in its order."""
        for parameter in self._groups:
            uses = self.held.pop(parameter, None)
            if parameter in self.gathering.parameters and self.phase == "record":
                self.gathering.own_part(_sum_of(parameter))
            del uses

    def _add(self, parameter: nn.Parameter, use: LinearUse | HeadUse | EmbeddingUse | Tensor) -> None:
        if isinstance(use, LinearUse):
            rows = sum(use.sizes)
            use = replace(use, sizes=(rows // self.n_units,) * self.n_units)
        if self.phase == "sum":
            if parameter in self.gathering.parameters and parameter not in self.gathering.sums:
                self.gathering.sums[parameter] = _sum_of(parameter)
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


def _sum_of(parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
