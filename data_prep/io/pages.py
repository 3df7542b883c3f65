"""How much memory a column of a Parquet file takes, from the headers of its pages, before any page is decoded.

The footer does not tell: a dictionary holds a long value once for all rows that repeat it, and what the footer declares
is not what is decompressed. Each page begins with a header in Thrift's compact protocol, which says how many bytes it
has compressed and decompressed (github.com/apache/parquet-format, `PageHeader`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_HEADER_BYTES = (4 << 10, 16 << 20)  # statistics are part of it, and hold two values, which may be long
_DICTIONARY_PAGE = 2


@dataclass(frozen=True)
class Page:
    """What the header of a page says."""

    is_dictionary: bool
    bytes: int
    """Decompressed."""


def pages(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk (pyarrow's ColumnChunkMetaData), in the order of the file.

    Raises:
        ValueError: not a page header, or pages that reach beyond their chunk.
    """
    starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
    at = min(start for start in starts if start)
    end = at + chunk.total_compressed_size
    while at < end:
        header, fields = _read(file, at)
        kind, whole, packed = (fields.get(number, -1) for number in (1, 2, 3))
        if min(kind, whole, packed) < 0:
            raise ValueError(f"no page header at byte {at}")
        yield Page(kind == _DICTIONARY_PAGE, whole)
        at += header.at + packed


def _read(file: BinaryIO, at: int) -> tuple[_Header, dict[int, int]]:
    for most in _HEADER_BYTES:
        file.seek(at)
        header = _Header(file.read(most))
        try:
            fields = header.struct()
        except ValueError:
            if most == _HEADER_BYTES[-1]:
                raise
        else:
            return header, fields
    raise AssertionError("the last one returns or raises")


class _Header:
    """A reader of Thrift's compact protocol: integers are kept, everything else is passed over as -1."""

    def __init__(self, data: bytes):
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The fields of a struct by their number."""
        fields, number = {}, 0
        while True:
            byte = self._byte()
            if byte == 0:
                return fields
            number = number + (byte >> 4) if byte >> 4 else _signed(self._varint())
            fields[number] = self._value(byte & 15, depth)

    def _value(self, kind: int, depth: int) -> int:
        if kind in (4, 5, 6):  # i16, i32, i64
            return _signed(self._varint())
        if kind == 3:
            self._byte()
        elif kind == 7:  # double
            self.at += 8
        elif kind == 8:  # bytes or text
            length = self._varint()
            self.at += length
        elif kind == 12 and depth < 8:
            self.struct(depth + 1)
        elif kind not in (1, 2):  # true and false have no more bytes; no page header has a list
            raise ValueError("not a page header")
        return -1

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise ValueError("a page header ends too early")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("not a page header")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
