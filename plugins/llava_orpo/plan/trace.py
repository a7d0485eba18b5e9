"""One training step at its true shapes without weights: bytes alive and FLOPs, by running the step on fake tensors.

The model is built from its config under `FakeTensorMode` (tensors with shapes, dtypes and storages, but without data);
then the project's own step runs on it: packed forward, loss, backward, with autocast, LoRA by PEFT and LLaMA-Factory's
gradient checkpointing. `Tracker` sees every operator and follows each storage from its making to its end.

What a trace does not see: temporaries inside a kernel, the allocator's rounding and fragmentation, the CUDA context.
For a GPU the tensors are fake CPU tensors (torch has no fake backward on CUDA without a driver), and attention is the
operators that CUDA would choose: flash for causal, memory-efficient for a mask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from .. import loss_keys, upstream
from ..errors import UserError
from ..step import attention, losses, orpo
from ..step.model import packed_logps, prepare
from ..step.packing import TokenPair, pack
from ..upstream import keep_frozen_tower_out_of_autograd

NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # bitsandbytes' block sizes: weights per absmax, absmax values per second absmax
aten = torch.ops.aten


@dataclass(frozen=True)
class Setting:
    """What a recipe says about one step.

    target is "cuda" or "cpu". autocast is the dtype of mixed precision or None; weights the dtype of what is
    frozen; compute the one that 4-bit weights are dequantized to.
    lora_rank None: full tuning. accumulates: gradients of earlier micro-batches are alive. reference: a second forward
    without gradients (losses with a reference model). recompute: under checkpointing, how many decoder layers run their
    forward again (None: all). shared: the shared-prefix step, else LLaMA-Factory's own.
    """

    target: str = "cuda"
    weights: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = torch.bfloat16
    compute: torch.dtype = torch.bfloat16
    quantized: bool = True
    double_quantization: bool = True
    quantize_vision: bool = False
    checkpointing: bool = True
    recompute: int | None = None
    reentrant: bool = True
    lora_rank: int | None = 64
    lora_targets: tuple[str, ...] = ("all",)
    freeze_vision_tower: bool = True
    freeze_projector: bool = True
    pure: bool = False
    accumulates: bool = True
    reference: bool = False
    shared: bool = True
    beta: float = 0.1

    @classmethod
    def of(cls, recipe: Mapping[str, Any], target: str, config=None) -> Setting:
        """The setting of a recipe. Raises UserError for a key whose cost is not traced.

        Frozen weights have the dtype that the model's config names, or the recipe's where both have 16 bits.
        """
        kind = recipe.get("finetuning_type", "lora")
        if kind not in ("lora", "full"):
            raise UserError(f"finetuning_type: {kind} is not planned; use lora or full.")
        bits = recipe.get("quantization_bit")
        if bits not in (None, 4):
            raise UserError(f"quantization_bit: {bits} is not planned; use 4, or leave it out.")
        reference = loss_keys.needs_reference(recipe) and recipe.get("reference") != "cached"
        if reference and kind == "full":
            raise UserError("pref_loss: a reference model beside full tuning is not planned; use orpo or simpo.")
        half = next((dtype for key, dtype in _HALF.items() if recipe.get(key)), None)
        named = getattr(config, "dtype", None)
        weights = half if named is None or half and named.itemsize == 2 else named
        targets = recipe.get("lora_target") or "all"
        wanted = str(recipe.get("recompute", "auto"))  # auto: all of them, the least memory
        return cls(
            target=target,
            weights=weights or torch.float32,
            compute=half or torch.float32,
            autocast=None if recipe.get("pure_bf16") else half,
            quantized=bits == 4,
            double_quantization=recipe.get("double_quantization", True),
            quantize_vision=recipe.get("quantize_vision", False),
            checkpointing=not recipe.get("disable_gradient_checkpointing", False) and wanted != "none",
            recompute=int(wanted) if wanted.isdecimal() else None,
            reentrant=recipe.get("use_reentrant_gc", True),
            lora_rank=recipe.get("lora_rank", 8) if kind == "lora" else None,
            lora_targets=tuple(name.strip() for name in (targets.split(",") if isinstance(targets, str) else targets)),
            freeze_vision_tower=recipe.get("freeze_vision_tower", True),
            freeze_projector=recipe.get("freeze_multi_modal_projector", True),
            pure=recipe.get("pure_bf16", False),
            accumulates=recipe.get("gradient_accumulation_steps", 1) > 1,
            reference=reference,
            shared=recipe.get("shared_prefix", True),
            beta=recipe.get("pref_beta", 0.1),
        )


_HALF = {"bf16": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PairSize:
    """A pair's size in tokens, its image's tiles and pixels.

    head: what the prompts of one image share beside it. rejected: 0 where no rejected answer is run. damaged: whether
    the chosen answer is run under a damaged image too.
    """

    image: int
    tiles: int
    width: int
    height: int
    head: int
    question: int
    chosen: int
    rejected: int
    damaged: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the pair as a row of its own."""
        chosen = self.image + self.head + self.question + self.chosen
        return chosen * (2 if self.damaged else 1) + self.rejected


@dataclass(frozen=True)
class Traced:
    """Bytes and FLOPs of one micro-batch. All sizes in bytes.

    frozen, trainable, gradients, optimizer  storages that outlive a step (two Adam moments per trainable weight)
    start        alive when the step starts: what outlives a step, and the batch
    entering     alive when the language model starts: that and the image features
    peak         the most that is alive at once during forward and backward
    largest_layer  parameters of the largest decoder layer, which ZeRO-3 and FSDP gather whole
    flops        of forward and backward; causal attention counts the half that kernels compute
    """

    tokens: int
    pairs: int
    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    start: int
    entering: int
    peak: int
    largest_layer: int
    flops: int
    trainable_parameters: int

    @property
    def activations(self) -> int:
        """Bytes at the peak beyond what outlives a step."""
        return self.peak - self.frozen - self.trainable - self.optimizer - self.gradients


class Tracker(TorchDispatchMode):
    """Bytes of all living storages that operators made or `add` was given, their peak, and FLOPs."""

    def __init__(self):
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = self.peak = self.flops = 0

    def add(self, tensor: Any) -> None:
        """Counts a tensor's storage until it dies; each storage once."""
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map(self.add, out)
        count = _FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def _seen(query: torch.Tensor, key: torch.Tensor, causal: bool) -> int:
    rows, columns = query.shape[2], key.shape[2]
    return rows * (rows + 1) // 2 if causal else rows * columns


def _attention_flops(query, key, value, *rest, out_val=None, causal: bool = False, products: int = 2, **_) -> int:
    return products * 2 * query.shape[0] * query.shape[1] * _seen(query, key, causal) * query.shape[3]


def _forward_flops(query, key, value, dropout_p=0.0, is_causal=False, *rest, **options) -> int:
    return _attention_flops(query, key, value, causal=is_causal)


def _cpu_backward_flops(grad, query, key, value, out, logsumexp, dropout_p=0.0, is_causal=False, **options) -> int:
    return _attention_flops(query, key, value, causal=is_causal, products=5)


def _flash_backward_flops(grad, query, key, value, out, lse, cq, ck, mq, mk, dropout_p, is_causal, *r, **o) -> int:
    return _attention_flops(query, key, value, causal=is_causal, products=5)


# torch's registry counts a causal product in full, and the CPU's kernel not at all.
_FLOPS = {
    aten._scaled_dot_product_flash_attention: _forward_flops,
    aten._scaled_dot_product_flash_attention_backward: _flash_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward_flops,
}


class _NF4Product(torch.autograd.Function):
    """x W^T with W dequantized for each use, forward and backward: what bitsandbytes' gemm_4bit does for long rows."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantized())

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad, ctx.layer.dequantized()), None, None


class _NF4Linear(torch.nn.Linear):
    """A linear layer as bitsandbytes holds it: packed weights, absmax per 64 weights in 8 bits (double) or fp32."""

    def __init__(self, of: torch.nn.Linear, compute: torch.dtype, double: bool):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = of.in_features, of.out_features, compute
        count = of.in_features * of.out_features
        self.weight = torch.nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("absmax", torch.empty(count // NF4_BLOCK, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("second", torch.empty(-(-count // NF4_BLOCK // ABSMAX_BLOCK)) if double else None)
        self.register_parameter("bias", of.bias)

    def dequantized(self) -> torch.Tensor:
        absmax = self.absmax
        if self.second is not None:
            absmax = torch.empty(
                absmax.shape, device=absmax.device
            )  # dequantize_blockwise; the offset is added in place
        shape = (self.out_features, self.in_features)
        return torch.ops.bitsandbytes.dequantize_4bit(self.weight, absmax, NF4_BLOCK, "nf4", shape, self.compute)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _NF4Product.apply(x.to(self.compute), self.weight, self)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).clone()  # PEFT's 4-bit layers clone their base layer's result


def trace(config, setting: Setting, groups: Sequence[Sequence[PairSize]]) -> Traced:
    """Traces one micro-batch of groups of pairs (one group per image) on a LLaVA-NeXT of this config.

    Takes a second for a small model and 10 to 30 for 7 B parameters; allocates no tensor data.
    """
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "sdpa"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = _batch(config, groups, mode)
    with _kernels_of(setting.target), mode:
        model = _model(config, setting)
        tracker = Tracker()
        trainable = [p for p in model.parameters() if p.requires_grad]
        learnt = {id(p) for p in trainable}
        statics = [*model.parameters(), *model.buffers()]
        tracker.now = 0
        for tensor in statics:
            if id(tensor) not in learnt:
                tracker.add(tensor)
        frozen = tracker.now
        for tensor in trainable:
            tracker.add(tensor)
        weights = tracker.now - frozen
        moments = [torch.empty_like(p) for p in trainable for _ in range(2)]
        for tensor in moments:
            tracker.add(tensor)
        optimizer = tracker.now - frozen - weights
        if setting.accumulates:
            for parameter in trainable:
                parameter.grad = torch.empty_like(parameter)
                tracker.add(parameter.grad)
        gradients = tracker.now - frozen - weights - optimizer
        for tensor in (*batch["image_inputs"].values(), batch["packed"].input_ids, batch["packed"].position_ids):
            tracker.add(tensor)
        start, entering = tracker.now, []
        decoder = attention.unwrap(model).get_decoder()
        decoder.register_forward_pre_hook(lambda *_: entering.append(tracker.now))
        step = _shared_step if setting.shared else _stock_step
        with tracker:
            loss = step(model, setting, batch)
            if setting.accumulates:  # accelerate divides by the number of micro-batches
                loss = loss / 2
            loss.backward()
        layers = [sum(p.untyped_storage().nbytes() for p in layer.parameters()) for layer in decoder.layers]
    return Traced(
        tokens=batch["tokens"],
        pairs=sum(map(len, groups)),
        frozen=frozen,
        trainable=weights,
        gradients=gradients,
        optimizer=optimizer,
        start=start,
        entering=entering[-1] if setting.reference else entering[0],
        peak=tracker.peak,
        largest_layer=max(layers),
        flops=tracker.flops,
        trainable_parameters=sum(p.numel() for p in trainable),
    )


def _batch(config, groups: Sequence[Sequence[PairSize]], mode: FakeTensorMode) -> dict[str, Any]:
    """What the collator would make, on fake tensors: packed, image_inputs, weights; and the groups."""
    token = config.image_token_id
    pairs, index = [], 0
    for group in groups:
        pairs.append([])
        for size in group:
            prompt = [1] * size.head + [token] * size.image + [5 + index % 1000] * size.question
            pairs[-1].append(TokenPair(prompt, [7] * size.chosen, [8] * size.rejected or None))
            index += 1
    damaged = [(number, range(len(group))) for number, group in enumerate(groups) if group[0].damaged]
    packed = pack(pairs, token, damaged)
    images = [group[0] for group in groups if group[0].image] + [groups[number][0] for number, _ in damaged]
    side, tiles = config.vision_config.image_size, max((size.tiles for size in images), default=0)
    with mode:
        inputs: dict[str, Any] = {}
        if images:
            inputs["pixel_values"] = torch.empty(len(images), tiles, 3, side, side)
            inputs["image_sizes"] = [[size.height, size.width] for size in images]
    return {"packed": _faked(packed, mode), "image_inputs": inputs, "groups": groups, "tokens": packed.num_tokens}


def _faked(value: Any, mode: FakeTensorMode) -> Any:
    changes = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if isinstance(inner, torch.Tensor):
            changes[field.name] = mode.from_tensor(inner)
        elif dataclasses.is_dataclass(inner):
            changes[field.name] = _faked(inner, mode)
    return dataclasses.replace(value, **changes)


def _precision(setting: Setting) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", setting.autocast) if setting.autocast else contextlib.nullcontext()


def _shared_step(model, setting: Setting, batch: dict[str, Any]) -> torch.Tensor:
    """`training.trainer.SharedPrefixTrainer`'s step: the loss of a batch."""
    device, packed = torch.device("cpu"), batch["packed"]
    n, rejected, frozen_tower = packed.n_pairs, packed.n_rejected, setting.freeze_vision_tower
    with _precision(setting):
        if setting.reference:
            with torch.no_grad(), model.disable_adapter():
                packed_logps(model, batch, device, skip_unread=frozen_tower)
        out = packed_logps(model, batch, device, skip_unread=frozen_tower)
        means = out.sums / out.lengths
        with torch.no_grad():  # the logged mean logits
            rows = out.logits.detach().reshape(-1, out.logits.shape[-1])
            chosen, other = packed.response_tokens
            rows[:chosen].float().mean(), rows[chosen : chosen + other].float().mean()
            del rows
        chosen = means[:n]
        terms = orpo.orpo_loss(chosen, means[n : 2 * n], setting.beta).loss if rejected else orpo.sft_loss(chosen)
        if packed.n_damaged:
            damaged = chosen.index_copy(0, packed.damaged_pairs, means[n + rejected :])
            terms = terms + losses.image_odds_ratio(chosen, damaged)
        return terms.mean()


def _stock_step(model, setting: Setting, batch: dict[str, Any]) -> torch.Tensor:
    """llamafactory 0.9.5's step: prompt and image in both sequences, fp32 logits at every position.

    As its best case no padding is masked, so that attention is causal.
    """
    from llamafactory.train.trainer_utils import get_batch_logps

    sizes = [size for group in batch["groups"] for size in group]
    n, image = len(sizes), model.config.image_token_id
    length = max(s.image + s.head + s.question + max(s.chosen, s.rejected) for s in sizes)
    length = -(-length // 8) * 8
    ids = torch.full((2 * n, length), 7)
    pixels = batch["image_inputs"]["pixel_values"]
    per_image = {id(group[0]): i for i, group in enumerate(batch["groups"])}
    order = [per_image[id(group[0])] for group in batch["groups"] for _ in group] * 2
    places = [[s.height, s.width] for s in sizes] * 2
    # On fake tensors transformers cannot see that nothing is masked, and would write the causal mask out.
    causal = mock.patch("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *args, **kwargs: True)
    with _precision(setting), causal:
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels[order],
            image_sizes=places,
            use_cache=False,
        ).logits.to(torch.float32)
        logps, lengths = get_batch_logps(logits=logits, labels=torch.full((2 * n, length), image + 1))
        means = logps / lengths
        chosen, rejected = logits.split(n, dim=0)
        chosen.detach().mean(), rejected.detach().mean()
        return orpo.orpo_loss(means[:n], means[n:], setting.beta).loss.mean()


def _model(config, setting: Setting):
    """The model as LLaMA-Factory loads it for this setting, on fake tensors."""
    from transformers import LlavaNextForConditionalGeneration
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(setting.weights)
    try:
        with no_init_weights():
            model = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    if setting.quantized:
        _quantize(model, setting)
    if setting.checkpointing:
        from llamafactory.model.model_utils.checkpointing import prepare_model_for_training

        flags = dict(upcast_layernorm=False, disable_gradient_checkpointing=False, use_unsloth_gc=False)
        flags.update(use_reentrant_gc=setting.reentrant, upcast_lmhead_output=False)
        prepare_model_for_training(model, SimpleNamespace(**flags))
    model = _with_trainable(model, setting)
    keep_frozen_tower_out_of_autograd(attention.unwrap(model).model.vision_tower)
    model.train()
    if setting.checkpointing and setting.recompute is not None:
        upstream.recompute_first(attention.unwrap(model).get_decoder().layers, setting.recompute)
    if setting.shared:
        prepare(model, "cpu")
    if setting.autocast:  # as accelerate wraps a model under mixed precision
        from accelerate.utils import convert_outputs_to_fp32

        model.forward = convert_outputs_to_fp32(model.forward)
    inner = attention.unwrap(model).model
    inner.get_placeholder_mask = lambda *args, **kwargs: _placeholder_mask(inner, *args, **kwargs)
    return model


def _placeholder_mask(inner, input_ids, inputs_embeds, image_features):
    """LlavaNextModel.get_placeholder_mask without its check: what it counts depends on data, which fake tensors lack.

    The check's temporaries, an index of three int64 for each masked element and the elements, are made.
    """
    mask = (input_ids == inner.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)
    elements = image_features.numel()
    index = torch.empty(elements, 3, dtype=torch.int64)
    found = inputs_embeds.new_empty(elements)
    del index, found
    return mask


def _quantize(model, setting: Setting) -> None:
    spared = () if setting.quantize_vision else ("vision_tower", "multi_modal_projector")
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or "lm_head" in name or any(part in name for part in spared):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _NF4Linear(module, setting.compute, setting.double_quantization))
    import bitsandbytes  # noqa: F401  registers the operators and their fake results

    model.is_quantized = model.is_loaded_in_4bit = True


def _with_trainable(model, setting: Setting):
    from llamafactory.model.model_utils.misc import find_all_linear_modules
    from llamafactory.model.model_utils.visual import get_forbidden_modules, patch_target_modules
    from peft import LoraConfig, get_peft_model

    freeze = SimpleNamespace(
        freeze_vision_tower=setting.freeze_vision_tower,
        freeze_multi_modal_projector=setting.freeze_projector,
        freeze_language_model=False,
        use_llama_pro=False,
        finetuning_type="lora" if setting.lora_rank else "full",
    )
    if setting.lora_rank:
        targets = list(setting.lora_targets)
        if targets == ["all"]:
            targets = find_all_linear_modules(model, setting.freeze_vision_tower)
        targets = patch_target_modules(model, freeze, targets)
        lora = LoraConfig(r=setting.lora_rank, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
        # PEFT moves adapters to their layer's device, which torch refuses on fake tensors; here all are on one.
        with mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module):
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        learnt = [name for name, p in model.named_parameters() if p.requires_grad]
    else:
        forbidden = get_forbidden_modules(model.config, freeze)
        learnt = [name for name, _ in model.named_parameters() if not any(part in name for part in forbidden)]
    for name in learnt:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        old = getattr(module, child)
        made = torch.empty(old.shape, dtype=setting.compute if setting.pure else torch.float32)
        setattr(module, child, torch.nn.Parameter(made))
    return model


@contextlib.contextmanager
def _kernels_of(target: str) -> Iterator[None]:
    """The attention operators of the target, called by name: choosing them needs a driver."""
    if target == "cpu":
        yield
        return

    def kernel(query, key, value, scale, dropout):
        if query.shape[1] != key.shape[1]:  # the branch of `attention._kernel` for CUDA
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

        def attend(q, k, v, **options):
            return _cuda_attention(q, k, v, dropout_p=dropout, scale=scale, **options)

        return attend, key, value

    with (
        mock.patch.object(attention, "_kernel", kernel),
        mock.patch.object(F, "scaled_dot_product_attention", _cuda_attention),
    ):
        yield


def _cuda_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    kept = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, kept, dropout_p, False, scale=scale)[0]
