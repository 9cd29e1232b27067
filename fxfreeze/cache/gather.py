"""Rows of many shards, copied into one batch and checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from fxfreeze.cache.columns import Blob, Column, Columns, row_sums
from fxfreeze.cache.errors import CorruptCache
from fxfreeze.cache.index import ROW, SHARD, RowIndex
from fxfreeze.cache.memory import Region, sparse_zeros, tensor_bytes
from fxfreeze.cache.shard import Shard

__all__ = ["HUGE", "NARROW", "Rows", "check_rows", "copy_rows"]

# Rows of fewer bytes are joined and copied at once: a copy of each would cost more than its bytes.
NARROW = 512
# Rows of as many are copied one by one: the view that gathers smaller ones at once would have more than 2**63 elements.
HUGE = 2**18


class Rows:
    """The rows of open shards, which are mapped in one region.

    For each wide column a table says where in the region each sample's row is; 0, a header's place, if it has none.
    """

    def __init__(self, columns: Columns, length: int, region: Region) -> None:
        self.index = RowIndex(length)
        self._columns = columns
        self._region = region
        self._names: list[str] = []
        self._sources: list[list[memoryview]] = [[] for _ in columns]
        self._ends: list[list[memoryview | None]] = [[] for _ in columns]
        self._wide = [isinstance(column, Column) and column.width >= NARROW for column in columns]
        self._all_wide = all(self._wide) and bool(columns)
        self._starts = [sparse_zeros(length if wide else 0) for wide in self._wide]
        self._sums = sparse_zeros(length)
        self._overlapping: dict[int, Tensor] = {}  # by bytes of a row
        self._fast_sums = tensor_bytes(self._sums).cast("Q")

    def add(self, shard: Shard) -> None:
        """CorruptCache if a sample has a row already."""
        rows = torch.arange(len(shard.index))
        for k, column in enumerate(self._columns):
            self._sources[k].append(shard.data[k])
            self._ends[k].append(shard.ends[k])
            if isinstance(column, Column) and self._wide[k]:
                self._starts[k][shard.index] = shard.starts[k] + rows * column.width
        self._sums[shard.index] = shard.sums
        self._names.append(shard.entry.name)
        # Last: a thread that reads meanwhile finds a row only once all of it is known.
        self.index.add(shard.entry.name, shard.index)

    def gather(self, samples: Tensor, out: dict[str, Tensor], check: bool) -> dict[str, Any]:
        """The rows of samples (n,) int64: per column a tensor (n, *shape), that of `out` where it has one; per blob a
        list of n bytes.

        check: whether each row must match its checksum. MissingRow, CorruptCache, ValueError, IndexError.
        """
        batch = _batch(self._columns, len(samples), out)
        numbers: list[int] = samples.tolist() if check or not self._all_wide else []
        places = [] if self._all_wide else self.index.places(numbers)
        sums = numbers
        for k, column in enumerate(self._columns):
            value = batch[column.name]
            if isinstance(column, Blob):
                value.extend(_cut_blobs(places, self._sources[k], self._ends[k]))
                sums = row_sums(sums, value) if check else sums
            elif not self._wide[k]:
                parts = _cut(places, column.width, self._sources[k])
                tensor_bytes(value)[:] = b"".join(parts)
                sums = row_sums(sums, parts) if check else sums
            elif check:
                starts = self._starts_of(k, samples).tolist()
                sums = _sum_and_copy(starts, column.width, self._region.view, tensor_bytes(value), sums)
            elif column.width < HUGE:
                self._select(self._starts_of(k, samples), column, value)
            else:
                copy_rows(self._starts_of(k, samples).tolist(), column.width, self._region.view, tensor_bytes(value))
        if check:
            self._compare(numbers, sums)
        return batch

    def _starts_of(self, k: int, samples: Tensor) -> Tensor:
        starts = torch.index_select(self._starts[k], 0, samples)  # and not self._starts[k][samples]: -1 is no sample
        if self.index.rows < len(self._starts[k]) and not bool(starts.all()):
            self.index.places(samples.tolist())
        return starts

    def _select(self, starts: Tensor, column: Column, value: Tensor) -> None:
        """One call for all rows: every byte of the region starts a row of a view whose rows overlap."""
        data = self._region.data
        overlapping = self._overlapping.get(column.width)
        if overlapping is None:
            overlapping = data.as_strided((len(data) - column.width + 1, column.width), (1, 1))
            self._overlapping[column.width] = overlapping
        target = value.detach().view(len(starts), column.numel).view(torch.uint8)
        torch.index_select(overlapping, 0, starts, out=target)

    def _compare(self, samples: list[int], sums: list[int]) -> None:
        expected = list(map(self._fast_sums.__getitem__, samples))
        if sums == expected:
            return
        wrong = next(n for n, (found, right) in enumerate(zip(sums, expected, strict=True)) if found != right)
        [place] = self.index.places([samples[wrong]])
        raise CorruptCache(
            f"shard {self._names[place >> SHARD]}: row {(place & ROW) - 1} (sample {samples[wrong]}) does not match its "
            "checksum; drop the store and fill it anew"
        )


def check_rows(shard: Shard, columns: Columns, length: int, region: Region) -> None:
    """Reads a whole shard. CorruptCache naming the first row that does not match its checksum."""
    rows = Rows(columns, length, region)
    rows.add(shard)
    for row in range(len(shard.index)):
        rows.gather(shard.index[row : row + 1], {}, check=True)


def _sum_and_copy(starts: list[int], width: int, source: memoryview, target: memoryview, seeds: list[int]) -> list[int]:
    """Row by row: the checksum brings a row into the processor's caches, and the copy finds it there.

    Slices of memoryviews: a copy costs a third of a microsecond above the moving of the bytes, torch's copy_ three.
    """
    sums = []
    at = 0
    for start, seed in zip(starts, seeds, strict=True):
        row = source[start : start + width]
        sums.append(xxh3_64_intdigest(row, seed))
        target[at : at + width] = row
        at += width
    return sums


def copy_rows(starts: list[int], width: int, source: memoryview, target: memoryview) -> None:
    """Bytes from each of ``starts`` on, one row after the other."""
    for row, start in enumerate(starts):
        target[row * width : (row + 1) * width] = source[start : start + width]


def _cut(places: list[int], width: int, sources: Sequence[memoryview]) -> list[memoryview]:
    return [sources[place >> SHARD][(place & ROW) * width - width : (place & ROW) * width] for place in places]


def _cut_blobs(places: list[int], sources: Sequence[memoryview], all_ends: Sequence[memoryview | None]) -> list[bytes]:
    blobs = []
    for place in places:
        ends = all_ends[place >> SHARD]
        assert ends is not None
        row = (place & ROW) - 1
        blobs.append(bytes(sources[place >> SHARD][ends[row - 1] if row else 0 : ends[row]]))
    return blobs


def _batch(columns: Columns, count: int, out: dict[str, Tensor]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for column in columns:
        if isinstance(column, Blob):
            batch[column.name] = []
        elif column.name not in out:
            batch[column.name] = torch.empty((count, *column.shape), dtype=column.dtype)
        else:
            tensor = batch[column.name] = out[column.name]
            shape = (count, *column.shape)
            if tensor.shape != shape or tensor.dtype != column.dtype or tensor.is_cuda or not tensor.is_contiguous():
                raise ValueError(
                    f"out[{column.name!r}] is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides "
                    f"{tensor.stride()}; expected {column.dtype} {list(shape)}, contiguous, on the CPU"
                )
            # A copy that autograd does not see: a tape that saved this tensor must notice all the same.
            torch.autograd.graph.increment_version(tensor)
    if unknown := out.keys() - batch.keys():
        raise ValueError(f"out has {sorted(unknown)}, which are no columns of the store")
    return batch
