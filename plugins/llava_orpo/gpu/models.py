"""Random LLaVA-NeXT models made on the device weight by weight, batches for them, and the two steps that are compared.

Nothing is downloaded, and beside the model itself never more than one weight exists. Needs torch, transformers and
PEFT; NF4 needs bitsandbytes, LLaMA-Factory's own step LLaMA-Factory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import LlavaNextForConditionalGeneration

from ..data.anyres import AnyresGeometry
from ..plan.trace import PairSize
from ..step import attention
from ..step.model import packed_logps, prepare
from ..step.orpo import orpo_loss
from ..step.packing import TokenPair, pack
from ..step.token_logps import token_logps
from ..tiny.shapes import Geometry, config, draw
from ..upstream import recompute_first

BETA, LORA_RANK, LORA_ALPHA = 0.1, 64, 128  # as in recipes/llava16_orpo_qlora.yaml
DECODER_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTOR_LAYERS = ("linear_1", "linear_2")
LORA_TARGETS = (  # the vision tower has layers of the same names
    rf".*(language_model.*\.({'|'.join(DECODER_LAYERS)})|multi_modal_projector\.({'|'.join(PROJECTOR_LAYERS)}))"
)
IGNORED = -100  # label of a position that is not scored, LLaMA-Factory's IGNORE_INDEX
WEIGHTS = ("nf4", "bf16")
RECOMPUTE = ("all", "none")  # what both steps know; ours also recomputes the first N layers


def set_recompute(model, which: str | int) -> None:
    """Sets how many decoder layers are recomputed: one of `RECOMPUTE`, or the first N."""
    inner = attention.unwrap(model)
    if which == "none":
        inner.gradient_checkpointing_disable()
    elif which == "all" or isinstance(which, int):
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        # It also asks for gradients of every embedding's output, the frozen vision tower's too, which would then keep
        # its activations. The trained projector brings gradients to the first layer.
        with suppress(AttributeError):  # of transformers 4, which does not ask and so has nothing to take back
            inner.disable_input_require_grads()
        if isinstance(which, int):
            recompute_first(inner.get_decoder().layers, which)
    else:
        raise ValueError(f"recompute {which!r} is none of {RECOMPUTE} and no number")


@contextmanager
def _large_layers_on_meta() -> Iterator[None]:
    """Inside, the layers that hold nearly all weights are made without memory; buffers and norms are real."""
    with ExitStack() as patches:
        for kind in (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.LayerNorm):
            made = functools.partialmethod(kind.__init__, device="meta")
            patches.enter_context(mock.patch.object(kind, "__init__", made))
        yield


def random_model(geometry: Geometry, device: torch.device, dtype: torch.dtype, nf4: bool = False, seed: int = 0):
    """A LLaVA-NeXT of this geometry with random weights, made on the device one weight at a time.

    nf4: the decoder's linear layers are quantized as soon as they are drawn (double quantization, the rest in dtype).
    """
    with _large_layers_on_meta():
        model = LlavaNextForConditionalGeneration(config(geometry))
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                weight = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[key] = torch.nn.Parameter(draw(f"{name}.{key}", weight, generator), False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
        if nf4 and isinstance(module, torch.nn.Linear) and "language_model" in name and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _nf4(module, device))
    if nf4:
        model.is_loaded_in_4bit = model.is_quantized = True  # PEFT asks the first
    return model


def _nf4(linear: torch.nn.Linear, device: torch.device) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4")
    data = linear.weight.data
    linear.weight = None  # the quantized copy must not live beside it longer than it takes to make
    made.weight = Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
    if linear.bias is not None:
        made.bias = linear.bias
    return made.to(device)


def with_lora(model, seed: int = 1):
    """The model with LoRA on decoder and projector in fp32, rank 64; B is not zero, so that A gets gradients too."""
    from peft import LoraConfig, get_peft_model

    rank = min(LORA_RANK, model.config.get_text_config().hidden_size // 4)
    lora = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LORA_TARGETS)
    model = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


# batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One micro-batch in both forms.

    ours   what `step.model.packed_logps` takes: packed, image_inputs
    stock  what LLaMA-Factory's collator makes of the same pairs: every sequence with its own prompt and image, chosen
           first, padded on the right to a multiple of 8: input_ids, attention_mask, labels, pixel_values, image_sizes
    """

    ours: dict[str, Any]
    stock: dict[str, torch.Tensor]
    pairs: int


def batch_of(groups: Sequence[Sequence[PairSize]], settings, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens and pixels of these sizes, one group of pairs per image; settings: the model's config."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(
            10, min(30_000, settings.get_text_config().vocab_size), (count,), generator=generator
        ).tolist()

    token, side = settings.image_token_id, settings.vision_config.image_size
    pairs: list[list[TokenPair]] = []
    for group in groups:
        start = [*words(group[0].head), *[token] * group[0].image]
        pairs.append([])
        for size in group:
            prompt = [*start, *words(size.question)]
            pairs[-1].append(TokenPair(prompt, words(size.chosen), words(size.rejected)))
    tiles = max(group[0].tiles for group in groups)
    pixels = torch.randn(len(groups), tiles, 3, side, side, generator=generator).to(device)
    places = torch.tensor([[group[0].height, group[0].width] for group in groups])
    # as the collator hands them over: the sizes on the host
    images = {"pixel_values": pixels, "image_sizes": places.tolist()}
    ours = {"packed": pack(pairs, token).to(device), "image_inputs": images}
    image_of = [i for i, group in enumerate(groups) for _ in group] * 2
    flat = [pair for group in pairs for pair in group]
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in flat] + [
        (pair.prompt_ids, pair.rejected_ids) for pair in flat
    ]
    width = -(-max(len(prompt) + len(answer) for prompt, answer in rows) // 8) * 8
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor([*prompt, *answer])
        mask[row, :stop] = 1
        labels[row, len(prompt) : stop] = torch.tensor(answer)
    stock = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
    stock.update(pixel_values=pixels[image_of], image_sizes=places[image_of].to(device))
    return Batch(ours, stock, len(flat))


def photo(settings, width: int = 640, height: int = 480, **tokens: int) -> PairSize:
    """A pair on a photograph of this size; tokens: head, question, chosen, rejected (the plan's assumptions else)."""
    from ..plan.sizes import CHOSEN, HEAD, QUESTION, REJECTED

    geometry = AnyresGeometry.from_config(settings)
    sizes = {"head": HEAD, "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED, **tokens}
    image, tiles = geometry.num_image_tokens(width, height), geometry.num_tiles(width, height)
    return PairSize(image=image, tiles=tiles, width=width, height=height, **sizes)


# steps --------------------------------------------------------------------------------------------------------------


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Mixed precision as the recipes train, or none."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def our_loss(model, batch: Batch, device: torch.device, skip_unread: bool = True) -> torch.Tensor:
    """The shared-prefix step's ORPO loss, a scalar."""
    out = packed_logps(model, dict(batch.ours), device, skip_unread=skip_unread)
    means = out.sums / out.lengths
    return orpo_loss(*means.chunk(2), BETA).loss.mean()


def plain_loss(model, batch: Batch, device: torch.device) -> torch.Tensor:
    """The same loss from a plain forward of two whole sequences per pair, log-probs in fp32."""
    inputs = {key: value for key, value in batch.stock.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch.stock["labels"][:, 1:]
    scored = labels != IGNORED
    logps = torch.zeros(labels.shape, device=logits.device)
    logps[scored] = token_logps(logits[scored], labels[scored])
    means = logps.sum(1) / scored.sum(1)
    return orpo_loss(*means.chunk(2), BETA).loss.mean()


def stock_loss(model, batch: Batch, device: torch.device) -> torch.Tensor:
    """LLaMA-Factory's own step on the batch of its own collator's form."""
    from ..upstream import stock_orpo_loss

    return stock_orpo_loss(model, dict(batch.stock), BETA, device)


def enable_ours(model, device: torch.device, backend: str = "auto") -> Callable[..., torch.Tensor]:
    """Gives the model the shared-prefix attention; returns its loss."""
    prepare(model, device, backend)
    return our_loss


def enable_other(model, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Takes the shared-prefix attention away, and cuDNN's is as torch has it; returns `loss`."""
    attention.disable(model)
    torch.backends.cuda.enable_cudnn_sdp(True)
    return loss
