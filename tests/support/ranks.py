"""Several processes on this machine, as `torchrun` would start them: gloo, one thread each, kept for all tests of a session."""

from __future__ import annotations

import queue
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.accelerator import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.dataclasses import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.integrations.accelerate import PrivateLoop
from tests.support.forks import CONTEXT, begin
from tests.support.loops import loop

SECONDS = 300.0  # a rank that waits in vain for another is an error after that,
AFTER_ANOTHER = 30.0  # sooner where another is done, because all end at once,
AFTER_AN_ERROR = 5.0  # and where another failed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What `torchrun` tells each process on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class World:
    """So many ranks that run functions of test modules: `world.run(function, *args)` -> what each rank returned."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tasks: list[Any] = [CONTEXT.Queue() for _ in range(size)]
        self._results: Any = CONTEXT.Queue()
        port = free_port()
        self._processes = [
            CONTEXT.Process(target=_work, args=(rank, size, port, self._tasks[rank], self._results), daemon=True)
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank, of results and errors by rank; an error on one is raised here."""
        for tasks in self._tasks:
            tasks.put((function, args))
        found: dict[int, Any] = {}
        errors: dict[int, str] = {}
        try:
            while len(found) + len(errors) < self.size:
                patience = AFTER_AN_ERROR if errors else AFTER_ANOTHER if found else SECONDS
                rank, result, error = self._results.get(timeout=patience)
                if error is not None:
                    errors[rank] = error
                else:
                    found[rank] = result
        except queue.Empty:
            self.close()
            waiting = sorted({*range(self.size)} - found.keys() - errors.keys())
            errors[-1] = f"ranks {waiting} wait in vain; the others returned {found}"[:2000]
        if errors:
            raise AssertionError("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        return [found[rank] for rank in range(self.size)]

    @property
    def closed(self) -> bool:
        return not all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _work(rank: int, size: int, port: int, tasks: Any, results: Any) -> None:
    begin(environment_of(rank, size, port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    parent = parent_process()
    while parent is not None and parent.is_alive():
        try:
            function, args = tasks.get(timeout=10.0)
        except queue.Empty:
            continue  # the next test of this size may come, unless the session is gone
        torch.manual_seed(0)
        try:
            results.put((rank, function(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


_worlds: dict[int, World] = {}


def world(size: int) -> World:
    """The ranks of this size, started when first asked for."""
    if size not in _worlds or _worlds[size].closed:
        _worlds[size] = World(size)
    return _worlds[size]


def fails(function: Callable[..., Any], *args: Any) -> str:
    """The message of the error that function(*args) raises; "" if none."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fresh() -> None:
    """Let Accelerate forget what it found out about this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@contextmanager
def noise_if(wanted: bool) -> Iterator[None]:
    """Training without noise, to be compared, unless wanted."""
    with pytest.MonkeyPatch.context() as patch:
        if not wanted:
            patch.setattr("dp_flash_hf.training.dp_sgd.add_gaussian_noise_", lambda tensors, **settings: None)
        yield


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Accelerate takes FSDP for ranks with GPUs only, and ignores it on others; what it does then runs on CPUs as well."""
    original: Any = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", init)
        yield


def mesh_of(kind: str) -> DeviceMesh:
    """All ranks, or for "hsdp" two replicas of half of them."""
    size = Ranks().size
    shape, names = ((2, size // 2), ("replica", "shard")) if kind == "hsdp" else ((size,), ("shard",))
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def split(model: nn.Module, kind: str, **settings: Any) -> nn.Module:
    """The model as FSDP2 ("fsdp") or HSDP ("hsdp") splits it up over all ranks: each block, and what is left."""
    mesh = mesh_of(kind)
    for module in list(model.modules()):
        if type(module).__name__.endswith(("Block", "DecoderLayer", "Layer")) and any(True for _ in module.children()):
            fully_shard(module, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def begun(model: Any, optimizer: Any, *, ddp: bool = False, **changes: Any) -> tuple[PrivateLoop, Any, Any]:
    """A private loop on the ranks there are, as a script of its own would begin it; with model and optimizer as prepared."""
    fresh()
    accelerator: Any = Accelerator(cpu=True)
    if ddp:
        model, optimizer = accelerator.prepare(model, optimizer)
    private, _, _ = loop(model, optimizer=optimizer, accelerator=accelerator, **changes)
    return private, model, optimizer
