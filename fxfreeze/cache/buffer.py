"""Rows that wait for a shard's worth of them."""

from typing import Any

import torch
from torch import Tensor

from fxfreeze.cache.columns import Column, Columns, row_sums
from fxfreeze.cache.memory import tensor_bytes
from fxfreeze.cache.shard import PAGE, Packed, pack

__all__ = ["RowBuffer"]

_OVERHEAD = 16  # bytes a row for its sample index and its checksum


class RowBuffer:
    """Memory for the rows of a shard of about `shard_bytes`, `length` rows at most, allocated once."""

    def __init__(self, columns: Columns, length: int, shard_bytes: int) -> None:
        self.columns = columns
        self.rows = 0
        self._shard_bytes = shard_bytes
        self._blob_bytes = 0
        width = _OVERHEAD + sum(column.width for column in columns if isinstance(column, Column))
        self.capacity = _aligned(max(1, min(length, shard_bytes // width)))
        self._width = width
        self._values: list[Tensor | list[bytes]] = [
            torch.empty((self.capacity, *column.shape), dtype=column.dtype) if isinstance(column, Column) else []
            for column in columns
        ]
        self._index = torch.empty(self.capacity, dtype=torch.int64)
        self._sums = torch.empty(self.capacity, dtype=torch.int64)

    @property
    def full(self) -> bool:
        return self.rows == self.capacity or self.rows * self._width + self._blob_bytes >= self._shard_bytes

    @property
    def index(self) -> Tensor:
        """(rows,) int64, the samples of the rows."""
        return self._index[: self.rows]

    def add(self, samples: Tensor, values: dict[str, Any], chosen: Tensor) -> None:
        """Copies the rows `chosen` (n,) int64, ascending, of `values`; their samples are `samples` (n,).

        The caller has checked the values, and that there is room for n.
        """
        rows = slice(self.rows, self.rows + len(samples))
        sums = samples.tolist()
        for column, held in zip(self.columns, self._values, strict=True):
            value = values[column.name]
            if isinstance(held, list):
                blobs = [bytes(value[row]) for row in chosen.tolist()]
                held.extend(blobs)
                self._blob_bytes += sum(map(len, blobs))
                sums = row_sums(sums, blobs)
            else:
                assert isinstance(column, Column)
                value = value.detach()
                held[rows].copy_(value if len(chosen) == len(value) else value[chosen.to(value.device)])
                data, width = tensor_bytes(held[rows]), column.width
                sums = row_sums(sums, [data[row * width : (row + 1) * width] for row in range(len(samples))])
        self._index[rows] = samples
        self._sums[rows] = torch.tensor(sums, dtype=torch.uint64).view(torch.int64)
        self.rows = rows.stop

    def pack(self) -> tuple[Packed, str]:
        """The file of a shard of these rows, and its checksum."""
        values = [value if isinstance(value, list) else value[: self.rows] for value in self._values]
        return pack(self.columns, values, self.index, self._sums[: self.rows])

    def clear(self) -> None:
        self.rows = self._blob_bytes = 0
        for value in self._values:
            if isinstance(value, list):
                value.clear()


def _aligned(rows: int) -> int:
    """As many rows, or somewhat fewer, that their indices and checksums end at a page's or cache line's end."""
    unit = next(unit for unit in (PAGE // _OVERHEAD, 64 // _OVERHEAD, 1) if unit <= rows)
    return rows - rows % unit
