"""The one writer of a store: rows are gathered in memory and committed a shard at a time, whole or not at all."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fxfreeze.cache import files
from fxfreeze.cache.buffer import RowBuffer
from fxfreeze.cache.columns import Blob, Column, Columns
from fxfreeze.cache.drop import finish_drop, refuse_foreign, remove_strays
from fxfreeze.cache.errors import CacheError, CorruptCache, MissingCache
from fxfreeze.cache.index import RowIndex, as_indices
from fxfreeze.cache.lock import Lock
from fxfreeze.cache.manifest import MANIFEST, Identity, Manifest, ShardEntry, shard_names
from fxfreeze.cache.memory import Region
from fxfreeze.cache.shard import open_shard, same_file
from fxfreeze.cache.store import read_manifest

__all__ = ["StoreWriter"]

SHARD_BYTES = 64 * 2**20


class StoreWriter:
    """Creates the store of a folder, or goes on with the one that is there; the only one to write it.

    identity: everything that determines the values, strings and numbers by name; length: the number of samples of the
    data set; columns: what a row is made of; shard_bytes: how many bytes are held in memory, and how large a shard is.
    CacheLocked while another process, or another object of this one, writes; StaleCache or CorruptCache if what is
    there can't be gone on with (see `drop`); CacheFull, CacheError; ValueError for what can't be stored at all.

    Leaving it as a context commits, unless by an exception.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        identity: Identity,
        length: int,
        columns: Iterable[Column | Blob],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        wanted = Manifest.new(identity, length, columns)
        self.directory = Path(directory).absolute()
        with files.translated(self.directory, "writing"):
            files.make_folder(self.directory)
            refuse_foreign(self.directory)
            self._lock = Lock(self.directory)
            try:
                finish_drop(self.directory)
                self._manifest = self._resume(wanted)
            except BaseException:
                self._lock.release()
                raise
        self._buffer = RowBuffer(wanted.columns, length, shard_bytes)

    @property
    def columns(self) -> Columns:
        return self._manifest.columns

    @property
    def length(self) -> int:
        """The number of samples of the data set."""
        return self._manifest.length

    @property
    def held(self) -> int:
        """The number of samples that have a row, committed or not."""
        return self._index.rows + self._buffer.rows

    @property
    def committed(self) -> int:
        """The number of samples that have a row on the disk."""
        return self._index.rows

    @property
    def complete(self) -> bool:
        return self.held == self.length

    def holds(self, indices: Tensor | Sequence[int]) -> Tensor:
        """(n,) bool, whether each sample has a row, committed or not. IndexError."""
        return self._held(as_indices(indices, self.length))

    def append(self, indices: Tensor | Sequence[int], values: dict[str, Any]) -> None:
        """Rows of samples (n,): per column a tensor (n, *shape) of its dtype on any device, per blob n times bytes.

        A sample that is held already keeps its row, so a fill that was broken off may simply be run again. Whenever
        there is a shard's worth, it is committed. CacheFull and other CacheError as for `commit`; ValueError or
        IndexError, with nothing taken, for values that do not fit the columns.
        """
        self._usable()
        samples = as_indices(indices, self.length)
        self._check(len(samples), values)
        files.point("append: checked")
        chosen = _firsts(samples)
        chosen = chosen[~self._held(samples[chosen])]
        while len(chosen):
            taken = chosen[: self._buffer.capacity - self._buffer.rows]
            chosen = chosen[len(taken) :]
            self._buffer.add(samples[taken], values, taken)
            files.point("append: buffered")
            if self._buffer.full:
                self.commit()

    def commit(self) -> None:
        """Writes the rows appended since the last commit as a shard; after it they outlive a kill or a power cut.

        CacheFull if there is no space, CacheError: the store is as it was, and the rows in memory are dropped.
        """
        self._usable()
        if not self._buffer.rows:
            return
        try:
            with files.translated(self.directory, "writing to"):
                self._write()
        finally:
            self._buffer.clear()
        files.point("commit: done")

    def close(self) -> None:
        """Commits, and lets another writer in. The lock is let go of whatever the commit raises."""
        try:
            if self._lock.held:
                self.commit()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._lock.release()

    def _resume(self, wanted: Manifest) -> Manifest:
        self._index = RowIndex(wanted.length)
        self._number = 0
        listed = shard_names(self.directory)
        try:
            manifest = read_manifest(self.directory)
        except MissingCache:
            if listed:
                raise CorruptCache(f"{self.directory} has {len(listed)} shards and no manifest") from None
            files.stage(self.directory, MANIFEST, [wanted.encode()], "create")
            files.place(self.directory, MANIFEST, "create")
            manifest = wanted
        manifest.require(wanted.identity, wanted.length, wanted.columns)
        for entry in manifest.shards:
            same_file(self.directory, entry)
            shard = open_shard(self.directory, entry, manifest.columns, manifest.length, Region(entry.size))
            self._index.add(entry.name, shard.index)
        remove_strays(self.directory, keep={entry.name for entry in manifest.shards})
        self._number = 1 + max((int(entry.name.partition(".")[0]) for entry in manifest.shards), default=-1)
        return manifest

    def _write(self) -> None:
        # A number is used once, or a shard could be replaced under a manifest that was placed and not known to be.
        name, self._number = f"{self._number:05d}.safetensors", self._number + 1
        data, xxh3 = self._buffer.pack()
        files.point("commit: packed")
        entry = ShardEntry(name, self._buffer.rows, sum(map(len, data)), xxh3)
        manifest = dataclasses.replace(self._manifest, shards=(*self._manifest.shards, entry))
        # All that takes space comes before anything is in its place, so that a full disk leaves the old state.
        files.stage(self.directory, name, data, "shard")
        try:
            files.stage(self.directory, MANIFEST, [manifest.encode()], "manifest")
        except BaseException:
            (self.directory / f"{name}.tmp").unlink(missing_ok=True)
            raise
        files.place(self.directory, name, "shard")
        files.place(self.directory, MANIFEST, "manifest")
        self._index.add(name, self._buffer.index)
        self._manifest = manifest

    def _held(self, samples: Tensor) -> Tensor:
        return self._index.holds(samples) | torch.isin(samples, self._buffer.index)

    def _check(self, count: int, values: dict[str, Any]) -> None:
        if values.keys() != {column.name for column in self.columns}:
            raise ValueError(f"values of {sorted(values)}; the columns are {'; '.join(map(str, self.columns))}")
        for column in self.columns:
            value = values[column.name]
            if isinstance(column, Blob):
                if len(value) != count or not all(isinstance(blob, bytes) for blob in value):
                    raise ValueError(f"{column.name}: {count} times bytes are expected")
            elif value.shape != (count, *column.shape) or value.dtype != column.dtype:
                raise ValueError(
                    f"{column.name}: {value.dtype} {list(value.shape)}; expected {column.dtype} {[count, *column.shape]}"
                )

    def _usable(self) -> None:
        if not self._lock.held:
            raise CacheError(
                f"this writer of {self.directory} is closed, or belongs to the process that forked this one"
            )


def _firsts(samples: Tensor) -> Tensor:
    """The positions of each sample's first occurrence, ascending."""
    ordered, order = samples.sort(stable=True)
    first = torch.ones(len(samples), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first].sort().values
