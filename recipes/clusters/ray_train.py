"""Run a recipe on a Ray cluster: each worker of Ray Train is one process of the same run.

    python ray_train.py --workers 8 --gpu --storage /shared lora_finetune output_dir=runs/lora bf16=true

--storage is a folder that every node sees, and where relative paths begin: checkpoints, the spend log and Ray's own files
are there. When a worker dies, Ray starts all of them again, and they go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(run: dict[str, Any]) -> None:
    """Run the recipe in one worker; Ray has set RANK, WORLD_SIZE and MASTER_ADDR as torchrun does."""
    from dp_flash_hf.cli import main as cli  # only workers need it

    os.chdir(run["storage"])
    # An exit status would end the worker; with --traceback errors are raised, and reach whoever waits for the run.
    cli.main(["--traceback", "train", run["recipe"], "resume_from_checkpoint=true", *run["overrides"]])


def main() -> None:
    """Start the workers and wait for them; raises what failed in one of them, once restarts are used up."""
    parser = argparse.ArgumentParser(description="Run a recipe on a Ray cluster.")
    parser.add_argument("--workers", type=int, required=True, help="processes, over all nodes")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each of them")
    parser.add_argument("--storage", type=Path, required=True, help="a folder that every node sees")
    parser.add_argument("--restarts", type=int, default=20, help="how often to go on after a worker died (default: 20)")
    parser.add_argument("recipe", help="a name from `dp-flash recipes ls`, or the path of a script on the storage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a line of the recipe's YAML file")
    options = parser.parse_args()
    storage = options.storage.resolve()
    # datasets names its caches after what dill reads from a print of the function; Ray would send that print to a log instead.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    TorchTrainer(
        train,
        train_loop_config={"storage": str(storage), "recipe": options.recipe, "overrides": options.overrides},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        run_config=RunConfig(storage_path=str(storage / "ray"), failure_config=FailureConfig(max_failures=options.restarts)),
    ).fit()


if __name__ == "__main__":
    main()
