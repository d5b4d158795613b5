"""Several processes that train one model: what they agree on, how they add up, and which part of a parameter each one holds.

Every unit of a draw lies on one rank as a whole, so its gradient norm needs no communication. What is added up over ranks is
the clipped sum: of parameters that every rank holds whole (DDP) once a step, of those that `fully_shard` (FSDP2) sharded after
each physical batch, so that no rank keeps more of a sum than of the parameter. Noise is drawn from secrets that ranks share:
holders of the same part draw the same noise, holders of different parts draw independently.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from dp_flash_hf.errors import PrivacyError, UnsupportedError

_BUCKET_BYTES = 32 * 2**20  # smaller sums share a bucket: DDP's own buckets have 25 MiB
_SIDE = 251  # of what `checksum` adds up, in words
_IN_FLIGHT = 2  # buckets on their way while the one before gets its noise


class Ranks:
    """The processes of the default process group, or this process alone.

    Every method that communicates has to be called by all ranks alike, or they wait for each other; with one process all of
    them return at once.

    >>> ranks = Ranks()
    >>> ranks.size, ranks.rank, ranks.gathered("mine")
    (1, 0, ['mine'])

    Attributes:
        size: number of processes.
        rank: of this one, from 0.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
        on_gpu = several and "nccl" in str(dist.get_backend())
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gave, by rank: anything that can be pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return any(self.gathered(flag))

    @contextmanager
    def all_ranks_or_none(self) -> Iterator[None]:
        """What is refused inside on one rank is refused on all; else the others would wait for it in vain.

        Communication inside has to come before anything that one rank alone may refuse: that rank would be missing from it.

        Raises:
            Exception: what was raised inside, on the rank where it was.
            PrivacyError: on all other ranks.
        """
        try:
            yield
        except Exception:
            self.any(True)
            raise
        if self.any(False):
            raise PrivacyError("another rank stopped here, with an error that it prints; so does this one")

    def shared(self, value: Any, source: int = 0) -> Any:
        """What the rank `source` gave: a tensor or anything that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, device=self._device)
        return values[0]

    def secret(self) -> bytes:
        """32 new bytes of the first rank's operating system, the same on all ranks, and known to them alone."""
        fresh = os.urandom(32)
        if self.size == 1:
            return fresh
        shared = torch.frombuffer(bytearray(fresh), dtype=torch.uint8).to(self._device)
        dist.broadcast(shared, src=0)
        return bytes(shared.tolist())

    def added_up(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Add up each tensor over all ranks, in place, and hand them out bucket by bucket while the next ones are on their way.

        Args:
            tensors: of the same shapes and dtypes in the same order on every rank.

        Yields:
            Some of the tensors, in their order, added up; each of them once.
        """
        if self.size == 1:
            yield list(tensors)
            return
        waiting: list[tuple[Any, Tensor, list[Tensor]]] = []
        for bucket in _buckets(tensors):
            flat = bucket[0] if len(bucket) == 1 and bucket[0].is_contiguous() else torch.cat([t.flatten() for t in bucket])
            on_device = flat.to(self._device) if self._device.type != flat.device.type else flat
            waiting.append((dist.all_reduce(on_device, async_op=True), on_device, bucket))
            if len(waiting) > _IN_FLIGHT:
                yield _arrived(*waiting.pop(0))
        for work, flat, bucket in waiting:
            yield _arrived(work, flat, bucket)

    def make_equal(self, model: nn.Module) -> None:
        """Give the trained parameters that every rank holds whole the values of the first rank."""
        for parameter in model.parameters():
            if self.size > 1 and parameter.requires_grad and not isinstance(parameter, DTensor):
                dist.broadcast(parameter.data, src=0)

    def require_equal(self, tensors: Sequence[tuple[str, Tensor]], what: str) -> None:
        """Compare ranks by checksums.

        Args:
            tensors: (part, what this rank holds of it): see `part_of`.
            what: these are, in words.

        Raises:
            PrivacyError: on all ranks, unless all that hold the same part hold the same bits.
        """
        own: dict[str, int] = {}
        for part, tensor in tensors if self.size > 1 else ():
            own[part] = (3 * own.get(part, 0) + int(checksum(tensor))) % 2**64  # so that exchanged tensors show
        seen: dict[str, set[int]] = {}
        for sums in self.gathered(own):
            for part, total in sums.items():
                seen.setdefault(part, set()).add(total)
        if any(len(totals) > 1 for totals in seen.values()):
            raise PrivacyError(
                f"ranks hold different {what}, so they no longer train one model: start all of them from the same weights and "
                "settings, on devices of one kind, and change no parameter outside optimizer.step()"
            )


def logger_of_all_ranks(name: str) -> logging.Logger:
    """A logger for what all ranks would say alike: the first one says it."""
    logger = logging.getLogger(name)
    logger.addFilter(lambda record: Ranks().first)
    return logger


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() * t.element_size() for t in bucket) >= _BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != tensor.dtype or bucket[0].device != tensor.device):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _arrived(work: Any, flat: Tensor, bucket: list[Tensor]) -> list[Tensor]:
    work.wait()
    if flat is not bucket[0]:
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))
    return bucket


def checksum(x: Tensor) -> Tensor:
    """A number that differs, but for a chance of 2^-32, where x differs in a bit, or where its values change places.

    Changes that keep the sum of every row and of every column in squares of 251 words of 64 bits are not seen. An even side
    would make rows of squares out of rows of parameters, and that so much as a permutation matrix can do. x is read twice, at
    the speed of memory, and nothing of its size is made.

    Args:
        x: Of any shape, dtype and layout; of sparse and meta tensors nothing is known.

    Returns:
        int64 (), on x's device. The same for the same bits on every device.
    """
    if is_traceable_wrapper_subclass(x):  # quantised weights, say
        inner, _ = x.__tensor_flatten__()
        return checksum(torch.stack([checksum(getattr(x, name)) for name in inner]))
    if x.layout is not torch.strided or x.is_meta or not x.numel():
        return torch.zeros((), dtype=torch.int64)
    octets = x.detach().contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # 64 bits at a time, which is as fast as memory is, have to be aligned
    n_words = len(octets) // 8
    in_squares = n_words // _SIDE**2 * _SIDE**2
    words = octets[: 8 * n_words].view(torch.int64)
    squares = words[:in_squares].view(-1, _SIDE, _SIDE)
    parts = [squares.sum(1).flatten(), squares.sum(2).flatten(), words[in_squares:], octets[8 * n_words :].long()]
    kept = [part for part in parts if len(part)]
    # A difference of two halves is below 2^32, so times a random weight it is 0 modulo 2^64 with a chance of 2^-33 at most.
    halves = (torch.cat(kept) if len(kept) > 1 else kept[0]).view(torch.int32)
    return (halves * _weights(1 << (len(halves) - 1).bit_length(), halves.device)[: len(halves)]).sum()


@functools.cache
def _weights(n: int, device: torch.device) -> Tensor:
    """So many numbers, int64 and the same on every rank."""
    ends = torch.iinfo(torch.int64)
    return torch.randint(ends.min, ends.max, (n,), generator=torch.Generator().manual_seed(0)).to(device)


# --- sharded parameters ---------------------------------------------------------------------------------------------------


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, unless it is sharded."""
    with torch.no_grad():
        return t.to_local() if isinstance(t, DTensor) else t


def part_of(parameter: Tensor) -> str:
    """Which part of a parameter this rank holds, in a few letters; "" for all of it."""
    if not isinstance(parameter, DTensor):
        return ""
    coordinate: Sequence[int] = parameter.device_mesh.get_coordinate() or ()
    split = [str(at) for at, placement in zip(coordinate, parameter.placements, strict=True) if not placement.is_replicate()]
    return "/".join(split)


def own_part_of_sum(parameter: nn.Parameter, whole: Tensor | None) -> Tensor:
    """Add up over all ranks what each has of a sharded parameter's sum, and keep this rank's part.

    Args:
        parameter: a sharded one.
        whole: of its full shape, or None for zeros; used up.

    Returns:
        This rank's part of the sum, on the device and in the layout of its part of the parameter.
    """
    assert isinstance(parameter, DTensor)
    if whole is None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        whole = torch.zeros(parameter.shape, dtype=dtype, device=device_of(parameter))
    mesh = parameter.device_mesh
    total = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
    if mesh.ndim > 1:  # shard first: less is then left to add up over replicas
        total = total.redistribute(placements=[Partial(), *parameter.placements[1:]])
    return local(total.redistribute(placements=parameter.placements)).to(local(parameter).device)


def add_own_parts(done: Sequence[nn.Parameter], sums: dict[nn.Parameter, Tensor], parts: dict[nn.Parameter, Tensor]) -> None:
    """Move the whole sums of these sharded parameters over all ranks into this rank's parts of them."""
    for parameter in done:
        part = own_part_of_sum(parameter, sums.pop(parameter, None))
        parts[parameter] = parts[parameter].add_(part) if parameter in parts else part


def device_of(parameter: Tensor) -> torch.device:
    """Where the model computes with a parameter: where it lies, unless FSDP2 offloads its parts to the CPU."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def accelerators(parameters: Iterable[Tensor]) -> list[torch.device]:
    """The devices beside the CPU that the model computes with these parameters on, each with its number."""
    found = {device_of(p) for p in parameters}
    numbered = {d if d.index is not None else torch.device(d.type, 0) for d in found if d.type not in ("cpu", "meta")}
    return sorted(numbered, key=str)


def as_gradient(parameter: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient of the parameter's dtype and layout, and `values`, this rank's part of it: one storage if of one dtype."""
    if not isinstance(parameter, DTensor):
        return values.to(parameter.dtype), values
    gradient = torch.empty_like(parameter.detach())
    own = local(gradient)
    own.copy_(values)
    return gradient, own if own.dtype == values.dtype else values


class Shards:
    """What `fully_shard` made of a model; false where it made nothing of it.

    Args:
        model: sharded by FSDP2 over all ranks, with or without replicas (HSDP), or whole.

    Attributes:
        ranks: all processes.
        modules: what `fully_shard` was called on.
        ordered: the sharded parameters, in the model's order.
        parameters: the same, as a set.

    Raises:
        UnsupportedError: for parameters sharded in other ways, as tensor parallelism does, or over several meshes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.ranks = Ranks()
        self.modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.reshard()
        self.ordered = [p for p in model.parameters() if isinstance(p, DTensor)]
        self.parameters = set(self.ordered)
        self._refuse(model)

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def reshard(self) -> None:
        """Give every module its own parameters back: after a forward pass alone, FSDP2 leaves whole ones in some."""
        for module in self.modules:
            module.reshard()

    def copies(self, parameter: nn.Parameter) -> int:
        """How often a unit is in the sum of a parameter, where all ranks compute the same batch."""
        return self.ranks.size if parameter in self.parameters else 1

    def any(self, flag: bool) -> bool:
        """Whether it holds on some of the ranks that compute the same layers at once: on this one, if nothing is sharded."""
        return self.ranks.any(flag) if self.parameters else flag

    def all(self, flag: bool) -> bool:
        """Whether it holds on all ranks that compute the same layers at once."""
        return not self.any(not flag)

    def of_any_rank(self, some: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The sharded parameters that are among `some` on any rank, in the model's order."""
        if not self.parameters:
            return []
        own = set(some)
        found = {
            place for places in self.ranks.gathered([i for i, p in enumerate(self.ordered) if p in own]) for place in places
        }
        return [self.ordered[place] for place in sorted(found)]

    def square(self, parts: dict[nn.Parameter, Tensor], like: Tensor | None = None) -> Tensor:
        """The sum of squares of all elements of these parameters' gradients, or sums.

        Args:
            parts: what this rank holds of each; of parameters that are not sharded, all ranks hold the same.
            like: a tensor giving dtype and device of the result; default: float64 on the CPU.

        Returns:
            A scalar, the same on all ranks.
        """
        dtype = torch.float64 if like is None else like.dtype
        by_part: dict[str, Tensor] = {}
        for parameter, own in parts.items():
            part = part_of(parameter)
            by_part[part] = own.to(dtype).square().sum() + by_part.get(part, 0)
        if self.parameters:
            found = self.ranks.gathered({part: float(total) for part, total in by_part.items()})
            by_part = {part: torch.tensor(total, dtype=dtype) for own_parts in found for part, total in own_parts.items()}
        return sum(by_part.values(), torch.zeros((), dtype=dtype, device=None if like is None else like.device))

    def _refuse(self, model: nn.Module) -> None:
        if len({p.device_mesh for p in self.ordered}) > 1:
            raise UnsupportedError("parameters are sharded over several device meshes: call fully_shard with one mesh for all")
        within = {p for module in self.modules for p in cast(nn.Module, module).parameters()}
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor) and not (parameter in within and _is_fully_sharded(parameter, self.ranks.size)):
                raise UnsupportedError(
                    f"{name} is sharded as {parameter.placements} over {parameter.device_mesh}, as tensor parallelism does: "
                    "its per-unit norms would be those of a part; use FSDP2 (torch's fully_shard, over all ranks), without a "
                    "tp_plan"
                )

    @contextmanager
    def synchronizing(self, value: bool) -> Iterator[None]:
        """Within the context FSDP2 averages gradients over ranks, or leaves them alone."""
        try:
            self._synchronize(value)
            yield
        finally:
            self._synchronize(True)

    def _synchronize(self, value: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(value, recurse=False)

    @contextmanager
    def at_ends(self, act: Callable[[list[nn.Parameter]], None]) -> Iterator[None]:
        """Within the context, `act` is called in backward when one of the modules is done, with its own sharded parameters.

        On all ranks in the same order, which is what FSDP2 itself relies on.
        """
        handles = []
        for module in cast(list[nn.Module], self.modules):
            inner = {p for m in module.modules() if m is not module and isinstance(m, FSDPModule) for p in m.parameters()}
            own = [p for p in module.parameters() if p in self.parameters and p.requires_grad and p not in inner]
            end = partial(with_end, partial(act, own))
            handles.append(module.register_forward_pre_hook(end, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def with_end(act: Callable[[], None], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A forward pre-hook: `act` is called in backward when all gradients of the module's inputs are there."""
    leaves, structure = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if torch.is_grad_enabled() and places:
        for i, out in zip(places, _End.apply(act, *(leaves[i] for i in places)), strict=True):  # type: ignore[no-untyped-call]
            leaves[i] = out
    return tree_unflatten(leaves, structure)


class _End(torch.autograd.Function):
    """The inputs of a module; their gradients are there when its backward pass is done."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.act = act
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.act()
        return (None, *gradients)


def _is_fully_sharded(parameter: DTensor, n_ranks: int) -> bool:
    kinds = [type(placement) for placement in parameter.placements]
    return parameter.device_mesh.size() == n_ranks and kinds in ([Shard], [Replicate, Shard])
