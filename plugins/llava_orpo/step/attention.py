"""Attention over packed shared-prefix sequences, plugged into transformers by name, and the model call that uses it.

`enable(model)` gives the text model (never the vision tower) an attention implementation registered in transformers'
`AttentionInterface` and `AttentionMaskInterface`. Called with the keyword `shared_prefix_layout` it attends as the
layout says; without it (generate(), evaluation, any plain forward) it is the implementation the user chose.

In each group the root is plain causal `scaled_dot_product_attention` (is_causal, so CUDA and CPU take their flash
kernels), and all tails are one call on the keys [root | tails] with a mask made once per batch. A T x T mask is never
made. The last layer runs only at the positions that are read (`last_layer.py`). transformers is imported only when a
model is enabled.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from ..errors import UserError
from . import last_layer
from .image_features import features_at_positions
from .packing import PackedBatch, SharedPrefixLayout

logger = logging.getLogger("llamafactory." + __name__)  # shown with or without LLaMA-Factory

BACKENDS = ("sdpa", "flex")
FLEX_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
CUDNN_FIRST = (9, 10)  # major compute capabilities whose SDPA takes cuDNN before flash (torch 2.11, sdp_utils.cpp)
_PREFIX = "shared_prefix"


def choose_backend(device: torch.device | str, requested: str = "auto") -> tuple[str, str]:
    """(backend name, reason to log). `requested`: "auto", "sdpa" or "flex".

    "auto" is "sdpa" on every device. "flex" (FlexAttention, one compiled kernel for the whole sequence) has no
    backward on CPU in torch 2.11, so asking for it there raises ValueError. There is no flash-attn backend:
    the root, where nearly all attention work is, reaches the flash kernel through SDPA already.
    """
    kind = torch.device(device).type
    if requested == "auto":
        return "sdpa", f"auto: SDPA on {kind} (root: causal flash kernel, tails: one masked call per group)"
    if requested not in BACKENDS:
        raise UserError(f"unknown shared-prefix attention {requested!r}: use 'auto', 'sdpa' or 'flex'")
    if requested == "flex" and kind != "cuda":
        raise UserError(f"shared-prefix attention 'flex' cannot train on {kind} (no backward): use 'sdpa'")
    return requested, f"requested: {requested} on {kind}"


def choose_cudnn(device: torch.device | str, wanted: bool = False) -> str:
    """Switches cuDNN's attention off for this process where SDPA would prefer it, unless `wanted`.

    Returns a line to log, which is "" where nothing was to decide: on CPUs and on GPUs before Hopper. cuDNN plans anew
    for every new shape, and nearly every packed batch has new ones: its image, question and answers decide three shapes
    a group.
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] not in CUDNN_FIRST:
        return ""
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    if wanted:
        return "cuDNN's attention is on (cudnn_attention: true)."
    return "cuDNN's attention is off: it would plan anew for every new shape (cudnn_attention: true keeps it)."


def enable(model, backend: str = "sdpa", text_only: bool = False) -> str:
    """Gives `model`'s text model the shared-prefix attention; returns its registered name.

    Takes a plain, PEFT-wrapped or DDP-wrapped model; calling it again replaces the backend. Raises ValueError
    for an unknown backend, for a model type other than llava_next (with `text_only`, any decoder is taken),
    and for attention that is not full and causal in every layer (sliding window, chunked, soft-capped), which
    it cannot serve.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown shared-prefix attention {backend!r}: use one of {BACKENDS}")
    inner = unwrap(model)
    if inner.config.model_type != "llava_next" and not text_only:
        raise UserError(
            f"shared_prefix serves model type 'llava_next', not {inner.config.model_type!r}: set shared_prefix: false"
        )
    config = inner.config.get_text_config()
    _check_full_attention(config)
    disable(model)
    name = register(config._attn_implementation, backend)
    _flex.serves = None
    for text_config in _text_configs(inner):
        text_config._attn_implementation = name
    if last_layer.serves(config):
        last_layer.enable(inner.get_decoder())
    return name


def disable(model) -> None:
    """Restores the attention implementation `enable` found. Does nothing on a model that is not enabled."""
    inner = unwrap(model)
    for config in _text_configs(inner):
        if _is_ours(config):
            config._attn_implementation = config._attn_implementation.split(":", 2)[2]
    last_layer.disable(inner.get_decoder())


def flex_fault() -> str:
    """Why FlexAttention, which was asked for, does not serve the batches since `enable`, or ""."""
    return _flex.fault if _flex.serves is False else ""


def is_enabled(model) -> bool:
    """Whether `enable` was called on this model (or on what it wraps)."""
    return _is_ours(unwrap(model).config.get_text_config())


def unwrap(model):
    """The transformers model inside DDP, DeepSpeed, FSDP and PEFT wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def packed_forward(model, packed: PackedBatch, **image_inputs) -> torch.Tensor:
    """Logits (1, K, V) at `packed.logits_to_keep`, from one forward over the packed sequence.

    image_inputs: what the model's image processor made, one entry per group that has an image, in the order of the
    groups (LLaVA-NeXT: pixel_values (num images, tiles, 3, H, W) and image_sizes, (height, width) per image, a list on
    the host); handed to the model as they are. `packed` must be on the model's device. Raises ValueError when the model
    was not enabled (it would silently ignore the layout and attend wrongly), and for another number of image features
    than image tokens.
    """
    if not is_enabled(model):
        raise ValueError("the model has no shared-prefix attention: call attention.enable first")
    inner = unwrap(model)
    trimmed = last_layer.serves(inner.config.get_text_config())
    with features_at_positions(inner, packed.image_positions) if image_inputs else nullcontext():
        return model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # 4-D masks count as ready made (masking_utils._preprocess_mask_arguments), so no T x T mask is built.
            attention_mask=packed.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            use_cache=False,
            logits_to_keep=packed.layout.read.index if trimmed else packed.logits_to_keep,
            shared_prefix_layout=packed.layout,
            **image_inputs,
        ).logits


def register(base: str, backend: str) -> str:
    """Registers shared-prefix attention over an implementation of transformers; returns the name for it.

    The name is "shared_prefix:<backend>:<base>".
    base: "sdpa", "eager", "flash_attention_2", …; it serves calls without a layout.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"{_PREFIX}:{backend}:{base}"
    AttentionInterface.register(name, partial(_attention, base=base, backend=backend))
    masks = AttentionMaskInterface()
    if base in masks:
        AttentionMaskInterface.register(name, masks[base])
    return name


def _attention(module, query, key, value, attention_mask, *, base: str, backend: str, **kwargs):
    """transformers' signature: query (B, H, T, D), key, value (B, Hkv, T, D) -> output (B, T, H, D), None."""
    layout = kwargs.pop("shared_prefix_layout", None)
    if layout is None:
        with _named(module.config, base):
            return _base_function(module, base)(module, query, key, value, attention_mask, **kwargs)
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"shared-prefix attention cannot serve {option}={kwargs[option]}")
    read_only = kwargs.pop("shared_prefix_read_only", False)
    rows = len(layout.read.positions) if read_only else layout.num_tokens
    if query.shape[0] != 1 or query.shape[2] != rows or key.shape[2] != layout.num_tokens:
        raise ValueError(
            f"the layout describes one row of {layout.num_tokens} tokens, but the model runs on query"
            f" {tuple(query.shape)} and key {tuple(key.shape)}: layout and batch do not belong together"
        )
    attend = _read_positions_attention if read_only else _flex_attention if backend == "flex" else _sdpa_attention
    output = attend(query, key, value, layout, kwargs.get("scaling"), kwargs.get("dropout", 0.0))
    return output.transpose(1, 2).contiguous(), None


def _kernel(query, key, value, scale: float | None, dropout: float):
    """SDPA with its options bound, and keys and values in the form it takes."""
    grouped_heads = query.shape[1] != key.shape[1]
    if grouped_heads and query.device.type != "cpu":
        # CUDA has no fused kernel for grouped heads with a mask, the tails' case; CPU flash takes both.
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        grouped_heads = False
    return partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale, enable_gqa=grouped_heads), key, value


def _sdpa_attention(query, key, value, layout: SharedPrefixLayout, scale: float | None, dropout: float):
    attend, key, value = _kernel(query, key, value, scale, dropout)
    # split, not slices: its backward is one concatenation instead of one zero-filled sequence per group.
    parts = [part for group in layout.groups for part in group]
    sizes = [root + tail for root, tail in layout.groups]
    queries = query.split(parts, dim=2)
    rows = zip(
        layout.groups, queries[::2], queries[1::2], key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True
    )
    outputs = []
    for ((root, _), root_query, tail_query, keys, values), mask in zip(
        rows, layout.tail_masks(query.dtype), strict=True
    ):
        if root:
            outputs.append(attend(root_query, keys[:, :, :root], values[:, :, :root], is_causal=True))
        outputs.append(attend(tail_query, keys, values, attn_mask=mask))
    return torch.cat(outputs, dim=2)


def _read_positions_attention(query, key, value, layout: SharedPrefixLayout, scale: float | None, dropout: float):
    """The last layer's attention: queries at `layout.read.positions` only, few enough for one masked call per group."""
    attend, key, value = _kernel(query, key, value, scale, dropout)
    sizes = [root + tail for root, tail in layout.groups]
    rows = zip(query.split(layout.read.counts, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
    masks = layout.read_masks(query.dtype)
    return torch.cat([attend(*parts, attn_mask=mask) for parts, mask in zip(rows, masks, strict=True)], dim=2)


def _flex_attention(query, key, value, layout: SharedPrefixLayout, scale: float | None, dropout: float):
    """FlexAttention over the whole sequence, padded to whole blocks: one compiled graph serves all batches.

    The equality of its forward is tested on a CPU, the compiled CUDA kernel and its backward (CUDA only in torch 2.11)
    by scripts/gpu.sh: right in fp32 on an H200, and not yet run there in bf16 with all states in one dtype. So the
    first call compares it with SDPA, see `_flex_fault`, and where they differ, or it does not compile, SDPA serves the
    whole run.
    """
    if dropout:
        raise UserError(f"FlexAttention has no dropout, the model asks for {dropout}: use backend 'sdpa'")
    if _flex.serves is None:
        fault = _flex_fault(query, key, value, layout, scale, backward=query.device.type != "cpu")
        _flex.serves, _flex.fault = not fault, fault
        if fault:
            logger.warning(f"attention_backend: flex is not used, SDPA serves this run: {fault}.")
    if not _flex.serves:
        return _sdpa_attention(query, key, value, layout, scale, dropout)
    return _flex_padded(query, key, value, layout, scale)


def _flex_padded(query, key, value, layout: SharedPrefixLayout, scale: float | None):
    flex = _compiled_flex() if query.device.type == "cuda" else _eager_flex()
    query, key, value = _in_one_dtype(query, key, value)
    padding = layout.flex_length - layout.num_tokens
    query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
    for states in (query, key, value):
        # Else a number of blocks that equals the number of heads is taken for the same size, and fixed with it.
        torch._dynamo.mark_static(states, (0, 1, 3))
    output = flex(query, key, value, block_mask=layout.block_mask(), scale=scale, enable_gqa=True)
    return output[:, :, : layout.num_tokens]


def _in_one_dtype(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The states in autocast's dtype, where it is on.

    With fp32 weights under autocast the rotary embedding makes fp32 queries and keys beside bf16 values. FlexAttention
    casts those by itself, but torch 2.11's compiled backward is wrong then: on an H200 its gradient of queries was off
    by 1.7 relative (pytorch issue 176025 is about the same mixture).
    """
    kind = states[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states[0].dtype
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in states)


class _FlexUse:
    """Whether FlexAttention serves this run, unknown from `enable` until the first batch, and why it does not."""

    serves: bool | None = None
    fault: str = ""


_flex = _FlexUse()


def _flex_fault(query, key, value, layout: SharedPrefixLayout, scale: float | None, backward: bool) -> str:
    """Why FlexAttention is not to be used on a batch like this one, or "": compares output and gradients with SDPA's.

    Of every token and head the difference may be `FLEX_TOLERANCE` of its norm plus the mean norm of all: several times
    what rounding, TF32 included, makes of either kernel, and far less than a token seen or hidden by mistake among few.
    """
    names = ["output", "gradient of queries", "gradient of keys", "gradient of values"][: 4 if backward else 1]

    def results(attend) -> list[torch.Tensor]:
        states = [x.detach().requires_grad_(backward) for x in (query, key, value)]
        output = attend(*states, layout, scale)
        if not backward:
            return [output]
        weights = torch.arange(output.numel(), device=output.device).cos().view(output.shape).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, states, weights)]

    # With hooks of its own: a checkpoint around the layer would count the tensors saved here among the layer's.
    with torch.set_grad_enabled(backward), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        expected = results(partial(_sdpa_attention, dropout=0.0))
        try:
            found = results(_flex_padded)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever stands in the way of compiling or running it
            return f"it fails with {type(error).__name__} ({str(error).strip().splitlines()[0] if str(error) else ''})"
    allowed = FLEX_TOLERANCE[expected[0].dtype]  # of the output: what autocast makes of fp32 queries
    for name, ours, theirs in zip(names, found, expected, strict=True):
        norms = theirs.float().norm(dim=-1)
        worst = ((ours.float() - theirs.float()).norm(dim=-1) / (norms + norms.mean())).max().item()
        if not worst <= allowed:  # NaN too
            return f"its {name} differs from SDPA's by {worst:.1e} relative, and {allowed:.0e} is allowed"
    return ""


def _eager_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable:
    return torch.compile(_eager_flex(), dynamic=True)


def _base_function(module, base: str) -> Callable:
    from transformers import AttentionInterface

    if base == "eager":  # each modeling file has its own and hands it over as the default
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]


@contextmanager
def _named(config, name: str) -> Iterator[None]:
    # flash_attention_forward looks its kernel up under the name in the module's config.
    ours, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = ours


def _text_configs(inner) -> list:
    # Both, should the decoder ever hold a copy of config.text_config instead of the object itself.
    configs = [inner.config.get_text_config(), inner.get_decoder().config]
    return configs[:1] if configs[0] is configs[1] else configs


def _is_ours(config) -> bool:
    return (config._attn_implementation or "").startswith(f"{_PREFIX}:")


def _check_full_attention(config) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise UserError(
            f"the text model ({config.model_type}) attends in a sliding window of {window} tokens, which a"
            " shared prefix cannot reproduce: set shared_prefix: false"
        )
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        raise UserError(
            f"the text model ({config.model_type}) has layers of type {sorted(others)}; a shared prefix needs"
            " full causal attention in every layer: set shared_prefix: false"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UserError(f"the text model ({config.model_type}) caps its logits: set shared_prefix: false")
