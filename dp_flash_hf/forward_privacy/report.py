"""What privatised calls guarantee, for the person who decides whether that is enough."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from dp_flash_hf.mechanisms.config import Noise
from dp_flash_hf.reporting import text

ADJACENCY = {
    "sequence": "replace one sequence by another of the same length",
    "token": "replace one token of a sequence by another",
}
NOT_COVERED = (
    "Lengths, padding and masks, and the places of special tokens; how often and when a unit took part.",
    "Inputs listed as public, outputs not listed as released, and everything before the noise.",
    "The trained weights, where gradients of private data reach them by another way than the released outputs.",
    "A number of calls that depends on what calls released: then the epsilon is that of the most calls there could have been.",
    "Units that hold several rows of a batch, or several batches' rows, unless ledger.units(ids) said so.",
    "Attacks on floating-point noise: it is added in float32 or float64, not on an exact grid, and whoever sees all digits of "
    "what is released may see which sums are impossible.",
    "Attacks on the operating system's random numbers, or on timing and memory use.",
    "Weights and whole numbers of modules, if they were changed by hand after verify_cut.",
)

_RANDOMNESS: dict[Noise, str] = {
    "secure": "secure: from a cryptographic keystream (ChaCha20), a new 256-bit key for every call",
    "fast": "fast: from Philox, a new 64-bit key for every call; not cryptographic",
}


@dataclass(frozen=True, kw_only=True)
class AttentionPrivacyReport:
    """What the privatised calls so far guarantee: their outputs, and what is computed of them, are (epsilon, delta)-private.

    Made by `Privatized.report`, once `verify_cut` has passed. The guarantee is that of the unit that the calls cost most.

    Attributes:
        epsilon: Of all calls so far.
        delta: At which epsilon holds.
        rho: The same in zero-concentrated differential privacy, which needs no delta; 0 with epsilon 0.
        target_epsilon: For which the noise was calibrated, or None.
        adjacency: What may be replaced between neighbouring inputs.
        placement: "attention" or "residual".
        places: Names of the modules with noise.
        calls: How many releases there were.
        clip_norm: C, or one for each key/value head.
        noise_multiplier: Noise std / sensitivity of one place.
        max_length: Rows of a unit that the noise is made for, or None.
        logit_cap: Bound on the logits, or None.
        noise: Where its randomness comes from: "secure" or "fast".
        verified_calls: How the model was called, and may be, as `verify_cut` tried it.
        private_inputs: Names of the protected inputs.
        public_inputs: Names of the other tensors that the model was given.
        released: Names of the outputs that may leave the model.
        not_covered: What the guarantee does not say, in sentences.
    """

    epsilon: float
    delta: float
    rho: float
    target_epsilon: float | None
    adjacency: str
    placement: str
    places: tuple[str, ...]
    calls: int
    clip_norm: float | tuple[float, ...]
    noise_multiplier: float
    max_length: int | None
    logit_cap: float | None
    noise: Noise
    verified_calls: tuple[str, ...]
    private_inputs: tuple[str, ...]
    public_inputs: tuple[str, ...]
    released: tuple[str, ...]
    not_covered: tuple[str, ...] = NOT_COVERED

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """The report for a reviewer, at most 100 columns; epsilon is rounded up."""
        target = "" if self.target_epsilon is None else f" (calibrated for epsilon = {self.target_epsilon:g})"
        length = "" if self.max_length is None else f", for at most {self.max_length} rows of a unit"
        cap = "" if self.logit_cap is None else f"; logits capped at {self.logit_cap:g}"
        epsilon = text.rounded_up(self.epsilon)
        rows = [
            ("guarantee", f"epsilon <= {epsilon} at delta = {self.delta:g}, rho = {self.rho:.6g} in zCDP{target}"),
            ("adjacency", self.adjacency),
            ("placement", f"{self.placement}: {', '.join(self.places)}"),
            ("clipping", f"C = {self.clip_norm}{cap}"),
            ("noise", f"Gaussian, std / sensitivity = {self.noise_multiplier:.6g}{length}; {_RANDOMNESS[self.noise]}"),
            ("calls", str(self.calls)),
            ("verified", "; ".join(self.verified_calls)),
            ("private", ", ".join(self.private_inputs)),
            ("public", ", ".join(self.public_inputs) or "nothing else was given"),
            ("released", ", ".join(self.released)),
        ]
        return text.page("Privacy report of privatised attention", rows, self.not_covered)

    def __str__(self) -> str:
        return self.to_text()
