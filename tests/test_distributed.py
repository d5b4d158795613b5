"""Ranks: the same sums, norms and noise as one process, for DDP, FSDP2 and HSDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dp_flash_hf.distributed import Ranks, local, part_of
from dp_flash_hf.engine import ClippingEngine
from dp_flash_hf.units import Units
from tests.models import batch_of, loss_of, tiny
from tests.oracle import rows_of
from tests.ranks import world


def split(model: nn.Module, kind: str, **settings: Any) -> nn.Module:
    """The model as FSDP2 ("fsdp") or HSDP ("hsdp") splits it up over all ranks: each block, and what is left."""
    size = Ranks().size
    mesh = init_device_mesh(
        "cpu", (2, size // 2) if kind == "hsdp" else (size,), mesh_dim_names=("replica", "shard")[-1 - (kind == "hsdp") :]
    )
    for module in list(model.modules()):
        if type(module).__name__.endswith(("Block", "DecoderLayer", "Layer")) and any(True for _ in module.children()):
            fully_shard(module, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def split_sums(
    family: str, kind: str, strategy: Any, clipping: Any, shares: list[list[int]], dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], list[float]]:
    """Clipped sums over the ranks' shares of a batch, and the norms of this rank's units."""
    model = split(tiny(family, dtype), kind)
    batch = batch_of(family, rows=6, dtype=dtype)
    engine = ClippingEngine(model, max_grad_norm=0.5, clipping=clipping, strategy=strategy)
    loss = loss_of(family, model)
    mine = shares[Ranks().rank]
    if mine:
        engine.backward(loss, rows_of(batch, mine))
    else:
        engine.attend(loss, rows_of(batch, [0]), Units.rows(1))
    norms = engine.norms.tolist()
    sums = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    engine.detach()
    return sums, norms


def one_process(
    family: str, clipping: Any, rows: list[int], dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor]:
    model = tiny(family, dtype)
    engine = ClippingEngine(model, max_grad_norm=0.5, clipping=clipping)
    engine.backward(loss_of(family, model), rows_of(batch_of(family, rows=6, dtype=dtype), rows))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, engine.norms


SHARES = {"ragged": [[0, 1, 2], [4], [3], []], "one has all": [[], [1, 0, 2], [], []]}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize(("kind", "size"), [("fsdp", 2), ("hsdp", 4)])
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
@pytest.mark.parametrize(("family", "clipping"), [("llama", "flat"), ("gpt2", "per_layer"), ("llama_tied", "automatic")])
def test_sums_of_split_models_equal_one_process(
    family: str, clipping: str, strategy: str, kind: str, size: int, shares: list[list[int]]
) -> None:
    results = world(size).run(split_sums, family, kind, strategy, clipping, shares)
    used = [row for share in shares[:size] for row in share]
    wanted, norms = one_process(family, clipping, used)
    for sums, _ in results:
        assert sums.keys() == wanted.keys()
        for name, total in sums.items():
            torch.testing.assert_close(total, wanted[name], rtol=1e-9, atol=1e-12)
    found = [norm for share, (_, norms) in zip(shares, results, strict=False) for norm in norms[: len(share)]]
    torch.testing.assert_close(torch.tensor(found, dtype=norms.dtype), norms)
