"""`dp-flash doctor`: what is installed, and what would run on this machine, or for this model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dp_flash_hf import __version__
from dp_flash_hf.cli.common import AUTO_CLASSES, add_task, config_of, show, table, whole

if TYPE_CHECKING:
    from rich.table import Table

    from dp_flash_hf.cli.common import Commands

# Whose versions are shown; those that pyproject.toml calls extras may be missing.
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "dp-accounting", "peft", "trl", "opacus", "triton")


def add_parsers(commands: Commands) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser("doctor", help="versions, devices, and what would run on them")
    parser.add_argument("--model", help="a Hub name or folder: try this architecture, with few layers and random weights")
    add_task(parser)
    parser.add_argument("--length", type=whole, default=128, help="tokens per row of the trial batch (default: 128)")
    parser.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> None:
    """Print versions, devices and what is computed how; with `options.model`, also of each kind of its layers.

    Raises:
        OSError: If there is no such model.
        UnsupportedError: If it cannot be trained privately.
    """
    show(_machine())
    if options.model is not None:
        show(_trial(options.model, options.task, options.length))


def _machine() -> Table:
    import platform
    from importlib.util import find_spec

    import torch

    here = table("what", "here")
    here.add_row("python", platform.python_version())
    here.add_row("dp-flash-hf", __version__)
    for package in _PACKAGES:
        here.add_row(package, _version(package))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        here.add_row(f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    here.add_row("cpu", f"{torch.get_num_threads()} threads")
    with_triton = torch.cuda.is_available() and find_spec("triton") is not None
    kernels = "torch; Triton for soft-caps, sinks and masks" if with_triton else "torch"
    here.add_row("attention", f'attn_implementation="dp_flash" is computed by {kernels}')
    here.add_row(
        "strategy",
        "bookkeeping, two_pass where memory is short (see plan --memory), microbatch for models with parameters that no rule "
        "covers (see --model)",
    )
    return here


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version
    from importlib.resources import files

    from packaging.version import Version

    try:
        installed = version(package)
    except PackageNotFoundError:
        return "not installed"
    tested = dict(
        line.split("==") for line in files("dp_flash_hf").joinpath("constraints.txt").read_text().split() if "==" in line
    )
    newest = tested[package]
    newer = Version(Version(installed).public) > Version(newest)  # less the build, as in 2.13.0+cpu
    return f"{installed}, newer than {newest}, which this release was tested with" if newer else installed


def _trial(name: str, task: str, length: int) -> Table:
    """How the engine treats each kind of layer of a model, from one backward pass over random tokens."""
    import torch
    import transformers

    from dp_flash_hf.engine.clipping_engine import ClippingEngine

    config = config_of(name)
    keep_few_layers(config)
    model = getattr(transformers, AUTO_CLASSES[task]).from_config(config, attn_implementation="dp_flash").train()
    ids = torch.randint(1, config.get_text_config().vocab_size, (2, length))
    engine = ClippingEngine(model, max_grad_norm=1.0)
    labels = torch.zeros(2, dtype=torch.long) if task == "classification" else ids
    engine.backward(lambda batch: model(**batch).loss, {"input_ids": ids, "labels": labels})
    sizes: dict[tuple[str, str], list[int]] = {}
    for parameter, method in engine.norm_methods().items():
        owner = type(model.get_submodule(parameter.rpartition(".")[0])).__name__
        sizes.setdefault((owner, method), []).append(model.get_parameter(parameter).numel())
    found = table("layer", "norm computed as", "tensors", "parameters")
    for (owner, method), own in sizes.items():
        found.add_row(owner, method, str(len(own)), f"{sum(own):,}")
    found.title = f"{type(model).__name__}, {sum(map(sum, sizes.values())):,} parameters here, rows of {length} tokens"
    return found


def keep_few_layers(config: Any) -> None:
    """Leave two layers in a model's configuration, or as many as it takes to have one of each kind."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    layers = 2 if kinds is None else max(2, *(kinds.index(kind) + 1 for kind in kinds))
    if getattr(config, "num_hidden_layers", 0) > layers:
        if kinds is not None:
            config.layer_types = kinds[:layers]
        config.num_hidden_layers = layers
