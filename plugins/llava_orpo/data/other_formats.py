"""Images of LLaMA-Factory's own formats (alpaca, sharegpt): paths that must not be followed, found before.

LLaMA-Factory 0.9.5 reads any path that a row names: below `media_dir` if there is such a file, else as it stands. Here
the rows whose path leaves the folders of `media.folders_of` are left out first.
"""

from __future__ import annotations

import os
from typing import Any

from datasets import Dataset, Image, List

from . import image_store, media


def leave_out_strange_paths(
    dataset: Dataset, dataset_attr, data_args, name: str
) -> tuple[Dataset, list[dict[str, Any]]]:
    """(the rows whose images may be read, entries of skipped_rows.jsonl for the others), in order.

    Embedded images keep their original bytes: the column is not decoded.
    """
    column = dataset_attr.images
    if column is None or column not in dataset.column_names:
        return dataset, []
    kind = dataset.features[column]
    if isinstance(kind, Image):
        dataset = dataset.cast_column(column, Image(decode=False))
    elif isinstance(kind, List) and isinstance(kind.feature, Image):
        dataset = dataset.cast_column(column, List(Image(decode=False)))
    checked = dataset.select_columns([column]).map(
        _problems,
        batched=True,
        batch_size=256,
        remove_columns=[column],
        fn_kwargs={
            "column": column,
            "folders": media.folders_of(dataset_attr, data_args),
            "media_dir": data_args.media_dir,
        },
        desc="Checking image paths",
        load_from_cache_file=False,  # files and links may have changed
    )
    reasons = checked["problem"]
    skipped = [
        {"dataset": name, "row": row, "pair_id": "", "reason": reason} for row, reason in enumerate(reasons) if reason
    ]
    if skipped:
        dataset = dataset.select([row for row, reason in enumerate(reasons) if not reason])
    return dataset, skipped


def problem_of(image: Any, folders: list[str], media_dir: str | None) -> str:
    """Why an image of a row must not be read, or ""; a missing file inside the folders is no problem of this kind."""
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return "" if isinstance(image["bytes"], bytes) else "bad image: its `bytes` are text"
        image, media_dir = image.get("path"), None  # LLaMA-Factory joins bare paths alone
    if image is None or isinstance(image, bytes):
        return ""
    if not isinstance(image, str):
        return f"bad image: {type(image).__name__} is neither a path nor bytes"
    if not folders:
        return "bad image: " + media.HUB_REASON.format(image)
    if image.startswith(image_store.OWN):
        return f"bad image: {image!r} is not the path of a file"
    try:
        below = os.path.join(media_dir, image) if media_dir else image
        place = os.path.realpath(below if os.path.isfile(below) else image)
    except ValueError as error:
        return f"bad image: {image!r} cannot exist ({error})"
    return "" if media.is_inside(place, folders) else "bad image: " + media.outside(image, [place], folders)


def _problems(batch, column, folders, media_dir):
    found = []
    for value in batch[column]:
        images = value if isinstance(value, list) else [value]
        found.append(next((problem for image in images if (problem := problem_of(image, folders, media_dir))), ""))
    return {"problem": found}
