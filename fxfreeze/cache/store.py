"""Stored rows, read: by any number of processes, each row checked against its checksum."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column, Columns
from fxfreeze.cache.errors import CorruptCache, MissingCache, StaleCache
from fxfreeze.cache.files import read_capped, translated
from fxfreeze.cache.gather import Rows, check_rows
from fxfreeze.cache.index import RowIndex, as_indices
from fxfreeze.cache.manifest import MANIFEST, MAX_MANIFEST, Identity, Manifest, ShardEntry
from fxfreeze.cache.memory import Region, sparse_zeros
from fxfreeze.cache.shard import open_shard, same_file

__all__ = ["Store", "Verify", "read_manifest", "verify"]

_ROOM = 2**30  # bytes of address space beyond twice what is on the disk

Verify = Literal["always", "once", "never"]


class Store:
    """The rows of a folder, as last committed when it was opened or refreshed.

    identity, length, columns: what the store must have been made for; None takes it as it is.
    verify: "always" compares each row read with its checksum, "once" the first time since opening, "never" trusts.
    MissingCache, StaleCache, CorruptCache, CacheError; whatever is raised, no wrong row is returned.

    Can be sent to other processes: forked ones share the mappings, spawned ones open the folder when they first read.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        identity: Identity | None = None,
        length: int | None = None,
        columns: Iterable[Column | Blob] | None = None,
        verify: Verify = "always",
    ) -> None:
        if verify not in ("always", "once", "never"):
            raise ValueError(f'verify={verify!r} is none of "always", "once", "never"')
        self.directory = Path(directory).absolute()
        self._required = identity, length, None if columns is None else tuple(columns)
        self._verify = verify
        self._opened: _Opened | None = _Opened(self.directory, *self._required)

    @property
    def identity(self) -> Identity:
        return self._open.manifest.identity

    @property
    def length(self) -> int:
        """The number of samples of the data set."""
        return self._open.manifest.length

    @property
    def columns(self) -> Columns:
        return self._open.manifest.columns

    @property
    def held(self) -> int:
        """The number of samples that have a row."""
        return self._open.rows.index.rows

    @property
    def complete(self) -> bool:
        return self.held == self.length

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all shards."""
        return sum(shard.size for shard in self._open.manifest.shards)

    def holds(self, indices: Tensor | Sequence[int]) -> Tensor:
        """(n,) bool, whether each sample has a row. IndexError for a sample that the data set does not have."""
        return self._open.rows.index.holds(as_indices(indices, self.length))

    def read(self, indices: Tensor | Sequence[int], out: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """The rows of samples (n,), in that order: per column a tensor (n, *shape), per blob a list of n bytes.

        out: contiguous CPU tensors (n, *shape) of some or all columns, perhaps pinned, to be filled and returned; their
        content is undefined after an error. MissingRow, CorruptCache naming shard and row, IndexError; ValueError for
        an `out` of another shape or dtype.
        """
        opened = self._open
        samples = torch.as_tensor(indices, dtype=torch.int64, device="cpu").flatten()
        check = self._verify == "always" or (self._verify == "once" and opened.any_unseen(samples))
        batch = opened.rows.gather(samples, out or {}, check)
        if check and self._verify == "once":
            opened.mark_seen(samples)
        return batch

    def refresh(self) -> None:
        """Takes up what was committed since. StaleCache if the folder has become another store; CorruptCache."""
        if not self._open.refresh(*self._required):
            self._opened = _Opened(self.directory, *self._required)

    def check(self) -> None:
        """CorruptCache if a shard is gone or was cut: to read it would be a bus error. Call it before each epoch."""
        with translated(self.directory, "checking"):
            for shard in self._open.manifest.shards:
                same_file(self.directory, shard)

    @property
    def _open(self) -> "_Opened":
        if self._opened is None:
            self._opened = _Opened(self.directory, *self._required)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


class _Opened:
    """A folder's manifest, and its shards as mapped by this process."""

    def __init__(self, directory: Path, *required: Any) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.manifest.require(*required)
        with translated(directory, "opening"):
            for entry in self.manifest.shards:
                same_file(directory, entry)
            # Room for a fill to go on; when it is used up, everything is opened anew, twice as large.
            self.region = Region(2 * Region.needed(shard.size for shard in self.manifest.shards) + _ROOM)
            self.rows = Rows(self.manifest.columns, self.manifest.length, self.region)
            self._entries: list[ShardEntry] = []
            self._seen = sparse_zeros(self.manifest.length, torch.bool)
            self._unseen = 0
            self._open_shards(self.manifest)

    def refresh(self, *required: Any) -> bool:
        """False if there is no room, and nothing was done."""
        manifest = read_manifest(self.directory)
        manifest.require(*required)
        manifest.require(self.manifest.identity, self.manifest.length, self.manifest.columns)
        if list(manifest.shards[: len(self._entries)]) != self._entries:
            raise StaleCache(
                f"{self.directory} was dropped and filled anew since it was opened; open it again", "shards"
            )
        if not self.region.fits(shard.size for shard in manifest.shards[len(self._entries) :]):
            return False
        with translated(self.directory, "opening"):
            self._open_shards(manifest)
        self.manifest = manifest
        return True

    def any_unseen(self, samples: Tensor) -> bool:
        """Whether one of the samples was not marked as verified."""
        return self._unseen > 0 and not bool(self._seen[samples].all())

    def mark_seen(self, samples: Tensor) -> None:
        new = set(samples[~self._seen[samples]].tolist())
        self._seen[list(new)] = True
        self._unseen -= len(new)

    def _open_shards(self, manifest: Manifest) -> None:
        for entry in manifest.shards[len(self._entries) :]:
            shard = open_shard(self.directory, entry, manifest.columns, manifest.length, self.region)
            self.rows.add(shard)
            self._unseen += entry.rows
            self._entries.append(entry)


def read_manifest(directory: Path) -> Manifest:
    """MissingCache if there is none, StaleCache, CorruptCache, CacheError."""
    with translated(directory, "opening"):
        try:
            return Manifest.decode(read_capped(directory / MANIFEST, MAX_MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingCache(f"there is no activation store in {directory}") from error


def verify(directory: str | Path) -> list[str]:
    """Reads everything in a store, and says what is wrong with it, a line for each shard; nothing if all is well.

    MissingCache, CacheError if it can't be read at all.
    """
    directory = Path(directory).absolute()
    try:
        manifest = read_manifest(directory)
    except (CorruptCache, StaleCache) as error:
        return [str(error)]
    problems = []
    index = RowIndex(manifest.length)
    with translated(directory, "verifying"):
        for entry in manifest.shards:
            try:
                same_file(directory, entry)
                region = Region(entry.size)
                shard = open_shard(directory, entry, manifest.columns, manifest.length, region)
                index.add(entry.name, shard.index)
                check_rows(shard, manifest.columns, manifest.length, region)
            except CorruptCache as error:
                problems.append(str(error))
    return problems
