"""Where each image lies inside a parquet file, so that one image can be read without its whole row group.

pyarrow reads a column by whole row groups: one image out of a group of 1,000 costs 100 MB. But an image is
incompressible, and parquet's two usual ways to store it leave it in reach: uncompressed, or in Snappy, whose encoder
packs every 65,536 bytes by themselves. So one walk over the pages of a column gives, for each value, the bytes of the
file to read. Whoever uses a place compares what it gives with what pyarrow gives for the row, once, when it is noted;
values that have no place (another codec or encoding) are read by row group.

Formats: https://github.com/apache/parquet-format (PageHeader in Thrift's compact protocol, PLAIN encoding) and
https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 65536  # what Snappy's encoder packs at a time, without references to what came before
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY = 0, 2  # the second is an older name for PLAIN on a dictionary page
HEADER_LIMIT = 1 << 20  # statistics may make a header long


class NotLocated(ValueError):
    """The pages are of a kind that this module does not read."""


@dataclass(frozen=True)
class Place:
    """Bytes start … start + stored of a file, unpacked to `unpacked` bytes, of which skip … skip + length are meant.

    unpacked: 0 for bytes that stand in the file as they are.
    """

    start: int
    stored: int
    unpacked: int
    skip: int
    length: int

    def __str__(self) -> str:
        return f"{self.start},{self.stored},{self.unpacked},{self.skip},{self.length}"

    @classmethod
    def parse(cls, text: str) -> Place:
        return cls(*map(int, text.split(",")))

    def read(self, file: int) -> bytes:
        """The bytes meant. file: a descriptor; its position stays. Raises OSError if they are not there."""
        data = os.pread(file, self.stored, self.start)
        if len(data) != self.stored:
            raise OSError(f"the file ends before byte {self.start + self.stored}")
        if self.unpacked:
            try:
                data = pa.Codec("snappy").decompress(_varint(self.unpacked) + data, self.unpacked, asbytes=True)
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"bytes {self.start} to {self.start + self.stored} are damaged ({error})") from error
        return data[self.skip : self.skip + self.length]


def key_of(value) -> tuple[int, int]:
    """What tells a value from the others of its row group: its length and a checksum."""
    return len(value), zlib.crc32(value)


def locate(file, parquet: pq.ParquetFile, group: int, path: str) -> dict[tuple[int, int], Place]:
    """{`key_of` a value: its place} of the binary column `path` ("image.bytes") in a row group; {} if out of reach.

    file: the whole file as a buffer (a memory map). One page at a time is unpacked.
    """
    places: dict[tuple[int, int], Place] = {}
    try:
        number = [column.path for column in map(parquet.schema.column, range(len(parquet.schema)))].index(path)
        leaf, chunk = parquet.schema.column(number), parquet.metadata.row_group(group).column(number)
        if leaf.physical_type != "BYTE_ARRAY" or leaf.max_repetition_level:
            raise NotLocated(path)
        if chunk.compression not in ("UNCOMPRESSED", "SNAPPY"):
            raise NotLocated(chunk.compression)
        for start, size, header in _pages(file, chunk):
            _note(places, file, start, size, header, chunk.compression == "SNAPPY", leaf.max_definition_level)
    except (NotLocated, ValueError, IndexError, KeyError, OSError, pa.ArrowException):
        pass  # what was located before stays; the rest is read by row group
    return places


def _pages(file, chunk) -> Iterator[tuple[int, int, dict[int, Any]]]:
    """(first byte, number of bytes, header) of every page of a column chunk."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    end = start + chunk.total_compressed_size
    while start < end:
        header, used = _struct(file[start : min(end, start + HEADER_LIMIT)], 0)
        yield start + used, header[3], header
        start += used + header[3]


def _note(places, file, start: int, size: int, header: dict[int, Any], snappy: bool, max_definition: int) -> None:
    """Adds the values of one page to `places`; a page without values in PLAIN (indices into a dictionary) adds none."""
    kind, before = header[1], 0  # before: bytes in front of the values, inside the unpacked page
    if kind == DICTIONARY_PAGE and header[7][2] in (PLAIN, PLAIN_DICTIONARY):
        levels = False
    elif kind == DATA_PAGE and header[5][2] == PLAIN:
        levels = max_definition > 0
    elif kind == DATA_PAGE_V2 and header[8][4] == PLAIN:
        outside = header[8].get(5, 0) + header[8].get(6, 0)  # levels that are never packed
        start, size, levels, snappy = start + outside, size - outside, False, snappy and header[8].get(7, True)
    else:
        return
    stored = memoryview(file)[start : start + size]
    page = pa.Codec("snappy").decompress(stored, _read_varint(stored, 0)[0]) if snappy else stored
    blocks = _blocks(stored) if snappy else []
    values = memoryview(page)
    if levels:
        before = 4 + int.from_bytes(values[:4], "little")
    while before + 4 <= len(values):
        length = int.from_bytes(values[before : before + 4], "little")
        before += 4
        if before + length > len(values):
            raise NotLocated("lengths that do not fit")
        value = values[before : before + length]
        if not snappy:
            places[key_of(value)] = Place(start + before, length, 0, 0, length)
        elif blocks and length:
            first = bisect_right(blocks, (before, len(stored))) - 1
            last = bisect_right(blocks, (before + length - 1, len(stored)))
            low = blocks[first]
            high = blocks[last] if last < len(blocks) else (len(values), len(stored))
            unpacked = high[0] - low[0]
            place = Place(start + low[1], high[1] - low[1], unpacked, before - low[0], length)
            places[key_of(value)] = place
        before += length


def _blocks(stored) -> list[tuple[int, int]]:
    """(unpacked position, packed position) of every multiple of `BLOCK` in a Snappy stream.

    A multiple inside an element is left out: another encoder wrote it, and the block before it reaches further.
    """
    length, place = _read_varint(stored, 0)
    found, unpacked = [], 0
    while place < len(stored):
        if unpacked % BLOCK == 0:
            found.append((unpacked, place))
        tag = stored[place]
        kind = tag & 3
        if kind == 0:  # bytes as they are
            count, place = (tag >> 2) + 1, place + 1
            if count > 60:
                width = count - 60
                count, place = int.from_bytes(stored[place : place + width], "little") + 1, place + width
            place += count
        elif kind == 1:
            count, place = (tag >> 2 & 7) + 4, place + 2
        else:
            count, place = (tag >> 2) + 1, place + (3 if kind == 2 else 5)
        unpacked += count
    if unpacked != length:
        raise NotLocated("a Snappy stream of another length")
    return found


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data, place: int) -> tuple[int, int]:
    """(the number at `place`, the place after it)."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7


def _zigzag(data, place: int) -> tuple[int, int]:
    number, place = _read_varint(data, place)
    return (number >> 1) ^ -(number & 1), place


def _struct(data, place: int) -> tuple[dict[int, Any], int]:
    """({field number: value}, the place after it) of a struct in Thrift's compact protocol."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, place = data[place], place + 1
        if head == 0:
            return fields, place
        if head >> 4:
            number += head >> 4
        else:
            number, place = _zigzag(data, place)
        kind = head & 15
        fields[number], place = (kind == 1, place) if kind in (1, 2) else _value(data, place, kind)


def _value(data, place: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2, 3):  # a boolean in a list, or a byte
        return data[place], place + 1
    if kind in (4, 5, 6):
        return _zigzag(data, place)
    if kind == 7:
        return data[place : place + 8], place + 8
    if kind == 8:
        length, place = _read_varint(data, place)
        return data[place : place + length], place + length
    if kind in (9, 10):
        head, place = data[place], place + 1
        count = head >> 4
        if count == 15:
            count, place = _read_varint(data, place)
        items = []
        for _ in range(count):
            item, place = _value(data, place, head & 15)
            items.append(item)
        return items, place
    if kind == 12:
        return _struct(data, place)
    raise NotLocated(f"Thrift type {kind}")
