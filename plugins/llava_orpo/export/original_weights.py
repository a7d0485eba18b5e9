"""The weights of original LLaVA-1.6 checkpoints: tensor names, files, and the vocabulary rows that transformers adds.

"Original" is the layout of liuhaotian/llava-v1.6-*, with the LLM at the root and LLaVA's own names for the rest (LLaVA
repository, llava/model/llava_arch.py and multimodal_{encoder,projector}/builder.py). "Published" is the layout of
llava-hf/llava-v1.6-*-hf.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoint.files import CheckpointError, read_json, some, tensor_table
from ..checkpoint.published import RECOMPUTED, published_name

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
# (original prefix, published prefix); the first that fits counts.
PREFIXES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
PADDING_SEED = 0


def from_original(name: str) -> str:
    """Published name of an original tensor. Raises CheckpointError for a name that LLaVA-1.6 does not have."""
    for original, published in PREFIXES:
        if name.startswith(original):
            mapped = published + name.removeprefix(original)
            if published_name(mapped) == mapped:
                return mapped
            break
    raise CheckpointError(f"{name!r} is not a tensor of an original LLaVA-1.6 checkpoint.")


def to_original(name: str) -> str:
    """Original name of a published tensor; the inverse of from_original."""
    for original, published in PREFIXES:
        if name.startswith(published):
            return original + name.removeprefix(published)
    raise CheckpointError(f"{name!r} is not a published LLaVA-1.6 tensor name.")


@dataclass
class Weights:
    """Tensors of a checkpoint folder, read when asked for. shapes: name -> shape, in the order of the files."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    files: dict[str, Path]
    _open: tuple[Path, object] | None = field(default=None, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor onto the CPU. In file order, one file is mapped at a time."""
        path = self.files[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, _open_file(path))
        source = self._open[1]
        return (source[name] if isinstance(source, dict) else source.get_tensor(name)).contiguous()

    def bytes(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize


def open_weights(folder: Path) -> Weights:
    """Weights of a folder: safetensors, or .bin files read without unpickling anything but tensors.

    Raises CheckpointError if there are no weights, or if a file is missing or cut short.
    """
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file() or (folder / "pytorch_model.bin").is_file():
        if not any(folder.glob("*.safetensors")):
            promised = read_json(index)["weight_map"] if index.is_file() else None
            return _open_bin(folder, promised)
    table = tensor_table(folder)
    strange = {entry[0] for entry in table.values()} - SAFETENSORS_DTYPES.keys()
    if strange:
        raise CheckpointError(f"{folder} holds {some(strange)} tensors; only unquantized checkpoints are converted.")
    order = sorted(table, key=lambda name: table[name][2])
    return Weights(
        {name: table[name][1] for name in order},
        {name: SAFETENSORS_DTYPES[table[name][0]] for name in order},
        {name: folder / table[name][2] for name in order},
    )


SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def _open_bin(folder: Path, promised: dict[str, str] | None) -> Weights:
    weights = Weights({}, {}, {})
    for file in sorted(set(promised.values())) if promised else ["pytorch_model.bin"]:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; download the checkpoint again.")
        for name, tensor in _open_file(path).items():
            weights.shapes[name] = tuple(tensor.shape)
            weights.dtypes[name] = tensor.dtype
            weights.files[name] = path
    absent = set(promised or ()) - set(weights.shapes)
    if absent:
        raise CheckpointError(f"{folder} lacks {some(absent)}, which pytorch_model.bin.index.json promises.")
    return weights


def _open_file(path: Path):
    if path.suffix == ".safetensors":
        return safe_open(path, framework="pt")
    try:  # mmap: a tensor is read from disk only when it is copied
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a cut, old-format or unsafe file
        raise CheckpointError(
            f"{path} cannot be read as a zip-format PyTorch file of tensors: half-downloaded, or not safe to "
            f"unpickle. Download it again, or use the safetensors version. ({type(error).__name__}: {error})"
        ) from error


def map_names(weights: Weights, vision_tower: Weights | None) -> dict[str, tuple[Weights, str]]:
    """Published name -> (where it is, name there) for an original checkpoint and the CLIP folder it may need.

    Constants that transformers recomputes (position_ids, inv_freq) are left out. Raises CheckpointError
    naming all unmapped tensors, and if the vision tower is in neither or both places.
    """
    found, unmapped = {}, []
    for name in weights.shapes:
        if RECOMPUTED.search(name):
            continue
        try:
            found[from_original(name)] = (weights, name)
        except CheckpointError:
            unmapped.append(name)
    if unmapped:
        raise CheckpointError(f"No place for {len(unmapped)} of the original tensors: {some(unmapped)}")
    has_tower = any(name.startswith("vision_tower.") for name in found)
    if has_tower and vision_tower is not None:
        raise CheckpointError("The checkpoint holds its own (tuned) vision tower; leave --vision-tower out.")
    if not has_tower and vision_tower is None:
        raise CheckpointError("The checkpoint holds no vision tower; give its CLIP folder as --vision-tower.")
    if vision_tower is not None:  # CLIP's text tower is not part of LLaVA
        for name in vision_tower.shapes:
            if name.startswith("vision_model.") and not RECOMPUTED.search(name):
                found["vision_tower." + name] = (vision_tower, name)
    return found


def padding_rows(embedding: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` new rows for the embedding and for the LM head, (count, hidden) each, in the embedding's dtype.

    Drawn as for the published checkpoints (transformers' convert_llava_next_weights_to_hf.py): both from a
    normal distribution with the mean of the embedding's rows (vocabulary, hidden) and 1e-5 times their
    covariance, here with a fixed seed. Mixing the centred rows with normal weights has exactly that
    covariance and needs no factor.
    """
    rows = embedding.float()
    mean = rows.mean(0)
    rows = rows - mean
    weights = torch.randn(2 * count, len(rows), generator=torch.Generator().manual_seed(PADDING_SEED))
    new = mean + (1e-5 / len(rows)) ** 0.5 * (weights @ rows)
    return tuple(new.to(embedding.dtype).split(count))
