"""`dp-flash bench`: speed and memory, measured on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dp_flash_hf.cli.common import several_whole, whole

if TYPE_CHECKING:
    from dp_flash_hf.cli.common import Commands

# The keys of benchmarks.training.PRESETS, and attention: stated here too, so that --help need not import them.
PRESETS = {
    "cpu": "private training beside Opacus and beside training without privacy",
    "memory": "each strategy with and without gradient checkpointing; 126 M parameters, on the CPU",
    "compile": "models given to torch.compile, and not",
    "t5": "an encoder-decoder on texts and labels of other lengths at every step, padded to the longest",
    "bart": "likewise",
    "cuda": "as cpu, on a GPU, in bfloat16 autocast",
    "full": "all weights, 512 tokens per row, on a GPU",
    "lora": "adapters of rank 16, on a GPU",
    "vocab": "a vocabulary of 128k tokens, on a GPU",
    "attention": "attention alone, beside torch's and that of the flash-attn package if it is installed, on a GPU",
}


def add_parsers(commands: Commands) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="speed and memory beside non-private training and peers",
        description="Measure speed and memory on this machine, methods taking turns. Presets:\n"
        + "".join(f"\n  {name:10} {what}" for name, what in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", metavar="PRESET", help="what is measured (default: cpu)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    parser.add_argument("--lengths", type=several_whole, help="tokens per row, comma-separated (default: the preset's)")
    parser.add_argument("--batch", type=whole, help="rows of the physical batch (default: the preset's; 32 texts)")
    parser.add_argument("--layers", type=whole, help="decoder layers (default: the preset's)")
    parser.add_argument("--width", type=whole, help="hidden size, a multiple of 64 (default: the preset's)")
    parser.add_argument("--vocabulary", type=whole, help="tokens that the head tells apart (default: the preset's)")
    parser.add_argument("--repeats", type=whole, default=5, help="rounds; medians are over them (default: 5)")
    parser.add_argument("--threads", type=whole, help="CPU threads (default: all)")
    parser.add_argument(
        "--padding-free", action="store_true", help="instead: texts as long as real ones, padded and flattened into one row"
    )
    parser.set_defaults(command=bench)


def bench(options: argparse.Namespace) -> None:
    """Measure what the options name, and print it.

    Raises:
        ValueError: For an option that the preset does not have, or a device that is not here.
    """
    from dataclasses import fields, replace

    from dp_flash_hf.benchmarks import attention, training

    of_attention = options.preset == "attention"
    work: Any = attention.WORK if of_attention else training.PRESETS[options.preset].work
    names = ("device", "lengths", "batch", "layers", "width", "vocabulary", "threads")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    unknown = given.keys() - {field.name for field in fields(work)}
    if options.padding_free and of_attention:
        unknown |= {"padding-free"}
    if unknown:
        raise ValueError(f"bench: --{min(unknown)} is not an option of --preset {options.preset}; leave it out")
    if of_attention:
        attention.print_table(replace(work, **given), repeats=options.repeats)
        return
    methods = training.PRESETS[options.preset].methods
    if options.padding_free:
        methods = training.ON_TEXTS
        given.setdefault("batch", training.TEXTS)
    training.print_table(training.Preset(replace(work, **given), methods), repeats=options.repeats)
