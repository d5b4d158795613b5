"""forward_privacy.verify_cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dp_flash_hf.errors import PrivacyError, invalid
from dp_flash_hf.forward_privacy.privatize import Privatized, _Verified
from dp_flash_hf.forward_privacy.sites import STRUCTURE
from dp_flash_hf.kernels.counter_noise import normals

_ROUNDING = 1024  # units in the last place that a row may differ by because another one changed: sums are reordered


# --- whether it is a cut --------------------------------------------------------------------------------------------------


def verify_cut(
    privatized: Privatized,
    inputs: Mapping[str, Any],
    *,
    private: Sequence[str] | None = None,
    released: Sequence[str] | None = None,
    special_ids: Sequence[int] = (),
    replacements: int = 3,
) -> None:
    """Check on a real batch that the privatised places cut everything released, and trained, off from what is private.

    Each privatised output is replaced by numbers that depend on nothing. Then: no released output may change when the private
    entries are replaced by others of the same lengths (bit for bit, `replacements` times), nor be reachable by autograd from
    where they enter; no trainable parameter may lie before a privatised place that is given anything private, because its
    gradient is computed from that without noise; what a place is given of one row may not depend on another row; and with
    unit="token", replacing one token may change what the place is given in that token's place only. The model runs as it
    stands, in training or in evaluation mode, always from the same torch seed.

    What passes is what was tried: a way around that is taken only by other inputs, or at another length, is not seen.

    Args:
        privatized: what `privatize` returned.
        inputs: keyword arguments of the model, as it will be called; a real batch. After one of one row, calls with several
            count as one unit, because nothing shows that rows do not mix.
        private: names of the entries that the guarantee protects. Default: every tensor but masks and positions. So where
            `labels` or `decoder_input_ids` are public, say private=("input_ids",).
        released: names of the entries of the model's output that will leave it, or that a loss to train on is made of; "0",
            "1", ... of a tuple. Default: all, with losses, caches and an encoder's states.
        special_ids: token ids that every text has in the same places, such as a classification token; with those that the
            model's config names, they stay where they are, and where they are is public.
        replacements: how many other private inputs are tried.

    Raises:
        PrivacyError: it is not a cut, with what leaks and why. The handle then gives no report.
        ValueError: names that are not there, or nothing private.
    """
    privatized._verified = None
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    private = tuple(name for name in tensors if name not in STRUCTURE) if private is None else tuple(private)
    if not private or not set(private) <= tensors.keys():
        raise invalid("private", expected=f"some of {', '.join(tensors)}", actual=private, remedy="name what is protected")
    trial = _Trial(privatized, dict(inputs), private, released, special_ids)
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
    trial.check_gradients(first, others, facing)
    trial.check_rows(first, generator)
    if privatized.privacy.unit == "token":
        trial.check_tokens(first, generator)
    names = tuple(dict.fromkeys(name.partition(".")[0] for name in first.outputs)) if released is None else tuple(released)
    public = tuple(name for name in tensors if name not in private)
    privatized._verified = _Verified(privatized._state(), private, public, names)


_REMEDY = {
    "attention": "Around attention, the residual stream carries the input: choose cross-attention (layers='cross'), or "
    "placement='residual'; or release less (released=...), without caches and an encoder's states (use_cache=False)",
    "residual": "Choose a block behind which nothing comes from before it; or release less (released=...), without caches and "
    "hidden states (use_cache=False)",
}


class _Run(NamedTuple):
    """One forward with constants in place of the privatised outputs."""

    outputs: dict[str, Tensor]  # what is released, by path
    seen: list[tuple[str, tuple[Tensor, ...]]]  # (place, what it was given), in order
    looked_up: list[Tensor]  # what embeddings were given, in order

    def shapes(self) -> list[Any]:
        return [(place, [x.shape for x in given]) for place, given in (*self.seen, ("", self.looked_up))]


class _Trial:
    """Runs of the model under verify_cut."""

    def __init__(
        self,
        privatized: Privatized,
        inputs: dict[str, Any],
        private: tuple[str, ...],
        released: Sequence[str] | None,
        special_ids: Sequence[int],
    ) -> None:
        self.model, self.scope = privatized.model, privatized._scope
        self.inputs, self.private, self.released = inputs, private, released
        numbers = {
            entry
            for part in self.model.modules()
            if isinstance(part, PreTrainedModel)
            for entry in _whole_numbers(part.config.to_dict())
        }
        special = sorted({*special_ids, *(number for name, number in numbers if re.search(r"_token_(id|index)s?$", name))})
        words = set(range(min((n for name, n in numbers if name == "vocab_size"), default=0))) - set(special)
        self.special, self.words = torch.tensor(special, dtype=torch.long), torch.tensor(sorted(words), dtype=torch.long)

    def run(self, inputs: Mapping[str, Any], probe: Callable[[int, Tensor], Tensor] | None = None) -> _Run:
        """`probe(i, output)` replaces the output of the i-th embedding that is looked up."""
        looked_up: list[Tensor] = []

        def look_up(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not isinstance(args[0], Tensor):  # a length, of which positions are made
                return None
            looked_up.append(args[0].detach().clone())
            return None if probe is None else probe(len(looked_up) - 1, output)

        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
            stack.enter_context(torch.set_grad_enabled(probe is not None))
            seen = stack.enter_context(self._constants())
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(look_up).remove)
            output = self.model(**inputs)
        return _Run(dict(self._released(output)), seen, looked_up)

    def run_like(self, first: _Run, inputs: Mapping[str, Any]) -> _Run:
        """`run`; raises PrivacyError if other calls are made than in `first`."""
        run = self.run(inputs)
        if run.shapes() != first.shapes():
            raise PrivacyError("which calls the model makes depends on what is private, not on its lengths alone")
        return run

    @contextmanager
    def _constants(self) -> Iterator[list[tuple[str, tuple[Tensor, ...]]]]:
        self.scope.seen = []
        try:
            yield self.scope.seen
        finally:
            self.scope.seen = None

    def _released(self, output: Any) -> Iterator[tuple[str, Tensor]]:
        entries: dict[str, Any]
        if isinstance(output, Tensor):
            entries = {"output": output}
        elif isinstance(output, Mapping):
            entries = dict(output)
        else:
            entries = {str(i): entry for i, entry in enumerate(output)}
        names = list(entries) if self.released is None else list(self.released)
        missing = set(names) - entries.keys()
        if missing or not names:
            raise invalid("released", expected=f"some of {', '.join(entries)}", actual=names, remedy="name what is returned")
        for name in names:
            yield from _tensors(name, entries[name], set())

    def replaced(self, generator: torch.Generator, row: int | None = None) -> dict[str, Any]:
        """The inputs with other private ones, of the same lengths: of all rows, or of one."""
        inputs = dict(self.inputs)
        for name in self.private:
            old = inputs[name]
            new = self._other(name, old, generator)
            if row is not None:
                new = torch.cat([old[:row], new[row : row + 1], old[row + 1 :]])
            inputs[name] = new
        if all(torch.equal(inputs[name], self.inputs[name]) for name in self.private):
            raise invalid("inputs", expected="private entries that can be replaced", actual=self.private, remedy="give text")
        return inputs

    def _other(self, name: str, old: Tensor, generator: torch.Generator) -> Tensor:
        if old.is_floating_point():
            spread = old.std() if old.numel() > 1 else 1
            return (torch.randn(old.shape, generator=generator).to(old) * spread + old.mean()).detach()
        if len(self.words) and (name.endswith("input_ids") or name == "inputs"):
            new = self.words[torch.randint(len(self.words), old.shape, generator=generator)].to(old)
            structure = torch.isin(old, self.special.to(old))  # padding, ends, placeholders of images
            return torch.where(structure, old, new)
        return old.flatten()[torch.randperm(old.numel(), generator=generator).to(old.device)].view_as(old)

    def check_gradients(self, first: _Run, others: list[_Run], facing: set[int]) -> None:
        """Raise PrivacyError if autograd leads from where private inputs enter to an output, or to a trained parameter.

        To an output, a gradient that is zero throughout leads nowhere: where only a classification token is read, the others
        are computed beside it. To parameters, any way counts.
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

        inputs = dict(self.inputs)
        for name in self.private:
            if inputs[name].is_floating_point():
                inputs[name] = inputs[name].detach().clone().requires_grad_()
                probes.append(inputs[name])
                private.append(torch.ones(inputs[name].shape, dtype=torch.bool, device=inputs[name].device))
        run = self.run(inputs, probe)
        for name, value in run.outputs.items():
            ways = zip(_gradients(value, probes), private, strict=True)
            if any(gradient is not None and bool((gradient[where] != 0).any()) for gradient, where in ways):
                raise PrivacyError(f"not a cut: {name} is computed from {', '.join(self.private)} around the privatised places")
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        before = [_gradients(x, list(trained.values())) for i in facing for x in run.seen[i][1]]
        found = (any(gradient is not None for gradient in ways) for ways in zip(*before, strict=True))
        unsafe = [name for name, reached in zip(trained, found, strict=True) if reached]
        if unsafe:
            shown = ", ".join(unsafe[:8]) + (f" and {len(unsafe) - 8} more" if len(unsafe) > 8 else "")
            raise PrivacyError(
                f"trained before the noise: {shown}. Their gradients are computed from private inputs without noise; freeze "
                "them (requires_grad_(False)), a weight that the output layer shares too"
            )

    def check_rows(self, first: _Run, generator: torch.Generator) -> None:
        """Raise PrivacyError if what a place is given of one row depends on another row.

        Of a place that has other rows than the batch (the sequence comes first, chunks), every call counts as one unit; and of
        all places, where the batch is one row, which shows nothing.
        """
        rows = {len(self.inputs[name]) for name in self.private}
        if len(rows) != 1:
            return
        n_rows = rows.pop()
        self.scope.whole = frozenset(
            place for place, given in first.seen if n_rows == 1 or any(len(x) != n_rows for x in given)
        )
        if n_rows == 1:
            return
        for row in (0, n_rows - 1):
            run = self.run_like(first, self.replaced(generator, row))
            kept = [i for i in range(n_rows) if i != row]
            for (place, given), (_, moved) in zip(first.seen, run.seen, strict=True):
                for x, y in zip(given, moved, strict=True):
                    if len(x) == n_rows and not _close(x[kept], y[kept]):
                        raise PrivacyError(
                            f"what {place} is given of one row depends on other rows, so a unit moves more than its own; "
                            "look for batch normalisation, or routing with a capacity, before it"
                        )

    def check_tokens(self, first: _Run, generator: torch.Generator) -> None:
        """Raise PrivacyError if a token changes what the place is given anywhere but in its own place."""
        for _ in range(4):
            other = self.replaced(generator, 0)
            changed = {name: (other[name][0] != self.inputs[name][0]).flatten().nonzero().flatten() for name in self.private}
            for name, positions in changed.items():
                one = self.inputs[name].clone()
                if len(positions):
                    at = positions[int(torch.randint(len(positions), (), generator=generator))]
                    one[0].view(-1)[at] = other[name][0].reshape(-1)[at]
                run = self.run_like(first, {**self.inputs, name: one})
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


def _whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, number) for the whole numbers of a config, at any depth."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _whole_numbers(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int):
                yield name, number


def _tensors(path: str, value: Any, known: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value: in containers, and in the attributes of caches and the like."""
    if isinstance(value, Tensor):
        yield path, value
    elif value is None or isinstance(value, str | int | float | torch.dtype | torch.device | type) or id(value) in known:
        return
    else:
        known.add(id(value))
        if isinstance(value, Mapping):
            items: Any = value.items()
        elif isinstance(value, Sequence | set):
            items = enumerate(value)
        else:
            items = getattr(value, "__dict__", {}).items()
        for name, inner in items:
            yield from _tensors(f"{path}.{name}", inner, known)


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _same_call(a: tuple[str, tuple[Tensor, ...]], b: tuple[str, tuple[Tensor, ...]]) -> bool:
    return all(_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def _slack(x: Tensor) -> float:
    return _ROUNDING * torch.finfo(x.dtype).eps * float(x.abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=_slack(a))


def _gradients(value: Tensor, sources: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a random projection of `value`; None where autograd does not lead to a source."""
    if not sources or not value.requires_grad:
        return [None] * len(sources)
    direction = normals((0, 0), (1, 1, 1, value.numel()), value.device, value.dtype).view_as(value)
    return torch.autograd.grad(value, sources, direction, retain_graph=True, allow_unused=True)
