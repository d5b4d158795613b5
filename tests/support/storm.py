"""A training to be killed, again and again. Started again, it goes on; see tests/end_to_end/test_kill_storm.py.

It counts what is really released in FOLDER/released, and steps of the optimizer in FOLDER/stepped, one byte each, independently
of the library's own records. When it ends it writes FOLDER/report.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers as hf

from dp_flash_hf.accounting.spend_log import FILE_NAME
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.trainers import attached, trainer_for

SAVE_STEPS = 3


def main(folder: Path, steps: int) -> None:
    first = os.environ.get("RANK", "0") == "0"
    released, stepped = (os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("released", "stepped"))
    release = DPSGD.release

    def counted(self: DPSGD) -> None:
        release(self)
        if first:
            os.write(released, b"r")

    DPSGD.release = counted  # type: ignore[method-assign]

    class Steps(hf.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if first:
                os.write(stepped, b"s")

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    backend: dict[str, Any] = {"ddp_backend": "gloo"} if ranks > 1 else {}
    trainer = trainer_for(
        "gpt2", folder / "run", max_steps=steps, learning_rate=1e-3, optim="adamw_torch", save_steps=SAVE_STEPS,
        save_strategy="steps", save_total_limit=3, logging_steps=1000, per_device_train_batch_size=4 // ranks,
        **backend,
    )  # fmt: skip
    trainer.add_callback(Steps())
    dp = attached(trainer)
    trainer.train(resume_from_checkpoint=(folder / "run" / FILE_NAME).exists() or None)
    assert trainer.state.global_step == steps
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    if first:
        (folder / "report.json").write_text(dp.report().to_json())
