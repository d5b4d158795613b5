"""Code that a compiler traces sees who sees whom as code that reads masks and positions does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.attention.masks import mark_made_here
from dp_flash_hf.errors import UnsupportedError
from tests.support.attention import B, H, S, assert_same, causal_mask, padding, run, tensors

RESTARTING = torch.tensor([[*range(5), *range(1), *range(S - 6)]])
LEFT_PADDED = torch.tensor([[1] * 3 + [*range(S - 3)]] * B)  # positions as Transformers counts them
TRACED: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {},
    "full": lambda: {"causal": False},
    "softcap and sinks": lambda: {"softcap": 1.3, "s_aux": torch.randn(H, dtype=torch.float64)},
    "bias": lambda: {"position_bias": torch.randn(1, H, S, S, dtype=torch.float64)},
    "window": lambda: {"sliding_window": 3},
    "padding": lambda: {"mask": padding([S, 4])},
    "padding, all visible": lambda: {"mask": padding([S, 4]), "causal": False},
    "4-D padding": lambda: {"mask": mark_made_here(causal_mask(S) & padding([S, 4])[:, None, None])},
    "4-D window": lambda: {"mask": mark_made_here(causal_mask(S, 3)[None, None], 3), "sliding_window": 3},
    "4-D window that a picture looks across": lambda: {
        "mask": mark_made_here((causal_mask(S, 3) | (torch.arange(S) < 5) & (torch.arange(S)[:, None] < 5))[None, None], 3),
        "sliding_window": 3,
    },
    "picked keys": lambda: {"indices": torch.arange(S).remainder(3).expand(B, S, S)[..., :2].contiguous()},
    "restarts": lambda: {"position_ids": RESTARTING},
    "restarts, all visible": lambda: {"position_ids": RESTARTING, "causal": False},
    "restarts in a window": lambda: {"position_ids": RESTARTING, "sliding_window": 3},
    "restarts that a mask crosses": lambda: {
        "position_ids": RESTARTING,
        "mask": mark_made_here(causal_mask(S)[None, None]),
    },
    "restarts that a padding mask crosses": lambda: {"position_ids": RESTARTING, "mask": padding([S, 4])},
    "restarts of padding on the left": lambda: {
        "position_ids": LEFT_PADDED,
        "mask": mark_made_here(causal_mask(S) & padding([S - 3] * B, "left")[:, None, None]),
    },
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRACED)
def test_traced_code_equals_what_is_read(name: str) -> None:
    torch._dynamo.reset()
    qkv, asked = tensors(), TRACED[name]()
    compiled: Any = torch.compile(run, backend="eager", fullgraph=True)
    trained = [*qkv, *(x.requires_grad_() for x in asked.values() if isinstance(x, Tensor) and x.is_floating_point())]
    assert_same(compiled(qkv, **asked), run(qkv, **asked), trained)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "asked",
    [
        {"cu_seq_lens_q": torch.tensor([0, 5, 6, S], dtype=torch.int32)},
        {"mask": causal_mask(S, 3)[None, None], "sliding_window": 3},
        {"mask": causal_mask(S)[None, None].double().log()},
        {"mask": mark_made_here(padding([S, 4])[:, None, None]), "position_ids": torch.arange(S)[None]},
    ],
    ids=["boundaries", "a window in a mask that was not made here", "a float mask", "a mask alike for all queries"],
)
def test_what_has_to_be_read_breaks_the_graph_and_counts(asked: dict[str, Any]) -> None:
    torch._dynamo.reset()
    rows = 1 if "cu_seq_lens_q" in asked else B
    qkv = tensors(batch=rows)
    assert_same(torch.compile(run, backend="eager")(qkv, **asked), run(qkv, **asked), qkv)


@pytest.mark.complete
def test_a_window_that_a_mask_ignores_is_refused_in_compiled_code_too() -> None:
    torch._dynamo.reset()
    for mask in (causal_mask(S)[None, None], mark_made_here(causal_mask(S)[None, None]), padding([S, 4])):
        with pytest.raises(UnsupportedError, match="that its attention mask ignores"):
            torch.compile(run, backend="aot_eager")(tensors(), mask, sliding_window=3)
