"""What only released gradients may change: a model's weights and buffers, compared by value from step to step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dp_flash_hf.distributed import local
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
    by, are compared at every release. Cost: each tensor is read once a step, trained ones twice; no copy is kept;
    the device is waited for once.

    Sums of the bits are compared: any change shows but for chance, except that values only change places.

    Args:
        model: whose state it is.
        trained: its trained parameters, which change in `optimizer.step()` and nowhere else.
        public: names of buffers and frozen parameters that may change, for what they hold comes from no private data.

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
            self._rest = bit_sums(self._others().items())

    def stepped(self) -> None:
        """The optimizer changed the weights."""
        self._weights = bit_sums((name, p) for p, name in self._trained.items())

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
        changed = differing(self._weights, bit_sums((name, p) for p, name in self._trained.items()))
        if changed:
            raise PrivacyError(
                f"trained weights were changed outside of optimizer.step(): {changed[:5]}. What changed them may have seen "
                "private data, and adds no noise; change weights before training, or in the optimizer's step"
            )
        changed = differing(self._rest, bit_sums(self._others().items()))
        if changed:
            raise PrivacyError(
                f"buffers or frozen parameters changed while training: {changed[:5]}. They would be saved with what they saw "
                "of private data, without noise. Keep them fixed (eval mode, no running averages), or "
                "name them in public_state if what they hold comes from no data: make_private(..., public_state=[...]), "
                "DPCallback(config, public_state=[...])"
            )

    def _others(self, *, everything: bool = False) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {
            **{name: p for name, p in self._model.named_parameters() if p not in self._trained},
            **dict(self._model.named_buffers()),
        }
        return {name: tensor for name, tensor in tensors.items() if everything or name not in self._public}


def bit_sums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """For each named tensor, on its device: int64 (), the sum of its bits as whole numbers, of this rank's part of it."""
    return {name: _bit_sum(local(tensor).detach()) for name, tensor in tensors}


def differing(noted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The names of what is not in both, or has another sum."""
    names = sorted(noted.keys() ^ found.keys())
    by_device: dict[torch.device, list[str]] = {}
    for name in noted.keys() & found.keys():
        by_device.setdefault(found[name].device, []).append(name)
    for device, own in by_device.items():
        before, now = (torch.stack([sums[name].to(device) for name in own]) for sums in (noted, found))
        if not torch.equal(before, now):
            names += [name for name, same in zip(own, (before == now).tolist(), strict=True) if not same]
    return sorted(names)


def _bit_sum(tensor: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):  # quantised weights, say
        inner, _ = tensor.__tensor_flatten__()
        return torch.stack([_bit_sum(getattr(tensor, name)) for name in inner]).sum()
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # 64 bits at a time, which is as fast as memory is, have to be aligned
    whole = len(octets) // 8 * 8
    return octets[:whole].view(torch.int64).sum() + octets[whole:].sum(dtype=torch.int64)
