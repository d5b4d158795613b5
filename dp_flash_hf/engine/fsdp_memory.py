"""What FSDP2 holds of a sharded model beside a rank's own part of it, and when: simulated on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dp_flash_hf.distributed import with_end


@dataclass(frozen=True, eq=False)
class GatheredGroup:
    """Parameters that FSDP2 gathers in one piece, when the first of these modules is called."""

    modules: Sequence[nn.Module]
    parameters: Sequence[nn.Parameter]
    size: int  # of them gathered, in bytes
    stays: bool  # whether they are kept from forward to backward


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 shards a model, or would."""

    ranks: int
    parameters: set[Tensor]  # that are sharded
    groups: list[GatheredGroup]  # inner modules come first
    dtype: torch.dtype | None  # in which parameters are gathered, None: their own

    @classmethod
    def of(cls, model: nn.Module, ranks: int) -> Sharding:
        """As the model is sharded, or else as Accelerate would shard it over so many ranks."""
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        parameters: set[Tensor] = set(sharded)
        wrapped: list[tuple[list[nn.Module], bool]] = []
        dtype = None
        if sharded:
            ranks = sharded[0].device_mesh.size(-1)  # HSDP's other dimension is of replicas
            wrapped, dtype = _wrapped_modules(model)
        elif ranks > 1:
            parameters, wrapped = {p for p in model.parameters() if p.dim()}, modules_to_wrap(model)
        sharding = cls(ranks=ranks, parameters=parameters, groups=[], dtype=dtype)
        seen: set[Tensor] = set()
        for modules, stays in wrapped:
            own = [p for p in dict.fromkeys(p for m in modules for p in m.parameters()) if p in parameters and p not in seen]
            size = sum(ranks * sharding.own(p) * (dtype or p.dtype).itemsize for p in own)
            sharding.groups.append(GatheredGroup(modules, own, size, stays))
            seen.update(own)
        return sharding

    def own(self, t: Tensor) -> int:
        """How many elements of this tensor a rank holds: of a sharded one rows, as many as the first rank."""
        return -(-len(t) // self.ranks) * t.shape[1:].numel() if t in self.parameters else t.numel()


def _wrapped_modules(model: nn.Module) -> tuple[list[tuple[list[nn.Module], bool]], torch.dtype | None]:
    """The modules that `fully_shard` was given, inner ones first, with whether they stay gathered; and the dtype of that."""
    by_state: dict[Any, list[nn.Module]] = {}
    for module in reversed(list(model.modules())):
        if isinstance(module, FSDPModule):
            by_state.setdefault(module._get_fsdp_state(), []).append(module)
    found = []
    for state, modules in by_state.items():
        parts = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # older ones have one
        # What is to be freed in part after forward counts as kept. The outermost module's are needed again at once.
        stays = model in modules or any(part and part.post_forward_mesh_info is not part.mesh_info for part in parts)
        found.append((modules, stays))
    return found, next((state._mp_policy.param_dtype for state in by_state), None)


def modules_to_wrap(model: nn.Module) -> list[tuple[list[nn.Module], bool]]:
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


class FSDPSimulator:
    """Holds what FSDP2 and the engine hold of a sharded model, beside this rank's parts, when they do.

    In forward a group's parameters are copied out of what was gathered, which stays until the next group's is there; in
    backward they are gathered again, and what comes before them is already on its way. Gradients are whole until all of the
    group's are there, then added up in one piece that stays until the next group's. Sums of strategy "two_pass" are whole until
    their module's backward pass ends, as `Shards.at_ends` has it, and those of "bookkeeping" one after the other.
    """

    def __init__(self, sharding: Sharding, model: nn.Module, copied: nn.Module) -> None:
        modules = dict(zip(model.modules(), copied.modules(), strict=True))
        same: dict[Tensor, nn.Parameter] = dict(zip(model.parameters(), copied.parameters(), strict=True))
        self.ranks = sharding.ranks
        self.parameters = {same[p] for p in sharding.parameters}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._parts: list[Tensor] = []
        self._whole: dict[GatheredGroup, Tensor] = {}
        self._coming: dict[GatheredGroup, Tensor] = {}
        self._last: Tensor | None = None  # gathered in forward
        self._adding: Tensor | None = None  # gradients
        self._order: list[GatheredGroup] = []  # of forward
        self._entered: set[GatheredGroup] = set()
        self._begun: set[GatheredGroup] = set()
        self._in_backward = False
        self._groups = [
            replace(group, modules=[modules[m] for m in group.modules], parameters=[same[p] for p in group.parameters])
            for group in sharding.groups
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
        for parameter in list(self._sums):
            self._parts.append(self._own_part(self._sums.pop(parameter)))

    def hold_sum(self, parameter: nn.Parameter) -> None:
        """The engine begins to add up this parameter's clipped sum in backward, whole until its module ends."""
        if parameter in self.parameters and parameter not in self._sums:
            self._sums[parameter] = _sum_of(parameter)

    def add_sum(self, parameter: nn.Parameter) -> None:
        """The engine makes this parameter's clipped sum at once, and keeps this rank's part of it."""
        if parameter in self.parameters:
            self._own_part(_sum_of(parameter))

    def _own_part(self, whole: Tensor) -> Tensor:
        """What `own_part_of_sum` makes."""
        rows = len(whole)
        _ = torch.empty_like(whole) if rows % self.ranks else None  # padded
        return whole.new_empty(-(-rows // self.ranks), *whole.shape[1:])

    def _gather(self, group: GatheredGroup) -> None:
        gathered = self._coming.pop(group, None)
        if gathered is None:
            gathered = _bytes(group.size)
        self._last = None
        self._whole[group] = _bytes(group.size)
        self._last = None if self._in_backward else gathered

    def _enter(self, group: GatheredGroup, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if group not in self._whole:
            self._gather(group)
        if group in self._begun:  # computed again
            return None
        # Of several modules the first one called ends last, if its inputs have gradients at all.
        ends = len(group.modules) == 1 or group not in self._entered
        self._entered.add(group)
        return with_end(partial(self._end, group if ends else None, module, set(group.parameters)), module, args, kwargs)

    def _leave(self, group: GatheredGroup, module: nn.Module, args: Any, out: Any) -> None:
        if not self._in_backward:
            self._order.append(group)
            if not group.stays:
                self._whole.pop(group, None)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._begin, group))

    def _begin(self, group: GatheredGroup, gradient: Tensor) -> None:
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

    def _end(self, group: GatheredGroup | None, module: nn.Module, parameters: set[nn.Parameter]) -> None:
        for parameter in module.parameters():
            if parameter in parameters and parameter in self._sums:
                self._parts.append(self._own_part(self._sums.pop(parameter)))
        if group is not None:
            self._free(group)

    def _free(self, group: GatheredGroup) -> None:
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


def _sum_of(parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
