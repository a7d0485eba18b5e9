"""LLaVA-1.6 for llama.cpp's converter, which knows the language model but not the whole.

Only for the environment of scripts/gguf.sh: imports the packages `gguf` and `conversion` of llama.cpp's sources as they
are in llama-cpp-python 0.3.36. The converter's classes are extended, none is changed; it reads and writes one tensor at
a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import torch
from conversion import MmprojModel
from conversion.llama import LlamaModel

from ..checkpoint.files import CheckpointError
from ..data.conversation import Conversation
from .gguf import PROJECTOR_NAMES, Vocabulary, image_settings, is_used, llama_cpp_template

WRITTEN_FOR = "0.19.0"  # of gguf
FILE_TYPES = {
    torch.float32: ("f32", gguf.LlamaFileType.ALL_F32),
    torch.float16: ("f16", gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: ("bf16", gguf.LlamaFileType.MOSTLY_BF16),
}


class LanguageModel(LlamaModel):
    """The language model, with the vocabulary's rows alone."""

    model_arch = gguf.MODEL_ARCH.LLAMA

    def __init__(self, *args, vocabulary: Vocabulary, conversation: Conversation, **kwargs):
        super().__init__(*args, **kwargs)
        self.vocabulary, self.conversation = vocabulary, conversation
        self.hparams["vocab_size"] = len(vocabulary.tokens)

    def set_vocab(self) -> None:
        vocabulary, writer = self.vocabulary, self.gguf_writer
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(list(vocabulary.tokens))
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_token_types(list(vocabulary.types))
        writer.add_add_space_prefix(vocabulary.space_prefix)
        special = gguf.SpecialVocab(self.dir_model, n_vocab=len(vocabulary.tokens))
        special.add_special_token = {"bos": vocabulary.adds_bos, "eos": False}
        special.chat_template = llama_cpp_template(self.conversation)
        special.add_to_gguf(writer)

    def modify_tensors(
        self, data_torch: torch.Tensor, name: str, bid: int | None
    ) -> Iterable[tuple[str, torch.Tensor]]:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            data_torch = data_torch[: len(self.vocabulary.tokens)]
        return super().modify_tensors(data_torch, name, bid)


class ImageEncoder(MmprojModel):
    """Vision tower, up to the layer whose features are used, and projector."""

    model_arch = gguf.MODEL_ARCH.MMPROJ

    def set_gguf_parameters(self) -> None:
        config, writer = self.global_config, self.gguf_writer
        vision, settings = config["vision_config"], image_settings(config)
        vision["num_hidden_layers"] = settings["block_count"]  # read by the next line; settings must be made before
        super().set_gguf_parameters()
        writer.add_clip_projector_type("mlp")
        writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
        writer.add_vision_feature_layers(settings["feature_layer"])
        writer.add_array("clip.vision.image_grid_pinpoints", settings["image_grid_pinpoints"])
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        writer.add_vision_use_gelu(vision["hidden_act"] == "gelu")  # otherwise llama.cpp takes CLIP's quick_gelu

    def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], torch.Tensor]]:
        tensors = super().index_tensors(remote_hf_model_id)
        return {name: get for name, get in tensors.items() if is_used(name, self.hparams)}

    def modify_tensors(
        self, data_torch: torch.Tensor, name: str, bid: int | None
    ) -> Iterable[tuple[str, torch.Tensor]]:
        if name in PROJECTOR_NAMES:
            return [(PROJECTOR_NAMES[name], data_torch)]
        return super().modify_tensors(data_torch, name, bid)


def write(model: Path, out: Path, dtype: torch.dtype, vocabulary: Vocabulary, conversation: Conversation) -> list[Path]:
    """Writes <out>/model-<dtype>.gguf and <out>/mmproj-<dtype>.gguf in the model's own dtype; returns both.

    Raises CheckpointError when other llama.cpp sources are installed than this was written for.
    """
    import importlib.metadata

    try:
        found = importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        found = WRITTEN_FOR  # used from the sources, whose version scripts/gguf.sh checks
    if found != WRITTEN_FOR:
        raise CheckpointError(f"gguf {found} is installed, this was written for {WRITTEN_FOR}: run scripts/gguf.sh.")
    logging.getLogger().setLevel(logging.WARNING)
    name, kind = FILE_TYPES[dtype]
    files = [out / f"model-{name}.gguf", out / f"mmproj-{name}.gguf"]
    with torch.inference_mode():
        LanguageModel(model, kind, files[0], vocabulary=vocabulary, conversation=conversation).write()
        ImageEncoder(model, kind, files[1]).write()
    return files
