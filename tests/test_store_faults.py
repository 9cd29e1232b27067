"""The activation store on a disk that lies: stale, cut, flipped, missing, foreign and hostile files are never data."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_samples import COLUMNS, IDENTITY, LENGTH, assert_same, open_store, resign, rewrite, values, write, writer

from fxfreeze.cache import Column, CorruptCache, MissingCache, StaleCache, Store, StoreWriter, drop, verify

EVERYONE = list(range(LENGTH))
FLIPS = 700


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "s")
    return tmp_path / "s"


def read_all(folder: Path) -> None:
    assert_same(open_store(folder).read(EVERYONE), values(COLUMNS, EVERYONE))


# ------------------------------------------------------------------------------------------------------------- stale


@pytest.mark.parametrize("name", [*IDENTITY, "added", "depth removed", "views removed", "depth as text"])
def test_each_field_of_the_identity_alone(folder: Path, name: str) -> None:
    identity: dict[str, Any] = dict(IDENTITY)
    name, _, how = name.partition(" ")
    if how == "removed":
        del identity[name]
    elif how:
        identity[name] = str(identity[name])
    else:
        identity[name] = {"weights": "9f3b", "depth": 4, "scale": 0.1 + 2**-56, "eval": 1, "views": 0}.get(name, "new")
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    for call in (Store, StoreWriter):
        with pytest.raises(StaleCache, match=f"another {name}") as caught:
            call(folder, identity=identity, length=LENGTH, columns=COLUMNS)
        assert caught.value.field == name
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.*")}


def test_both_values_are_named(folder: Path) -> None:
    with pytest.raises(StaleCache, match="it has 3, and 4 is asked for"):
        Store(folder, identity=IDENTITY | {"depth": 4})


@pytest.mark.parametrize(
    "columns",
    [
        COLUMNS[:-1],
        COLUMNS[::-1],
        (Column("renamed", torch.bfloat16, (3, 4)), *COLUMNS[1:]),
        (Column("features", torch.float16, (3, 4)), *COLUMNS[1:]),
        (Column("features", torch.bfloat16, (4, 3)), *COLUMNS[1:]),
    ],
    ids=["fewer", "order", "name", "dtype", "shape"],
)
def test_other_columns(folder: Path, columns: Any) -> None:
    for call in (Store, StoreWriter):
        with pytest.raises(StaleCache, match="another columns"):
            call(folder, identity=IDENTITY, length=LENGTH, columns=columns)


def test_another_length(folder: Path) -> None:
    for call in (Store, StoreWriter):
        with pytest.raises(StaleCache, match="another length"):
            call(folder, identity=IDENTITY, length=LENGTH + 1, columns=COLUMNS)


def test_another_format(folder: Path) -> None:
    rewrite(folder, lambda body: body.update(format=2))
    for call in (open_store, writer):
        with pytest.raises(StaleCache, match="format is 2"):
            call(folder)
    drop(folder)
    assert not folder.exists()


# ----------------------------------------------------------------------------------------------------- cut or missing


def test_every_cut_of_a_shard(folder: Path) -> None:
    for shard in sorted(folder.glob("*.safetensors")):
        data = shard.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        edges = {0, 8, start, len(data), *(start + at for part in header.values() for at in part["data_offsets"])}
        for size in sorted({max(0, edge + by) for edge in edges for by in (-1, 0, 1)} - {len(data)}):
            shard.write_bytes(data[:size] if size < len(data) else data + b"\0")
            for call in (open_store, writer):
                with pytest.raises(CorruptCache, match=f"{shard.name} has {size} bytes instead of {len(data)}"):
                    call(folder)
            assert len(verify(folder)) == 1
        shard.write_bytes(data)
    read_all(folder)


def test_every_cut_of_the_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    data = manifest.read_bytes()
    for size in range(len(data)):
        manifest.write_bytes(data[:size])
        with pytest.raises(CorruptCache):
            open_store(folder)
    with pytest.raises(CorruptCache):
        writer(folder)
    assert verify(folder)


def test_a_shard_cut_or_gone_after_opening(folder: Path) -> None:
    store = open_store(folder)
    shard = folder / "00001.safetensors"
    data = shard.read_bytes()
    os.truncate(shard, 5000)
    with pytest.raises(CorruptCache, match=r"00001.safetensors has 5000 bytes"):
        store.check()
    shard.write_bytes(data)
    store.check()
    shard.unlink()
    with pytest.raises(CorruptCache, match=r"00001.safetensors is missing"):
        store.check()
    for call in (open_store, writer):
        with pytest.raises(CorruptCache, match=r"00001.safetensors is missing"):
            call(folder)
    assert len(verify(folder)) == 1


def test_a_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(MissingCache, match="no activation store"):
        open_store(folder)
    with pytest.raises(CorruptCache, match="no manifest"):
        writer(folder)
    drop(folder)
    assert not folder.exists()


# --------------------------------------------------------------------------------------------------------------- flips


def test_flipped_bytes(folder: Path) -> None:
    """One byte changed anywhere but in the lock is found by opening or reading, and by `verify`."""
    files = sorted(path for path in folder.iterdir() if path.name != "lock")
    rng = random.Random(0)
    caught: dict[type[BaseException], int] = {}
    for turn in range(FLIPS):
        path = files[turn % len(files)]
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        _overwrite(path, data, lambda: _detected(folder, caught))
    assert sum(caught.values()) == FLIPS
    read_all(folder)


def test_each_byte_of_a_header_and_the_manifest(folder: Path) -> None:
    shard = folder / "00000.safetensors"
    for path, size in ((folder / "manifest.json", 10**6), (shard, 700)):
        data = path.read_bytes()
        for at in range(min(size, len(data))):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            path.write_bytes(flipped)
            with pytest.raises((CorruptCache, StaleCache)):
                open_store(folder)
        path.write_bytes(data)
    read_all(folder)


@pytest.mark.parametrize("name", ["index", "xxh3", "rest.ends"])
def test_each_byte_beside_the_rows_is_checked_at_opening(folder: Path, name: str) -> None:
    shard = folder / "00000.safetensors"
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in range(*json.loads(data[8:start])[name]["data_offsets"]):
        flipped = bytearray(data)
        flipped[start + at] ^= 1 << at % 8
        shard.write_bytes(flipped)
        with pytest.raises(CorruptCache, match=r"does not match its checksum"):
            open_store(folder, verify="never")


def test_flips_in_the_lock_are_harmless(folder: Path) -> None:
    for data in (b"", b"\xff" * 100):
        (folder / "lock").write_bytes(data)
        read_all(folder)
        writer(folder).close()


def test_once_checks_each_row_when_it_is_first_read(folder: Path) -> None:
    store = open_store(folder, verify="once")
    store.read(EVERYONE[:20])
    offsets = _flip_row(folder, store, 3), _flip_row(folder, store, 30)
    assert all(offsets)
    store.read(EVERYONE[:20])
    with pytest.raises(CorruptCache, match=r"shard 0000\d.safetensors: row \d+ \(sample 30\) does not match"):
        store.read([30])
    with pytest.raises(CorruptCache):
        store.read([0, 30, 1])
    with pytest.raises(CorruptCache):
        open_store(folder, verify="once").read([3])
    with pytest.raises(CorruptCache):
        open_store(folder).read([3])
    open_store(folder, verify="never").read([3, 30])
    assert len(verify(folder)) == 2


def test_a_row_can_not_stand_in_for_another(tmp_path: Path) -> None:
    """Whole rows, with their checksums, exchanged: each is intact, and of the wrong sample."""
    columns = [Column("x", torch.uint8, (16,))]
    with StoreWriter(tmp_path, identity={}, length=2, columns=columns) as store:
        store.append([0, 1], {"x": torch.arange(32, dtype=torch.uint8).view(2, 16)})
    shard = tmp_path / "00000.safetensors"
    data = bytearray(shard.read_bytes())
    for size in (16, 8):  # rows at the end, checksums before them
        end = len(data) - (0 if size == 16 else 32)
        data[end - 2 * size : end] = data[end - size : end] + data[end - 2 * size : end - size]
    shard.write_bytes(data)
    resign(tmp_path)
    for sample in (0, 1):
        with pytest.raises(CorruptCache, match="row"):
            Store(tmp_path).read([sample])


# ----------------------------------------------------------------------------------------------------------- tools


def _overwrite(path: Path, data: bytes, then: Callable[[], None]) -> None:
    before = path.read_bytes()
    path.write_bytes(data)
    then()
    path.write_bytes(before)


def _detected(folder: Path, caught: dict[type[BaseException], int]) -> None:
    with pytest.raises((CorruptCache, StaleCache)) as error:
        open_store(folder).read(EVERYONE)
    caught[error.type] = caught.get(error.type, 0) + 1
    assert verify(folder), error.value


def _flip_row(folder: Path, store: Store, sample: int) -> int:
    """Flips a byte of a sample's row in its file, and returns where."""
    skip = values(COLUMNS, [sample])["skip"].numpy().tobytes()
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        if (at := data.find(skip)) >= 0:
            data[at + 7] ^= 1
            path.write_bytes(data)
            return at
    return 0
