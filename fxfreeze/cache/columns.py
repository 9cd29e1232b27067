"""What a row is made of, and the checksum that ties it to its sample."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from fxfreeze.sizes import dtype_text

__all__ = ["DTYPES", "Blob", "Column", "Columns", "check_columns", "columns_from_json", "columns_to_json", "row_sums"]

# Each dtype that a column may have, and its name in a safetensors header.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {dtype_text(dtype): dtype for dtype in DTYPES}
_RESERVED = ("index", "xxh3", "__metadata__")  # tensors that every shard has, and safetensors' own word
_MOST_NUMBERS = 2**62


@dataclass(frozen=True)
class Column:
    """A tensor of one shape and dtype per sample: rows of (n, *shape). ValueError for a shape or dtype that can't be."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype not in DTYPES:
            raise ValueError(f"column {self.name!r}: {self.dtype} can't be stored; these can: {', '.join(_BY_NAME)}")
        if (
            not all(type(size) is int and 0 <= size <= _MOST_NUMBERS for size in self.shape)
            or self.numel > _MOST_NUMBERS
        ):
            raise ValueError(f"column {self.name!r}: {list(self.shape)} is not a shape of at most 2**62 numbers")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.numel * self.dtype.itemsize

    def empty(self, rows: int, *, pinned: bool = False) -> Tensor:
        """Memory for (rows, *shape), to be written over."""
        return torch.empty((rows, *self.shape), dtype=self.dtype, pin_memory=pinned)

    def __str__(self) -> str:
        return f"{self.name}: {dtype_text(self.dtype)}{list(self.shape)}"


@dataclass(frozen=True)
class Blob:
    """Bytes of any length per sample."""

    name: str

    @property
    def ends(self) -> str:
        """The name of the tensor that says where each row's bytes end."""
        return f"{self.name}.ends"

    def __str__(self) -> str:
        return f"{self.name}: bytes"


Columns = tuple[Column | Blob, ...]


def check_columns(columns: Iterable[Column | Blob]) -> Columns:
    """The columns as a tuple; ValueError if two would share a name in a shard."""
    columns = tuple(columns)
    names = [*_RESERVED, *(column.name for column in columns), *(c.ends for c in columns if isinstance(c, Blob))]
    for name in names:
        if not isinstance(name, str) or not name or names.count(name) > 1:
            raise ValueError(f"{name!r} can't name a column: it is empty, reserved, or there twice")
    return columns


def columns_to_json(columns: Columns) -> list[dict[str, Any]]:
    return [
        {"name": c.name, "dtype": dtype_text(c.dtype), "shape": list(c.shape)}
        if isinstance(c, Column)
        else {"name": c.name, "dtype": "bytes"}
        for c in columns
    ]


def columns_from_json(entries: Any) -> Columns:
    """ValueError, TypeError or KeyError for anything that `columns_to_json` does not make."""
    columns = check_columns(
        Blob(entry["name"])
        if entry["dtype"] == "bytes"
        else Column(entry["name"], _BY_NAME[entry["dtype"]], tuple(entry["shape"]))
        for entry in entries
    )
    if columns_to_json(columns) != entries:
        raise ValueError("columns with more fields than a column has")
    return columns


def row_sums(seeds: list[int], parts: Sequence[memoryview | bytes]) -> list[int]:
    """xxh3_64 of each row's bytes in one column, seeded with the row's checksum over the columns before it.

    The first column's seeds are the sample indices, so a row can't stand in for another sample's; a chain tells apart
    rows whose bytes are the same but split between columns differently, and costs one call a column.
    """
    return list(map(xxh3_64_intdigest, parts, seeds))
