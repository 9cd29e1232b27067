"""A shard: rows in a standard safetensors file.

Per column its rows (rows, *shape) in the column's dtype; per blob its bytes `name` and, in `name.ends`, where each row's
end (rows,) int64; `index` (rows,) int64, the sample of each row; `xxh3` (rows,) int64, the checksum of each row.
"""

import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import TensorSpec, serialize
from torch import Tensor
from xxhash import xxh3_64

from fxfreeze.cache.columns import DTYPES, Blob, Column, Columns
from fxfreeze.cache.errors import CorruptCache
from fxfreeze.cache.files import open_regular
from fxfreeze.cache.manifest import ShardEntry
from fxfreeze.cache.memory import Region, tensor_bytes
from fxfreeze.sizes import dtype_text

__all__ = ["PAGE", "Packed", "Shard", "open_shard", "pack", "same_file"]

PAGE = 4096
MAX_HEADER = 2**20  # bytes; a header has about 100 for each column

Packed = tuple[bytes, memoryview]  # what a file is made of, one after the other


@dataclass(frozen=True)
class Shard:
    """An open shard.

    data: per column, in their order, the bytes of its rows, views of the mapped file; starts: where in the region.
    ends: per column None, or for a blob the byte at which each row ends.
    index: (rows,) int64, the sample of each row; sums: (rows,) int64, the checksum of each.
    """

    entry: ShardEntry
    data: list[memoryview]
    starts: list[int]
    ends: list[memoryview | None]
    index: Tensor
    sums: Tensor


def pack(columns: Columns, values: Sequence[Tensor | list[bytes]], index: Tensor, sums: Tensor) -> tuple[Packed, str]:
    """The file of a shard, and the checksum of what in it is not row data.

    values: per column (rows, *shape), or a list of bytes; index and sums (rows,) int64.
    """
    tensors = {"index": index, "xxh3": sums}
    for column, value in zip(columns, values, strict=True):
        if isinstance(value, Tensor):
            tensors[column.name] = value
        else:
            assert isinstance(column, Blob)
            tensors[column.ends] = torch.tensor([len(blob) for blob in value], dtype=torch.int64).cumsum(0)
            tensors[column.name] = torch.empty(sum(map(len, value)), dtype=torch.uint8)
            tensor_bytes(tensors[column.name])[:] = b"".join(value)
    # The pointer of an empty tensor is null, which the library must not be given even to read nothing.
    specs = {
        name: TensorSpec(
            dtype=dtype_text(tensor.dtype),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr() or index.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    data = memoryview(serialize(specs, None))
    spans = _layout(data, columns, len(index))
    parts = {name: data[span] for name, span in spans.items()}
    header = _pad(parts["__header__"])
    digest = _digest(parts | {"__header__": memoryview(header)}, columns)
    return (header, data[spans["__header__"].stop :]), digest


def _pad(header: memoryview) -> bytes:
    """The header with spaces, which the format allows, up to the next page.

    A row that starts at a page's start, or at least at a cache line's, is copied up to a tenth faster.
    """
    text = bytes(header[8:]) + b" " * (-len(header) % PAGE)
    return len(text).to_bytes(8, "little") + text


def open_shard(folder: Path, entry: ShardEntry, columns: Columns, length: int, region: Region) -> Shard:
    """Maps a shard into the region and checks all of it but the rows. CorruptCache if anything is not as written, OSError."""
    path = folder / entry.name
    try:
        descriptor, size = open_regular(path)
    except FileNotFoundError as error:
        raise CorruptCache(f"{path} is missing") from error
    try:
        if size != entry.size or size < 8:
            raise CorruptCache(f"{path} has {size} bytes instead of {entry.size}")
        start = region.map(descriptor, size)
    finally:
        os.close(descriptor)
    mapped = region.view[start : start + size]
    try:
        spans = _layout(mapped, columns, entry.rows)
        parts = {name: mapped[span] for name, span in spans.items()}
        if _digest(parts, columns) != entry.xxh3:
            raise ValueError("the header or the index does not match its checksum")
        index = torch.frombuffer(bytearray(parts["index"]), dtype=torch.int64)
        if int(index.min()) < 0 or int(index.max()) >= length:
            raise ValueError(f"rows of samples that a data set of {length} does not have")
        ends = [_ends(parts, column) for column in columns]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCache(f"{path} is not the shard that was written: {error}") from error
    starts = [start + spans[column.name].start for column in columns]
    sums = torch.frombuffer(bytearray(parts["xxh3"]), dtype=torch.int64)
    return Shard(entry, [parts[column.name] for column in columns], starts, ends, index, sums)


def same_file(folder: Path, entry: ShardEntry) -> None:
    """CorruptCache if the shard is gone, a link, or of another size than it was written with; OSError."""
    path = folder / entry.name
    try:
        status = os.lstat(path)
    except FileNotFoundError as error:
        raise CorruptCache(f"{path} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCache(f"{path} is not a regular file")
    if status.st_size != entry.size:
        raise CorruptCache(f"{path} has {status.st_size} bytes instead of {entry.size}")


def _layout(data: memoryview, columns: Columns, rows: int) -> dict[str, slice]:
    """Where in a safetensors file each tensor is, and "__header__". ValueError, TypeError or KeyError."""
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length} bytes")
    body = 8 + length
    header: dict[str, Any] = json.loads(bytes(data[8:body]))
    expected = _expected(columns, rows)
    if header.keys() != expected.keys():
        raise ValueError(f"tensors {sorted(header)} instead of {sorted(expected)}")
    spans = {"__header__": slice(0, body)}
    for name, (dtype, width, shape) in expected.items():
        start, end = header[name]["data_offsets"]
        found = header[name]["dtype"], header[name]["shape"]
        if shape is None:  # a blob's bytes: as many as its ends say, which `_ends` checks
            width, shape = 1, [end - start]
        if (
            found != (dtype, shape)
            or not 0 <= start <= end <= len(data) - body
            or end - start != width * math.prod(shape)
        ):
            raise ValueError(f"tensor {name} is {header[name]}")
        spans[name] = slice(body + start, body + end)
    ordered = sorted((span.start, span.stop) for span in spans.values())
    if [start for start, _ in ordered] != [0, *(stop for _, stop in ordered[:-1])] or ordered[-1][1] != len(data):
        raise ValueError("tensors that overlap, or bytes that belong to none")
    return spans


def _expected(columns: Columns, rows: int) -> dict[str, tuple[str, int, list[int] | None]]:
    """Each tensor's dtype as the header names it, bytes of an element, and shape (None: flat, of any length)."""
    expected: dict[str, tuple[str, int, list[int] | None]] = {"index": ("I64", 8, [rows]), "xxh3": ("I64", 8, [rows])}
    for column in columns:
        if isinstance(column, Column):
            expected[column.name] = (DTYPES[column.dtype], column.dtype.itemsize, [rows, *column.shape])
        else:
            expected[column.name] = ("U8", 1, None)
            expected[column.ends] = ("I64", 8, [rows])
    return expected


def _digest(parts: dict[str, memoryview], columns: Columns) -> str:
    digest = xxh3_64(parts["__header__"])
    for name in ("index", "xxh3", *(column.ends for column in columns if isinstance(column, Blob))):
        digest.update(parts[name])
    return digest.hexdigest()


def _ends(parts: dict[str, memoryview], column: Column | Blob) -> memoryview | None:
    if isinstance(column, Column):
        return None
    ends = torch.frombuffer(bytearray(parts[column.ends]), dtype=torch.int64)
    steps = torch.diff(ends, prepend=ends.new_zeros(1))
    if int(steps.min()) < 0 or int(ends[-1]) != len(parts[column.name]):
        raise ValueError(f"{column.name}: rows that end before they start, or not where the bytes end")
    return parts[column.ends].cast("q")
