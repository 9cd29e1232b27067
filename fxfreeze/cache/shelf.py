"""The stores of one directory that are of one data set: found, opened, filled and dropped."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.drop import drop, finish
from fxfreeze.cache.encoding import Encoding
from fxfreeze.cache.errors import CacheError, CorruptCache, StaleCache
from fxfreeze.cache.identity import store_name
from fxfreeze.cache.manifest import MANIFEST, Identity
from fxfreeze.cache.placement import Resident
from fxfreeze.cache.store import Store, read_manifest
from fxfreeze.cache.writer import StoreWriter

__all__ = ["SUMS", "Rows", "Shelf", "Source"]

SUMS = Column("input", torch.int64, ())  # a checksum of what the model received, as the loader yielded it


class Rows(NamedTuple):
    """boundary: of each value (k, ...); rest: the samples' other columns; sums: (k,) int64 of their inputs."""

    boundary: list[Tensor]
    rest: dict[str, Any]
    sums: Tensor


class Source:
    """A store to read from. resident: its rows in memory, once they are there; epochs: in which it was read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.identity = store.identity
        self.depth = int(store.identity["depth"] or 0)
        self.encoding = Encoding.read_from(store.columns)
        self.width = sum(c.width for c in store.columns if isinstance(c, Column))  # bytes of a row
        self.resident: Resident | None = None
        self.epochs: set[int] = set()
        self._rest = [c.name for c in store.columns if c.name.startswith("rest.")]

    @property
    def path(self) -> Path:
        return self.store.directory

    @property
    def tier(self) -> str:
        """In which memory its rows are: "disk", "ram" or "device"."""
        return "disk" if self.resident is None else self.resident.tier

    def holds(self, keys: Tensor) -> Tensor:
        """(k,) bool."""
        return self.store.holds(keys)

    def read(self, keys: Tensor, *, pinned: bool = False) -> Rows:
        """The rows (k,) int64, in memory of their own: no batch is written over while something refers to it. CacheError."""
        out = {c.name: c.empty(len(keys), pinned=True) for c in self.encoding.columns} if pinned else {}
        read = self.store.read(keys, out) if self.resident is None else self.resident.read(keys, out)
        return Rows(self.encoding.decode(read), {name: read[name] for name in self._rest}, read[SUMS.name])

    def touch(self) -> None:
        """Take note that the store is in use, for people who look at it."""
        with suppress(OSError):  # in a folder that can't be written the date stays
            os.utime(self.path / MANIFEST)


class Shelf:
    """data: the part of an identity that tells the data set; length: of keys."""

    def __init__(self, directory: str | Path, data: Identity, length: int) -> None:
        self.directory = Path(directory)
        self.data = data
        self.length = length

    def identities(self) -> Iterator[Identity]:
        """Of the stores that are there for this data set, deepest first."""
        found = []
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else []:
            with suppress(CacheError):
                finish(path)
            try:
                identity = read_manifest(path).identity
            except CacheError:
                continue  # no store, a damaged one, or one of another version: filling it anew finds that out
            if isinstance(identity.get("depth"), int) and self.data.items() <= identity.items():
                found.append(identity)
        yield from sorted(found, key=lambda identity: identity["depth"], reverse=True)  # type: ignore[arg-type,return-value]

    def whole(self, prefix: Identity) -> Identity:
        """The identity of a store, from that of a frozen part."""
        return {**prefix, **self.data}

    def open(self, identity: Identity) -> Source:
        """CacheError."""
        return Source(Store(self._path(identity), identity=identity, length=self.length))

    def writer(self, identity: Identity, columns: Sequence[Column | Blob]) -> StoreWriter:
        """Goes on with the store, or begins it, or begins it anew where what is there is no good. CacheError."""
        path = self._path(identity)
        try:
            return StoreWriter(path, identity=identity, length=self.length, columns=columns)
        except (CorruptCache, StaleCache):
            drop(path)
        return StoreWriter(path, identity=identity, length=self.length, columns=columns)

    def drop(self, identity: Mapping[str, Any]) -> None:
        """CacheError."""
        drop(self._path(identity))

    def _path(self, identity: Mapping[str, Any]) -> Path:
        return self.directory / store_name(identity)
