"""`attn_implementation="dp_flash"`: exact attention in which no unit can see another, forward or backward.

    import dp_flash_hf                                       # registers the name
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dp_flash")

Rows of a batch are separate by construction. Units packed into one row are computed segment by segment, so that not even
a NaN crosses: a mask alone does not stop it, because 0 * NaN = NaN in weights @ value and in every product of the backward.
Segments come from `cu_seq_lens_q/k`, from the mask (a block-diagonal mask is cut into its blocks) and from `position_ids`
that restart (some models, GPT-OSS among them, do not tell their mask about these). Padding (keys nobody sees, queries that
see nothing) is zeroed for the same reason.

`dp_attention` is the same thing under a name without "flash": some models treat any name with that word as the flash-attn
package and refuse what this implementation can do (Llama 4's chunks beyond one chunk, HRM's prefix masks, ESM-C's chains).

A module on which `privatize` put a site releases a noised output of clipped values instead; see `Site`.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from dp_flash_hf import patching
from dp_flash_hf.attention_implementations import Pattern, Segment, Segments, Sight, causal_mask, compute
from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.kernels.attention import Release

NAMES = ("dp_flash", "dp_attention")

# Keyword arguments of transformers that change what attention computes, and that nothing below implements.
_UNHANDLED = ("block_indices", "sinks", "cache", "block_table", "head_mask")

# Model types that extend their mask by additive terms, which a bool mask silently turns around.
_ADDS_TO_ITS_MASK = ("deepseek_v4",)
# Attribute of a model that is to be patched, from the beginning of its construction to the end.
_WANTED = "_dp_flash_wanted"
# Model types that cannot do without a mask: those that do not support torch's SDPA by themselves, found while models are built.
ALWAYS_MASKED: set[str] = set()


class Call(NamedTuple):
    """What a privatised module is about to compute."""

    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, E)
    segments: Segments | None  # per row of the batch
    blind: Tensor | None  # (B or 1, 1, Q, 1), True at queries that see no key
    pattern: Pattern
    picked: bool  # whether an indexer chose the keys


class Site(Protocol):
    """What makes a module private: its attribute `SITE`, put there by `privatize`."""

    def open(self, call: Call) -> tuple[Release, float | None] | Tensor:
        """Account a call, before it is computed: how to release it, and its soft-cap. Or the output to return instead of any.

        Raises UnsupportedError for a call whose sensitivity is not known.
        """


SITE = "_dp_flash_site"


def dp_flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with Transformers; see `AttentionInterface` for who calls it.

    Args:
        module: the calling layer; `module.is_causal` counts where `is_causal` is None.
        query: (B, H, Q, D).
        key: (B, G, K, D), heads not repeated: H is a multiple of G.
        value: (B, G, K, E).
        attention_mask: what `dp_flash_mask` returned: bool, broadcastable to (B, H, Q, K), True where a query may see a key;
            or a float mask of that shape, added to the logits; or (B, K), True at real keys. A 4-D mask says everything:
            `is_causal` and `sliding_window` are not applied on top of it. None: all keys, or those up to the diagonal.
        dropout: probability of dropping an attention weight; 0 outside training.
        scaling: factor on the logits; None means D ** -0.5.
        is_causal: None means `module.is_causal`.
        sliding_window: without a mask, a causal query sees the last `sliding_window` keys only.
        softcap: logits become softcap * tanh(logits / softcap) before the mask.
        s_aux: (H,), one logit per head without a value (attention sinks); trainable.
        position_bias: broadcastable to (B, H, Q, K), added to the scaled logits; trainable.
        indices: (B, Q, N) keys picked by a sparse-attention indexer; a query sees only these, and only if the mask agrees.
        cu_seq_lens_q: (n + 1,) boundaries of the segments packed into the one row of the batch, 0 first and Q last.
        cu_seq_lens_k: the same for keys; None means `cu_seq_lens_q`.
        max_length_q, max_length_k: longest segments; models pass them, the boundaries already say so.
        position_ids: (B or 1, Q); without `cu_seq_lens_q`, a position below the one before starts a segment, and so does one
            that repeats without being above the first of its row.
        output_attentions: only False.
        kwargs: what other layers of the model need; nothing that changes attention.

    Returns:
        ((B, Q, H, E) in the dtype of `value`, None). Zero for queries that see nothing.

    Raises:
        UnsupportedError: an argument that changes the result is not implemented, or its meaning here would be ambiguous.
        ValueError: shapes or boundaries that contradict each other.
    """
    if not getattr(module, "_dp_flash_ran", False):
        module._dp_flash_ran = True  # type: ignore[assignment]  # read by _check_ran
    for name in _UNHANDLED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f'dp_flash attention does not implement {name}; use attn_implementation="eager"')
    if output_attentions:
        raise UnsupportedError('dp_flash attention forms no attention weights to return; use attn_implementation="eager"')
    n_queries, n_keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and n_queries > 1
    square = n_queries == n_keys > 1

    mask = attention_mask
    if causal and not square and (mask is None or mask.ndim == 2):
        raise UnsupportedError(
            f"{type(module).__name__} asks for causal attention of {n_queries} queries over {n_keys} keys without a 4-D mask: "
            "it is not known whether the first or the last of them line up; pass a 4-D attention_mask"
        )
    if mask is not None and mask.ndim == 2:
        mask = _mask_of_padding(mask, causal)
    elif mask is not None and mask.ndim != 4:
        raise invalid(
            "attention_mask", expected="2 or 4 dimensions", actual=tuple(mask.shape), remedy="broadcast it to (B, H, Q, K)"
        )
    if mask is None and sliding_window is not None and n_keys > sliding_window and n_queries > 1:
        if not causal:
            raise UnsupportedError(
                "a sliding window that is not causal comes as a mask, or not at all; pass a 4-D attention_mask"
            )
        mask = causal_mask(n_keys, query.device, window=sliding_window)[None, None]
    if indices is not None:
        picked = torch.zeros(indices.shape[0], 1, n_queries, n_keys, dtype=torch.bool, device=query.device)
        picked.scatter_(-1, indices.long()[:, None], True)
        if mask is None and causal:
            mask = causal_mask(n_keys, query.device)[None, None]
        mask = picked if mask is None else mask & picked

    layout = _Layout(None, None, None, 0)
    if mask is not None and mask.dtype == torch.bool and n_queries > 1:  # for one (decoding), copying the keys costs too much
        layout = once(mask, _layout_of_mask, n_queries)
    if attention_mask is not None and causal and square and sliding_window is not None and layout.reach >= sliding_window:
        raise UnsupportedError(
            f"{type(module).__name__} has a sliding window of {sliding_window} that its attention mask ignores, so whether it "
            "applies would depend on the other rows of the batch; set sliding_window to None or pass a mask that contains it"
        )
    segments = layout.segments and layout.segments * (query.shape[0] // len(layout.segments))
    if cu_seq_lens_q is not None:
        ends = once(cu_seq_lens_q, _to_list), once(cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k, _to_list)
        segments = _segments_of_ends(*ends, query, key, causal, mask is not None, segments)
    elif square and position_ids is not None and position_ids.shape in ((1, n_keys), (len(query), n_keys)):
        restarts = once(position_ids, _lengths_between_restarts)
        if restarts is not None and (attention_mask is None or (causal and _crosses_restarts(mask, position_ids))):
            if attention_mask is not None and attention_mask.ndim == 4 and not hasattr(attention_mask, "made_by_dp_flash"):
                raise UnsupportedError(
                    f"{type(module).__name__} was given position_ids that restart, as for several units in one row, and a mask "
                    "under which these see each other; separate them in the mask, or give position_ids that do not restart"
                )
            sight: Sight = "mask" if mask is not None else "causal" if causal else "all"
            segments = tuple(tuple(Segment(n, n, sight) for n in row) for row in restarts) * (len(query) // len(restarts))

    if layout.unseen is not None:
        key, value = key.masked_fill(layout.unseen, 0), value.masked_fill(layout.unseen, 0)
    if layout.blind is not None:
        query = query.masked_fill(layout.blind, 0)
    pattern = Pattern(
        mask=mask,
        causal=causal and mask is None,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
    )
    site: Site | None = getattr(module, SITE, None)
    release = None
    if site is not None:
        opened = site.open(Call(query, key, value, segments, layout.blind, pattern, indices is not None))
        if isinstance(opened, Tensor):
            return opened.transpose(1, 2).contiguous(), None
        release, softcap = opened
        pattern = replace(pattern, softcap=softcap)
    output = compute(query, key, value, segments, pattern, release)
    if layout.blind is not None:  # some backends average over all keys instead; noise there would say nothing
        output = output.masked_fill(layout.blind, 0)
    return output.transpose(1, 2).contiguous(), None


def dp_flash_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function registered with Transformers: `sdpa_mask`, and padding tokens of a causal model see nothing.

    Returns None where causality (or full sight) says it all, else (B, 1, Q, K) bool, True where a query may see a key.
    Takes the arguments of `transformers.masking_utils.sdpa_mask`.
    """
    queries, keys, padding = kwargs.get("q_length"), kwargs.get("kv_length"), kwargs.get("attention_mask")
    # Without a mask, the diagonal of unequal lengths could lie anywhere, and a model that was never meant to run without
    # one may call its causal layers not causal (BigBird-Pegasus).
    if (queries != keys and queries != 1) or getattr(kwargs.get("config"), "model_type", None) in ALWAYS_MASKED:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    # Only the causal mask builders leave this argument out; for the others the queries may be another sequence than the keys.
    causal = "allow_is_bidirectional_skip" not in kwargs
    if mask is not None and causal and padding is not None and queries == keys and padding.shape == (mask.shape[0], keys):
        mask = mask & padding[:, None, :, None].to(torch.bool)
    if mask is not None:
        mask.made_by_dp_flash = True  # type: ignore[attr-defined]
    return mask


def is_packed(position_ids: Tensor | None, attention_mask: Tensor | None = None) -> bool:
    """Whether `position_ids` (B, S) say that a row holds several units, which `attention_mask` (B, S) does not keep apart.

    Where the token before is padding, a position that starts again is just that; a 4-D mask says everything.
    """
    if position_ids is None or position_ids.ndim != 2 or (attention_mask is not None and attention_mask.ndim != 2):
        return False
    restarts = _restarts(position_ids)
    if attention_mask is not None and attention_mask.shape[1] == position_ids.shape[1]:
        restarts = restarts & attention_mask[:, :-1].to(torch.bool)
    return bool(restarts.any())


def register() -> None:
    """Make the names in `NAMES` known to Transformers; calling it again changes nothing.

    Registers the attention and the mask function, and teaches `PreTrainedModel` that the names need no flash-attn package
    and no replacement by a kernel from the Hub. All other names behave as before.

    Raises UnsupportedError if this version of Transformers chooses attention implementations in an unknown way.
    """
    for name in NAMES:
        AttentionInterface.register(name, dp_flash_attention)
        AttentionMaskInterface.register(name, dp_flash_mask)
    _wrap("_check_and_adjust_attn_implementation", ("self", "attn_implementation", "is_init_check"), _skip_flash_packages)
    _wrap("get_correct_attn_implementation", ("self", "requested_attention", "is_init_check"), _arm_check)
    _wrap("set_attn_implementation", ("self", "attn_implementation"), _patch_or_raise)
    _wrap("post_init", ("self",), _patch_once_built)


def status(model: nn.Module) -> str:
    """How a model stands to this attention, for reports.

    "called": by a forward of this model. "patched": through a file of `patches/`. "not called yet": asked for, and nothing is
    known against it. "not asked for": the model runs another implementation, though it could run this one.
    "no softmax attention": there is nothing to replace. "own attention code: ...": why it cannot be replaced.
    """
    why = patching.reason(model)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not any(part.config._attn_implementation in NAMES for part in parts):
        return why or "not asked for"
    if patching.is_patched(model):
        return "patched"
    return "called" if any(getattr(module, "_dp_flash_ran", False) for module in model.modules()) else why or "not called yet"


# --- what a call asks for -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """What a bool mask (B, H, Q, K) implies; B and H may be 1. Holds no view of the mask, which it must not keep alive."""

    unseen: Tensor | None  # (B, 1, K, 1), True at keys no query sees; None if there are none
    blind: Tensor | None  # (B, 1, Q, 1), True at queries that see no key; None if there are none
    segments: Segments | None  # None if a row is not made of blocks of queries and the keys they see
    reach: int  # how far behind itself a query sees at most; for Q == K


def _layout_of_mask(mask: Tensor, n_queries: int) -> _Layout:
    sight = mask.any(1)
    seen, sees = sight.any(1), sight.any(2)
    unseen = None if bool(seen.all()) else ~seen[:, None, :, None]
    blind = None if bool(sees.all()) else ~sees[:, None, :, None]
    constant = bool((mask == sight[:, None, :1]).all())
    if sight.shape[1] != sight.shape[2]:
        return _Layout(unseen, blind, _segments_of_keys(seen, n_queries) if constant else None, 0)

    size = sight.shape[1]
    place = torch.arange(size, device=mask.device).expand_as(sees)
    bits = sight.to(torch.uint8)
    first = torch.where(sees, bits.argmax(-1), place)
    reach = int((place - first).max())
    if constant:
        return _Layout(unseen, blind, _segments_of_keys(seen, size), reach)
    last = torch.where(sees, size - 1 - bits.flip(-1).argmax(-1), place)
    # A block starts where nobody from here on looks back across, and nobody before looks ahead across.
    looks_back = first.flip(-1).cummin(-1).values.flip(-1)
    looks_ahead = last.cummax(-1).values
    starts = looks_back >= place
    starts[:, 1:] &= looks_ahead[:, :-1] < place[:, 1:]
    # What a mask without holes would be, block by block, and whether a query's sight is that.
    block = starts.cumsum(1)
    behind = place[:, :, None] - place[:, None, :]
    full = block[:, :, None] == block[:, None, :]
    sights = [full, full & (behind >= 0), full & (behind >= 0) & (behind <= reach)]
    agrees = [(mask == one[:, None]).all(3).all(1) for one in sights]

    rows = []
    for is_start, can_see, *agree in torch.stack([starts, sees, *agrees], 1).tolist():
        edges = [i for i, start in enumerate(is_start) if start and (can_see[i] or i == 0 or can_see[i - 1])] + [size]
        rows.append(tuple(_block(a, b, can_see, agree, reach + 1) for a, b in pairwise(edges)))
    return _Layout(unseen, blind, tuple(rows), reach)


def _block(start: int, stop: int, can_see: list[bool], agrees: list[list[bool]], window: int) -> Segment:
    """What the block [start, stop) of one row's mask says; agrees: whether each query sees all, all behind, or a window."""
    length = stop - start
    if not any(can_see[start:stop]):
        return Segment(length, length, "nothing")
    all_of_it, causal, windowed = (all(agree[start:stop]) for agree in agrees)
    if all_of_it or causal:
        return Segment(length, length, "all" if all_of_it else "causal")
    return Segment(length, length, "mask", window if windowed else None)


def _segments_of_keys(seen: Tensor, queries: int) -> Segments | None:
    """Rows whose queries all see the same keys (B, K), if these follow one another."""
    rows = []
    for row in seen.tolist():
        first, count = row.index(True) if any(row) else 0, sum(row)
        if not all(row[first : first + count]):
            return None
        after = len(row) - first - count
        rows.append((Segment(0, first, "nothing"), Segment(queries, count, "all"), Segment(0, after, "nothing")))
    return tuple(rows)


def _segments_of_ends(
    ends_q: list[int], ends_k: list[int], query: Tensor, key: Tensor, causal: bool, masked: bool, blocks: Segments | None
) -> Segments:
    for name, ends, size in (("cu_seq_lens_q", ends_q, query.shape[2]), ("cu_seq_lens_k", ends_k, key.shape[2])):
        if not ends or ends[0] != 0 or ends[-1] != size or any(b < a for a, b in pairwise(ends)) or len(ends) != len(ends_q):
            raise invalid(
                name, expected=f"boundaries rising from 0 to {size}", actual=ends, remedy="give every token one segment"
            )
    if query.shape[0] != 1:
        raise invalid("cu_seq_lens_q", expected="a batch of one packed row", actual=query.shape[0], remedy="flatten the batch")
    lengths = [(q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    if causal and any(q != k for q, k in lengths):
        raise UnsupportedError("causal segments with different numbers of queries and keys; pass equal cu_seq_lens_q and _k")
    if blocks is not None and ends_q == ends_k:
        starts, start = {0}, 0
        for part in blocks[0]:
            start += part.queries
            starts.add(start)
        if starts.issuperset(ends_q):  # the mask is at least as fine, and already known block by block
            return blocks
    sight: Sight = "mask" if masked else "causal" if causal else "all"
    return (tuple(Segment(q, k, sight) for q, k in lengths),)


def _restarts(position_ids: Tensor) -> Tensor:
    """(B, S - 1) bool: whether token i + 1 begins a segment. A repeated position may be an image's, unless it is the first."""
    step = position_ids.diff(dim=-1)
    return (step < 0) | ((step == 0) & (position_ids[:, 1:] <= position_ids[:, :1]))


def _lengths_between_restarts(position_ids: Tensor) -> list[list[int]] | None:
    restarts = _restarts(position_ids)
    if not bool(restarts.any()):
        return None
    size = position_ids.shape[-1]
    edges = ([0, *(i + 1 for i, restart in enumerate(row) if restart), size] for row in restarts.tolist())
    return [[b - a for a, b in pairwise(row)] for row in edges]


def _crosses_restarts(mask: Tensor | None, position_ids: Tensor) -> bool:
    """Whether a segment's first token sees the token before it: the mask was made without looking at `position_ids`."""
    assert mask is not None
    sees_previous = mask.diagonal(-1, 2, 3)
    if mask.dtype != torch.bool:
        sees_previous = sees_previous > torch.finfo(mask.dtype).min / 2
    return bool((sees_previous.any(1) & _restarts(position_ids)).any())


def _mask_of_padding(padding: Tensor, causal: bool) -> Tensor:
    real = padding.to(torch.bool)
    mask = real[:, None, None, :]
    return mask & causal_mask(real.shape[1], real.device) & real[:, None, :, None] if causal else mask


def _to_list(tensor: Tensor) -> list[int]:
    ends: list[int] = tensor.tolist()
    return ends


_T = TypeVar("_T")
_KNOWN: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()


def once(tensor: Tensor, work: Callable[..., _T], *args: Any) -> _T:
    """`work(tensor, *args)`, computed once while the tensor lives unchanged: all layers of a forward are given the same one."""
    if tensor.is_inference():  # has no version to notice a change by
        return work(tensor, *args)
    known = _KNOWN.setdefault(tensor, {})
    if (work, args) not in known or known[work, args][0] != tensor._version:
        known[work, args] = (tensor._version, work(tensor, *args))
    result: _T = known[work, args][1]
    return result


# --- what Transformers has to be taught -----------------------------------------------------------------------------------


def _wrap(method: str, parameters: tuple[str, ...], wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(PreTrainedModel, method, None)
    if getattr(original, "_wrapped_by_dp_flash", False):
        return
    found = tuple(inspect.signature(original).parameters) if original is not None else ()
    if original is None or found[: len(parameters)] != parameters:
        raise UnsupportedError(
            f"transformers {transformers.__version__} does not choose attention implementations through "
            f"PreTrainedModel.{method}({', '.join(parameters)}, ...) but {found}; use a version that dp-flash-hf is tested with"
        )
    wrapped = functools.wraps(original)(wrapper(original))
    wrapped._wrapped_by_dp_flash = True  # type: ignore[attr-defined]
    setattr(PreTrainedModel, method, wrapped)


def _skip_flash_packages(original: Callable[..., str]) -> Callable[..., str]:
    def check(
        self: PreTrainedModel, attn_implementation: str | None, is_init_check: bool = False, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation in NAMES:  # the original would look for a flash-attn package, or fetch a kernel from the Hub
            checked: str = self.get_correct_attn_implementation(attn_implementation, is_init_check)
            return checked
        return original(self, attn_implementation, is_init_check, *args, **kwargs)

    return check


def _arm_check(original: Callable[..., str]) -> Callable[..., str]:
    def check(self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False) -> str:
        chosen = original(self, requested_attention, is_init_check)
        if chosen in NAMES:
            if patching.has_patch(type(self)):
                if is_init_check:  # these know no name but their own while they are built
                    setattr(self, _WANTED, chosen)
                    _arm(self)
                    return "eager"
            elif _picks_attention_itself(type(self).__module__):
                raise UnsupportedError(_never_runs(self))
            elif self.config.model_type in _ADDS_TO_ITS_MASK:
                raise UnsupportedError(f'{type(self).__name__} needs a float mask; use attn_implementation="eager"')
            elif not self._supports_sdpa:
                ALWAYS_MASKED.add(self.config.model_type)
            _arm(self)
        return chosen

    return check


def _arm(model: PreTrainedModel) -> None:
    if _check_ran not in model._forward_hooks.values():
        model.register_forward_hook(_check_ran)
    _UNCHECKED.add(model)


def _patch_once_built(original: Callable[..., None]) -> Callable[..., None]:
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _WANTED in vars(self):
            wanted = vars(self).pop(_WANTED)
            patching.patch(self, wanted)
            self.config._attn_implementation_internal = wanted
            _arm_all(self)

    return post_init


def _arm_all(model: PreTrainedModel) -> None:
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation in NAMES:
            _arm(part)


@functools.cache
def _picks_attention_itself(module_name: str) -> bool:
    """Whether this modeling file looks the name up in a table of its own, or calls flash-attn itself (Falcon, GPT-J, Git)."""
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return False
    return re.search(r"_CLASSES\[(config\._)?attn_implementation\]|_flash_attention_forward\(", source) is not None


def _patch_or_raise(original: Callable[..., None]) -> Callable[..., None]:
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        wanted = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if wanted is not None:
            vars(self).pop(_WANTED, None)
        if wanted in NAMES:  # before the original, which finds nothing to change then
            patching.patch(self, wanted)
        elif wanted is not None:
            patching.unpatch(self)
        original(self, attn_implementation, *args, **kwargs)
        if wanted in NAMES:
            if self.config._attn_implementation != wanted:  # the original only warned
                raise UnsupportedError(_never_runs(self))
            if patching.is_patched(self):
                _arm_all(self)

    return set_attn_implementation


_UNCHECKED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def _check_ran(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a model that was given one of our names: after its first forward, has our attention been called?

    Removes itself once it has. Raises UnsupportedError if not, except in a part of a larger model that has one attention
    among other parts: there the larger model decides.
    """
    assert isinstance(model, PreTrainedModel)
    if _WANTED in vars(model):
        raise UnsupportedError(
            f"{type(model).__name__} does not call self.post_init() at the end of its __init__, so it ran without "
            f'attn_implementation="{vars(model)[_WANTED]}"; call it there, or model.set_attn_implementation on the built model'
        )
    if model.config._attn_implementation not in NAMES:
        _disarm(model)
    elif any(getattr(module, "_dp_flash_ran", False) for module in model.modules()):
        for part in model.modules():
            _disarm(part)
        for whole in list(_UNCHECKED):  # a wrapper may call only its body, as PEFT does
            if whole.base_model is model:
                _disarm(whole)
    else:
        wholes = [whole for whole in _UNCHECKED if whole is not model and any(part is model for part in whole.modules())]
        if all(whole.base_model is model for whole in wholes):
            raise UnsupportedError(_never_runs(model))
        _disarm(model)


def _disarm(module: nn.Module) -> None:
    for number in [number for number, hook in module._forward_hooks.items() if hook is _check_ran]:
        del module._forward_hooks[number]
    if isinstance(module, PreTrainedModel):
        _UNCHECKED.discard(module)


def _never_runs(model: PreTrainedModel) -> str:
    why = patching.reason(model)
    if why == "no softmax attention":
        return f"{type(model).__name__} has no softmax attention; leave attn_implementation out, one unit per row"
    return (
        f"{type(model).__name__} does not take its attention from Transformers' attention interface"
        f'{"" if why is None else f" ({why})"}, so attn_implementation="{NAMES[0]}" would be ignored; '
        'use attn_implementation="eager", and one unit per row'
    )
