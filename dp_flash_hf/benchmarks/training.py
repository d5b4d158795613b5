"""`dp-flash bench`: speed and memory of private training beside non-private training and its peers, measured in one run.

A preset is a model, its batches and the methods that train it. With `--padding-free` the batches are texts as long as real
ones, padded to the longest or flattened into one row. `bench_attention` measures attention by itself.

A step is the forward pass, backward pass, clipping and AdamW update of one physical batch of random tokens. Methods take
turns, in an order that rotates from round to round, so that whatever else the machine does meets all of them; figures are
medians over the rounds, and ratios are medians of each round's ratio.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dp_flash_hf.engine.clipping_engine import ClippingEngine, Strategy
from dp_flash_hf.kernels.ghost_norm import embedding_squared_norms, linear_squared_norms
from dp_flash_hf.layers.recorder import MAX_LOGIT_BYTES
from dp_flash_hf.mechanisms.gaussian_noise import add_gaussian_noise_, fresh_generator
from dp_flash_hf.units import IGNORED

BASELINE = "non-private"
TEXTS = 32  # with --padding-free: enough for a long one among them
# Tokens of the 10,003 training queries of BANKING77 (Casanueva et al. 2020, arXiv 2003.04807), in those of a BERT tokenizer:
# 33 evenly spaced quantiles.
BANKING77 = (
    *(4, 8, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13),
    *(14, 14, 15, 15, 15, 16, 17, 17, 18, 19, 21, 24, 29, 34, 42, 98),
)
MAX_GRAD_NORM = 1.0
_OURS = (BASELINE, "dp_flash")  # whose failure is an error; a peer's leaves a note
_MEASURED_SECONDS = {"cpu": 3.0, "cuda": 0.5}  # a turn has as many steps as it takes to last this long

Step = Callable[[], None]
Method = Callable[["Work", int], tuple[nn.Module, Step]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A Llama decoder with an untied head (Opacus' ghost clipping refuses tied ones) and the batches it is trained on.

    heads are 64 wide and the feed-forward layers 4 * width. autocast: bfloat16 autocast over float32 weights. lora: rank of
    adapters on all linear layers but the head, which are then all that is trained; 0: everything is. checkpointing: the layers
    keep their inputs only, and compute the rest again in the backward pass. compiled: `torch.compile` traces the whole model.
    """

    device: str
    autocast: bool
    layers: int
    width: int
    vocabulary: int
    batch: int
    lengths: tuple[int, ...]
    threads: int
    lora: int = 0
    checkpointing: bool = False
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one method at one length; None with the reason in `note` where it did not run.

    ratio and memory_ratio are over the non-private method. memory: bytes at the peak, beyond those of the imported libraries.
    """

    length: int
    method: str
    tokens_per_second: float | None = None
    ratio: float | None = None
    memory: int | None = None
    memory_ratio: float | None = None
    note: str = ""


def model_of(work: Work, length: int, attention: str) -> Any:
    """The decoder to train, the same weights at every call, in training mode on the device.

    Raises ImportError for `work.lora` without peft.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.width,
        intermediate_size=4 * work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=max(1, work.width // 64),
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(work.device):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)  # type: ignore[no-untyped-call]
        if work.lora:
            from peft import LoraConfig, get_peft_model

            # Not the usual zeros in B: they would make every gradient of A zero.
            adapter = LoraConfig(r=work.lora, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, adapter)
    if work.checkpointing:
        model.gradient_checkpointing_enable()
    if work.compiled:
        model.compile()
    return model.train()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)


def tokens_of(work: Work, length: int) -> Tensor:
    """The physical batch: int64 (batch, length)."""
    return torch.randint(work.vocabulary, (work.batch, length), generator=torch.Generator().manual_seed(1)).to(work.device)


def non_private(work: Work, length: int) -> tuple[nn.Module, Step]:
    """The model, and a step of it without privacy."""
    tokens = tokens_of(work, length)
    return _plain(work, length, {"input_ids": tokens, "labels": tokens}, "sdpa")


def dp_flash(
    work: Work, length: int, strategy: Strategy = "bookkeeping", max_logit_bytes: int = MAX_LOGIT_BYTES
) -> tuple[nn.Module, Step]:
    """The model, and a step of it with `ClippingEngine` and dp_flash attention."""
    tokens = tokens_of(work, length)
    batch = {"input_ids": tokens, "labels": tokens}
    return _private(work, length, batch, None, [length] * work.batch, strategy, max_logit_bytes)


def checkpointed(work: Work, length: int, make: Method) -> tuple[nn.Module, Step]:
    """As `make`, with gradient checkpointing."""
    return make(replace(work, checkpointing=True), length)


def compiled(work: Work, length: int, make: Method) -> tuple[nn.Module, Step]:
    """As `make`, with the model given to `torch.compile`."""
    return make(replace(work, compiled=True), length)


def text_lengths(work: Work) -> list[int]:
    """Tokens of each text of the physical batch, drawn from BANKING77's; the same at every call."""
    place = torch.rand(work.batch, generator=torch.Generator().manual_seed(2)) * (len(BANKING77) - 1)
    quantiles, below = torch.tensor(BANKING77, dtype=torch.float32), place.long()
    lengths: list[int] = torch.lerp(quantiles[below], quantiles[below + 1], place - below).round().int().tolist()
    return lengths


def padded(work: Work, length: int, *, private: bool) -> tuple[nn.Module, Step]:
    """The model, and a step of it on texts padded to the longest, which has this length."""
    lengths = text_lengths(work)
    ids = tokens_of(work, length)
    mask = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).to(work.device)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, IGNORED)}
    return _private(work, length, batch, None, lengths) if private else _plain(work, length, batch, "sdpa")


def padding_free(work: Work, length: int, *, private: bool) -> tuple[nn.Module, Step]:
    """The model, and a step of it on the same texts in one row, as `DataCollatorWithFlattening` makes it."""
    lengths = text_lengths(work)
    ids = torch.cat([row[:n] for row, n in zip(tokens_of(work, length), lengths, strict=True)]).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(work.device)
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}
    units = torch.tensor([0, *lengths]).cumsum(0).int()
    return _private(work, length, batch, units, lengths) if private else _plain(work, length, batch, "dp_flash")


def _plain(work: Work, length: int, batch: dict[str, Tensor], attention: str) -> tuple[nn.Module, Step]:
    model = model_of(work, length, attention)
    optimizer = _optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        with _precision(work):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    return model, step


def _private(
    work: Work,
    length: int,
    batch: dict[str, Tensor],
    units: Tensor | None,
    lengths: list[int],
    strategy: Strategy = "bookkeeping",
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> tuple[nn.Module, Step]:
    model = model_of(work, length, "dp_flash")
    optimizer = _optimizer(model)
    # The mean over rows, as the other methods take it, but without a pass over the gradients: that comes with the noise.
    norm = MAX_GRAD_NORM / work.batch
    engine = ClippingEngine(model, max_grad_norm=norm, strategy=strategy, max_logit_bytes=max_logit_bytes)
    scale = 1 / (torch.tensor(lengths, device=work.device) - 1) / work.batch

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        with _precision(work):
            loss: Tensor = model(**batch, num_items_in_batch=1).loss
        return loss

    def step() -> None:
        optimizer.zero_grad()
        engine.backward(loss_fn, batch, units, scale)
        optimizer.step()

    return model, step


def two_backwards(work: Work, length: int) -> tuple[nn.Module, Step]:
    """The model, and a step of ghost clipping as fastDP does it (Li et al. 2022, arXiv 2110.05679), by hooks and torch alone.

    One forward pass; a backward pass that takes the gradients of layers' outputs, from which come the norms; and an ordinary
    one of the losses times their clip factors. The norms are computed as for dp_flash, by the same kernels.
    """
    model, tokens = model_of(work, length, "sdpa"), tokens_of(work, length)
    optimizer = _optimizer(model)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, inputs[0].detach(), output))

    for layer in model.modules():
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            layer.register_forward_hook(remember)

    def step() -> None:
        optimizer.zero_grad()
        with _precision(work):
            logits = model(input_ids=tokens).logits
        entropies = nn.functional.cross_entropy(logits[:, :-1].mT.float(), tokens[:, 1:], reduction="none")
        losses = entropies.mean(1)
        outputs = torch.autograd.grad(losses.sum(), [output for *_, output in calls], retain_graph=True)
        norms = sum(_squared_norms(layer, x, g) for (layer, x, _), g in zip(calls, outputs, strict=True))
        assert isinstance(norms, Tensor)
        calls.clear()
        factors = (MAX_GRAD_NORM / norms.sqrt()).clamp(max=1.0) / work.batch
        (losses * factors).sum().backward()
        optimizer.step()

    return model, step


def _squared_norms(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """(rows,) of a layer with one parameter. x: its input (rows, length, ...). g: its output's gradient (rows, length, p)."""
    sizes = (x.shape[1],) * len(x)
    if isinstance(layer, nn.Embedding):
        return embedding_squared_norms(x.flatten(), g.flatten(0, 1), sizes)
    if isinstance(layer, nn.Linear):
        return linear_squared_norms(x.flatten(0, 1), [g.flatten(0, 1)], sizes)[0]
    x = nn.functional.rms_norm(x.float(), x.shape[-1:], eps=layer.variance_epsilon)  # type: ignore[arg-type]
    return (g.float() * x).sum(1).square().sum(1)


def opacus(work: Work, length: int, mode: str) -> tuple[nn.Module, Step]:
    """The model, and a step of it with Opacus' PrivacyEngine; `mode` is its grad_sample_mode, "hooks" or "ghost".

    Noise multiplier 0, so that no method's step contains noise.
    """
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model, tokens = model_of(work, length, "sdpa"), tokens_of(work, length)
    warnings.filterwarnings("ignore", message="Secure RNG turned off|Full backward hook is firing")  # on every use of Opacus
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=_optimizer(model),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(tokens), batch_size=work.batch),
        noise_multiplier=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    private, optimizer = made[:2]
    criterion = functools.partial(made[2], shape=(work.batch, length - 1)) if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        with _precision(work):
            logits = private(input_ids=tokens).logits
        criterion(logits[:, :-1].reshape(-1, work.vocabulary).float(), tokens[:, 1:].reshape(-1)).backward()
        optimizer.step()

    return model, step


Methods = Mapping[str, Method]  # ratios are to the first
METHODS: Methods = {
    BASELINE: non_private,
    "dp_flash": dp_flash,
    "Opacus hooks": functools.partial(opacus, mode="hooks"),
    "Opacus ghost": functools.partial(opacus, mode="ghost"),
}
ON_TEXTS: Methods = {
    "dp_flash, padded": functools.partial(padded, private=True),
    "dp_flash, padding-free": functools.partial(padding_free, private=True),
    "non-private, padded": functools.partial(padded, private=False),
    "non-private, padding-free": functools.partial(padding_free, private=False),
}
FULL: Methods = {
    BASELINE: non_private,
    "dp_flash": dp_flash,
    "dp_flash two_pass": functools.partial(dp_flash, strategy="two_pass"),
    "ghost clipping, two backwards": two_backwards,
    "Opacus ghost": functools.partial(opacus, mode="ghost"),
}
LORA: Methods = {name: FULL[name] for name in (BASELINE, "dp_flash", "dp_flash two_pass", "Opacus ghost")}


COMPILE: Methods = {
    BASELINE: non_private,
    f"{BASELINE}, compiled": functools.partial(compiled, make=non_private),
    "dp_flash": dp_flash,
    "dp_flash, compiled": functools.partial(compiled, make=dp_flash),
}
VOCABULARY: Methods = {
    BASELINE: non_private,
    "dp_flash, logits in blocks": functools.partial(dp_flash, max_logit_bytes=0),
    "dp_flash, all logits": functools.partial(dp_flash, max_logit_bytes=2**62),
}
_STRATEGIES: Methods = {name: FULL[name] for name in (BASELINE, "dp_flash two_pass", "dp_flash")}
MEMORY: Methods = {
    **{f"{name}, checkpointing": functools.partial(checkpointed, make=make) for name, make in _STRATEGIES.items()},
    **_STRATEGIES,
}


class Preset(NamedTuple):
    """What is trained, and how."""

    work: Work
    methods: Methods


_CUDA = Work(
    device="cuda",
    autocast=True,
    layers=8,
    width=2048,
    vocabulary=32000,
    batch=8,
    lengths=(512, 2048),
    threads=os.cpu_count() or 1,
)
PRESETS = {
    "cpu": Preset(replace(_CUDA, device="cpu", autocast=False, width=512, vocabulary=8192, lengths=(128, 512)), METHODS),
    "memory": Preset(
        replace(_CUDA, device="cpu", autocast=False, layers=12, width=768, vocabulary=8192, batch=4, lengths=(256,)), MEMORY
    ),
    "cuda": Preset(_CUDA, METHODS),
    "full": Preset(replace(_CUDA, batch=16, lengths=(512,)), FULL),
    "lora": Preset(replace(_CUDA, batch=16, lengths=(512,), lora=16), LORA),
    "compile": Preset(replace(_CUDA, device="cpu", autocast=False, width=512, vocabulary=8192, lengths=(128,)), COMPILE),
    "vocab": Preset(replace(_CUDA, layers=2, vocabulary=2**17, lengths=(1024,)), VOCABULARY),
}


def measure(work: Work, methods: Methods, *, repeats: int, advance: Callable[[], None] = lambda: None) -> list[Row]:
    """A row for every length and method, in that order; `advance` is called after each of `turns(...)` turns."""
    torch.set_num_threads(work.threads)
    rows = []
    first = next(iter(methods))
    for length in work.lengths:
        tokens = sum(text_lengths(work)) if methods is ON_TEXTS else work.batch * length
        memory = {method: peak_memory(work, length, method, advance) for method in methods}
        makers = {name: functools.partial(_step_of, make, work, length) for name, make in methods.items()}
        seconds, notes = take_turns(
            makers, functools.partial(_timed, work), _MEASURED_SECONDS[work.device], repeats=repeats, advance=advance
        )
        for method in methods:
            if method in notes:
                rows.append(Row(length=length, method=method, note=notes[method]))
                continue
            own, base = memory[method], memory[first]
            rows.append(
                Row(
                    length=length,
                    method=method,
                    tokens_per_second=tokens / statistics.median(seconds[method]),
                    ratio=statistics.median(b / s for b, s in zip(seconds[first], seconds[method], strict=True)),
                    memory=own,
                    memory_ratio=own / base if own is not None and base else None,
                )
            )
    return rows


def turns(work: Work, methods: Methods, repeats: int) -> int:
    """How often `measure` calls `advance`."""
    return len(work.lengths) * len(methods) * (2 + repeats)


def _step_of(make: Method, work: Work, length: int) -> Step:
    return make(work, length)[1]


def take_turns(
    makers: Mapping[str, Callable[[], Step]],
    timed: Callable[[Step, int], float],
    turn_seconds: float,
    *,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per step of each method in each round, and why a peer does not run.

    makers: what makes each method's step. timed: seconds per step of so many. turn_seconds: how long a turn lasts at least.
    """
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for name, make in makers.items():
        try:
            step = make()
            step()
            steps[name] = step
        except ImportError as error:
            if name.startswith(_OURS):
                raise
            notes[name] = f"not installed: {error.name}" if error.name else "not installed"
        except Exception as error:
            if name.startswith(_OURS):
                raise
            notes[name] = f"failed: {' '.join(str(error).split())[:60]}"
        advance()
    counts = {name: math.ceil(turn_seconds / timed(step, 1)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(repeats):
        for name in order:
            steps[name]()  # untimed: caches and the allocator still hold what the method before left there
            seconds[name].append(timed(steps[name], counts[name]))
            advance()
        order = order[1:] + order[:1]
    for _ in range(repeats * len(notes)):
        advance()
    return seconds, notes


def _timed(work: Work, step: Step, count: int) -> float:
    _synchronize(work)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _synchronize(work)
    return (time.perf_counter() - start) / count


def peak_memory(work: Work, length: int, method: str, advance: Callable[[], None] = lambda: None) -> int | None:
    """Bytes that two steps of a method need at their peak; None if it fails.

    Off the GPU it is what a process of their own holds at its peak, and what it frees goes back at once: what glibc would keep
    for later depends on the sizes and the order of all that was freed before.
    """
    try:
        if work.device == "cuda":
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            _two_steps(work, length, method)
            return torch.cuda.max_memory_allocated() - before
        command = [sys.executable, "-m", "dp_flash_hf.benchmarks.training", json.dumps(asdict(work)), str(length), method]
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16), **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return int(done.stdout) if done.returncode == 0 else None
    except Exception:  # the same method's turn says why
        return None
    finally:
        advance()


def _print_peak_memory(work: Work, length: int, method: str) -> None:
    torch.set_num_threads(work.threads)
    if method.startswith("Opacus"):
        importlib.import_module("opacus")  # its own memory is not the step's
    if work.lora:
        importlib.import_module("peft")
    before = _resident_peak()
    _two_steps(work, length, method)
    print(_resident_peak() - before)


def _two_steps(work: Work, length: int, method: str) -> None:
    known = {name: make for preset in PRESETS.values() for name, make in preset.methods.items()} | {**ON_TEXTS}
    _, step = known[method](work, length)
    step()
    step()


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at what the parent process held
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_milliseconds(work: Work, length: int) -> float:
    """What one logical batch takes besides, whatever its size: noise on every gradient, and the division by the batch size."""
    gradients = [torch.zeros_like(p) for p in model_of(work, length, "sdpa").parameters() if p.requires_grad]
    generator = fresh_generator(work.device)

    def release() -> None:
        add_gaussian_noise_(gradients, std=1.0, generator=generator)
        for gradient in gradients:
            gradient.div_(work.batch)

    return 1000 * statistics.median(_timed(work, release, 1) for _ in range(3))


def require_device(device: str, remedy: str) -> None:
    """Raise ValueError where this device is not."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: no CUDA device here; {remedy}")


def print_table(preset: Preset, *, repeats: int) -> None:
    """Measure, and print one table with what was measured under it."""
    work, methods = preset
    on_texts = methods is ON_TEXTS
    if on_texts:
        work = replace(work, lengths=(max(text_lengths(work)),))
    require_device(work.device, "use --preset cpu, or --device cpu with --layers, --width and --vocabulary that suit it")
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=turns(work, methods, repeats))
        rows = measure(work, methods, repeats=repeats, advance=lambda: progress.advance(task))
    table = Table()
    for column in ("length", "method", "tokens/s", "ratio", "peak MiB", "ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        if row.length != work.lengths[0] and row.method == next(iter(methods)):
            table.add_section()
        figures = (
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else row.note,
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            f"{row.memory / 2**20:,.0f}" if row.memory is not None else "",
            f"{row.memory_ratio:.2f}" if row.memory_ratio is not None else "",
        )
        table.add_row(str(row.length), row.method, *figures)
    Console().print(table)
    model = model_of(work, work.lengths[0], "sdpa")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    adapters = f", of which {trained:.1f} M are adapters of rank {work.lora}, and trained" if work.lora else ""
    where = f"{work.threads} CPU threads" if work.device == "cpu" else torch.cuda.get_device_name()
    release = release_milliseconds(work, work.lengths[0])
    print(
        f"Llama decoder: {work.layers} layers of width {work.width}, vocabulary {work.vocabulary}, untied head, "
        f"{size:.1f} M parameters{adapters}.\n"
        f"Batch {work.batch}, {'bfloat16 autocast' if work.autocast else 'float32'}, {where}, torch {torch.__version__}.\n"
        "Timed: forward, backward, clipping and AdamW step of one physical batch; medians of "
        f"{repeats} rounds, methods taking turns.\n"
        f"Not in it: noise and division, done once per logical batch whatever its size; they take {release:.0f} ms.\n"
        "Peak memory: of two steps, "
        f"{'as allocated by torch' if work.device == 'cuda' else 'in a process of their own, beyond the imported libraries'}.\n"
        f"Ratios: to {next(iter(methods))}."
    )
    if on_texts:
        lengths = text_lengths(work)
        print(
            f"Texts: {len(lengths)} of {min(lengths)} to {max(lengths)} tokens, as long as BANKING77's; tokens/s counts their "
            f"{sum(lengths)} tokens, not the {len(lengths) * max(lengths) - sum(lengths)} of padding."
        )


@contextmanager
def _precision(work: Work) -> Iterator[None]:
    with torch.autocast(work.device, torch.bfloat16, enabled=work.autocast):
        yield


def _synchronize(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()


def _work_from_json(text: str) -> Work:
    values: dict[str, Any] = json.loads(text)
    return replace(Work(**values), lengths=tuple(values["lengths"]))


if __name__ == "__main__":
    _print_peak_memory(_work_from_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
