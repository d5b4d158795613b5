"""`dp-flash`: train recipes, plan a budget, see what would run, and measure it.

What only some commands need is imported inside them.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dp_flash_hf.errors import PrivacyError, invalid

if TYPE_CHECKING:
    from rich.table import Table


_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}
_DTYPES = ("float32", "bfloat16")
_OPTIMIZERS = {"adamw": 2, "sgd": 0}  # numbers of state for each trained one
_PRESETS = ("cpu", "memory", "cuda", "full", "lora", "vocab", "compile", "attention")
_PACKAGES = (
    "dp-flash-hf",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "dp-accounting",
    "peft",
    "trl",
    "opacus",
    "triton",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `dp-flash` command: exit status 2, after one line on stderr, for what the user can mend."""
    options = _parser().parse_args(arguments)
    run(lambda: options.command(options), traceback=options.traceback)


def run(command: Callable[[], None], *, traceback: bool = False) -> None:
    """Call `command`; an error that the user can mend becomes one line on stderr and exit status 2, unless `traceback`."""
    try:
        command()
    except (ValueError, PrivacyError, OSError, ImportError) as error:
        if traceback:
            raise
        print(f"dp-flash: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print its usage too."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dp-flash", description="Differentially private fine-tuning for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=_version("dp-flash-hf"))
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a recipe", description="Run a recipe with the keys of its YAML file.")
    train.add_argument("recipe", help="a name from `dp-flash recipes ls`, or the path of a copied script")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a line of the YAML file")
    train.set_defaults(command=_train)

    plan = commands.add_parser(
        "plan",
        help="epsilon, noise and steps of a run, or its memory, before anything is spent",
        description="Give --units, --batch and two of --epsilon, --noise-multiplier and --steps (or --epochs); the third is "
        "computed. Each of these may be a comma-separated list: the table has every combination. Or give --memory, --model, "
        "--batch-rows and --length: the table has what each strategy needs.",
    )
    plan.add_argument("--units", type=_whole, help="privacy units (usually: examples) in the dataset")
    plan.add_argument("--batch", type=_whole, help="expected units per optimizer step")
    plan.add_argument("--delta", type=_above_zero, help="default: units ** -1.1")
    plan.add_argument("--epsilon", type=_numbers, help="target epsilon: calibrates the noise, or counts the steps it affords")
    plan.add_argument("--noise-multiplier", type=_numbers, help="noise standard deviation / max_grad_norm")
    steps = plan.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=_whole_numbers, help="optimizer steps")
    steps.add_argument("--epochs", type=_numbers, help="optimizer steps, in units of units / batch")
    plan.add_argument("--accountant", default="pld", help="pld (default), prv or rdp")
    plan.add_argument("--max-batch-size", type=_whole, help="truncated Poisson sampling: most units in one draw")
    memory = plan.add_argument_group("memory of a step, from shapes alone")
    memory.add_argument("--memory", action="store_true", help="plan memory")
    memory.add_argument("--model", help="a Hub name or folder, of which the configuration is read and no weights")
    memory.add_argument(
        "--task", choices=sorted(_AUTO_CLASSES), default="causal-lm", help="the model's head (default: causal-lm)"
    )
    memory.add_argument("--batch-rows", type=_whole, help="rows computed at once: per_device_train_batch_size")
    memory.add_argument("--length", type=_whole, help="tokens per row")
    memory.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    memory.add_argument("--lora", type=_whole, help="rank of adapters on all linear layers, which are all that is trained")
    memory.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: float32)")
    memory.add_argument("--autocast", action="store_true", help="with bfloat16 autocast over them: bf16 of TrainingArguments")
    memory.add_argument("--optimizer", choices=sorted(_OPTIMIZERS), default="adamw", help="default: adamw")
    memory.add_argument(
        "--ranks",
        type=_whole,
        default=1,
        help="what one rank needs where FSDP2 splits the model up over so many; with DDP each needs as much as one alone",
    )
    plan.set_defaults(command=_plan)

    recipes = commands.add_parser("recipes", help="list or copy recipes").add_subparsers(required=True, metavar="COMMAND")
    recipes.add_parser("ls", help="list them").set_defaults(command=_list_recipes)
    copy = recipes.add_parser("cp", help="copy a recipe's script and YAML file, to change them")
    copy.add_argument("recipe", help="a name from `dp-flash recipes ls`")
    copy.add_argument("folder", type=Path, help="where to; nothing is overwritten")
    copy.set_defaults(command=_copy_recipe)

    doctor = commands.add_parser("doctor", help="versions, devices, and what would run on them")
    doctor.add_argument("--model", help="a Hub name or folder: try this architecture, with few layers and random weights")
    doctor.add_argument(
        "--task", choices=sorted(_AUTO_CLASSES), default="causal-lm", help="the model's head (default: causal-lm)"
    )
    doctor.add_argument("--length", type=_whole, default=128, help="tokens per row of the trial batch (default: 128)")
    doctor.set_defaults(command=_doctor)

    bench = commands.add_parser(
        "bench",
        help="speed and memory beside non-private training and peers",
        description="Presets: cpu and cuda, training beside Opacus; memory, strategies with and without checkpointing, 126 M "
        "parameters on the CPU; compile, compiled beside eager; on a GPU also full, all weights in bfloat16 at 512 tokens, "
        "lora, adapters of rank 16, vocab, a head of 128k tokens, and attention, the kernels beside torch's and flash-attn's.",
    )
    bench.add_argument("--preset", choices=_PRESETS, default="cpu", help="what is measured (default: cpu)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    bench.add_argument("--lengths", type=_whole_numbers, help="tokens per row, comma-separated (default: the preset's)")
    bench.add_argument("--batch", type=_whole, help="rows of the physical batch (default: the preset's; 32 texts)")
    bench.add_argument("--layers", type=_whole, help="decoder layers (default: the preset's)")
    bench.add_argument("--width", type=_whole, help="hidden size, a multiple of 64 (default: the preset's)")
    bench.add_argument("--vocabulary", type=_whole, help="tokens that the head tells apart (default: the preset's)")
    bench.add_argument("--repeats", type=_whole, default=5, help="rounds; medians are over them (default: 5)")
    bench.add_argument("--threads", type=_whole, help="CPU threads (default: all)")
    bench.add_argument(
        "--padding-free", action="store_true", help="instead: texts as long as real ones, padded and flattened into one row"
    )
    bench.set_defaults(command=_bench)
    return parser


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def _whole(text: str) -> int:
    value = _above_zero(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(value)


def _numbers(text: str) -> list[float]:
    return [_above_zero(part) for part in text.split(",")]


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _train(options: argparse.Namespace) -> None:
    path = Path(options.recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        name = f"dp_flash_recipe_{path.stem}"  # never the name of a package
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        sys.modules[name] = recipe  # dataclasses look their module up
        spec.loader.exec_module(recipe)
    else:
        recipe = import_module(f"dp_flash_hf.recipes.{_require_recipe(options.recipe)}")
    recipe.main(options.overrides)


def _recipes() -> list[str]:
    return sorted(
        file.name.removesuffix(".yaml") for file in files("dp_flash_hf.recipes").iterdir() if file.name.endswith(".yaml")
    )


def _require_recipe(name: str) -> str:
    if name not in _recipes():
        raise invalid(
            "recipe", expected=f"one of {', '.join(_recipes())}", actual=name, remedy="or give the path of a .py file"
        )
    return name


def _list_recipes(options: argparse.Namespace) -> None:
    table = _table("recipe", "what it does")
    for name in _recipes():
        docstring = ast.get_docstring(ast.parse((files("dp_flash_hf.recipes") / f"{name}.py").read_text(encoding="utf-8")))
        table.add_row(name, (docstring or "").partition("\n")[0])
    _print(table)


def _copy_recipe(options: argparse.Namespace) -> None:
    name = _require_recipe(options.recipe)
    copies = [options.folder / f"{name}{suffix}" for suffix in (".py", ".yaml")]
    for target in copies:
        if target.exists():
            raise FileExistsError(f"{target} exists; remove it or name another folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    for target in copies:
        with (files("dp_flash_hf.recipes") / target.name).open("rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    print(f"dp-flash train {copies[0]}")


def _plan(options: argparse.Namespace) -> None:
    if options.memory:
        _plan_memory(options)
        return
    if options.units is None or options.batch is None:
        raise ValueError("plan: give --units and --batch, or --memory")

    from rich.progress import track

    from dp_flash_hf.accounting.ledger import ADJACENCY
    from dp_flash_hf.accounting.plan import PrivacyPlan
    from dp_flash_hf.mechanisms.config import PrivacyConfig
    from dp_flash_hf.training.batches import steps_per_epoch

    steps = options.steps
    if options.epochs:
        steps = [math.ceil(epochs * steps_per_epoch(options.units, options.batch)) for epochs in options.epochs]
    if sum(values is None for values in (options.epsilon, options.noise_multiplier, steps)) != 1:
        raise ValueError("plan: give exactly two of --epsilon, --noise-multiplier and --steps (or --epochs)")
    delta = options.units**-1.1 if options.delta is None else options.delta

    def plan(epsilon: float | None, noise_multiplier: float | None, steps: int) -> PrivacyPlan:
        config = PrivacyConfig(
            target_delta=delta,
            target_epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            accountant=options.accountant,
            sampling="poisson" if options.max_batch_size is None else "truncated_poisson",
            max_batch_size=options.max_batch_size,
        )
        return PrivacyPlan.from_config(config, n_units=options.units, expected_batch_size=options.batch, steps=steps)

    rows = []
    combinations = list(product(options.epsilon or [None], options.noise_multiplier or [None], steps or [None]))
    for epsilon, noise_multiplier, count in track(
        combinations, "accounting", console=_stderr(), transient=True, disable=not sys.stderr.isatty()
    ):
        if count is None:
            most = plan(None, noise_multiplier, 1).max_steps(epsilon)
            if most == 0:
                raise ValueError(
                    f"epsilon {epsilon:g} does not afford one step at noise multiplier {noise_multiplier:g}; add noise"
                )
            rows.append(plan(None, noise_multiplier, most))
        else:
            rows.append(plan(epsilon, noise_multiplier, count))

    table = _table("epsilon", "noise multiplier", "steps", "epochs", justify="right")
    for row in rows:
        epochs = row.steps * row.sampler.sampling_rate
        table.add_row(f"{row.epsilon():.4g}", f"{row.noise_multiplier:.4f}", str(row.steps), f"{epochs:.2f}")
    _print(table)
    print(
        f"{options.units} units, {options.batch} expected per step (sampling rate {rows[0].sampler.sampling_rate:.4g}), "
        f"delta {delta:.3g}, {rows[0].sampler.kind} sampling, {options.accountant} accountant, adjacency: {ADJACENCY}"
    )


def _plan_memory(options: argparse.Namespace) -> None:
    import torch
    import transformers

    from dp_flash_hf.engine.memory import estimate, free_memory
    from dp_flash_hf.training.session import model_loss_of

    rows, length = options.batch_rows, options.length
    if None in (options.model, rows, length):
        raise ValueError("plan: --memory needs --model, --batch-rows and --length")
    config = _config_of(options.model)
    with torch.device("meta"):
        auto = getattr(transformers, _AUTO_CLASSES[options.task])
        model: Any = auto.from_config(config, attn_implementation="eager", dtype=getattr(torch, options.dtype))
        if options.lora is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=options.lora, target_modules="all-linear"))
        ids = torch.zeros(rows, length, dtype=torch.long)
        labels = torch.zeros(rows, dtype=torch.long) if options.task == "classification" else ids
    if options.checkpointing:
        model.activation_checkpointing_enable()
    found = estimate(
        model,
        {"input_ids": ids, "labels": labels},
        rows,
        loss_fn=model_loss_of,
        moments=_OPTIMIZERS[options.optimizer],
        autocast=torch.bfloat16 if options.autocast else None,
        ranks=options.ranks,
    )
    table = _table("MiB", "weights", "grads", "states", "activations", "records", "total", justify="right")
    if options.ranks > 1:
        table.title = f"one of {options.ranks} ranks, split up by FSDP2"
    for row in found:
        parts = (row.parameters, row.gradients, row.optimizer, row.activations, row.records, row.total)
        table.add_row(row.strategy, *(f"{part / 2**20:,.0f}" for part in parts))
    _print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (True, False))
    gathered = " Activations are with the weights that FSDP2 gathers." if options.ranks > 1 else ""
    dtype = f"{options.dtype} under bfloat16 autocast" if options.autocast else options.dtype
    print(
        f"{type(model).__name__}: {size:,.1f} M parameters in {dtype}, {trained:,.1f} M trained with {options.optimizer}.\n"
        f"{rows} rows of {length} tokens, {'with' if options.checkpointing else 'without'} checkpointing.{gathered} "
        f"Free on {device} now: {free_memory(device) / 2**20:,.0f} MiB."
    )


def _doctor(options: argparse.Namespace) -> None:
    import torch

    table = _table("what", "here")
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        table.add_row(f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    table.add_row("cpu", f"{torch.get_num_threads()} threads")
    kernels = "torch; Triton for soft-caps, sinks and masks" if torch.cuda.is_available() and _has("triton") else "torch"
    table.add_row("attention", f'attn_implementation="dp_flash" is computed by {kernels}')
    table.add_row(
        "strategy",
        "bookkeeping, two_pass where memory is short (see plan --memory), microbatch for models with parameters that no rule "
        "covers (see --model)",
    )
    _print(table)
    if options.model is not None:
        _print(_trial(options.model, options.task, options.length))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _trial(name: str, task: str, length: int) -> Table:
    """How the engine treats each kind of layer of a model, from one backward pass over random tokens."""
    import torch
    import transformers

    from dp_flash_hf import ClippingEngine

    config = _config_of(name)
    _keep_few_layers(config)
    model = getattr(transformers, _AUTO_CLASSES[task]).from_config(config, attn_implementation="dp_flash").train()
    ids = torch.randint(1, config.get_text_config().vocab_size, (2, length))
    engine = ClippingEngine(model, max_grad_norm=1.0)
    labels = torch.zeros(2, dtype=torch.long) if task == "classification" else ids
    engine.backward(lambda batch: model(**batch).loss, {"input_ids": ids, "labels": labels})
    forms = engine.norm_methods()
    counts: dict[tuple[str, str], list[int]] = {}
    for parameter, form in forms.items():
        owner = type(model.get_submodule(parameter.rpartition(".")[0])).__name__
        counts.setdefault((owner, form), []).append(model.get_parameter(parameter).numel())
    table = _table("layer", "norm computed as", "tensors", "parameters")
    for (owner, form), sizes in counts.items():
        table.add_row(owner, form, str(len(sizes)), f"{sum(sizes):,}")
    table.title = f"{type(model).__name__}, {sum(map(sum, counts.values())):,} parameters here, rows of {length} tokens"
    return table


def _config_of(name: str) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(f"{name}: {error}") from None
    if config.pad_token_id is None:
        config.pad_token_id = 0  # classifiers look for the last token that is not padding
    return config


def _keep_few_layers(config: Any) -> None:
    """Two layers, or as many as it takes to have one of each kind."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    layers = 2 if kinds is None else max(2, *(kinds.index(kind) + 1 for kind in kinds))
    if getattr(config, "num_hidden_layers", 0) > layers:
        if kinds is not None:
            config.layer_types = kinds[:layers]
        config.num_hidden_layers = layers


def _bench(options: argparse.Namespace) -> None:
    from dataclasses import fields, replace

    from dp_flash_hf.benchmarks import attention as bench_attention
    from dp_flash_hf.benchmarks import training as bench

    attention = options.preset == "attention"
    work: Any = bench_attention.WORK if attention else bench.PRESETS[options.preset].work
    names = ("device", "lengths", "batch", "layers", "width", "vocabulary", "threads")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    strange = given.keys() - {field.name for field in fields(work)} | (
        {"padding-free"} if options.padding_free and attention else set()
    )
    if strange:
        raise ValueError(f"bench: --{min(strange)} means nothing to --preset {options.preset}; leave it out")
    if attention:
        bench_attention.print_table(replace(work, **given), repeats=options.repeats)
        return
    methods = bench.PRESETS[options.preset].methods
    if options.padding_free:
        methods = bench.ON_TEXTS
        given.setdefault("batch", bench.TEXTS)
    bench.print_table(bench.Preset(replace(work, **given), methods), repeats=options.repeats)


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _table(*columns: str, justify: Any = "left") -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, justify=justify)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


if __name__ == "__main__":
    main()
