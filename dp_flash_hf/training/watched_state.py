"""What only released gradients may change: a model's weights and buffers, compared by value from step to step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from dp_flash_hf.distributed import checksum, local
from dp_flash_hf.errors import PrivacyError, invalid

REMEDY = (
    "what is trained may not change during training. Stop (control.should_training_stop = True), change requires_grad, then "
    "dp.detach(), dp.attach(trainer) and trainer.train() again; in a loop of your own private.stop() and make_private(...) "
    "with the same spend_log. What was spent goes on counting"
)


class WatchedState:
    """All parameters and buffers of a model, but those that are public whatever happens.

    Private data could get into what is saved without noise: an average of weights or activations kept in a buffer or a frozen
    parameter, a count, or weights that a callback changes by what it saw. So values, and not versions, which `.data` passes
    by, are compared at every release. Cost: a checksum of each tensor once a step, of trained ones twice; no copy is
    kept; the device is waited for once. Values that change places show too: see `checksum`.

    Args:
        model: whose state it is.
        trained: its trained parameters, which change in `optimizer.step()` and nowhere else.
        public: names of buffers and frozen parameters that may change, for what they hold comes from no private data, but
            through weights that were released.

    Raises:
        ValueError: a public name is none of a buffer or frozen parameter.
    """

    def __init__(self, model: nn.Module, trained: Mapping[nn.Parameter, str], public: Collection[str] = ()) -> None:
        self._model, self._trained, self._public = model, trained, frozenset(public)
        unknown = sorted(self._public - self._others(everything=True).keys())
        if unknown:
            raise invalid(
                "public_state",
                expected="names of buffers and frozen parameters, as model.named_buffers() and named_parameters() give them",
                actual=unknown,
                remedy="take the names from there",
            )
        self._weights: dict[str, Tensor] | None = None
        self._rest: dict[str, Tensor] | None = None

    def begin(self) -> None:
        """Values may be others from now on, until `note` or `require_unchanged`: a checkpoint is loaded."""
        self._weights = self._rest = None

    def note(self, *, again: bool = False) -> None:
        """What there is now is what has to be there at the next release.

        Args:
            again: weights too that were noted already, for an optimizer that changes them between steps.
        """
        if self._weights is None or again:
            self.stepped()
        if self._rest is None:
            self._rest = checksums(self._others().items())

    def stepped(self) -> None:
        """The optimizer changed the weights."""
        self._weights = checksums((name, p) for p, name in self._trained.items())

    def require_unchanged(self) -> None:
        """Raise PrivacyError unless everything is as noted, and the same parameters are trained; note it if nothing is yet."""
        now = {p: name for name, p in self._model.named_parameters() if p.requires_grad}
        if now.keys() != self._trained.keys():
            frozen = [name for p, name in self._trained.items() if p not in now]
            added = [name for p, name in now.items() if p not in self._trained]
            raise PrivacyError(f"during training {frozen[:5]} were frozen and {added[:5]} unfrozen or replaced: {REMEDY}")
        self.note()
        assert self._weights is not None
        assert self._rest is not None
        changed = differing(self._weights, checksums((name, p) for p, name in self._trained.items()))
        if changed:
            raise PrivacyError(
                f"trained weights were changed outside of optimizer.step(): {changed[:5]}. What changed them may have seen "
                "private data, and adds no noise. Change weights before training; or, if by what was released alone, in the "
                "optimizer's step: optimizer.register_step_post_hook(...), before training begins"
            )
        changed = differing(self._rest, checksums(self._others().items()))
        if changed:
            raise PrivacyError(
                f"buffers or frozen parameters changed while training: {changed[:5]}. They would be saved with what they saw "
                "of private data, without noise. Keep them fixed (eval mode, no running averages), or "
                "name them in public_state if what they hold comes from no data, or from released weights alone: "
                "make_private(..., public_state=[...]), DPCallback(config, public_state=[...])"
            )

    def _others(self, *, everything: bool = False) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {
            **{name: p for name, p in self._model.named_parameters() if p not in self._trained},
            **dict(self._model.named_buffers()),
        }
        return {name: tensor for name, tensor in tensors.items() if everything or name not in self._public}


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """For each named tensor the checksum of this rank's part of it, on its device: int64 ()."""
    return {name: checksum(local(tensor)) for name, tensor in tensors}


def differing(noted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The names of what is not in both, or has another checksum."""
    names = sorted(noted.keys() ^ found.keys())
    by_device: dict[torch.device, list[str]] = {}
    for name in noted.keys() & found.keys():
        by_device.setdefault(found[name].device, []).append(name)
    for device, own in by_device.items():
        before, now = (torch.stack([sums[name].to(device) for name in own]) for sums in (noted, found))
        if not torch.equal(before, now):
            names += [name for name, same in zip(own, (before == now).tolist(), strict=True) if not same]
    return sorted(names)
