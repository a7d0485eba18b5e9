"""LLaVA-1.6 checkpoints in the published llava-hf tensor layout: write one, check one, load one.

transformers 5.5 and 5.6 both read the layout of the published checkpoints (`language_model.model.*`,
`vision_tower.vision_model.*`, ...), but each writes another one that the other cannot read: missing tensors are
initialised randomly, with only a printed table as notice. So full models are written here, in the published names, and
loading raises an error instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from ..upstream import without_zero_init
from .files import (
    CheckpointError,
    copy_files,
    fresh_folder,
    processor_files,
    read_json,
    some,
    tensor_table,
    write_shards,
)

LM_HEAD = "language_model.lm_head.weight"
# Constants that old writers stored among the weights; transformers recomputes them.
RECOMPUTED = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")

_PARAMETER = r"\.(?:weight|bias)"
_NAME = re.compile(
    r"(?:model\.)?(?:"
    r"language_model\.(?:model\.)?(?P<text>(?:embed_tokens|norm)\.weight|layers\.\d+\."
    rf"(?:self_attn\.[qkvo]_proj{_PARAMETER}|mlp\.(?:gate|up|down)_proj{_PARAMETER}"
    r"|(?:input|post_attention)_layernorm\.weight))"
    r"|vision_tower\.(?:vision_model\.)?(?P<vision>embeddings\.(?:class_embedding|(?:patch|position)_embedding\.weight)"
    rf"|(?:pre_layrnorm|post_layernorm){_PARAMETER}"
    rf"|encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]|layer_norm[12]){_PARAMETER})"
    rf"|(?P<projector>multi_modal_projector\.linear_[12]{_PARAMETER})"
    r"|(?P<newline>image_newline)"
    r"|(?P<head>(?:language_model\.)?lm_head\.weight))"
)


def published_name(name: str) -> str:
    """The llava-hf name of a LLaVA-NeXT tensor (LLM of the Llama, Mistral or Qwen2 kind, CLIP vision tower).

    Accepts the names transformers 5.5 and 5.6 hold in memory, those each of them writes, and published names
    themselves. Raises CheckpointError for any other name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name!r} is not a tensor of a (full precision, merged) LLaVA-NeXT model.")
    parts = match.groupdict()
    if parts["text"]:
        return f"language_model.model.{parts['text']}"
    if parts["vision"]:
        return f"vision_tower.vision_model.{parts['vision']}"
    return parts["projector"] or parts["newline"] or LM_HEAD


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Published name -> given name, for all of `names`: the way back from a folder to a model's `state_dict`.

    Raises CheckpointError naming every unknown name, and two names that mean the same tensor.
    """
    names = list(names)
    unknown = [name for name in names if _NAME.fullmatch(name) is None]
    if unknown:
        raise CheckpointError(
            f"Not tensors of a full-precision, merged LLaVA-NeXT model: {some(unknown)}. "
            "Merge adapters (merge_and_unload) and load the base unquantized first."
        )
    back: dict[str, str] = {}
    for name in names:
        if back.setdefault(published_name(name), name) != name:
            raise CheckpointError(
                f"{back[published_name(name)]} and {name} are the same tensor {published_name(name)}."
            )
    return back


def expected_tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every weight that a llava_next config.json (as a dict) implies.

    Asks transformers for the model on the meta device: no memory, no weights. A tied LM head is left out.
    """
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = {key: value for key, value in config.items() if key != "quantization_config"}
    model_config = LlavaNextConfig.from_dict(config)
    with torch.device("meta"), without_zero_init():
        state = LlavaNextForConditionalGeneration(model_config).state_dict()
    shapes = {name: tuple(state[key].shape) for name, key in published_names(state).items()}
    if model_config.tie_word_embeddings:
        del shapes[LM_HEAD]
    return shapes


def read_config(folder: str | Path) -> dict:
    """config.json of a llava_next folder. Raises CheckpointError if it is absent or of another model type."""
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") != "llava_next":
        kind = config.get("model_type")
        hint = ""
        if kind in ("llava", "llava_llama", "llava_mistral"):
            hint = " Original LLaVA checkpoints are converted by scripts/convert_llava_checkpoint.py."
        raise CheckpointError(f"{folder}/config.json is of model type {kind!r}, not 'llava_next'.{hint}")
    return config


def check_shapes(found: Mapping[str, tuple[int, ...]], config: dict, what: str) -> None:
    """Raises CheckpointError unless `found` (published name -> shape) is exactly what `config` implies."""
    expected = expected_tensors(config)
    absent, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    wrong = [
        f"{n} {found[n]} (expected {expected[n]})" for n in expected.keys() & found.keys() if found[n] != expected[n]
    ]
    groups = {"missing": absent, "not in the model": extra, "wrong shape": wrong}
    problems = [f"{label}: {some(names)}" for label, names in groups.items() if names]
    if problems:
        raise CheckpointError(f"{what} does not fit its config.json. " + "; ".join(problems))


def check_folder(path: str | Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Checks a llava_next folder before it is loaded, from config.json and the shards' headers alone.

    Every shard of the index is there and as long as its header says, and (unless quantized) names and shapes
    are those the config implies, in the published layout or one that some transformers writes (load_checked
    tells whether the installed one reads it). Returns tensor name -> (dtype code, shape, file). Raises
    CheckpointError.
    """
    path = Path(path)
    config = read_config(path)
    table = tensor_table(path)
    if "quantization_config" not in config:
        weights = [name for name in table if not RECOMPUTED.search(name)]
        found = {published: table[name][1] for published, name in published_names(weights).items()}
        if config.get("tie_word_embeddings"):
            found.pop(LM_HEAD, None)
        check_shapes(found, config, str(path))
    return table


def check_load(info: Mapping[str, Iterable], where: str | Path) -> None:
    """Raises CheckpointError unless a load was complete.

    info: what `from_pretrained(..., output_loading_info=True)` returns beside the model: missing_keys,
    unexpected_keys, mismatched_keys. (A tied LM head is not missing: transformers leaves it out itself.)
    """
    unexpected = [name for name in info["unexpected_keys"] if not RECOMPUTED.search(name)]
    groups = {
        "missing (they would stay random)": info["missing_keys"],
        "unexpected": unexpected,
        "of another shape": info["mismatched_keys"],
    }
    problems = [f"{label}: {some(names)}" for label, names in groups.items() if names]
    if problems:
        import transformers

        raise CheckpointError(
            f"{where} did not load completely with transformers {transformers.__version__}. Tensors "
            + "; ".join(problems)
            + ". transformers writes LLaVA-NeXT under other names from version to version; export the model "
            "again through this plugin, which writes the published names that all versions read."
        )


def load_checked(path: str | Path, **kwargs):
    """LlavaNextForConditionalGeneration from a folder or Hub id; CheckpointError instead of random weights.

    kwargs go to `from_pretrained` (dtype, device_map, quantization_config, ...).
    """
    from transformers import LlavaNextForConditionalGeneration

    if Path(path).expanduser().is_dir():
        check_folder(path)
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    check_load(info, path)
    return model


def config_with_dtype(raw: bytes, dtype: torch.dtype) -> bytes:
    """A config.json's bytes with every dtype entry set to `dtype`; the same bytes where nothing changes."""
    config = json.loads(raw)
    name = str(dtype).removeprefix("torch.")
    changed = False
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if part and key in part and part[key] != name:
                part[key] = name
                changed = True
    if "dtype" not in config and "torch_dtype" not in config:
        config["torch_dtype"] = name  # the key every transformers version reads
        changed = True
    return (json.dumps(config, indent=2) + "\n").encode() if changed else raw


def save_published(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    out_dir: str | Path,
    base_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_gb: float = 5.0,
    overwrite: bool = False,
    show_progress: bool = False,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Writes a whole LLaVA-NeXT model as a folder that plain transformers 5.5 and 5.6 load completely.

    model: a LlavaNextForConditionalGeneration with adapters merged, or its (gathered) `state_dict`. base_dir:
    the folder the model came from; its config.json is kept but for the dtype, its processor, tokenizer,
    generation and chat-template files are copied byte for byte. dtype: what to write (default: the model's
    own). The rest: see `write_published`. Raises CheckpointError before writing: unknown tensors, other shapes than
    the base's, and what `write_published` refuses.
    """
    base = Path(base_dir)
    config = read_unquantized_config(base)
    tensors = model.state_dict() if isinstance(model, torch.nn.Module) else dict(model)
    names = published_names(name for name in tensors if not RECOMPUTED.search(name))
    if config.get("tie_word_embeddings"):
        names.pop(LM_HEAD, None)
    check_shapes({name: tuple(tensors[key].shape) for name, key in names.items()}, config, "The model to be written")
    offloaded = [name for name, key in names.items() if tensors[key].is_meta]
    if offloaded:
        raise CheckpointError(f"The model's weights are not in memory ({some(offloaded)}); load it without offloading.")
    kinds = {tensors[key].dtype for key in names.values()}
    if dtype is None and len(kinds) > 1:
        raise CheckpointError(f"The model mixes {some(kinds)}; say which dtype to write.")
    dtype = dtype or kinds.pop()

    return write_published(
        out_dir,
        base,
        {name: tuple(tensors[key].shape) for name, key in names.items()},
        lambda name: tensors[names[name]].detach().to("cpu", dtype).contiguous(),
        dtype=dtype,
        max_shard_gb=max_shard_gb,
        overwrite=overwrite,
        what=f"writing {Path(out_dir).name}" if show_progress else "",
        texts=texts,
    )


def read_unquantized_config(base: Path) -> dict:
    """config.json of a llava_next folder. Raises CheckpointError as `read_config`, and for a quantized checkpoint."""
    config = read_config(base)
    if "quantization_config" in config:
        raise CheckpointError(f"{base} is a quantized checkpoint; name the 16-bit base model instead.")
    return config


def read_merged(folder: Path, form: str) -> tuple[dict, dict[str, tuple[str, tuple[int, ...], str]]]:
    """(config.json, tensor table) of a whole, unquantized folder of which another form is made.

    form: its name, for the messages. Raises CheckpointError for an adapter, a quantized checkpoint, another
    architecture, and a folder that is not whole.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter: merge it first (llamafactory-cli export), then convert the result."
        )
    config = read_config(folder)
    if "quantization_config" in config:
        raise CheckpointError(f"{folder} is quantized; {form} is made of the merged 16- or 32-bit model.")
    return config, check_folder(folder)


def write_published(
    out_dir: str | Path,
    base: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fetch: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    max_shard_gb: float,
    overwrite: bool,
    what: str = "",
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Writes weights beside the small files of their base model, tensor by tensor.

    shapes: published name -> shape of every weight. fetch(name) gives it in `dtype` on the CPU. texts: further files,
    name -> content. Shards hold at most max_shard_gb (1e9 bytes each). Everything is written into '<out_dir>.partial',
    which is renamed at the end. what: names the progress bar. Returns `out_dir`. Raises CheckpointError before writing:
    missing processor files, a filled `out_dir` (unless overwrite), the base's own folder, a full disk.
    """
    out_dir = Path(out_dir)
    if out_dir.resolve() == base.resolve():
        raise CheckpointError(f"{out_dir} is the base model's own folder; write the result somewhere else.")
    files = processor_files(base)
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in sorted(shapes.items())}
    needed = sum(tensor.nbytes for tensor in planned.values())
    needed += sum((base / file).stat().st_size for file in files)
    with fresh_folder(out_dir, needed, overwrite) as partial:
        copy_files(base, files, partial)
        (partial / "config.json").write_bytes(config_with_dtype((base / "config.json").read_bytes(), dtype))
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        write_shards(partial, planned, fetch, max_shard_gb, what)
    return out_dir
