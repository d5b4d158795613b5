"""Ranks: the same sums, norms and noise as one process, for DDP, FSDP2 and HSDP."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.units import Units
from tests.support.models import batch_of, loss_of, tiny
from tests.support.oracle import rows_of
from tests.support.ranks import fails, split, whole, world


def split_sums(
    family: str,
    kind: str,
    strategy: Any,
    clipping: Any,
    shares: list[list[int]],
    dtype: torch.dtype = torch.float64,
    variant: str = "",
) -> tuple[dict[str, Tensor], list[float]]:
    """Clipped sums over the ranks' shares of a batch, and the norms of this rank's units."""
    model = tiny(family, dtype)
    if "checkpointing" in variant:
        model.train().gradient_checkpointing_enable({"use_reentrant": "reentrant" in variant})
    settings: dict[str, Any] = {}
    if variant == "offload":
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if variant == "bf16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    split(model, kind, **settings)
    batch = batch_of(family, rows=6, dtype=dtype)
    engine = ClippingEngine(model, max_grad_norm=0.5, clipping=clipping, strategy=strategy)
    loss = loss_of(family, model)
    mine = shares[Ranks().rank]
    if mine:
        engine.backward(loss, rows_of(batch, mine))
    else:
        engine.participate(loss, rows_of(batch, [0]), Units.rows(1))
    norms = engine.norms.tolist()
    assert engine.reduces_precision == (variant == "bf16")
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


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
@pytest.mark.parametrize("variant", ["checkpointing", "reentrant checkpointing", "offload", "bf16"])
def test_what_else_fsdp2_does(variant: str, strategy: str) -> None:
    """Units are on all ranks but the last; bfloat16 is compared with itself in one process."""
    low = variant == "bf16"
    dtype = torch.float32 if low else torch.float64
    results = world(2).run(split_sums, "llama", "fsdp", strategy, "flat", SHARES["ragged"], dtype, variant)
    wanted, _ = one_process("llama", "flat", [0, 1, 2, 4], torch.bfloat16 if low else dtype)
    for (sums, _), name in itertools.product(results, wanted):
        if low:  # rounding of activations, which is all the two need not have in common
            assert float((sums[name] - wanted[name].float()).norm()) <= 2.0**-6 * float(wanted[name].float().norm())
            assert sums[name].dtype == torch.float32
        else:
            torch.testing.assert_close(sums[name], wanted[name], rtol=1e-9, atol=1e-12)


def leftovers(strategy: Any) -> str:
    """What the engine says where one rank's batch uses a parameter outside the rules."""
    model: Any = split(tiny("llama"), "fsdp")
    engine = ClippingEngine(model, max_grad_norm=0.5, strategy=strategy)
    loss, batch = loss_of("llama", model), batch_of("llama", rows=2)

    def own_loss(batch: Any) -> Tensor:
        hidden: list[Tensor] = []
        handle = model.model.norm.register_forward_hook(
            lambda module, args, out: hidden.append(torch.einsum("btd,d->", out, module._parameters["weight"]))
        )
        try:
            total = loss(batch)
        finally:
            handle.remove()
        return total + hidden[0] if Ranks().rank == 1 else total

    message = fails(engine.backward, own_loss, batch)
    assert all(p.grad is None for p in model.parameters())
    engine.backward(loss, batch)  # nothing is left of it
    return message


@pytest.mark.parametrize("strategy", ["auto", "two_pass"])
def test_a_use_outside_the_rules_on_one_rank_stops_all(strategy: str) -> None:
    first, second = world(2).run(leftovers, strategy)
    assert first.startswith("UncoveredParametersError: no rule covers how the model uses parameters named on another rank")
    assert second.startswith("UncoveredParametersError: no rule covers how the model uses model.norm.weight")


def refusals() -> list[str]:
    """What is said of models that are sharded in other ways."""
    mesh = init_device_mesh("cpu", (Ranks().size,))
    parallel = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel()})
    both = nn.Sequential(nn.Linear(4, 4))
    two = init_device_mesh("cpu", (1, Ranks().size), mesh_dim_names=("dp", "tp"))
    parallelize_module(both, two["tp"], {"0": ColwiseParallel()})
    fully_shard(both, mesh=two["dp"])
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    old = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    found = [fails(lambda m: ClippingEngine(m, max_grad_norm=1.0), m) for m in (parallel, both, ddp, old)]
    unit_by_unit = split(tiny("llama"), "fsdp")
    found.append(fails(lambda: ClippingEngine(unit_by_unit, max_grad_norm=1.0, strategy="microbatch")))
    engine = ClippingEngine(unit_by_unit, max_grad_norm=1.0)
    with pytest.raises(UnsupportedError, match=r"use engine\.backward"), engine.batch():
        pass
    return found


def test_what_cannot_be_exact_is_refused() -> None:
    for tensor, both, ddp, old, unit_by_unit in world(2).run(refusals):
        assert "tensor parallelism" in tensor
        assert "tensor parallelism" in both
        assert "give its .module" in ddp
        assert "or FSDP2" in old
        assert "microbatch" in unit_by_unit


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="FSDP2"):
        ClippingEngine(nn.DataParallel(nn.Linear(2, 2)), max_grad_norm=1.0)


def stopped() -> list[str]:
    """What ranks say when one of them is refused something, or is given other values."""
    ranks = Ranks()

    def refused_on_one() -> None:
        with ranks.all_ranks_or_none():
            if ranks.rank == 1:
                raise ValueError("no")

    def equal(kind: str) -> None:
        x = torch.arange(7.0)
        if kind == "exchanged" and ranks.rank == 1:
            x[[1, 2]] = x[[2, 1]]
        if kind == "a bit" and ranks.rank == 1:
            x[3] = torch.nextafter(x[3], torch.tensor(9.0))
        part = str(ranks.rank % 2) if kind == "parts" else ""
        if kind == "tensors exchanged":
            ranks.require_equal([("", x + ranks.rank), ("", x + 1 - ranks.rank)], "values")
        ranks.require_equal([(part, x + (ranks.rank % 2 if kind == "parts" else 0))], "values")

    return [
        fails(refused_on_one),
        *(fails(equal, kind) for kind in ("same", "parts", "exchanged", "tensors exchanged", "a bit")),
    ]


def test_ranks_stop_at_once_and_notice_what_differs() -> None:
    first, second = world(2).run(stopped)
    assert first[0].startswith("PrivacyError: another rank stopped here")
    assert second[0] == "ValueError: no"
    for said in (first, second):
        assert said[1:3] == ["", ""]
        assert all("ranks hold different values" in text for text in said[3:])


def added() -> list[Tensor]:
    """Sums over ranks of tensors of many sizes and dtypes."""
    ranks = Ranks()
    shapes = [(3,), (0,), (2, 5), (9_000_000,), (4,), (1, 1)]
    tensors = [torch.full(shape, float(ranks.rank + 1)) for shape in shapes]
    tensors[4] = tensors[4].double()
    tensors[2] = torch.full((5, 2), float(ranks.rank + 1)).T
    out = [id(t) for bucket in ranks.added_up(tensors) for t in bucket]
    assert out == [id(t) for t in tensors]
    return [t.unique() for t in tensors]


def test_sums_over_ranks() -> None:
    for rank in world(2).run(added):
        assert [t.tolist() for t in rank] == [[3.0], [], [3.0], [3.0], [3.0], [3.0]]
