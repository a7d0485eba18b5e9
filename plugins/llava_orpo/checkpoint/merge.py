"""Merging LoRA adapters into a base model tensor by tensor: neither the model nor the adapter is in memory as a whole.

PEFT builds its layers on the meta device; each is given its weights when its turn comes, and merges them itself. So the
result is bit for bit that of `merge_and_unload` on the loaded model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from .. import upstream
from .adapter import ADAPTER_FILE
from .files import CheckpointError, read_header, some, weight_files
from .published import LM_HEAD, RECOMPUTED, check_folder, published_names, read_unquantized_config

NAME = "default"  # of the only adapter in a PeftModel
ROOT = "base_model.model."  # before every module's name there
STREAMED_LAYERS = (Linear, Embedding)
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights; the others change base weights
# Keys of an adapter's config, with the values that leave everything but the layers' own weights alone.
PLAIN = {
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_qalora": (False,),
}


class NotStreamed(Exception):
    """A merge needs the whole model; the message says why, as the end of a sentence."""


class StreamedMerge:
    """A LLaVA-NeXT base and the adapters to be merged into it one after the other, read when a tensor is asked for.

    base: a folder with safetensors weights. adapters: PEFT folders. Reads configs and headers alone. `skeleton` is the
    base on the meta device, in the dtype that transformers would load it in; `shapes` are the published names and
    shapes of the result.

    Raises NotStreamed for what has to be merged in memory, and CheckpointError for a base that is quantized or not
    whole and for an adapter that lacks weights of its own layers.
    """

    def __init__(self, base: str | Path, adapters: Sequence[str | Path]):
        self.base = Path(base)
        config = read_unquantized_config(self.base)
        self._check_format()
        table = check_folder(self.base)
        sources = published_names(name for name in table if not RECOMPUTED.search(name))
        if config.get("tie_word_embeddings"):
            sources.pop(LM_HEAD, None)
        self.shapes = {name: table[source][1] for name, source in sources.items()}
        self._sources = {name: (self.base / table[source][2], source) for name, source in sources.items()}
        self.skeleton = make_skeleton(self.base)
        self._dtype = self.skeleton.dtype  # the skeleton may be cast later
        in_model = published_names(self.skeleton.state_dict())
        self._keys = {name: in_model[name] for name in self.shapes}
        self._adapters = [_Adapter(Path(folder), copy.deepcopy(self.skeleton)) for folder in adapters]
        if self.skeleton.config.tie_word_embeddings:
            tied = [in_model[name] for name in in_model if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
            if any(key in adapter.changed for adapter in self._adapters for key in tied):
                raise NotStreamed("the adapter changes embeddings that the LM head shares")

    def _check_format(self) -> None:
        pickled = [*self.base.glob("*.bin"), *self.base.glob("*.bin.index.json")]
        if pickled and not any(self.base.glob("*.safetensors")):
            raise NotStreamed("the base model's weights are not in safetensors files")

    @torch.no_grad()
    def fetch(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The merged weight of a published name, merged in the base's dtype and then cast."""
        file, source = self._sources[name]
        tensor = _read(file, source, self._dtype)
        for adapter in self._adapters:
            tensor = adapter.merged(self._keys[name], tensor)
        return tensor.to(dtype).contiguous()


def make_skeleton(base: Path) -> LlavaNextForConditionalGeneration:
    """The model of a folder on the meta device, in the dtype that `from_pretrained(dtype="auto")` would give it."""
    config = LlavaNextConfig.from_pretrained(base)
    dtype = upstream.dtype_to_load(config, [base / file for file in weight_files(base)])
    with torch.device("meta"), upstream.without_zero_init():
        return LlavaNextForConditionalGeneration(config).to(dtype)


class _Adapter:
    """One adapter, laid by PEFT over a model on the meta device; `changed` are the names of the weights it changes."""

    def __init__(self, folder: Path, model: LlavaNextForConditionalGeneration):
        self.file = folder / ADAPTER_FILE
        config = PeftConfig.from_pretrained(folder)
        _check_config(config)
        config.inference_mode = True
        model.name_or_path = config.base_model_name_or_path  # else PEFT warns that it is another model
        self.model = get_peft_model(model, config, adapter_name=NAME, low_cpu_mem_usage=True)
        where = self._stored()
        self._layers: dict[str, dict[str, str]] = {}  # module -> its own parameter -> tensor of the file
        self._whole: dict[str, str] = {}  # weight -> tensor of the file that takes its place
        for path, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                for own, stored in _inside(where, f"{path}.modules_to_save.{NAME}.").items():
                    self._whole[f"{path.removeprefix(ROOT)}.{own}"] = stored
            elif isinstance(module, LoraLayer) and type(module) in STREAMED_LAYERS:
                self._layers[path.removeprefix(ROOT)] = _inside(where, f"{path}.")
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                raise NotStreamed(f"PEFT's {type(module).__name__} layers are merged in memory")
        self.changed = {f"{layer}.weight" for layer in self._layers} | self._whole.keys()

    def _stored(self) -> dict[str, str]:
        """Name in PEFT's model -> name in the file, for all that the file should and does hold."""
        state = {name: name for name in self.model.state_dict()}  # PEFT renames the keys; the values go through
        expected = get_peft_model_state_dict(
            self.model, state_dict=state, adapter_name=NAME, save_embedding_layers=False
        )
        found = read_header(self.file)
        if absent := expected.keys() - found.keys():
            raise CheckpointError(
                f"{self.file} lacks {len(absent)} weights of its layers in this model: {some(absent, 3)}."
            )
        if more := found.keys() - expected.keys():
            raise NotStreamed(f"the adapter holds more than its layers' weights ({some(more, 3)})")
        return {state_name: stored for stored, state_name in expected.items()}

    def merged(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The weight `key` of the model after the merge; `tensor` is it before, and may be changed in place."""
        if key in self._whole:
            return _read(self.file, self._whole[key], tensor.dtype)
        path, _, parameter = key.rpartition(".")
        if parameter != "weight" or path not in self._layers:
            return tensor
        layer = copy.deepcopy(self.model.get_submodule(ROOT + path))  # a merged layer does not merge again
        layer.get_base_layer().weight = torch.nn.Parameter(tensor, requires_grad=False)
        own = {
            name: _read(self.file, stored, layer.get_parameter(name).dtype)
            for name, stored in self._layers[path].items()
        }
        layer.load_state_dict(own, strict=False, assign=True)
        layer.merge()
        return layer.get_base_layer().weight.data


def _inside(names: dict[str, str], start: str) -> dict[str, str]:
    return {name.removeprefix(start): value for name, value in names.items() if name.startswith(start)}


def _check_config(config: PeftConfig) -> None:
    """Raises NotStreamed for settings that touch more than the weights of the layers."""
    if not isinstance(config, LoraConfig):
        raise NotStreamed(f"{config.peft_type} adapters are merged in memory")
    if config.init_lora_weights not in KEEP_THE_BASE:
        raise NotStreamed(f"`init_lora_weights: {config.init_lora_weights}` changes the base model's weights")
    for name, plain in PLAIN.items():
        if (value := getattr(config, name, plain[0])) not in plain:
            raise NotStreamed(f"the adapter was trained with `{name}: {value}`")


def _read(file: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory of its own. The file is closed again, so that its pages do not count as this process's."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name).to(dtype, copy=True)
