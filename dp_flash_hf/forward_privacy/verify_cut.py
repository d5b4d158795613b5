"""`verify_cut`: whether noise lies on every way from what is private to what is released or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.errors import PrivacyError, invalid
from dp_flash_hf.forward_privacy.calls import Verdict
from dp_flash_hf.forward_privacy.generation import refuse_reading, settings_of
from dp_flash_hf.forward_privacy.privatize import Privatized
from dp_flash_hf.forward_privacy.scope import STRUCTURE, Given
from dp_flash_hf.forward_privacy.trial import LOGITS, Call, Run, Trial
from dp_flash_hf.kernels.counter_noise import normals

_ROUNDING = 1024  # units in the last place that a row may differ by because another one changed: sums are reordered
_AT_MOST = 1 / 16  # of the largest value: in half precision, which computes with more, that many units would hide everything


def verify_cut(
    privatized: Privatized,
    inputs: Mapping[str, Any],
    *,
    private: Sequence[str] | None = None,
    released: Sequence[str] | None = None,
    special_ids: Sequence[int] = (),
    replacements: int = 3,
    call: Call = "forward",
) -> None:
    """Check on a real batch that the privatised places cut everything released, and trained, off from what is private.

    Each privatised output is replaced by values that depend on nothing. Then

    - no released output may change when the private entries are replaced by others of the same lengths (bit for bit,
      `replacements` times), nor be reachable by autograd from where they enter;
    - no trainable parameter may lie before a privatised place that is given anything private, because its gradient is computed
      from that without noise, nor may its gradient change with the private entries in another way;
    - what a place is given of one row may not depend on another row;
    - with unit="token", replacing one token may change what the place is given in that token's place only.

    With ``call="generate"`` the same is checked of a whole generation, prompts left out, and of the logits of each of its
    passes, in which tokens hide little; and every setting that is not known to read no private ids is refused by name: logits
    processors and stopping criteria of one's own, streamers, assistants, and what bans or rewards tokens of a private text
    (``no_repeat_ngram_size``, ``repetition_penalty``; ``encoder_...``; see `generation.refuse_reading`).

    The model runs as it stands, in training or in evaluation mode, always from the same torch seed; nothing is released. The
    verdict holds for the model in this state (`fingerprint.fingerprint`) called with these arguments: the same tensors, by
    name, and equal options. There may be several verdicts; `Privatized.report` wants one on every way in which something was
    released.

    What it proves: with these inputs, in this mode, nothing released and no gradient depends on the private entries but through
    the noise. What it cannot prove: a way around that is taken only by other inputs, or at another length, is not seen, and
    neither is one outside the model (a loss that reads the private text, a log). Give it a batch like those that will come.

    Args:
        privatized: What `privatize` returned.
        inputs: Keyword arguments of the call, as it will be made; a real batch. After one of one row, calls with several
            count as one unit, because nothing shows that rows do not mix.
        private: Names of the entries that the guarantee protects. Default: every tensor but masks and positions. So where
            `labels` or `decoder_input_ids` are public, say ``private=("input_ids",)``.
        released: Names of the entries of the model's output that will leave it, or that a loss to train on is made of; "0",
            "1", ... of a tuple. Default: all, with losses, caches and an encoder's states.
        special_ids: Token ids that every text has in the same places, such as a classification token; with those that the
            model's config names, they stay where they are, and where they are is public.
        replacements: How many other private inputs are tried.
        call: "forward", or "generate": then `inputs` are arguments of ``model.generate``, options too. How many tokens are
            generated, and settings such as ``temperature`` that read no ids, may be others later.

    Raises:
        PrivacyError: It is not a cut, with what leaks and why. The handle then gives no report.
        ValueError: Names that are not there, or nothing private.
    """
    validation.one_of("call", call, get_args(Call))
    scope = privatized.scope
    arguments = dict(inputs) if call == "forward" else settings_of(privatized.model, (), inputs)
    scope.calls.verify(scope.way(call, arguments), None)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    private = tuple(name for name in tensors if name not in STRUCTURE) if private is None else tuple(private)
    if not private or not set(private) <= tensors.keys():
        raise invalid("private", expected=f"some of {', '.join(tensors)}", actual=private, remedy="name what is protected")
    if call == "generate":
        refuse_reading(privatized.model, arguments, private)
    trial = Trial(privatized, dict(inputs), private, released, special_ids, call)
    first = trial.run(inputs)
    missed = set(privatized.places) - {place for place, _ in first.seen}
    if missed:
        raise PrivacyError(f"privatised, but never called: {', '.join(sorted(missed))}; choose the layers that run")
    generator = torch.Generator().manual_seed(0)
    others = [trial.run_like(first, trial.replaced(generator)) for _ in range(replacements)]
    for other in others:
        leaks = [name for name, value in first.outputs.items() if not _equal(value, other.outputs.get(name))]
        if leaks or other.outputs.keys() != first.outputs.keys():
            raise PrivacyError(
                f"not a cut: with the privatised outputs held constant, {', '.join(leaks) or 'what is returned'} still depends "
                f"on {', '.join(private)}. {_REMEDY[privatized.placement]}"
            )
    facing = {i for other in others for i, call in enumerate(first.seen) if not _same_call(call, other.seen[i])}
    if not facing:
        raise PrivacyError(f"nothing that the privatised places are given depends on {', '.join(private)}; is that private?")
    _check_gradients(trial, first, others)
    if call == "forward":  # nothing is trained through generate
        _check_trained(trial, facing, generator)
    whole = _check_rows(trial, first, generator)
    if privatized.privacy.unit == "token":
        _check_tokens(trial, first, generator)
    found = dict.fromkeys(name.partition(".")[0] for name in first.outputs if not name.startswith(LOGITS))
    public = tuple(name for name in tensors if name not in private)
    scope.calls.verify(scope.way(call, arguments), Verdict(private, public, tuple(found), whole))


_REMEDY = {
    "attention": "Around attention, the residual stream carries the input: choose cross-attention (layers='cross'), or "
    "placement='residual'; or release less (released=...), without caches and an encoder's states (use_cache=False)",
    "residual": "Choose a block behind which nothing comes from before it; or release less (released=...), without caches and "
    "hidden states (use_cache=False)",
}


def _check_gradients(trial: Trial, first: Run, others: list[Run]) -> None:
    """Raise PrivacyError if autograd leads from where private inputs enter to an output.

    A gradient that is zero throughout leads nowhere: where only a classification token is read, the others are computed
    beside it.
    """
    probes: list[Tensor] = []
    private: list[Tensor] = []  # of each probe, where what enters is not the same in all runs

    def probe(i: int, output: Tensor) -> Tensor:
        ids = first.looked_up[i]
        differs = torch.stack([ids != run.looked_up[i] for run in others]).any(0)
        if not differs.any() or output.shape[: ids.ndim] != ids.shape:
            return output
        probes.append(torch.zeros_like(output, requires_grad=True))
        private.append(differs)
        return output + probes[-1]

    inputs = dict(trial.inputs)
    for name in trial.private:
        if inputs[name].is_floating_point():
            inputs[name] = inputs[name].detach().clone().requires_grad_()
            probes.append(inputs[name])
            private.append(torch.ones(inputs[name].shape, dtype=torch.bool, device=inputs[name].device))
    run = trial.run(inputs, probe)
    for name, value in run.outputs.items():
        ways = zip(_gradients(value, probes), private, strict=True)
        if any(gradient is not None and bool((gradient[where] != 0).any()) for gradient, where in ways):
            raise PrivacyError(f"not a cut: {name} is computed from {', '.join(trial.private)} around the privatised places")


def _check_trained(trial: Trial, facing: set[int], generator: torch.Generator) -> None:
    """Raise PrivacyError if the gradient of a trained parameter is computed from private inputs without noise.

    That is so before a place, and on a way around the places that a parameter closes as yet, such as a gate that is zero.
    """
    run = trial.run(trial.inputs, lambda _, output: output)
    trained = {name: p for name, p in trial.model.named_parameters() if p.requires_grad}
    before = [_gradients(x, list(trained.values())) for i in facing for x in run.seen[i][1]]
    found = (any(gradient is not None for gradient in ways) for ways in zip(*before, strict=True))
    unsafe = [name for name, reached in zip(trained, found, strict=True) if reached]
    if unsafe:
        shown = ", ".join(unsafe[:8]) + (f" and {len(unsafe) - 8} more" if len(unsafe) > 8 else "")
        raise PrivacyError(
            f"trained before the noise: {shown}. Their gradients are computed from private inputs without noise; freeze "
            "them (requires_grad_(False)), a weight that the output layer shares too"
        )
    other = trial.run(trial.replaced(generator), lambda _, output: output)
    parameters: list[Tensor] = list(trained.values())
    for name, value in run.outputs.items():
        pairs = zip(trained, _gradients(value, parameters), _gradients(other.outputs[name], parameters), strict=True)
        around = [path for path, a, b in pairs if a is not None and (b is None or not _close(a, b, 8))]
        if around:
            raise PrivacyError(
                f"trained around the noise: the gradient that {name} gives {', '.join(around[:8])} depends on "
                f"{', '.join(trial.private)}; freeze it (requires_grad_(False))"
            )


def _check_rows(trial: Trial, first: Run, generator: torch.Generator) -> frozenset[str]:
    """The places whose calls count as one unit; PrivacyError if what a place is given of one row depends on another row.

    Of a place that has other rows than the batch (the sequence comes first, chunks), every call counts as one unit; and of
    all places, where the batch is one row, which shows nothing.
    """
    rows = {len(trial.inputs[name]) for name in trial.private}
    if len(rows) != 1:
        return frozenset()
    n_rows = rows.pop()
    whole = frozenset(place for place, given in first.seen if n_rows == 1 or any(len(x) != n_rows for x in given))
    if n_rows == 1:
        return whole
    for row in (0, n_rows - 1):
        run = trial.run_like(first, trial.replaced(generator, row))
        kept = [i for i in range(n_rows) if i != row]
        for (place, given), (_, moved) in zip(first.seen, run.seen, strict=True):
            for x, y in zip(given, moved, strict=True):
                if len(x) == n_rows and not _close(x[kept], y[kept]):
                    raise PrivacyError(
                        f"what {place} is given of one row depends on other rows, so a unit moves more than its own; "
                        "look for batch normalisation, or routing with a capacity, before it"
                    )
    return whole


def _check_tokens(trial: Trial, first: Run, generator: torch.Generator) -> None:
    """Raise PrivacyError if a token changes what the place is given anywhere but in its own place."""
    for _ in range(4):
        other = trial.replaced(generator, 0)
        changed = {name: (other[name][0] != trial.inputs[name][0]).flatten().nonzero().flatten() for name in trial.private}
        for name, positions in changed.items():
            one = trial.inputs[name].clone()
            if len(positions):
                at = positions[int(torch.randint(len(positions), (), generator=generator))]
                one[0].view(-1)[at] = other[name][0].reshape(-1)[at]
            run = trial.run_like(first, {**trial.inputs, name: one})
            for (place, given), (_, moved) in zip(first.seen, run.seen, strict=True):
                touched = {
                    int(i)
                    for x, y in zip(given, moved, strict=True)
                    for i in (~torch.isclose(x, y, rtol=0, atol=_slack(x))).any(3).any(1).nonzero()[:, 1]
                }
                if len(touched) > 1:
                    raise PrivacyError(
                        f"one token of {name} changes what {place} is given in {len(touched)} places: it is not given "
                        'embeddings alone, so its noise protects no token; use unit="sequence"'
                    )


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _same_call(a: Given, b: Given) -> bool:
    return all(_equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def _slack(x: Tensor, rounding: int = _ROUNDING) -> float:
    return min(rounding * torch.finfo(x.dtype).eps, _AT_MOST) * float(x.abs().max())


def _close(a: Tensor, b: Tensor, rounding: int = _ROUNDING) -> bool:
    return torch.allclose(a, b, rtol=0, atol=_slack(a, rounding))


def _gradients(value: Tensor, sources: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a random projection of `value`; None where autograd does not lead to a source."""
    if not sources or not value.requires_grad:
        return [None] * len(sources)
    direction = normals((0, 0), (1, 1, 1, value.numel()), value.device, value.dtype).view_as(value)
    return torch.autograd.grad(value, sources, direction, retain_graph=True, allow_unused=True)
