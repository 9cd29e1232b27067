"""Stores of small, known rows: what the store's tests write and expect."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_hexdigest

from fxfreeze.cache import Blob, Column, Store, StoreWriter
from fxfreeze.cache.columns import DTYPES

IDENTITY: dict[str, str | int | float | bool | None] = {
    "weights": "9f3a",
    "depth": 3,
    "scale": 0.1,
    "eval": True,
    "views": None,
}
LENGTH = 40
COLUMNS = (
    Column("features", torch.bfloat16, (3, 4)),
    Column("skip", torch.float32, (160,)),  # wide enough to be copied row by row
    Column("label", torch.int64, ()),
    Blob("rest"),
    Column("nothing", torch.float16, (2, 0)),
)
EVERY_DTYPE = tuple(Column(str(dtype), dtype, (2, 3)) for dtype in DTYPES)


def values(columns: Iterable[Column | Blob], samples: Sequence[int]) -> dict[str, Any]:
    """The rows of samples: a function of sample and column alone, of all bit patterns (NaN too)."""
    return {
        column.name: [_row(column, k, sample) for sample in samples]
        if isinstance(column, Blob)
        else _tensor(column, [_row(column, k, sample) for sample in samples])
        for k, column in enumerate(columns)
    }


def write(directory: Path, columns: Sequence[Column | Blob] = COLUMNS, samples: Iterable[int] | None = None) -> None:
    """A complete store of several shards."""
    with writer(directory, columns) as store:
        for some in torch.tensor(list(range(LENGTH) if samples is None else samples)).split(7):
            store.append(some, values(columns, some.tolist()))


def writer(directory: Path, columns: Sequence[Column | Blob] = COLUMNS, shard_bytes: int = 8000) -> StoreWriter:
    return StoreWriter(directory, identity=IDENTITY, length=LENGTH, columns=columns, shard_bytes=shard_bytes)


def open_store(directory: Path, **options: Any) -> Store:
    return Store(directory, identity=IDENTITY, length=LENGTH, columns=COLUMNS, **options)


def assert_rows(store: Store, samples: Sequence[int]) -> None:
    assert_same(store.read(samples), values(store.columns, samples))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert found[name].shape == value.shape, name
            assert raw(found[name]) == raw(value), name
        else:
            assert found[name] == value, name


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes: NaN equals itself, and minus zero is not zero."""
    if not tensor.numel():
        return b""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def _row(column: Column | Blob, k: int, sample: int) -> bytes:
    generator = torch.Generator().manual_seed(1000 * k + sample)
    size = column.width if isinstance(column, Column) else sample % 5 * 30
    top = 2 if isinstance(column, Column) and column.dtype == torch.bool else 256
    return bytes(torch.randint(top, (size,), generator=generator).tolist())


def _tensor(column: Column, rows: list[bytes]) -> Tensor:
    data = bytearray(b"".join(rows))
    if not data:
        return torch.empty((len(rows), *column.shape), dtype=column.dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(column.dtype).view(len(rows), *column.shape)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest and gives it the checksum that it must have."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["xxh3"]
    change(body)
    path.write_bytes(_canonical(body | {"xxh3": xxh3_64_hexdigest(_canonical(body))}))


def resign(folder: Path) -> None:
    """Gives the first shard the size and checksum that the manifest must state, where its header can be read."""
    data = (folder / "00000.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    digest = xxh3_64(data[:start])
    header = json.loads(data[8:start])
    for name in ("index", "xxh3", "rest.ends"):
        if name in header:
            digest.update(data[slice(*(start + at for at in header[name]["data_offsets"]))])
    rewrite(folder, lambda body: body["shards"][0].update(size=len(data), xxh3=digest.hexdigest()))


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
