"""Flash attention in Triton against the float64 oracle: outputs and every gradient, with NaN wherever nothing may be read.

A result may be off by twice the error that plain torch makes in the same dtype, plus twice a rounding band of the largest
element: its own rounding, and that of the weights, whose exponents (up to the largest logit) are rounded to float32.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels import reference
from dp_flash_hf.kernels.attention import flash_attention
from dp_flash_hf.kernels.attention_backward import key_value_grad_kernel, query_grad_kernel
from dp_flash_hf.kernels.attention_forward import attention_forward_kernel
from dp_flash_hf.kernels.attention_tiles import config, key_tiles, query_tiles
from dp_flash_hf.kernels.types import Release, SegmentTable
from tests.kernels.test_counter_noise_triton import keep_mask, standard_normals

Segment = tuple[int, int, int, int, int]  # row, first query, queries, first key, keys

# Rows, queries, keys; then segments: cross attention with gaps before and after, one token, no keys, more queries than keys, no
# queries. Starts that are no multiples of 4 or of a tile.
RAGGED = (2, 45, 53), [(0, 3, 21, 5, 37), (0, 24, 1, 42, 1), (0, 25, 15, 43, 0), (1, 0, 40, 2, 33), (1, 40, 0, 36, 14)]
WHOLE = (2, 19, 19), [(0, 0, 19, 0, 19), (1, 0, 19, 0, 19)]
PADDED = (3, 20, 20), [(0, 0, 17, 0, 17), (1, 0, 0, 0, 0), (2, 0, 1, 0, 1)]
PACKED = (1, 50, 50), [(0, 0, 5, 0, 5), (0, 5, 1, 5, 1), (0, 6, 0, 6, 0), (0, 6, 35, 6, 35), (0, 41, 9, 41, 9)]
# The same with two tiles at most, where what is asked is not how many.
SHORT = (1, 28, 28), [(0, 0, 5, 0, 5), (0, 5, 1, 5, 1), (0, 6, 0, 6, 0), (0, 6, 18, 6, 18), (0, 24, 4, 24, 4)]
DROPOUT_KEY = (0xFEDCBA98, 16)
CHACHA_KEY = (1, 2**32 - 1, 2**31, 7, 11, 13, 17, 19)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Tiles so small that these shapes have several of them, and nothing to tune where there is a GPU."""

    def use(block_m: int, block_n: int) -> None:
        for kernel in (attention_forward_kernel, key_value_grad_kernel, query_grad_kernel):
            monkeypatch.setattr(kernel, "configs", [config(block_m, block_n, 4, 1)])

    use(16, 16)
    return use


class Problem(NamedTuple):
    inputs: dict[str, Any]  # query, key, value and perhaps sinks, NaN outside segments
    grad: Tensor  # of the output, likewise
    segments: list[Segment]
    table: SegmentTable
    options: dict[str, Any]

    def ours(self, **changed: Any) -> dict[str, Tensor]:
        """The output and the gradient of every input."""
        leaves: dict[str, Any] = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        out = flash_attention(**leaves, segments=self.table, **{**self.options, **changed})
        return {"output": out.detach(), **grads_of(out, leaves, self.grad)}

    def largest_logit(self) -> float:
        """Of any query of a row with any of its keys, in base 2, before a soft-cap."""
        query, key = (self.inputs[name].double().nan_to_num(0.0) for name in ("query", "key"))
        logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
        scale: float = self.options.get("scale", query.shape[3] ** -0.5)
        return float(logits.abs().max()) * scale * math.log2(math.e)

    def expected(self, attend: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The same, one segment after another, by reference.attention or something with its arguments."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        options = {name: x for name, x in self.options.items() if name not in ("dropout_key", "release")}
        batch, heads, n_queries, _ = query.shape
        release = self.options.get("release")
        out = torch.zeros(batch, heads, n_queries, value.shape[3], dtype=torch.float64, device=query.device)
        if "sinks" in leaves:
            options["sinks"] = leaves["sinks"]
        keep = noise = None
        if release is not None:
            noise = (
                standard_normals(release.key, (batch, heads, n_queries, value.shape[3])).to(out)
                * release.noise_std[:, None, None]
            )
            options["clip_norms"] = release.clip_norms
        if "dropout_key" in options or self.options.get("dropout"):
            keep = keep_mask(self.options["dropout_key"], (batch, heads, n_queries, key.shape[2]), options["dropout"]).to(
                query.device
            )
        for row, q0, n_q, k0, n_k in self.segments:
            rows, qs, ks = slice(row, row + 1), slice(q0, q0 + n_q), slice(k0, k0 + n_k)
            if n_q:
                extra = {} if keep is None else {"keep": keep[rows, :, qs, ks]}
                extra |= {} if noise is None else {"noise": noise[rows, :, qs]}
                part = attend(query[rows, :, qs], key[rows, :, ks], value[rows, :, ks], **options, **extra)
                out = torch.slice_scatter(out, out[rows].slice_scatter(part.double(), 2, q0, q0 + n_q), 0, row, row + 1)
        return {"output": out.detach(), **grads_of(out, leaves, self.grad.double())}


def grads_of(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    # Where nothing was computed, a NaN would be compared with a 0 of the oracle's own, not of an attention.
    if out.dtype == torch.float64:
        grad = grad.nan_to_num(0.0)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    clip_norms: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Attention as one writes it in torch, in the dtype of its inputs."""
    heads, (n_q, dim), n_k = query.shape[1], query.shape[2:], key.shape[2]
    if clip_norms is not None:
        value = value * (clip_norms.to(value.dtype)[:, None, None] / value.norm(dim=3, keepdim=True)).clamp(max=1)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    logits = query @ key.mT * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(n_q, device=query.device)[:, None], torch.arange(n_k, device=query.device)
    behind = i + n_k - n_q - j
    hidden = (behind < 0) if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (behind.abs() >= window)
    logits = logits.masked_fill(hidden, -math.inf)
    sink = torch.full((heads, 1, 1), torch.finfo(query.dtype).min) if sinks is None else sinks[:, None, None]
    weights = torch.softmax(torch.cat([logits, sink.to(logits).expand(1, heads, n_q, 1)], 3), 3)[..., :-1]
    weights = weights.masked_fill(hidden, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    out = weights @ value
    return out if noise is None else out + noise.to(out.dtype)


def problem(
    layout: tuple[tuple[int, int, int], list[Segment]],
    device: str,
    *,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (20, 24),
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
    **options: Any,
) -> Problem:
    (batch, n_q, n_k), segments = layout
    shapes = {
        "query": (batch, heads[0], n_q, dims[0]),
        "key": (batch, heads[1], n_k, dims[0]),
        "value": (batch, heads[1], n_k, dims[1]),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64).to(device, dtype) for name, shape in shapes.items()}
    grad = torch.randn(batch, heads[0], n_q, dims[1], dtype=torch.float64).to(device, dtype)
    for x, start in ((inputs["query"], 1), (inputs["key"], 3), (inputs["value"], 3), (grad, 1)):
        outside = torch.ones(batch, x.shape[2], dtype=torch.bool)
        for segment in segments:
            outside[segment[0], segment[start] : segment[start] + segment[start + 1]] = False
        x.transpose(1, 2)[outside.to(device)] = math.nan
    if sinks:
        inputs["sinks"] = torch.randn(heads[0], device=device)
    columns = torch.tensor(segments, dtype=torch.int32, device=device).T
    row, q_start, q_length, k_start, k_length = columns
    table = SegmentTable(row, q_start, q_length, k_start, k_length, max(s[2] for s in segments), max(s[4] for s in segments))
    return Problem(inputs, grad, segments, table, options)


def release(heads: tuple[int, int], device: str, key: tuple[int, ...] = DROPOUT_KEY, std: float = 1.0) -> Release:
    """Clips about half of the rows; one head has no noise."""
    clip_norms = torch.linspace(4.0, 5.5, heads[1], device=device)
    return Release(clip_norms, torch.arange(heads[0], dtype=torch.float32, device=device) * std, key)


def check(given: Problem) -> None:
    ours, exact, rounded = given.ours(), given.expected(reference.attention), given.expected(plain)
    eps = torch.finfo(given.inputs["query"].dtype).eps
    for name, wanted in exact.items():
        assert bool(ours[name].isfinite().all()), name
        theirs = (rounded[name].double() - wanted).abs().max().item()
        bound = 2 * (theirs + (eps + torch.finfo(torch.float32).eps * given.largest_logit()) * wanted.abs().max().item())
        error = (ours[name].double() - wanted).abs().max().item()
        assert error <= bound, f"{name}: off by {error:.2e}, allowed {bound:.2e}"
        unused = given.grad.isnan() if name == "output" else given.inputs[name].isnan()
        assert not bool(ours[name].masked_select(unused).any()), f"{name} outside segments"


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"causal": True},
    "causal-window": {"causal": True, "window": 5},
    "causal-wide-window": {"causal": True, "window": 21},
    "window": {"window": 3},
    "wide-window": {"window": 20},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "everything": {"causal": True, "window": 18, "softcap": 2.0, "sinks": True, "scale": 0.4},
    "dropout": {"dropout": 0.3, "dropout_key": DROPOUT_KEY},
    "dropout-causal-window": {"dropout": 0.5, "dropout_key": DROPOUT_KEY, "causal": True, "window": 18, "sinks": True},
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("features", FEATURES)
def test_agrees_with_the_oracle(features: str, device: str) -> None:
    check(problem(RAGGED, device, **FEATURES[features]))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", [WHOLE, PADDED, PACKED], ids=["whole", "padded", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_layouts(layout: Any, causal: bool, device: str) -> None:
    check(problem(layout, device, causal=causal))


@triton.jit
def _ranges(out, cases, OF_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    case = cases + 4 * tl.program_id(0)
    first, n_q, n_k, window = tl.load(case), tl.load(case + 1), tl.load(case + 2), tl.load(case + 3)
    if OF_KEYS:
        low, left, right, high = key_tiles(first, n_q, n_k, 0, window, CAUSAL, WINDOWED, False, 8, 4)
    else:
        low, left, right, high = query_tiles(first, n_q, n_k, window, CAUSAL, WINDOWED, 4, 8)
    out += 4 * tl.program_id(0)
    tl.store(out, low)
    tl.store(out + 1, left)
    tl.store(out + 2, right)
    tl.store(out + 3, high)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize(("causal", "windowed"), [(False, False), (True, False), (False, True), (True, True)])
def test_tiles_in_sight(of_keys: bool, causal: bool, windowed: bool, device: str) -> None:
    """Tiles of 8 queries and 4 keys (or of 4 and 8): all that is seen is visited, and only what all see goes unmasked."""
    sizes = torch.randint(1, 25, (120, 3))
    cases = [[8 * (n // 2 % (-(-(q, k)[not of_keys] // 8))), q, k, w] for n, (q, k, w) in enumerate(sizes.tolist())]
    out = torch.zeros(len(cases), 4, dtype=torch.int32, device=device)
    _ranges[(len(cases),)](out, torch.tensor(cases, dtype=torch.int32, device=device), of_keys, causal, windowed)
    for (first, n_q, n_k, window), (low, left, right, high) in zip(cases, out.tolist(), strict=True):
        behind = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)
        seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
        if windowed:
            seen &= behind.abs() < window
        tile = (seen if of_keys else seen.T)[first : first + 8]
        visited = tile.any(0).nonzero().flatten().tolist()
        assert visited == list(range(low, high))
        assert low <= left <= right <= max(left, high)
        assert (left - low) % 4 == (right - left) % 4 == 0
        assert bool(tile[:, left:right].all())
        unmasked = [j for j in range(left, high - 3, 4) if bool(tile[:, j : j + 4].all())]
        assert unmasked == list(range(left, right, 4))  # and nothing is masked without need


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("heads", "dims"), [((2, 2), (16, 16)), ((4, 1), (5, 33)), ((4, 2), (64, 16)), ((3, 1), (16, 80))])
def test_heads(heads: tuple[int, int], dims: tuple[int, int], device: str) -> None:
    check(problem(PACKED, device, heads=heads, dims=dims, causal=True, sinks=True))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tiles", [(32, 16), (16, 32)])
@pytest.mark.parametrize("features", ["causal", "causal-wide-window", "wide-window", "dropout"])
def test_tiles(tiles: tuple[int, int], features: str, device: str, small_tiles: Callable[[int, int], None]) -> None:
    small_tiles(*tiles)
    check(problem(RAGGED, device, heads=(1, 1), **FEATURES[features]))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", ["plain", "everything", "dropout"])
def test_half_precision(features: str, dtype: torch.dtype, device: str) -> None:
    check(problem(RAGGED, device, dtype=dtype, **FEATURES[features]))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("dtype", "key", "features"),
    [
        (torch.float32, DROPOUT_KEY, "plain"),
        (torch.float32, DROPOUT_KEY, "everything"),
        (torch.bfloat16, CHACHA_KEY, "causal"),
    ],
)
def test_release(dtype: torch.dtype, key: tuple[int, ...], features: str, device: str) -> None:
    heads = (2, 2)
    check(problem(RAGGED, device, heads=heads, dtype=dtype, release=release(heads, device, key), **FEATURES[features]))


@pytest.mark.complete
def test_noise_does_not_touch_gradients(device: str) -> None:
    given = problem(PACKED, device, causal=True, dtype=torch.bfloat16)
    quiet, loud = (given.ours(release=release((2, 1), device, std=std)) for std in (0.0, 1e6))
    assert all(torch.equal(quiet[name], loud[name]) for name in given.inputs)
    assert torch.equal(quiet["output"][:, 0], loud["output"][:, 0])  # the head without noise
    assert 0.9e6 < loud["output"][:, 1].float().std().item() < 1.1e6


def test_a_release_is_bounded_whatever_the_input(device: str) -> None:
    given = problem(WHOLE, device, dims=(16, 16), dtype=torch.bfloat16)
    query, key, value = given.inputs.values()
    value *= 100
    value[0, 0, 3, 2], value[0, 0, 4, 5], value[1, 0, 1] = math.nan, math.inf, 1e38
    key[1, 0, 7] = math.inf
    privately = release((2, 1), device, std=0.0)
    out = flash_attention(query, key, value, segments=given.table, release=privately)
    limit = privately.clip_norms.item() * (1 + torch.finfo(torch.bfloat16).eps)
    assert bool((out.float().norm(dim=3) <= limit).all())


def test_a_release_in_half_precision_is_bounded_where_numbers_are_tiny(device: str) -> None:
    # Weight times clip factor is just above 2^-25 for all keys but one, and float16 would round it to 2^-24.
    length, width, largest = 257, 64, 65504.0
    value = torch.full((1, 1, length, width), largest, dtype=torch.float16, device=device)
    value[:, :, 0] = 0
    query, key = torch.ones(1, 1, 1, 16, dtype=torch.float16, device=device), torch.zeros_like(value[..., :16])
    key[..., 0, 0] = -math.log(2**-25 * 1.02 * largest * width**0.5)
    private = Release(torch.ones(1, device=device), torch.zeros(1, device=device), (1, 2))
    table = SegmentTable.whole(1, 1, length, device)
    out = flash_attention(query, key, value, segments=table, scale=1.0, release=private)
    assert out.dtype == torch.float16
    assert 0.5 < float(out.float().norm()) <= 1 + 2**-10


@pytest.mark.complete
def test_the_same_call_gives_the_same_bits(device: str) -> None:
    given = problem(SHORT, device, causal=True, sinks=True, dropout=0.2, dropout_key=DROPOUT_KEY)
    first, second = given.ours(), given.ours()
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    row, q_start, q_length, k_start, k_length = (x[order] for x in given.table[:5])
    table = SegmentTable(row, q_start, q_length, k_start, k_length, *given.table[5:])
    third = given._replace(table=table).ours()
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
def test_nothing_crosses_between_segments(name: str, device: str) -> None:
    given = problem(SHORT, device, heads=(2, 2), release=release((2, 2), device))
    clean = given.ours()
    poisoned = given._replace(inputs={key: x.clone() for key, x in given.inputs.items()}, grad=given.grad.clone())
    (poisoned.grad if name == "grad" else poisoned.inputs[name])[:, :, 6:24] = math.nan
    dirty = poisoned.ours()
    others = [*range(6), *range(24, 28)]
    for key, wanted in clean.items():
        assert torch.equal(dirty[key][:, :, others], wanted[:, :, others]), key
    assert bool(dirty["query"][:, :, 6:24].isnan().any())


@pytest.mark.complete
def test_strides(device: str) -> None:
    given = problem(SHORT, device, heads=(2, 1))
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.inputs.items()}
    spread = {name: x.repeat_interleave(2, 3)[..., ::2] for name, x in given.inputs.items()}
    grad = given.grad.mT.contiguous().mT
    plainly = given.ours()
    for inputs in (turned, spread):
        other = given._replace(inputs=inputs, grad=grad).ours()
        assert all(torch.equal(other[name], plainly[name]) for name in plainly)
    assert plainly["output"].transpose(1, 2).is_contiguous()
    assert given._replace(inputs=turned).ours()["query"].transpose(1, 2).is_contiguous()


@pytest.mark.complete
def test_constructors(device: str) -> None:
    whole = problem(WHOLE, device)
    packed = problem(SHORT, device)
    padded = problem(PADDED, device)
    ends = torch.tensor([0, 5, 6, 6, 24, 28], device=device)
    for given, table in (
        (whole, SegmentTable.whole(2, 19, 19, device)),
        (packed, SegmentTable.from_cu_seqlens(ends, ends, 18, 23)),
        (padded, SegmentTable.from_lengths(torch.tensor([17, 0, 1], device=device), max_queries=20)),
    ):
        ours, same = given.ours(), given._replace(table=table).ours()
        assert all(torch.equal(ours[name], same[name]) for name in ours)


def test_without_gradients(device: str) -> None:
    given = problem(SHORT, device, causal=True, release=release((2, 1), device))
    recorded = given.ours()["output"]
    with torch.no_grad():
        assert torch.equal(flash_attention(**given.inputs, segments=given.table, **given.options), recorded)
    query, key, value = given.inputs.values()
    value = value.detach().requires_grad_()
    out = flash_attention(query, key, value, segments=given.table)
    (alone,) = torch.autograd.grad(out, value, given.grad)
    assert torch.equal(alone, given._replace(options={}).ours()["value"])


def test_logits_of_minus_infinity_give_zero(device: str) -> None:
    given = problem(WHOLE, device, heads=(1, 1))
    inputs = {**given.inputs, "query": given.inputs["query"].abs(), "key": given.inputs["key"].clone()}
    inputs["key"][0] = -math.inf
    out = flash_attention(**inputs, segments=given.table)
    assert not bool(out[0].any())
    assert bool(out[1].isfinite().all())
    torch.testing.assert_close(out.double(), reference.attention(**inputs), rtol=0, atol=1e-5)


def test_nothing_at_all(device: str) -> None:
    for shape in ((0, 3), (2, 0)):
        x = torch.randn(shape[0], 1, shape[1], 16, device=device, requires_grad=True)
        out = flash_attention(x, x, x, segments=SegmentTable.whole(*shape, shape[1], device))
        assert out.shape == x.shape
        out.sum().backward()


def test_what_is_refused(device: str) -> None:
    x = torch.randn(1, 2, 4, 16, device=device)
    table = SegmentTable.whole(1, 4, 4, device)
    wide = torch.randn(1, 2, 4, 257, device=device)
    private = release((2, 2), device)
    refused: tuple[tuple[tuple[Tensor, ...], dict[str, Any], type[Exception], str], ...] = (
        ((x[0], x, x), {}, ValueError, "query: expected 4 dimensions"),
        ((x, x[:, :0], x), {}, ValueError, "key: expected"),
        ((x, x, x[:, :, :3]), {}, ValueError, "value: expected"),
        ((x, x, x.half()), {}, ValueError, "value: expected torch.float32"),
        ((x.double(), x, x), {}, UnsupportedError, "float64"),
        ((wide, wide, wide), {}, UnsupportedError, "257"),
        ((x, x, x), {"window": 0}, ValueError, "window"),
        ((x, x, x), {"scale": -1.0}, ValueError, "scale"),
        ((x, x, x), {"softcap": 0.0}, ValueError, "softcap"),
        ((x, x, x), {"dropout": 1.0}, ValueError, "dropout: "),
        ((x, x, x), {"dropout": 0.1}, ValueError, "dropout_key"),
        ((x, x, x), {"dropout": 0.1, "release": private, "dropout_key": (1, 2)}, UnsupportedError, "release"),
        ((x, x, x), {"release": private._replace(key=(1, 2, 3))}, ValueError, "release.key"),
        ((x, x, x), {"release": private._replace(key=(1, 2**32))}, ValueError, "release.key"),
        ((x, x, x), {"release": private._replace(noise_std=torch.ones(1))}, ValueError, "release.noise_std"),
        ((x, x, x), {"sinks": torch.zeros(3)}, ValueError, "sinks"),
        ((x, x, x), {"segments": table._replace(row=table.row.long())}, ValueError, "segments.row"),
    )
    for (query, key, value), changed, error, message in refused:
        with pytest.raises(error, match=message):
            flash_attention(query, key, value, **{"segments": table, **changed})
