"""Checkpoint folders as files: reads and checks their tensor tables, writes new ones whole or not at all.

Nothing here knows LLaVA's tensor names (published.py does), and only torch, safetensors and the standard library are
needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import progress
from ..errors import UserError

INDEX = "model.safetensors.index.json"
# What a folder must offer so that plain transformers can build its processor: one name of each group. (From
# tokenizer.model alone transformers 5 builds a llava_next tokenizer that gives other ids.)
PROCESSOR_GROUPS = {
    "tokenizer": ("tokenizer.json",),
    "tokenizer settings": ("tokenizer_config.json",),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
# Everything that is neither weights nor config.json and decides what a user gets from the folder.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "image_processor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
COPIED_FOLDERS = ("additional_chat_templates",)
CODES = {  # torch dtype -> safetensors' name of it, in the order in which safetensors puts tensors into a file
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(UserError):
    """A checkpoint folder cannot be used or written; the message names the file and the remedy."""


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises CheckpointError if the file is absent or cut short."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a (whole) checkpoint folder.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download or export it again.") from error


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes (safetensors' codes, e.g. "BF16") and shapes in one .safetensors file, without its weights.

    Raises CheckpointError if the file is absent, empty, a Git LFS pointer, or not as long as its header promises
    (half-downloaded).
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download or export the checkpoint again.")
    try:
        with safe_open(path, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}): half-downloaded, "
            "damaged, or a Git LFS pointer. Download it again."
        ) from error


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """File name -> tensor names the index assigns to it (None without an index), for a folder's safetensors.

    Raises CheckpointError if the folder holds no safetensors weights.
    """
    if (folder / INDEX).is_file():
        files: dict[str, list[str] | None] = {}
        for tensor, file in read_json(folder / INDEX)["weight_map"].items():
            files.setdefault(file, []).append(tensor)
        return files
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise CheckpointError(
        f"{folder} holds neither {INDEX} nor model.safetensors"
        + (f" (it holds: {', '.join(found[:12])})." if found else " (no such folder, or empty).")
    )


def tensor_table(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Tensor name -> (dtype code, shape, file name) for all safetensors weights in `folder`; reads headers only.

    Raises CheckpointError naming the file if a shard is missing or cut short, or lacks a tensor of the index.
    """
    folder = Path(folder)
    table = {}
    for file, promised in weight_files(folder).items():
        header = read_header(folder / file)
        absent = sorted(set(promised or ()) - set(header))
        if absent:
            raise CheckpointError(f"{folder / file} lacks {some(absent)}, which {INDEX} promises.")
        table.update({name: (*entry, file) for name, entry in header.items()})
    return table


def some(items: object, limit: int = 6) -> str:
    """The first few of `items`, sorted, and how many more, for a message."""
    names = sorted(str(item) for item in items)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def resolve_model_dir(
    name_or_path: str | Path,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """The local folder of a model: itself if it is one, else the Hub snapshot of its small files, without weights.

    Honours the Hub's cache and HF_HUB_OFFLINE. Raises CheckpointError if there is no such folder or repository.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") != 1:
        raise CheckpointError(f"{name_or_path} is not a folder; give a checkpoint folder or a Hub id (owner/name).")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        found = snapshot_download(
            str(name_or_path), revision=revision, cache_dir=cache_dir, token=token, allow_patterns=small
        )
    except Exception as error:  # the Hub client raises many kinds; all mean the same to the user
        raise CheckpointError(
            f"{name_or_path} is neither a folder nor reachable on the Hub ({type(error).__name__}: {error})."
        ) from error
    return Path(found)


def download_weights(folder: Path, name: str, revision: str | None, cache_dir: str | None, token: str | None) -> Path:
    """The Hub snapshot of a model with its safetensors weights. folder: that of its small files, the index among them.

    Raises CheckpointError where they cannot be had.
    """
    from huggingface_hub import snapshot_download

    index = folder / INDEX
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    if all((folder / file).is_file() for file in files):
        return folder
    try:
        found = snapshot_download(name, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=files)
    except Exception as error:  # the Hub client raises many kinds; all mean the same to the user
        raise CheckpointError(
            f"The weights of {name} cannot be downloaded ({type(error).__name__}: {error})."
        ) from error
    return Path(found)


def processor_files(base: Path) -> list[Path]:
    """Processor, tokenizer, generation and chat-template files of `base`, relative to it.

    Raises CheckpointError naming what is missing for transformers to build the processor.
    """
    for what, names in PROCESSOR_GROUPS.items():
        if not any((base / name).is_file() for name in names):
            raise CheckpointError(f"{base} has no {what} ({' or '.join(names)}); get the base model's whole folder.")
    files = [Path(name) for name in COPIED_FILES if (base / name).is_file()]
    for name in COPIED_FOLDERS:
        files += sorted(path.relative_to(base) for path in (base / name).rglob("*") if path.is_file())
    return files


def copy_files(base: Path, files: list[Path], folder: Path) -> None:
    """Copies `files` (relative to `base`) into `folder`, byte for byte."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / file, folder / file)


def check_output(out_dir: str | Path, overwrite: bool = False, mark: str = "config.json") -> None:
    """Refuses an `out_dir` that no checkpoint may be written to. Call it before long work.

    Raises CheckpointError if it is a file, if it holds files and `overwrite` is false, or if what it holds is
    not a checkpoint (overwriting never deletes anything else). mark: a file that only such a folder has, as a pattern.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is a file; choose another output folder.")
    if not out_dir.is_dir() or not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{out_dir} already holds files; choose another folder or ask to overwrite it.")
    if not any(out_dir.glob(mark)):
        raise CheckpointError(f"{out_dir} holds files but no {mark}, so no checkpoint: remove it yourself.")


@contextmanager
def fresh_folder(
    out_dir: str | Path, needed_bytes: int, overwrite: bool = False, mark: str = "config.json"
) -> Iterator[Path]:
    """Writes a checkpoint beside its final place: yields '<out_dir>.partial', renames it to `out_dir` on success.

    If the block raises, the partial folder is removed and `out_dir` is as it was. Raises CheckpointError
    before anything is written: see check_output, check_disk (`needed_bytes`).
    """
    out_dir = Path(out_dir)
    check_output(out_dir, overwrite, mark)
    partial = out_dir.with_name(out_dir.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # left by an interrupted run; its name says it is not whole
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    check_disk(out_dir.parent, needed_bytes)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if out_dir.is_dir() and any(out_dir.iterdir()):
        old = out_dir.with_name(out_dir.name + ".replaced")
        out_dir.rename(old)
        partial.rename(out_dir)
        shutil.rmtree(old)
    else:
        if out_dir.is_dir():
            out_dir.rmdir()
        partial.rename(out_dir)


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raises CheckpointError if `folder`'s disk has less than `needed_bytes` (and 1 % to spare) free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes * 1.01:
        raise CheckpointError(
            f"Not enough disk space in {folder.resolve()}: {needed_bytes / 1e9:.3f} GB needed, "
            f"{free / 1e9:.3f} GB free."
        )


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Tensor names split in order into shards of at most `max_shard_bytes`; a larger tensor is a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_tensors(
    path: Path,
    planned: Mapping[str, torch.Tensor],
    fetch: Callable[[str], torch.Tensor],
    written: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes one .safetensors file with one tensor in memory at a time, byte for byte what safetensors writes.

    safetensors 0.8's own `save_file` wants all tensors of a file at once. Format:
    https://github.com/huggingface/safetensors#format

    planned: name -> meta tensor of the dtype and shape to come, in the order to fetch them. fetch(name) gives the
    tensor on the CPU. written is told the bytes of each. Raises CheckpointError if a fetched tensor is not as planned.
    """
    order = list(CODES)
    names = sorted(planned, key=lambda name: (order.index(planned[name].dtype), name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + planned[name].nbytes
        shape = list(planned[name].shape)
        header[name] = {"dtype": CODES[planned[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in planned.items():
            tensor = fetch(name)
            if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
                found, meant = (f"{x.dtype} {tuple(x.shape)}" for x in (tensor, wanted))
                raise CheckpointError(f"{name} is {found}; {meant} was planned.")
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(tensor.nbytes)
            del tensor  # before the next one is fetched


def write_shards(
    folder: Path,
    planned: Mapping[str, torch.Tensor],
    fetch: Callable[[str], torch.Tensor],
    max_shard_gb: float,
    what: str = "",
) -> None:
    """Writes tensors as shards with an index, or as model.safetensors alone when one shard is enough.

    Shards are named model-00001-of-0000N.safetensors and have the metadata {'format': 'pt'}.

    planned: tensor name -> meta tensor of its dtype and shape, in the order of the shards. fetch(name) gives the CPU
    tensor; one is in memory at a time. what: names the progress bar; none is shown without it. Raises CheckpointError
    if a fetched tensor is not as planned.
    """
    sizes = {name: tensor.nbytes for name, tensor in planned.items()}
    shards = plan_shards(sizes, int(max_shard_gb * 1e9))
    weight_map = {}
    with progress.bar(sum(sizes.values()), what, unit="B", unit_scale=True, disable=not what) as bar:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            write_tensors(folder / file, {name: planned[name] for name in names}, fetch, bar.update)
            weight_map.update(dict.fromkeys(names, file))
    if len(shards) == 1:
        return
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
