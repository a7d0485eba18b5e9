"""RLAIF-V rows as plain Python: fields, subsets, filters, the held-out split. It does not need LLaMA-Factory.

Schema of openbmb/RLAIF-V-Dataset (strings but for the image): ds_name, image {bytes, path}, question, chosen,
rejected, origin_dataset, origin_split, idx, image_path. `origin_split` is a JSON string that holds the
generating model and the question type. RLHF-V's layout has one `text` column with a JSON object instead.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UserError

UNREADABLE = "_unreadable"  # column of the reason why a row of a file cannot be read at all (see `json_rows`)
QUESTION_TYPES = ("detailed description", "question answering")
SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """A row that cannot be used; the message is the reason that is listed."""


def normal(text: Any) -> str:
    """Case- and punctuation-insensitive form of a value: "VQA v2" and "vqa_v2" are the same."""
    return "".join(ch for ch in str(text).casefold() if ch.isalnum())


def leaves(value: Any) -> list[str]:
    """All scalar values inside a JSON value, as strings."""
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [] if value is None else [str(value)]


def parse_json(text: Any) -> Any:
    """The JSON value of a string column, or the text itself where it is not JSON."""
    if not isinstance(text, str) or text.strip()[:1] not in ("{", "["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


CONTEXT = "context"  # column of the clean beginning of an answer that comes before both responses


def context_of(row: Mapping[str, Any]) -> str:
    """The beginning of an answer that comes before both responses of a row, "" if it has none. Raises RowError.

    Of a context that holds a whole answer nothing is left to prefer (arXiv 2507.12455 pairs next sentences).
    """
    context = row.get(CONTEXT)
    if context is None:
        return ""
    if not isinstance(context, str):
        raise RowError(f"`{CONTEXT}` is not text but {type(context).__name__}")
    if SURROGATE.search(context):
        raise RowError(f"`{CONTEXT}` holds half a character (a lone surrogate)")
    for field in ("chosen", "rejected"):
        answer = row.get(field)
        if context.strip() and isinstance(answer, str) and context.strip().endswith(answer.strip()):
            raise RowError(f"`{CONTEXT}` contains the whole answer: nothing is left of `{field}`")
    return context if context.strip() else ""


def preference_texts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(question, chosen, rejected) of a row in RLAIF-V's or RLHF-V's layout. Raises RowError."""
    if row.get(UNREADABLE):
        raise RowError(row[UNREADABLE])
    if row.get("question") is None and row.get("text") is not None:
        text = row["text"]
        if isinstance(text, str):
            try:
                text = json.loads(text)
            except (ValueError, RecursionError) as err:
                raise RowError(f"column `text` is not JSON: {err}") from None
        if not isinstance(text, Mapping):
            raise RowError("column `text` must hold a JSON object with question, chosen, rejected")
        row = text
    texts = []
    for field in ("question", "chosen", "rejected"):
        value = row.get(field)
        if value is None:
            raise RowError(f"`{field}` is missing")
        if not isinstance(value, str):
            raise RowError(f"`{field}` is not text but {type(value).__name__}")
        if field != "question" and not value.strip():
            raise RowError(f"`{field}` is empty")
        if SURROGATE.search(value):
            raise RowError(f"`{field}` holds half a character (a lone surrogate)")
        texts.append(value)
    if texts[1] == texts[2]:
        raise RowError("chosen and rejected are the same text")
    return tuple(texts)


def source_of(row: Mapping[str, Any]) -> str:
    """Where a row comes from (MSCOCO, VQA v2, …): origin_dataset, else ds_name."""
    return str(row.get("origin_dataset") or row.get("ds_name") or "unknown")


def question_type_of(row: Mapping[str, Any]) -> str:
    """ "detailed description", "question answering" or "unknown", from anywhere inside origin_split."""
    known = {normal(kind): kind for kind in QUESTION_TYPES}
    for leaf in leaves(parse_json(row.get("origin_split"))):
        if normal(leaf) in known:
            return known[normal(leaf)]
    return "unknown"


def pair_id_of(row: Mapping[str, Any], number: int) -> str:
    """`<idx>-<8 hex digits of the texts>`; a row without an idx gets its row number instead."""
    idx = row.get("idx")
    texts = "\0".join(str(row.get(field)) for field in ("question", "chosen", "rejected", "text"))
    digest = hashlib.blake2b(texts.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{number if idx in (None, '') else idx}-{digest}"


def flatten_filter(conditions: Mapping[str, Any]) -> dict[str, list[str]]:
    """{"origin_split": {"type": "x"}} and {"origin_split.type": ["x"]} alike become {"origin_split.type": ["x"]}."""
    flat: dict[str, list[str]] = {}
    for key, value in conditions.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": wanted for inner, wanted in flatten_filter(value).items()})
        else:
            flat[key] = [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return flat


def values_at(row: Mapping[str, Any], path: str) -> list[str]:
    """The values a condition on `path` is compared with.

    A bare column that holds JSON gives the column's text and every scalar inside it, so that
    `origin_split: detailed description` works whatever the field is called.
    """
    column, *fields = path.split(".")
    value = parse_json(row.get(column))
    for field in fields:
        value = value.get(field) if isinstance(value, Mapping) else None
    return leaves(value) + ([str(row[column])] if not fields and isinstance(value, (Mapping, list)) else [])


def wanted_values(conditions: Mapping[str, Any]) -> dict[str, set[str]]:
    """{path: the values that meet a filter's condition on it, in their `normal` form}."""
    return {path: {normal(v) for v in values} for path, values in flatten_filter(conditions).items()}


def filter_rows(rows: Iterable[Mapping[str, Any]], conditions: Mapping[str, Any], dataset: str) -> list[int]:
    """Indices of the rows that meet every condition.

    Raises UserError when a column does not exist or when nothing matches; the message lists the values
    present with their counts.
    """
    wanted = wanted_values(conditions)
    present: dict[str, Counter] = {path: Counter() for path in wanted}
    kept, columns = [], set()
    for index, row in enumerate(rows):
        columns.update(row)
        keep = True
        for path, values in wanted.items():
            found = values_at(row, path)
            present[path].update(found or ["(none)"])
            keep &= any(normal(value) in values for value in found)
        if keep:
            kept.append(index)
    unknown = [path for path in wanted if path.split(".")[0] not in columns]
    if columns and unknown:
        raise UserError(
            f"dataset_filter: {dataset} has no column {', '.join(repr(p.split('.')[0]) for p in unknown)}; "
            f"its columns are {', '.join(sorted(columns))}."
        )
    if not kept:
        lines = [
            f"  {path}: wanted {flatten_filter(conditions)[path]}, present: "
            + ", ".join(f"{value!r} ({count})" for value, count in counter.most_common(20))
            for path, counter in present.items()
        ]
        raise UserError(f"dataset_filter matches no row of {dataset}. Values present:\n" + "\n".join(lines))
    return kept


def is_heldout(image_hash: str, fraction: float) -> bool:
    """True for the `fraction` of images whose content hash (16 hex digits, uniform) falls below it.

    A pure function of the image's bytes: the same image is on the same side in every row, run and machine.
    """
    return int(image_hash, 16) < fraction * 16**16
