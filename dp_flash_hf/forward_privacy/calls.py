"""In which ways a privatised model was called, and which of them `verify_cut` has found to be a cut."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, Self

from torch import Tensor

from dp_flash_hf.forward_privacy.fingerprint import changed, token


class Way(NamedTuple):
    """How a model is called, as far as it decides which code runs.

    Attributes:
        method: "forward", "generate", or in words what else.
        arguments: Name and `fingerprint.token` of each that is not None: which tensors there are, and what the options are.
        code: What the model runs: the items of its `fingerprint.fingerprint`.
    """

    method: str
    arguments: frozenset[tuple[str, Hashable]]
    code: frozenset[tuple[str, Hashable]]

    @classmethod
    def of(cls, method: str, arguments: Mapping[str, Any], code: Mapping[str, Hashable]) -> Self:
        """Of a call with these arguments, by name."""
        given = frozenset((name, token(value)) for name, value in arguments.items() if value is not None)
        return cls(method, given, frozenset(code.items()))

    def __str__(self) -> str:
        """As it is written, the tensors by name."""
        tensors = sorted(name for name, value in self.arguments if value is Tensor)
        options = sorted((item for item in self.arguments if item[1] is not Tensor), key=lambda item: item[0])
        shown = [f"{name}={value if isinstance(value, str) else '...'}" for name, value in options]
        return f"{self.method}({', '.join([*tensors, *shown])})"


class Verdict(NamedTuple):
    """What `verify_cut` found to be cut off from what.

    Attributes:
        private: Names of the protected inputs.
        public: Names of the other tensors among the inputs.
        released: Names of the outputs that may leave the model.
        whole: Places whose calls count as one unit, because their rows may not be those of the batch.
    """

    private: tuple[str, ...]
    public: tuple[str, ...]
    released: tuple[str, ...]
    whole: frozenset[str]


class Calls:
    """The ways in which something was released, and the verdicts.

    Shared by copies of a model within a process. Verdicts and ways stay in their process: elsewhere nothing is verified, and
    what was not verified before stays so.

    Args:
        elsewhere: In words, calls that no verdict can speak of any more.
    """

    def __init__(self, elsewhere: Iterable[str] = ()) -> None:
        self._elsewhere = tuple(elsewhere)
        self._made: dict[Way, None] = {}
        self._verdicts: dict[Way, Verdict] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, (self.not_verified(),)

    def record(self, way: Way) -> None:
        """Something is about to be released in a call made in this way."""
        self._made[way] = None

    def verify(self, way: Way, verdict: Verdict | None) -> None:
        """For `verify_cut`: what it found for this way; None takes an earlier verdict back."""
        self._verdicts.pop(way, None)
        if verdict is not None:
            self._verdicts[way] = verdict

    def verdict(self, way: Way) -> Verdict | None:
        """On this way, if it was verified."""
        return self._verdicts.get(way)

    def verdicts(self, code: Mapping[str, Hashable]) -> dict[Way, Verdict]:
        """Of all ways that were taken, and of those that may be taken while the model runs this code."""
        now = frozenset(code.items())
        return {way: verdict for way, verdict in self._verdicts.items() if way in self._made or way.code == now}

    def is_verified(self, code: Mapping[str, Hashable]) -> bool:
        """Whether any way was verified while the model ran this code."""
        now = frozenset(code.items())
        return any(way.code == now for way in self._verdicts)

    def since_verified(self, code: Mapping[str, Hashable]) -> str:
        """In words, what changed since the latest verdict; nothing if there is none."""
        if not self._verdicts:
            return ""
        return f". Since it was verified, there is another {_shown(changed(dict([*self._verdicts][-1].code), code))}"

    def not_verified(self) -> list[str]:
        """In words, the ways in which something was released without a verdict."""
        return [*self._elsewhere, *(self._explained(way) for way in self._made if way not in self._verdicts)]

    def _explained(self, way: Way) -> str:
        """The way, and what had changed if the same call was verified with other code."""
        same = [other for other in self._verdicts if (other.method, other.arguments) == (way.method, way.arguments)]
        if not same:
            return str(way)
        return f"{way}, with another {_shown(changed(dict(same[-1].code), dict(way.code)))}"


def _shown(places: list[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
