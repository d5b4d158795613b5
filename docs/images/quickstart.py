"""Draws docs/images/quickstart.svg, the picture of the README: held-out loss and epsilon over the steps of a run.

Needs matplotlib.

    dp-flash train quickstart output_dir=RUN eval_strategy=steps eval_steps=5 logging_steps=5 save_strategy=steps save_steps=100
    python docs/images/quickstart.py RUN/checkpoint-100/trainer_state.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

LOSS, EPSILON = "#2563eb", "#b45309"  # legible on white and on black


def draw(history: list[dict[str, float]], path: Path) -> None:
    """The figure of a Trainer's log history, without a background so that it fits light and dark pages."""
    loss = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    epsilon = [(0, 0.0), *((entry["step"], entry["privacy/spent_epsilon"]) for entry in history if "loss" in " ".join(entry))]
    plt.rcParams.update({"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "quickstart"})
    figure, left = plt.subplots(figsize=(8, 3.2), layout="constrained")
    right = left.twinx()
    for axes, points, color, label in (
        (left, loss, LOSS, "loss per byte, held-out text"),
        (right, epsilon, EPSILON, "epsilon spent (delta 1e-5)"),
    ):
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2.5)
        axes.set_ylabel(label, color=color)
        axes.tick_params(colors="#808080", labelcolor=color)
        for spine in axes.spines.values():
            spine.set_color("#808080")
    left.set_xlabel("step", color="#808080")
    left.tick_params(axis="x", labelcolor="#808080")
    right.set_ylim(0, 8.4)
    left.set_xlim(0, max(step for step, _ in loss))
    left.grid(alpha=0.25)
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["log_history"], Path(__file__).with_suffix(".svg"))
