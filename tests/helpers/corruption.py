"""Odd rows of many kinds, each with what must become of it, and an independent judgement of what did.

A kind makes one row of one of three files: `embedded` (parquet in RLAIF-V's layout, images as bytes), `lines` (JSONL,
images as paths) or `rlhf` (JSON in RLHF-V's layout, images as paths). The judgement uses Pillow, the tokenizer and the
processor of transformers alone.
"""

from __future__ import annotations

import functools
import io
import json
import re
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from helpers.serving import picture
from llava_orpo.tiny import photo_pairs

FILES = {"embedded": "embedded.parquet", "lines": "lines.jsonl", "rlhf": "rlhf.json"}
CUTOFF = 1024
KEYS = {"dataset": ",".join(FILES), "cutoff_len": CUTOFF, "max_skipped_fraction": 1.0}


@dataclass
class Case:
    """One row: what is written, and either the reason it must be skipped for or what must reach the model."""

    kind: str
    file: str
    row: Any  # a dict of columns, or the bytes of a line
    texts: dict[str, str]
    image: bytes  # what the pixels must come from
    stage: str = ""  # reading, tokenizing or training if it must be skipped
    reason: str = ""  # a pattern of the listed reason
    sixteen_bit: bool = False
    number: int = -1  # of the row in its file


@dataclass
class Result:
    """How many rows of each kind were used, skipped and wrong, and one sentence per wrong row."""

    counts: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    complaints: list[str] = field(default_factory=list)

    def table(self) -> str:
        lines = ["| kind | rows | used | skipped | wrong |", "|---|--:|--:|--:|--:|"]
        for kind, count in [*self.counts.items(), ("all", sum(self.counts.values(), Counter()))]:
            shown = [count["used"] + count["skipped"] + count["wrong"], count["used"], count["skipped"], count["wrong"]]
            lines.append(f"| {kind} | " + " | ".join(map(str, shown)) + " |")
        return "\n".join(lines)


# kinds ------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, Callable[[Case, int, Path], None]]] = {}


def kind(file: str, name: str):
    """Registers a function that turns a good case of `file` into one of this kind, in place."""

    def register(change):
        KINDS[name] = (file, change)
        return change

    return register


def text_kind(file: str, name: str, stage: str = "", reason: str = "", **texts: Any) -> None:
    """A kind that only changes texts; {} stands for the original text, which keeps rows apart."""

    def change(case: Case, i: int, folder: Path) -> None:
        for side, text in texts.items():
            text = text.replace("{}", case.texts[side]) if isinstance(text, str) else text
            case.row[side] = case.texts[side] = text
        case.stage, case.reason = stage, reason

    KINDS[name] = (file, change)


def image_kind(name: str, make: Callable[[int], bytes | None], stage: str = "", reason: str = "", **more: Any) -> None:
    """A kind of image bytes, in the file `embedded`."""

    def change(case: Case, i: int, folder: Path) -> None:
        case.image = make(i)
        case.row["image"] = None if case.image is None else {"bytes": case.image, "path": None}
        case.stage, case.reason = stage, reason
        case.sixteen_bit = more.get("sixteen_bit", False)

    KINDS[name] = ("embedded", change)


def path_kind(file: str, name: str, place: Callable[[Case, int, Path], Any], stage: str = "", reason: str = "") -> None:
    """A kind of image path; `place` writes the file and returns what the row says."""

    def change(case: Case, i: int, folder: Path) -> None:
        case.row["image"] = place(case, i, folder)
        case.stage, case.reason = stage, reason

    KINDS[name] = (file, change)


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def photo(i: int) -> Image.Image:
    return picture(60 + 7 * (i % 9), 50 + 11 * (i % 7), seed=i)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def wrong_crc(data: bytes) -> bytes:
    """A PNG with one byte of its pixel data changed."""
    at = data.index(b"IDAT") + 12
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def rotated(i: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(photo(i), "JPEG", exif=exif)


def lying_icon(inner: bytes) -> bytes:
    """An icon whose directory says 16x16, whatever the size of the picture in it."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def beyond(data: bytes, i: int) -> bytes:
    return data[: len(data) * (2 + i % 6) // 9]


@functools.cache
def text_bomb() -> bytes:
    return png(8, 8, chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100_000_000), 9)), data=bytes(72))


MISSING = ("reading", "is missing")
text_kind("embedded", "good")
text_kind("embedded", "question empty", question="")
text_kind("embedded", "question whitespace", question=" \n\t ")
text_kind("embedded", "NUL", chosen="a\0b {}", question="{} \0")
text_kind("embedded", "control characters", chosen="\x01\x02\x1b[31m {} \x7f", rejected="{}\x08\x0b")
text_kind("embedded", "right-to-left", question="מה יש בתמונה? {}", chosen="\u202eقطة {}\u202c")
text_kind("embedded", "emoji", chosen="👩‍👩‍👧‍👦🏳️‍🌈 {}", rejected="🙂{}")
text_kind("embedded", "combining marks", chosen="Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ {}")
text_kind("embedded", "non-characters", chosen="\ufffe\uffff\ufeff {}", rejected="\ue000 {}")
text_kind("embedded", "line ends", chosen="{}\r\n\r\n", rejected="\n\n{}", question="{}\r")
text_kind("embedded", "spaces around", chosen="   {}   ", rejected="\u3000{}\u00a0")
text_kind("embedded", "word-start mark", chosen="▁{}▁▁", rejected="▁")
text_kind("embedded", "<image> in texts", question="<image>\n{} <image>", chosen="<image>{}", rejected="{}<image>")
text_kind("embedded", "[INST] in texts", question="[/INST] {} [INST]", chosen="[INST] {} [/INST]")
text_kind("embedded", "</s> in texts", question="</s>{}<s>", chosen="</s>", rejected="{}</s></s> <s>")
text_kind("embedded", "special tokens", question="<unk> <pad> {} <|im_start|>", chosen="<<SYS>> <0x0A> {} <unk>")
text_kind("embedded", "HTML and script", chosen="<script>alert('{}')</script>", rejected="<img src=x onerror=x> {}")
text_kind("embedded", "JSON as text", chosen='{"chosen": "{}"}', rejected="[{}]")
text_kind("embedded", "answer of 100,000 characters", chosen="{} " + "long words " * 9091)
text_kind("embedded", "question of 100,000 characters", "tokenizing", "cutoff_len is", question="{} " + "why " * 25000)
text_kind("embedded", "question None", *MISSING, question=None)
text_kind("embedded", "chosen None", *MISSING, chosen=None)
text_kind("embedded", "chosen empty", "reading", "is empty", chosen="")
text_kind("embedded", "rejected whitespace", "reading", "is empty", rejected=" \n ")
text_kind("embedded", "equal answers", "reading", "same text", chosen="The same.", rejected="The same.")

image_kind("1x1", lambda i: encode(picture(1, 1, seed=i), "PNG"))
image_kind("1x5000", lambda i: encode(picture(1, 5000, seed=i), "PNG"))
image_kind("5000x1", lambda i: encode(picture(5000, 1, seed=i), "PNG"))
image_kind("grey", lambda i: encode(photo(i).convert("L"), "PNG"))
image_kind("one bit", lambda i: encode(photo(i).convert("1"), "PNG"))
image_kind("grey with alpha", lambda i: encode(photo(i).convert("LA"), "PNG"))
image_kind("alpha", lambda i: encode(Image.merge("RGBA", (*photo(i).split(), photo(i).convert("L"))), "PNG"))
image_kind("palette with transparency", lambda i: encode(photo(i).convert("P"), "PNG", transparency=i % 256))
image_kind("CMYK", lambda i: encode(photo(i).convert("CMYK"), "JPEG"))
image_kind(
    "16-bit grey",
    lambda i: encode(Image.fromarray((np.asarray(photo(i).convert("L")).astype(np.uint16) << 8) + i % 256), "PNG"),
    sixteen_bit=True,
)
image_kind("animated GIF", lambda i: encode(photo(i), "GIF", save_all=True, append_images=[ImageOps.invert(photo(i))]))
image_kind("animated PNG", lambda i: encode(photo(i), "PNG", save_all=True, append_images=[ImageOps.invert(photo(i))]))
image_kind("EXIF rotated", rotated)
image_kind("progressive JPEG", lambda i: encode(photo(i), "JPEG", progressive=True))
image_kind("JPEG with data behind it", lambda i: encode(photo(i), "JPEG") + b"trailing" * (i % 50))
image_kind("WebP", lambda i: encode(photo(i), "WEBP", lossless=bool(i % 2)))
image_kind("BMP", lambda i: encode(photo(i), "BMP"))
image_kind("TIFF", lambda i: encode(photo(i), "TIFF", compression="tiff_lzw" if i % 2 else None))
image_kind("ICO of another size", lambda i: lying_icon(encode(picture(64 + i % 5, 64, seed=i), "PNG")))
image_kind("ICO", lambda i: encode(picture(32, 32, seed=i), "ICO", sizes=[(32, 32)]))
BAD = "bad image: "
image_kind("image None", lambda i: None, "reading", "^no image$")
image_kind("image of no bytes", lambda i: b"", "reading", BAD + ".*empty")
image_kind("truncated JPEG", lambda i: beyond(encode(picture(90, 90, seed=i), "JPEG"), i), "reading", BAD)
image_kind("truncated PNG", lambda i: beyond(encode(photo(i), "PNG"), i), "reading", BAD + ".*truncated")
image_kind("truncated WebP", lambda i: beyond(encode(photo(i), "WEBP"), i), "reading", BAD)
image_kind("truncated GIF", lambda i: encode(photo(i), "GIF")[: -200 - i % 300], "training", BAD)
image_kind("PNG with a wrong checksum", lambda i: wrong_crc(encode(photo(i), "PNG")), "training", BAD)
image_kind("PNG with a wrong header", lambda i: png(9, 9)[:24] + b"\xff" + png(9, 9)[25:], "reading", BAD)
image_kind("size zero", lambda i: png(0, i % 3), "reading", BAD)
image_kind("bomb, PNG", lambda i: png(40000 + i, 40000), "reading", BAD + ".*decompression bomb")
image_kind("bomb that Pillow only warns of", lambda i: png(12000 + i, 12000), "reading", BAD + ".*decompression bomb")
image_kind("bomb, GIF", lambda i: b"GIF89a" + b"\xff\xff\xff\xff\0\0\0;" + bytes(i), "reading", BAD)
image_kind("bomb of text in a PNG", lambda i: text_bomb(), "reading", BAD + ".*MAX_TEXT_CHUNK")
image_kind("bomb in an icon", lambda i: lying_icon(png(12000 + i, 12000)), "reading", BAD + ".*decompression bomb")
image_kind("text as image", lambda i: b"This is no image. " * (i + 1), "reading", BAD + ".*no known image format")
image_kind("HTML as image", lambda i: b"<!DOCTYPE html><title>404</title>" + bytes(i), "reading", BAD + ".*no known")
image_kind("SVG", lambda i: b"<svg xmlns='http://www.w3.org/2000/svg'/>" + b" " * i, "reading", BAD + ".*no known")
image_kind("EPS", lambda i: encode(photo(i), "EPS"), "reading", BAD + ".*no known image format")


@kind("embedded", "bytes and path both")
def _bytes_win(case, i, folder):
    case.row["image"]["path"] = "../../etc/passwd" if i % 2 else "some.jpg"


def written(case: Case, i: int, folder: Path, name: str | None = None) -> str:
    """Writes the case's image below the data folder; returns its path from there."""
    name = name or f"pictures/{case.file}-{case.kind.replace('/', '')}-{i}.png"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(case.image)
    return name


def linked(case: Case, i: int, folder: Path, target: Path) -> str:
    name = f"pictures/link-{case.kind}-{i}.png"
    (folder / name).symlink_to(target)
    return name


def folder_link(case: Case, i: int, folder: Path) -> str:
    link = folder / "elsewhere"
    if not link.is_symlink():
        link.symlink_to(outside(case, i, folder).parent)
    return f"elsewhere/{outside(case, i, folder).name}"


def outside(case: Case, i: int, folder: Path) -> Path:
    place = folder.parent / "private" / f"{i}.png"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(case.image)
    return place


OUT = ("reading", r"bad image: .*is outside the folders that images are read from .*; set `media_dir: /.*` if")
path_kind("lines", "path", written)
path_kind("lines", "path in {path}", lambda c, i, f: {"path": written(c, i, f)})
path_kind("lines", "path in {bytes: null, path}", lambda c, i, f: {"bytes": None, "path": written(c, i, f)})
path_kind(
    "lines", "path with spaces and unicode", lambda c, i, f: written(c, i, f, f"pictures/Ein Bild № {i} 🙂 'x\".png")
)
path_kind("lines", "path with dots", lambda c, i, f: "./pictures/../" + written(c, i, f))
path_kind("lines", "absolute path inside", lambda c, i, f: str(f / written(c, i, f)))
path_kind("lines", "link inside", lambda c, i, f: linked(c, i, f, f / written(c, i, f)))
path_kind("lines", "path missing", lambda c, i, f: f"pictures/none-{i}.png", "reading", BAD + ".*not found in")
path_kind("lines", "path of a folder", lambda c, i, f: "pictures", "reading", BAD + ".*not found in")
path_kind("lines", "path empty", lambda c, i, f: "", "reading", BAD + "|no image")
path_kind("lines", "path with NUL", lambda c, i, f: f"a\0{i}.png", "reading", BAD + ".*cannot exist")
path_kind("lines", "URL", lambda c, i, f: f"https://example.com/{i}.png", "reading", BAD + ".*not found in")
path_kind("lines", "file URL", lambda c, i, f: f"file://{outside(c, i, f)}", "reading", BAD + ".*not found in")
path_kind("lines", "arrow reference", lambda c, i, f: f"arrow:{outside(c, i, f)}#image#0", "reading", BAD)
path_kind("lines", "../ path", lambda c, i, f: f"../private/{outside(c, i, f).name}", *OUT)
path_kind("lines", "absolute path outside", lambda c, i, f: str(outside(c, i, f)), *OUT)
path_kind("lines", "link out of the folder", lambda c, i, f: linked(c, i, f, outside(c, i, f)), *OUT)
path_kind("lines", "link of a folder", folder_link, *OUT)
path_kind("lines", "image a number", lambda c, i, f: i, "reading", "not a path but int")
path_kind("lines", "a list of images", lambda c, i, f: ["a.png", "b.png"], "reading", "2 images: ")
path_kind("lines", "bytes in JSON", lambda c, i, f: {"bytes": "aGVsbG8="}, "reading", "`bytes`, which JSON cannot")
text_kind("lines", "answer a number", "reading", "`chosen` is not text but int", chosen=5)
text_kind("lines", "answer a list", "reading", "`rejected` is not text but list", rejected=["a", "b"])
text_kind("lines", "answer an object", "reading", "`chosen` is not text but dict", chosen={"a": 1})
text_kind("lines", "question a truth value", "reading", "`question` is not text but bool", question=True)
text_kind("lines", "answer null", *MISSING, rejected=None)
HALF = ("reading", "half a character")
text_kind("lines", "lone surrogate", *HALF, chosen="half \ud83d {}")
text_kind("lines", "NUL in JSON", chosen="{}\0", question="\0{}")


@kind("lines", "key missing")
def _no_key(case, i, folder):
    del case.row[("question", "chosen", "rejected")[i % 3]]
    case.stage, case.reason = MISSING


@kind("lines", "image key missing")
def _no_image_key(case, i, folder):
    del case.row["image"]
    case.stage, case.reason = "reading", "^no image$"


@kind("lines", "line cut off")
def _cut(case, i, folder):
    line = json.dumps(case.row).encode()
    case.row, case.stage, case.reason = line[: len(line) * (1 + i % 7) // 9], "reading", "line [0-9]+ is not JSON"


@kind("lines", "line not an object")
def _no_object(case, i, folder):
    case.row = (b'"text"', b"[1, 2]", b"17", b"null")[i % 4]
    case.stage, case.reason = "reading", "not a JSON object"


@kind("lines", "line not UTF-8")
def _latin(case, i, folder):
    case.row = json.dumps({**case.row, "chosen": "gr\xfc\xdfe"}, ensure_ascii=False).encode("latin-1")
    case.stage, case.reason = "reading", "not UTF-8"


@kind("lines", "nested too deeply")
def _deep(case, i, folder):
    case.row, case.stage, case.reason = b'{"idx": ' + b"[" * 200_000, "reading", "not readable JSON|not JSON"


@kind("lines", "duplicate row")
def _twice(case, i, folder):
    case.texts.update(question="Seen twice?", chosen="Yes.", rejected="No.")
    case.image = encode(photo(1), "PNG")
    case.row.update(case.texts, idx="twice", image=written(case, 0, folder))


@kind("lines", "duplicate idx")
def _same_idx(case, i, folder):
    case.row["idx"] = "always the same"


@kind("lines", "columns of other types")
def _types(case, i, folder):
    case.row.update(idx=i, origin_split={"type": "question answering"}, extra=[i, None, "x"])


def in_text(name: str, content: Callable[[Case], Any], stage: str = "", reason: str = "") -> None:
    """A kind of RLHF-V's `text` column."""

    def change(case: Case, i: int, folder: Path) -> None:
        case.row["text"] = content(case)
        case.stage, case.reason = stage, reason

    KINDS[name] = ("rlhf", change)


in_text("text column", lambda c: json.dumps(c.texts))
in_text("text column an object", lambda c: c.texts)
in_text("text column with more fields", lambda c: json.dumps({**c.texts, "more": [1]}))
in_text("text column not JSON", lambda c: json.dumps(c.texts)[:-1], "reading", "`text` is not JSON")
in_text("text column a list", lambda c: json.dumps([c.texts]), "reading", "must hold a JSON object")
in_text("text column a number", lambda c: 5, "reading", "`text`")
in_text("text column null", lambda c: None, *MISSING)
in_text("text column without an answer", lambda c: json.dumps({"question": "q", "chosen": "c"}), *MISSING)
in_text("number in the text column", lambda c: json.dumps({**c.texts, "chosen": 5}), "reading", "not text but int")
in_text("half a character in the text column", lambda c: json.dumps({**c.texts, "chosen": "\udc00"}), *HALF)
in_text(
    "equal answers in the text column",
    lambda c: json.dumps({**c.texts, "chosen": c.texts["rejected"]}),
    "reading",
    "same",
)
path_kind("rlhf", "../ path, text column", lambda c, i, f: f"../private/{outside(c, i, f).name}", *OUT)


# files ------------------------------------------------------------------------------------------------------


def make(folder: Path, per_kind: int) -> list[Case]:
    """Writes and registers the three files with `per_kind` rows of every kind; returns the cases in file order."""
    data = folder / "data"
    (data / "pictures").mkdir(parents=True)
    cases: dict[str, list[Case]] = {file: [] for file in FILES}
    for i in range(per_kind):
        for number, (name, (file, change)) in enumerate(KINDS.items()):
            case = good(name, file, 1000 * number + i)
            if file != "embedded":
                case.row["image"] = written(case, i, data)
            change(case, i, data)
            case.number = len(cases[file])
            cases[file].append(case)
    photo_pairs.write(data / FILES["embedded"], [case.row for case in cases["embedded"]])
    lines = [row if isinstance(row := case.row, bytes) else json.dumps(row).encode() for case in cases["lines"]]
    (data / FILES["lines"]).write_bytes(b"\n".join(lines) + b"\n")
    (data / FILES["rlhf"]).write_text(json.dumps([case.row for case in cases["rlhf"]]))
    entry = {"formatting": "rlaif_v", "ranking": True}
    info = {name: {"file_name": file, **entry} for name, file in FILES.items()}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return [case for part in cases.values() for case in part]


def good(name: str, file: str, seed: int) -> Case:
    texts = {
        "question": f"What is in picture {seed}?",
        "chosen": f"Colours, number {seed}.",
        "rejected": f"A cat of {seed} years.",
    }
    image = encode(photo(seed), "PNG")
    row: dict[str, Any] = {"idx": f"{file}-{seed}", "origin_dataset": "COCO", "image": {"bytes": image, "path": None}}
    if file == "rlhf":
        row["text"] = json.dumps(texts)
    else:
        row.update(texts, ds_name="odd", origin_split="{}", image_path="")
    return Case(name, file, row, dict(texts), image)


# judgement --------------------------------------------------------------------------------------------------


def judge(cases: list[Case], rows, listed: list[dict], processor, collator=None) -> Result:
    """What became of each case.

    rows: the tokenized pairs; listed: the entries of skipped_rows.jsonl; collator: given, every row's pixels are
    compared too, and a row that must be skipped in training must be found bad there.
    """
    result = Result()
    used = {(row["dataset"], row["row"]): row for row in rows}
    entries = defaultdict(list)
    for entry in listed:
        entries[entry["dataset"], entry["row"]].append(entry)
    for case in cases:
        key = (case.file, case.number)
        if case.stage:
            problem = _judge_skipped(case, used.get(key), entries.pop(key, []), collator)
        else:
            problem = _judge_used(case, used.get(key), entries.pop(key, []), processor, collator)
        result.counts[case.kind]["wrong" if problem else "skipped" if case.stage else "used"] += 1
        if problem:
            result.complaints.append(f"{case.kind} ({case.file}, row {case.number}): {problem}")
    result.complaints += [f"listed, but no row: {key}" for key in entries]
    return result


def _judge_skipped(case: Case, row, entries: list[dict], collator) -> str:
    if case.stage == "training" and collator is not None:  # found when the image is decoded, with no training here
        if row is None or entries:
            return f"not in the data ({entries})"
        batch = collator([row])
        reasons = [f"bad image: {reason}" for _, reason in batch["bad_images"]]
        good = batch["weights"].tolist() == [0.0] and len(reasons) == 1 and re.search(case.reason, reasons[0])
        return "" if good else f"found in the collator: {reasons}"
    if len(entries) != 1 or entries[0]["stage"] != case.stage or not re.search(case.reason, entries[0]["reason"]):
        return f"expected {case.stage}: {case.reason}, listed: {entries}"
    return "used" if row is not None and case.stage != "training" else ""


def _judge_used(case: Case, row, entries: list[dict], processor, collator) -> str:
    if row is None or entries:
        return f"not used: {entries}"
    picture = Image.open(io.BytesIO(case.image))
    if case.sixteen_bit:
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    picture = picture.convert("RGB")
    inputs = processor.image_processor([picture], return_tensors="pt")
    count = processor(images=[picture], text="<image>")["input_ids"][0]
    count = list(count).count(processor.tokenizer.convert_tokens_to_ids("<image>"))
    prompt, chosen, rejected = reference_ids(processor.tokenizer, case.texts)
    limit = CUTOFF - (len(prompt) + count - 1)
    expected = {"prompt_ids": prompt, "chosen_ids": chosen[:limit], "rejected_ids": rejected[:limit]}
    expected |= {"num_image_tokens": count, "width": picture.width, "height": picture.height}
    for name, value in expected.items():
        if row[name] != value:
            return f"{name} is {str(row[name])[:200]}, expected {str(value)[:200]}"
    if collator is not None:
        batch = collator([row])
        if batch["bad_images"] or batch["weights"].tolist() != [1.0]:
            return f"left out in the collator: {batch['bad_images']}"
        for name, value in inputs.items():
            if not torch.equal(torch.as_tensor(batch["image_inputs"][name]), torch.as_tensor(value)):
                return f"{name} differs from Pillow's"
    return ""


def reference_ids(tokenizer, texts: dict[str, str]) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected) ids by the tokenizer alone: what stands between special tokens is text."""

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    before, image = plain("[INST] "), tokenizer.convert_tokens_to_ids("<image>")
    start = [tokenizer.bos_token_id, *before, image]
    question = plain("\n" + texts["question"] + " [/INST]")
    answers = []
    for side in ("chosen", "rejected"):
        whole = plain("\n" + texts["question"] + " [/INST] " + texts[side])
        assert whole[: len(question)] == question, "the reference cannot cut this text"
        answers.append([*whole[len(question) :], tokenizer.eos_token_id])
    return [*start, *question], *answers
