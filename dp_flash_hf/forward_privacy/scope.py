"""What the privatised places of one model share: whose rows a batch holds, what was released, what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dp_flash_hf.attention.function import NAMES
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.forward_privacy.calls import Calls, Way
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.fingerprint import fingerprint
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.kernels.counter_noise import normals

# Arguments of models that say where units and tokens lie, not what they hold.
STRUCTURE = frozenset(
    f"{side}{name}"
    for side in ("", "decoder_", "encoder_")
    for name in ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position", "inputs_mask")
)


class Given(NamedTuple):
    """What a place was given in one call."""

    place: str
    tensors: tuple[Tensor, ...]


class Scope:
    """What the sites of one model share. Copied and pickled with it.

    Args:
        root: The whole model.
        privacy: How calls are made private.
        places: Names of the privatised modules.
        ledger: Where releases are recorded.
        configs: Of the models whose attention implementation must stay ours.
    """

    def __init__(
        self,
        root: nn.Module,
        privacy: AttentionPrivacy,
        places: Collection[str],
        ledger: AttentionLedger,
        configs: list[PreTrainedConfig],
    ) -> None:
        self.root, self.privacy, self.places, self.ledger, self.configs = root, privacy, len(places), ledger, configs
        self._missing = set(places)  # that have not released yet
        self.calls = Calls()
        self._way: Way | None = None  # of the call under way
        self._generating = False
        self._rows: int | None = None  # of the batch that the outermost model was given; None if its inputs disagree
        self._depth = 0
        self._given: list[Given] | None = None  # what sites were given, while verify_cut runs

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of every model and the models in it."""
        if module is self.root:  # also after one that was interrupted
            self._depth = 0
        self._depth += 1
        if self._depth > 1:
            return
        arguments = arguments_of(module, args, kwargs)
        if not self._generating and not self.is_observed:
            self._way = self.way("forward" if module is self.root else f"forward of a {type(module).__name__}", arguments)
        for config in self.configs:
            if config._attn_implementation not in NAMES:
                raise PrivacyError(
                    f'the attention implementation became "{config._attn_implementation}", so that privatised attention would '
                    "not run; set it back, or call remove()"
                )
        sizes = {
            value.shape[0]
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.ndim > 1 and name not in STRUCTURE
        }
        self._rows = sizes.pop() if len(sizes) == 1 else None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the same, also after an error."""
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self._rows = None
            self._way = self._way if self._generating else None

    def way(self, method: str, arguments: Mapping[str, Any]) -> Way:
        """How the model, as it stands, is called by this method with these arguments."""
        return Way.of(method, arguments, fingerprint(self.root))

    @contextmanager
    def within(self, method: str, arguments: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Within the context, calls are part of one of this method; of the outer one, if there is one already."""
        if self._generating:
            yield
            return
        self._way, self._generating = self.way(method, arguments()), True
        try:
            yield
        finally:
            self._way, self._generating = None, False

    def check_released(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the whole model."""
        if self._missing and not self.is_observed:
            raise PrivacyError(
                f"privatised, but nothing was released there: {', '.join(sorted(self._missing))}; choose the layers that run"
            )

    def account(self, place: str, by_row: list[float], by_part: list[float] | None = None) -> None:
        """Record a release; the arguments as those of AttentionLedger.per_unit, in factors."""
        costs = self.per_unit(place, by_row, by_row if by_part is None else by_part)
        multiplier = self.privacy.multiplier(self.places)
        base = 1.0 if self.privacy.max_length is None else self.privacy.factor
        self.calls.record(self._way or Way("a privatised module called by itself", frozenset(), frozenset()))
        self.ledger.record(place, [factor / base / multiplier**2 for factor in costs])
        self._missing.discard(place)

    def per_unit(self, place: str, by_row: list[float], by_part: list[float]) -> list[float]:
        """What a call costs each unit in it; see AttentionLedger.per_unit."""
        verdict = None if self._way is None else self.calls.verdict(self._way)
        rows_are_units = self._rows == len(by_row) and (verdict is None or place not in verdict.whole)
        return self.ledger.per_unit(by_row, by_part, sum(by_row), rows_are_units=rows_are_units)

    @property
    def is_observed(self) -> bool:
        """Whether verify_cut runs, so that nothing is released."""
        return self._given is not None

    @contextmanager
    def observed(self) -> Iterator[list[Given]]:
        """Within the context, places release constants instead; gives what they were given, in order."""
        self._given = []
        try:
            yield self._given
        finally:
            self._given = None

    def constant(self, place: str, given: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        """Remember what a site was given, and answer by values that depend on the call's place only."""
        assert self._given is not None
        self._given.append(Given(place, given))
        values = normals((len(self._given), 0), (1, 1, 1, shape.numel()), given[-1].device, given[-1].dtype)
        return values[0, 0, 0].view(shape)

    def refuse_replaying(self) -> None:
        """Raise UnsupportedError where one release would be used several times."""
        if _is_replayed():
            raise UnsupportedError(
                "a privatised call while the model is traced, exported, captured or transformed by torch.func: what is made of "
                "it would add the same noise again and again, and no ledger would know; release with the model itself"
            )
        # A recomputed forward would draw other noise than the one whose loss is being differentiated.
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedError("a privatised call during the backward pass: switch gradient checkpointing off")


def _is_replayed() -> bool:
    """Whether what is computed now will serve for several releases."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return captured or transformed or bool(torch._C._is_tracing() or torch.compiler.is_exporting())


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
