"""The manifest: what a store holds and for whom, as one canonical JSON text that carries its own checksum."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from fxfreeze.cache.columns import Blob, Column, Columns, check_columns, columns_from_json, columns_to_json
from fxfreeze.cache.errors import CacheError, CorruptCache, StaleCache

__all__ = ["MANIFEST", "MAX_MANIFEST", "Identity", "Manifest", "ShardEntry", "is_shard_name", "shard_names"]

MANIFEST = "manifest.json"
MAX_MANIFEST = 16 * 2**20  # bytes, about 150,000 shards
FORMAT = 1
_MOST_SAMPLES = 2**40

Identity = Mapping[str, str | int | float | bool | None]


def is_shard_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[0-9]{5,}\.safetensors", name) is not None


def shard_names(folder: Path) -> list[str]:
    """The files of `folder` that are called like a shard."""
    return sorted(name for name in os.listdir(folder) if is_shard_name(name))


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it: rows, file size in bytes, xxh3 of all bytes of the file that are not row data."""

    name: str
    rows: int
    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """identity: everything that determines the values; length: the number of samples of the data set."""

    identity: Identity
    length: int
    columns: Columns
    shards: tuple[ShardEntry, ...] = ()

    @classmethod
    def new(cls, identity: Identity, length: int, columns: Iterable[Column | Blob]) -> "Manifest":
        """Of an empty store; ValueError for what can't be one."""
        manifest = cls(dict(identity), length, check_columns(columns))
        manifest._check()
        return manifest

    def encode(self) -> bytes:
        """CacheError when there are more shards than a manifest may list."""
        body = {
            "format": FORMAT,
            "identity": self.identity,
            "length": self.length,
            "columns": columns_to_json(self.columns),
            "shards": [vars(shard) for shard in self.shards],
        }
        text = _canonical(body | {"xxh3": xxh3_64_hexdigest(_canonical(body))})
        if len(text) > MAX_MANIFEST:
            raise CacheError(
                f"{len(self.shards)} shards are more than a manifest can list; commit less often, or use larger shards"
            )
        return text

    @classmethod
    def decode(cls, text: bytes) -> "Manifest":
        """CorruptCache for anything that `encode` does not make, StaleCache for another version of the format."""
        try:
            body = json.loads(text)
            version = body["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CorruptCache(f"{MANIFEST} is not a store's manifest ({error!r})") from error
        if version != FORMAT:
            raise StaleCache(f"the store's format is {version!r}, and this fxfreeze reads {FORMAT}", "format")
        try:
            shards = tuple(ShardEntry(**entry) for entry in body["shards"])
            manifest = cls(body["identity"], body["length"], columns_from_json(body["columns"]), shards)
            manifest._check()
            same = manifest.encode() == text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CacheError) as error:
            raise CorruptCache(f"{MANIFEST} is not a store's manifest ({error!r})") from error
        if not same:
            raise CorruptCache(f"{MANIFEST} does not match its checksum")
        return manifest

    def require(self, identity: Identity | None, length: int | None, columns: Iterable[Column | Blob] | None) -> None:
        """StaleCache naming the first of the given ones (None: anything will do) that differs."""
        if identity is not None:
            for name in sorted({*self.identity, *identity}):
                _same(name, _field(self.identity, name), _field(identity, name))
        if length is not None:
            _same("length", str(self.length), str(length))
        if columns is not None:
            held, asked = (["; ".join(str(c) for c in cs)] for cs in (self.columns, tuple(columns)))
            _same("columns", *held, *asked)

    def _check(self) -> None:
        for name, value in self.identity.items():
            if not isinstance(name, str) or not isinstance(value, str | int | float | None):
                raise ValueError(f"identity {name!r}: {value!r} is neither a string nor a number")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"identity {name!r}: {value} is not finite")
        if not _count(self.length, _MOST_SAMPLES):
            raise ValueError(f"length {self.length!r} is not a number of samples up to 2**40")
        for shard in self.shards:
            if not is_shard_name(shard.name):
                raise ValueError(f"{shard.name!r} is not a shard's name")
            if (
                not _count(shard.rows, self.length)
                or not shard.rows
                or not _count(shard.size, 2**62)
                or not isinstance(shard.xxh3, str)
            ):
                raise ValueError(f"shard {shard.name} of {shard.rows!r} rows, {shard.size!r} bytes")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")


def _count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _field(identity: Identity, name: str) -> str:
    return json.dumps(identity[name]) if name in identity else "absent"


def _same(field: str, held: str, asked: str) -> None:
    if held != asked:
        raise StaleCache(f"the store was made for another {field}: it has {held}, and {asked} is asked for", field)
