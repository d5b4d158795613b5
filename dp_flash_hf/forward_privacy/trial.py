"""Runs of a privatised model in which its places release constants, so that whatever still changes has gone around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dp_flash_hf.errors import PrivacyError, invalid
from dp_flash_hf.forward_privacy.generation import generator_of
from dp_flash_hf.forward_privacy.privatize import Privatized
from dp_flash_hf.forward_privacy.scope import Given

Call = Literal["forward", "generate"]
LOGITS = "logits of pass "  # and its number, of a generation: checked, and not among what is returned


class Run(NamedTuple):
    """One forward with constants in place of the privatised outputs."""

    outputs: dict[str, Tensor]  # what is released, by path
    seen: list[Given]  # what places were given, in order
    looked_up: list[Tensor]  # what embeddings were given, in order

    def shapes(self) -> list[Any]:
        """Which calls were made, and the shapes of their tensors."""
        return [(place, [x.shape for x in given]) for place, given in (*self.seen, ("", self.looked_up))]


class Trial:
    """Runs of the model while its privatised places release constants, with the inputs that were given or with others."""

    def __init__(
        self,
        privatized: Privatized,
        inputs: dict[str, Any],
        private: tuple[str, ...],
        released: Sequence[str] | None,
        special_ids: Sequence[int],
        call: Call,
    ) -> None:
        self.model, self.scope, self.call = privatized.model, privatized.scope, call
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

    def run(self, inputs: Mapping[str, Any], probe: Callable[[int, Tensor], Tensor] | None = None) -> Run:
        """One forward, or all of one generation, always from the same torch seed.

        probe: `probe(i, output)` replaces the output of the i-th embedding that is looked up; with it, gradients flow.
        """
        looked_up: list[Tensor] = []

        def look_up(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not isinstance(args[0], Tensor):  # a length, from which positions are made
                return None
            looked_up.append(args[0].detach().clone())
            return None if probe is None else probe(len(looked_up) - 1, output)

        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
            stack.enter_context(torch.set_grad_enabled(probe is not None))
            seen = stack.enter_context(self.scope.observed())
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(look_up).remove)
            if self.call == "forward":
                return Run(dict(self._released(self.model(**inputs))), seen, looked_up)
            chosen_from: list[Tensor] = []
            generator: Any = generator_of(self.model)
            stack.callback(generator.register_forward_hook(lambda _, args, output: chosen_from.append(output.logits)).remove)
            model: Any = self.model
            released = dict(self._released(self._continuation(model.generate(**inputs))))
        # Tokens hide what hardly moves the logits that they are chosen from.
        return Run({**released, **{f"{LOGITS}{i + 1}": x for i, x in enumerate(chosen_from)}}, seen, looked_up)

    def _continuation(self, output: Any) -> dict[str, Any]:
        """What `generate` returned, without the prompt that it repeats."""
        entries = dict(output) if isinstance(output, Mapping) else {"sequences": output}
        generator: Any = generator_of(self.model)
        prompt = self.inputs.get("input_ids", self.inputs.get("inputs"))
        if prompt is not None and not generator.config.is_encoder_decoder:
            entries["sequences"] = entries["sequences"][:, prompt.shape[1] :]
        return entries

    def run_like(self, first: Run, inputs: Mapping[str, Any]) -> Run:
        """`run` without a probe; raises PrivacyError if other calls are made than in `first`."""
        run = self.run(inputs)
        if run.shapes() != first.shapes():
            raise PrivacyError("which calls the model makes depends on what is private, not on its lengths alone")
        return run

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
