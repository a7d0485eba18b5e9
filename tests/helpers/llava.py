"""A random LLaVA-NeXT small enough for unit tests, images for it, and the plain path as the reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    MistralConfig,
)

from llava_orpo.step.packing import TokenPair

IMAGE_TOKEN = 3
SIDE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def tiny_llava(seed=0, sliding_window=None, dtype=torch.float32, attn_implementation="sdpa", scale=4.0, **text):
    text_config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=sliding_window,
        max_position_embeddings=2048,
        pad_token_id=0,
        **text,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    config = LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():  # transformers' 0.02 leaves attention nearly uniform: make it matter
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    return model.to(dtype)


def make_image(width, height, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_inputs(images):
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    if not images:
        return {}
    out = processor(images=list(images), return_tensors="pt")
    return {"pixel_values": out["pixel_values"], "image_sizes": out["image_sizes"]}


def num_image_tokens(model, image):
    """As the model itself counts: run it on the image and measure."""
    with torch.no_grad():
        return model.get_image_features(**_cast(model, image_inputs([image]))).pooler_output[0].shape[0]


def _cast(model, inputs):
    return {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def make_example(model, image, questions, responses, seed, shared_question=0):
    """A group of pairs on one image (None: text only); `questions` and `responses` are token counts."""
    rng = np.random.default_rng(seed)

    def words(n):
        return rng.integers(10, 320, n).tolist()

    head = words(3) + ([IMAGE_TOKEN] * num_image_tokens(model, image) if image is not None else [])
    head += words(shared_question)
    pairs = [TokenPair(head + words(q), words(c), words(r)) for q, (c, r) in zip(questions, responses, strict=True)]
    return SimpleNamespace(image=image, pairs=pairs)


def packed_images(model, examples):
    return _cast(model, image_inputs([e.image for e in examples if e.image is not None]))


def plain_logps(model, examples, text_model=None):
    """Summed log-probs (2n,), chosen first, from one plain forward per full sequence."""
    chosen, rejected = [], []
    for example in examples:
        images = packed_images(model if text_model is None else text_model, [example])
        for pair in example.pairs:
            for answer, into in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
                ids = torch.tensor([list(pair.prompt_ids) + list(answer)])
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images, use_cache=False).logits
                logps = logits[0, len(pair.prompt_ids) - 1 : -1].float().log_softmax(-1)
                into.append(logps.gather(-1, ids[0, len(pair.prompt_ids) :, None]).sum())
    return torch.stack(chosen + rejected)


def padded_logps(model, examples):
    """The same from one right-padded batch, all chosen, then all rejected, each with its image: as in
    LLaMA-Factory's PairwiseDataCollatorWithPadding."""
    pairs = [(e.image, p) for e in examples for p in e.pairs]
    rows = [list(p.prompt_ids) + list(p.chosen_ids) for _, p in pairs]
    rows += [list(p.prompt_ids) + list(p.rejected_ids) for _, p in pairs]
    images = _cast(model, image_inputs([image for image, _ in pairs * 2 if image is not None]))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, **images, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    starts = [len(p.prompt_ids) for _, p in pairs] * 2
    return torch.stack([logp[s - 1 : len(row) - 1].sum() for logp, row, s in zip(logps, rows, starts, strict=True)])
