"""On a GPU (`pytest -m gpu`): kernels at sizes of real models, in bfloat16, and the engine on CUDA as on the CPU.

Errors are measured against float64. A budget is twice the error that the same formula makes in torch when it rounds where the
kernel has to (inputs, weights and results in bfloat16, sums in float32), and one more rounding of the largest number.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support import ROOT

pytest.importorskip("triton")

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.kernels import clipped_sum, ghost_norm
from dp_flash_hf.kernels.attention import flash_attention
from dp_flash_hf.kernels.counter_noise import keep_mask, normals
from dp_flash_hf.kernels.linear_cross_entropy import linear_cross_entropy
from dp_flash_hf.kernels.types import Head, Release, SegmentTable
from tests.support.models import batch_of, loss_of, tiny
from tests.support.oracle import clipped_sum as oracle_sum
from tests.support.oracle import distance, each_row, grads, unit_gradients

pytestmark = pytest.mark.gpu

EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module", autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


class Case(NamedTuple):
    """Shapes and features of one attention."""

    name: str
    heads: int = 8
    kv_heads: int = 8
    dim: int = 128
    dim_v: int = 128
    lengths: tuple[int, ...] = (2048,)  # of the segments, one after another in a row
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    clipped: bool = False
    dropout: float = 0.0


CASES = [
    Case("Llama, grouped heads", kv_heads=2),
    Case("64 wide", dim=64, dim_v=64),
    Case("96 wide, length 1001", dim=96, dim_v=96, lengths=(1001,)),
    Case("not causal", causal=False, lengths=(1024,)),
    Case(
        "256 wide, soft-cap, window: Gemma", heads=4, kv_heads=2, dim=256, dim_v=256, window=300, softcap=50.0, lengths=(1500,)
    ),
    Case("sinks and window: GPT-OSS", kv_heads=1, dim=64, dim_v=64, window=128, sinks=True),
    Case("values of another width", dim=192, dim_v=128, lengths=(1024,)),
    Case("packed", lengths=(1, 700, 64, 0, 513, 127)),
    Case("window, not causal: ModernBERT", dim=64, dim_v=64, causal=False, window=65),
    Case("clipped values", kv_heads=4, clipped=True),
    Case("dropout", dim=64, dim_v=64, lengths=(512, 300), dropout=0.1),
]
KEY = (123, 456)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    grad: Tensor


def inputs_of(case: Case) -> Inputs:
    """bfloat16, on the GPU, laid out as models do (rows, length, heads, width), seen as (rows, heads, length, width)."""
    length = sum(case.lengths)
    shapes = ((case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, case.dim_v), (case.heads, case.dim_v))
    query, key, value, grad = (torch.randn(1, length, *shape, device="cuda").bfloat16().transpose(1, 2) for shape in shapes)
    return Inputs(query, key, value, torch.randn(case.heads, device="cuda").bfloat16(), grad)


def clip_norms_of(case: Case) -> Tensor:
    return torch.full((case.kv_heads,), case.dim_v**0.5, device="cuda")  # about half of the values are longer


def ours(case: Case, x: Inputs, noise_std: float = 0.0, words: tuple[int, ...] = KEY) -> tuple[Tensor, ...]:
    """The result, and the gradients of query, key, value and sinks."""
    leaves = [t.detach().requires_grad_() for t in x[:4]]
    ends = torch.tensor([0, *case.lengths], device="cuda").cumsum(0).int()
    release = None
    if case.clipped or noise_std:
        release = Release(clip_norms_of(case), torch.full((case.heads,), noise_std, device="cuda"), words)
    out = flash_attention(
        *leaves[:3],
        segments=SegmentTable.from_cu_seqlens(ends, ends, max(case.lengths), max(case.lengths)),
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        sinks=leaves[3] if case.sinks else None,
        dropout=case.dropout,
        dropout_key=KEY if case.dropout else None,
        release=release,
    )
    wanted = leaves if case.sinks else leaves[:3]
    return (out.detach(), *torch.autograd.grad(out, wanted, x.grad))


def dense(case: Case, x: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same by the definition; in float64, or rounding to bfloat16 where the kernel has to."""

    def rounded(t: Tensor) -> Tensor:
        return t if dtype == torch.float64 else t.bfloat16().float()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.detach().to(wide).requires_grad_() for t in x[:4]]
    query, key, value, sinks = leaves
    group = case.heads // case.kv_heads
    if case.clipped:
        value = value * (clip_norms_of(case).view(-1, 1, 1).to(wide) / value.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * case.dim**-0.5
    if dtype != torch.float64:
        logits.register_hook(rounded)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    place = torch.arange(sum(case.lengths), device="cuda")
    segment = torch.repeat_interleave(torch.tensor(case.lengths, device="cuda"))
    behind = place.unsqueeze(1) - place
    seen = segment.unsqueeze(1) == segment
    if case.causal:
        seen &= behind >= 0
    if case.window is not None:
        seen &= behind.abs() < case.window
    logits = logits.masked_fill(~seen, -math.inf)
    if case.sinks:
        logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(1, -1, len(place), 1)], -1)
    weights = torch.softmax(logits, -1)[..., : len(place)]
    if case.dropout:
        kept = keep_mask(KEY, (1, case.heads, len(place), len(place)), case.dropout, "cuda")
        weights = weights * kept.to(wide) / (1 - case.dropout)
    out = rounded(rounded(weights) @ value)
    return (out.detach(), *torch.autograd.grad(out, leaves if case.sinks else leaves[:3], x.grad.to(wide)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_in_bfloat16(case: Case) -> None:
    x = inputs_of(case)
    for name, found, exact, low in zip(
        ("out", "query", "key", "value", "sinks"),
        ours(case, x),
        dense(case, x, torch.float64),
        dense(case, x, torch.bfloat16),
        strict=False,
    ):
        error = (found.double() - exact).norm() / exact.norm()
        allowed = 2 * ((low.bfloat16().double() - exact).norm() / exact.norm() + EPS / 2)
        assert float(error) <= float(allowed), name
        largest = float((found.double() - exact).abs().max())
        assert largest <= 2 * (float((low.bfloat16().double() - exact).abs().max()) + EPS * float(exact.abs().max())), name


@pytest.mark.parametrize("case", [case for case in CASES if len(case.lengths) > 1], ids=lambda case: case.name)
def test_segments_do_not_see_each_other(case: Case) -> None:
    """Bit for bit what they are beside other numbers, when another segment is NaN in everything that goes in."""
    x = inputs_of(case)
    bad = slice(case.lengths[0], sum(case.lengths[:2]))
    poisoned = Inputs(*(t.clone() if i != 3 else t for i, t in enumerate(x)))
    for i, t in enumerate(poisoned):
        if i != 3:
            t[:, :, bad] = math.nan
    clean, found = ours(case, x), ours(case, poisoned)
    others = torch.ones(sum(case.lengths), dtype=torch.bool, device="cuda")
    others[bad] = False
    for one, other in zip(clean[:4], found[:4], strict=True):
        assert torch.equal(one[:, :, others], other[:, :, others])
        assert bool(one.isfinite().all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_every_time(case: Case) -> None:
    x = inputs_of(case)
    std = 0.5 if case.clipped else 0.0
    first = ours(case, x, std)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, ours(case, x, std), strict=True))


@pytest.mark.parametrize("words", [KEY, tuple(range(8))], ids=["Philox", "ChaCha20"])
def test_the_noise_is_that_of_the_generator(words: tuple[int, ...]) -> None:
    """A quick logarithm is off by 2^-22: r = sqrt(-2 ln u) by 2^-22 / r, and by sqrt(2) 2^-11 at most, where r is nearly 0."""
    case = Case("noise", heads=4, kv_heads=2, lengths=(1000,), clipped=True)
    x = Inputs(*(t.float() for t in inputs_of(case)))
    clean, noisy = ours(case, x, 0.0, words)[0].double(), ours(case, x, 3.0, words)[0].double()
    noise = 3.0 * normals(words, clean.shape, device="cuda", secure=len(words) == 8).double()
    error = (noisy - clean - noise).abs()
    assert float(error.max()) < 3.0 * 2.0**-10
    assert float(error.mean()) < 3.0 * 2.0**-17  # and sines, cosines and the sum round by eps
    assert float(noise.std()) == pytest.approx(3.0, rel=5 / math.sqrt(2 * noise.numel()))


# Norms, sums and losses.

UNITS = {"even": (512,) * 8, "ragged": (1, 700, 0, 513, 64, 2000)}


def records(sizes: tuple[int, ...], d: int, p: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(sum(sizes), width, device="cuda").bfloat16() for width in (d, p))  # type: ignore[return-value]


@pytest.mark.parametrize("units", UNITS)
def test_norms_and_clipped_sums_of_a_linear_layer(units: str) -> None:
    """float32 sums of exact products: n terms round by sqrt(n) eps of their size, of which a few kinds follow each other."""
    sizes = UNITS[units]
    a, g = records(sizes, 2048, 5632)
    gradients = [g_u.double().mT @ a_u.double() for a_u, g_u in zip(a.split(sizes), g.split(sizes), strict=True)]
    norms = torch.stack([gradient.square().sum() for gradient in gradients])
    lengths = a.double().norm(dim=1) * g.double().norm(dim=1)
    bound = torch.stack([unit.sum() for unit in lengths.split(sizes)]).square()
    (found,) = ghost_norm.linear_squared_norms(a, [g], sizes)
    assert bool(((found.double() - norms).abs() <= 8 * torch.finfo(torch.float32).eps * bound).all())
    assert torch.equal(found, ghost_norm.linear_squared_norms(a, [g], sizes)[0])

    factors = torch.rand(len(sizes), device="cuda")
    wanted = torch.zeros_like(gradients[0])
    for factor, gradient in zip(factors, gradients, strict=True):
        wanted += factor * gradient
    out = torch.zeros(5632, 2048, device="cuda")
    clipped_sum.add_linear_(out, a, g, factors, sizes)
    again = torch.zeros_like(out)
    clipped_sum.add_linear_(again, a, g, factors, sizes)
    assert torch.equal(out, again)
    terms = g.double().abs().mT @ (
        a.double().abs() * torch.repeat_interleave(factors, torch.tensor(sizes, device="cuda"))[:, None]
    )
    allowed = 8 * torch.finfo(torch.float32).eps * math.sqrt(sum(sizes)) * terms
    assert bool(((out.double() - wanted).abs() <= allowed).all())


def test_norms_and_clipped_sums_of_an_embedding() -> None:
    sizes = UNITS["ragged"]
    _, g = records(sizes, 1, 2048)
    ids = torch.randint(0, 500, (sum(sizes),), device="cuda")
    tables = []
    for ids_u, g_u in zip(ids.split(sizes), g.split(sizes), strict=True):
        tables.append(torch.zeros(500, 2048, dtype=torch.float64, device="cuda").index_add_(0, ids_u, g_u.double()))
    norms = torch.stack([table.square().sum() for table in tables])
    torch.testing.assert_close(ghost_norm.embedding_squared_norms(ids, g, sizes).double(), norms, rtol=1e-4, atol=0.0)
    factors, out = torch.rand(len(sizes), device="cuda"), torch.zeros(500, 2048, device="cuda")
    clipped_sum.add_embedding_(out, ids, g, factors, sizes)
    wanted = sum(factor.double() * table for factor, table in zip(factors, tables, strict=True))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-3)


def test_cross_entropies_of_a_large_vocabulary() -> None:
    rows, d, size = 2048, 1024, 128256
    hidden = torch.randn(rows, d, device="cuda").bfloat16()
    weight = torch.randn(size, d, device="cuda").bfloat16() * d**-0.5
    labels = torch.randint(size, (rows,), device="cuda")
    labels[::7] = -100
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses, lse = linear_cross_entropy(hidden, Head(weight), labels)
    taken = torch.cuda.max_memory_allocated() - held
    assert taken < rows * size * 2 / 4, "as much memory as the logits take in bfloat16, or nearly"
    wanted = torch.cat([(hidden[i : i + 256].double() @ weight.double().mT).logsumexp(1) for i in range(0, rows, 256)])
    # d products of numbers near 1 and d^-1/2 in float32, twice; then an exponential and a logarithm of sums.
    allowed = 16 * torch.finfo(torch.float32).eps * math.sqrt(d) * wanted.abs()
    assert bool(((lse.double() - wanted).abs() <= allowed).all())
    own = (hidden.double() * weight.double()[labels.clamp(min=0)]).sum(1)
    exact = (wanted - own).masked_fill(labels == -100, 0.0)
    assert bool(((losses.double() - exact).abs() <= 2 * allowed).all())


# The engine.


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass", "microbatch"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5", "bert", "mixtral"])
def test_the_engine_on_cuda_as_on_the_cpu(name: str, strategy: Any) -> None:
    """The CPU's float64 gradients, to float32 rounding through a few layers."""
    batch = batch_of(name)
    model = tiny(name)
    wanted, norms = oracle_sum(unit_gradients(model, loss_of(name, model), each_row(batch)), 0.5)
    model = tiny(name, torch.float32).cuda()
    batch = {
        key: value.cuda() if isinstance(value, Tensor) else value for key, value in batch_of(name, dtype=torch.float32).items()
    }
    engine = ClippingEngine(model, max_grad_norm=0.5, strategy=strategy)
    engine.backward(loss_of(name, model), batch)
    found = {parameter: gradient.cpu() for parameter, gradient in grads(model).items()}
    assert distance(found, wanted) < 1e-4
    torch.testing.assert_close(engine.norms.double().cpu(), norms, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_bf16_autocast_on_cuda_equals_single_units(strategy: Any) -> None:
    """As on the CPU: a few bf16 roundings of 2^-9 for every layer."""
    model = tiny("llama", torch.float32).cuda()
    batch = {key: value.cuda() for key, value in batch_of("llama", dtype=torch.float32).items()}
    inner = loss_of("llama", model)

    def loss(part: Any) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return inner(part)

    wanted, norms = oracle_sum(unit_gradients(model, loss, each_row(batch)), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    engine.backward(loss, batch)
    assert distance(grads(model), wanted) < 8 * 2**-9
    torch.testing.assert_close(engine.norms.double().cpu(), norms, rtol=8 * 2**-9, atol=0.0)


# Memory.

SANITIZED = """
import torch
from dp_flash_hf.kernels import clipped_sum, ghost_norm
from dp_flash_hf.kernels.attention import Release, SegmentTable, flash_attention
from dp_flash_hf.kernels.linear_cross_entropy import Head, linear_cross_entropy
ends = torch.tensor([0, 5, 5, 70, 133], device="cuda", dtype=torch.int32)
segments = SegmentTable.from_cu_seqlens(ends, ends, 65, 65)
for dim, release in ((40, None), (64, Release(torch.ones(2).cuda(), torch.ones(4).cuda(), (1, 2)))):
    q, k, v = (torch.randn(1, heads, 133, dim, device="cuda").bfloat16().requires_grad_() for heads in (4, 2, 2))
    flash_attention(q, k, v, segments=segments, causal=True, release=release).float().square().sum().backward()
sizes = (3, 0, 70, 60)
a, g = torch.randn(133, 50, device="cuda").bfloat16(), torch.randn(133, 37, device="cuda").bfloat16()
ids, factors = torch.randint(0, 11, (133,), device="cuda"), torch.rand(4, device="cuda")
ghost_norm.linear_squared_norms(a, [g], sizes)
ghost_norm.embedding_squared_norms(ids, g, sizes)
clipped_sum.add_linear_(torch.zeros(37, 50, device="cuda"), a, g, factors, sizes)
clipped_sum.add_embedding_(torch.zeros(11, 37, device="cuda"), ids, g, factors, sizes)
linear_cross_entropy(a, Head(torch.randn(501, 50, device="cuda").bfloat16()), ids)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_access_out_of_bounds_and_no_race(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--kernel-name-exclude",
            "kernel_substring=at::",
            sys.executable,
            "-c",
            SANITIZED,
        ],
        # Torch's own allocator would hand out neighbouring memory, which the tool then takes for allocated.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said or "LibraryNotLoaded" in said:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert done.returncode == 0, said[-4000:]
    assert "done" in done.stdout
