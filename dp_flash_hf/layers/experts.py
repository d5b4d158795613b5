"""Mixtures of experts whose weights are stacked (experts, out, in), as Transformers' `ExpertsInterface` dispatches them.

Which rows an expert sees follows the data, so no operation in it has a layout of its own; but whose row each is follows from
the layout of the layer's input.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.layers.chain import once, record
from dp_flash_hf.layers.recorder import recorder_of
from dp_flash_hf.layers.tracking import Tracked
from dp_flash_hf.layers.unit_layout import Layout


class Routes(NamedTuple):
    """Rows sorted by expert, and for each expert by unit, those without a unit last.

    tokens: (rows,) the token that each row is. slots: (rows,) which of its experts (0..k-1) the row is for. units: (rows,)
    the row's unit, n where it has none. ends: (experts + 1) rows before each expert's last, 0 first.
    """

    tokens: Tensor
    slots: Tensor
    units: Tensor
    ends: list[int]


def routes(index: Tensor, layout: Layout, n_experts: int) -> Routes:
    """index: (tokens, k) the experts of each token; choices of `n_experts` and above are nothing to compute."""
    device = index.device
    of_token = layout.unit_of_row.to(device)
    of_token = torch.where(of_token < 0, layout.units.n, of_token)
    experts, units = index.flatten(), of_token.repeat_interleave(index.shape[1])
    order = torch.argsort(experts * (layout.units.n + 1) + units, stable=True)
    order = order[: int((experts < n_experts).sum())]
    counts = torch.bincount(experts[order], minlength=n_experts)
    tokens, slots = order // index.shape[1], order % index.shape[1]
    return Routes(tokens, slots, units[order], [0, *counts.cumsum(0).tolist()])


class RecordedExperts(torch.autograd.Function):
    """y_t = x_t W_e^T + b_e for the rows t of each expert e, whose backward records the gradients of W and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, swapped: bool, tracked: Any, layout: Layout, route: Routes
    ) -> Tensor:
        """x: (rows, d), sorted by expert. weight: (experts, p, d), (experts, d, p) where swapped. bias: (experts, p)."""
        ctx.save_for_backward(x, weight)
        ctx.swapped, ctx.tracked, ctx.layout, ctx.route = swapped, tracked, layout, route
        pieces = [
            F.linear(x[a:b], weight[e].mT if swapped else weight[e], None if bias is None else bias[e])
            for e, (a, b) in enumerate(pairwise(route.ends))
        ]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: (rows, p)."""
        once(ctx)
        x, weight = ctx.saved_tensors
        w, b = ctx.tracked
        route, n = ctx.route, ctx.layout.units.n
        spans = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(route.ends)) if stop > start]
        if w is not None:
            for e, start, stop in spans:
                sizes = torch.bincount(route.units[start:stop], minlength=n + 1)[:n].tolist()
                owned = slice(start, start + sum(sizes))
                inputs, outputs = (g[owned], x[owned]) if ctx.swapped else (x[owned], g[owned])
                w.recorder.linear_rows(w.plain, inputs, outputs, tuple(sizes), (e, e + 1))
        if b is not None:
            sums = torch.zeros((n + 1) * len(weight), g.shape[1], dtype=upcast(g).dtype, device=g.device)
            counts = torch.tensor(route.ends, device=g.device).diff()
            experts = torch.repeat_interleave(torch.arange(len(weight), device=g.device), counts)
            sums.index_add_(0, route.units * len(weight) + experts, upcast(g))
            record(b, sums.view(n + 1, len(weight), -1)[:n])
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        back = torch.empty_like(x)
        for e, start, stop in spans:
            matrix = weight[e].to(g.dtype)
            back[start:stop] = g[start:stop] @ (matrix.mT if ctx.swapped else matrix)
        return (back, *(None,) * 6)


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers' decorator for experts made this layer's class, and no norm follows each expert."""
    marks = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    return all(hasattr(module, mark) for mark in marks) and not getattr(module, "has_post_expert_norm", False)


class Experts:
    """Rule for such layers. Input: tokens (N, d), their experts (N, k), and the weights of these (N, k)."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # noqa: D102
        recorder = recorder_of(self)
        trained = [getattr(self, name) for name, p in self.named_parameters(recurse=False) if p.requires_grad]
        elsewhere = getattr(self, "_is_expert_parallel", True)  # versions before it do not say whether ranks share the experts
        if not trained or not all(isinstance(p, Tracked) for p in trained) or elsewhere:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc, no-any-return]
        layout = recorder.layout(self, hidden_states)
        if layout is None and recorder.phase == "learn":
            layout = Layout.of_one_unit(tuple(hidden_states.shape[:1]))  # computes the same, and records nothing
        if layout is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc, no-any-return]
        route = routes(top_k_index, layout, self.num_experts)
        rows = self._project("gate_up_proj" if self.has_gate else "up_proj", hidden_states[route.tokens], layout, route)
        rows = self._project("down_proj", self._apply_gate(rows) if self.has_gate else self.act_fn(rows), layout, route)
        rows = rows * top_k_weights[route.tokens, route.slots].unsqueeze(-1)
        out = torch.zeros(hidden_states.shape, dtype=rows.dtype, device=rows.device).index_add(0, route.tokens, rows)
        return out.to(hidden_states.dtype)

    def _project(self: Any, name: str, x: Tensor, layout: Layout, route: Routes) -> Tensor:
        given = [getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None]
        tracked = [t if isinstance(t, Tracked) else None for t in given]
        plain = [t.plain if isinstance(t, Tracked) else t for t in given]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, plain = x.to(dtype), [None if t is None else t.to(dtype) for t in plain]
        return RecordedExperts.apply(x, *plain, self.is_transposed, tracked, layout, route)  # type: ignore[no-any-return, no-untyped-call]
