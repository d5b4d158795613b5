"""The ways of training that `dp-flash bench` compares: each makes a model, and a step of it on the same batch.

A step is the forward pass, backward pass, clipping and AdamW update of one physical batch of random tokens, or of texts as long
as real ones.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.kernels.ghost_norm import embedding_squared_norms, linear_squared_norms
from dp_flash_hf.layers.recorder import MAX_LOGIT_BYTES
from dp_flash_hf.units import IGNORED

BASELINE = "non-private"
# Tokens of the 10,003 training queries of BANKING77 (Casanueva et al. 2020, arXiv 2003.04807), in those of a BERT tokenizer:
# 33 evenly spaced quantiles.
BANKING77 = (
    *(4, 8, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13),
    *(14, 14, 15, 15, 15, 16, 17, 17, 18, 19, 21, 24, 29, 34, 42, 98),
)
MAX_GRAD_NORM = 1.0
_BATCHES_BEFORE = 8  # of ragged ones: the first are learnt from

Step = Callable[[], None]
Method = Callable[["Work", int], tuple[nn.Module, Step]]  # of some work, at a length in tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model and the batches it is trained on.

    A Llama decoder with an untied head (Opacus' ghost clipping refuses tied ones), or an encoder-decoder of another family.
    Heads are 64 wide, and feed-forward layers 4 * width.

    Attributes:
        device: "cpu" or "cuda".
        autocast: bfloat16 autocast over float32 weights.
        layers: Decoder layers, and as many of an encoder where there is one.
        width: Hidden size, a multiple of 64.
        vocabulary: Tokens that the head tells apart.
        batch: Rows of the physical batch.
        lengths: Tokens per row; everything is measured at each of them.
        threads: CPU threads.
        lora: Rank of adapters on all linear layers but the head, which are then all that is trained; 0: everything is.
        checkpointing: Layers keep their inputs only, and compute the rest again in the backward pass.
        compiled: `torch.compile` traces the whole model.
        family: "llama", "t5" or "bart".
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
    family: str = "llama"


def model_of(work: Work, length: int, attention: str) -> Any:
    """The model to train, the same weights at every call, in training mode on the device.

    Args:
        work: What is built.
        length: Tokens per row at most.
        attention: Its attn_implementation.

    Raises:
        ImportError: For `work.lora` without peft.
    """
    torch.manual_seed(0)
    if work.family != "llama":
        return _encoder_decoder(work, length, attention)
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


def _encoder_decoder(work: Work, length: int, attention: str) -> Any:
    heads, wide = max(1, work.width // 64), 4 * work.width
    built: Any
    with torch.device(work.device):
        if work.family == "t5":
            sizes: dict[str, Any] = {"d_model": work.width, "d_kv": work.width // heads, "d_ff": wide, "num_heads": heads}
            sizes |= {"num_layers": work.layers, "num_decoder_layers": work.layers, "decoder_start_token_id": 0}
            built = T5ForConditionalGeneration(T5Config(vocab_size=work.vocabulary, use_cache=False, **sizes))
        else:
            sides: dict[str, Any] = {}
            for side in ("encoder", "decoder"):
                sides |= {f"{side}_layers": work.layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": wide}
            built = BartForConditionalGeneration(
                BartConfig(vocab_size=work.vocabulary, d_model=work.width, max_position_embeddings=length + 2, **sides)
            )
    built.set_attn_implementation(attention)
    return built.train()


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
    """The model, and a step of it with `ClippingEngine` and dp_flash attention.

    Args:
        work: The model and its batches.
        length: Tokens per row.
        strategy: See `ClippingEngine`.
        max_logit_bytes: See `ClippingEngine`.
    """
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


def ragged_batch(work: Work, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Texts and labels of random lengths, from a sixth of this one on, padded to the longest of each."""
    shortest = max(1, length // 6)
    lengths, label_lengths = torch.randint(shortest, length + 1, (2, work.batch), generator=generator)

    def mask_of(own: Tensor) -> Tensor:
        return torch.arange(int(own.max())) < own.unsqueeze(1)

    mask, labelled = mask_of(lengths), mask_of(label_lengths)
    ids = torch.randint(3, work.vocabulary, mask.shape, generator=generator).masked_fill(~mask, 0)
    labels = torch.randint(3, work.vocabulary, labelled.shape, generator=generator).masked_fill(~labelled, IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: value.to(work.device) for name, value in batch.items()}


def ragged(work: Work, length: int, *, private: bool) -> tuple[nn.Module, Step]:
    """The model, and a step of it on a batch whose lengths are drawn anew at every step; hardly two have the same shapes."""
    model = model_of(work, length, "sdpa")
    optimizer, generator = _optimizer(model), torch.Generator().manual_seed(2)
    engine = ClippingEngine(model, max_grad_norm=MAX_GRAD_NORM) if private else None

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        with _precision(work):
            logits = model(**batch).logits
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def step() -> None:
        optimizer.zero_grad()
        batch = ragged_batch(work, length, generator)
        if engine is None:
            loss_fn(batch).backward()
        else:
            engine.backward(loss_fn, batch)
        optimizer.step()

    for _ in range(_BATCHES_BEFORE):
        step()
    return model, step


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
    """The model, and a step of it with Opacus' PrivacyEngine, at noise multiplier 0: no method's step contains noise.

    Args:
        work: The model and its batches.
        length: Tokens per row.
        mode: Its grad_sample_mode, "hooks" or "ghost".

    Raises:
        ImportError: Without opacus.
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


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def _precision(work: Work) -> Iterator[None]:
    with torch.autocast(work.device, torch.bfloat16, enabled=work.autocast):
        yield


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
RAGGED: Methods = {
    f"{BASELINE}, ragged": functools.partial(ragged, private=False),
    "dp_flash, ragged": functools.partial(ragged, private=True),
}
# Every method by its name; the same name is the same method wherever it appears.
BY_NAME: Methods = {**METHODS, **ON_TEXTS, **FULL, **COMPILE, **VOCABULARY, **MEMORY, **RAGGED}
