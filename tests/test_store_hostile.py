"""The activation store in hostile hands: manifests and shards whose checksums match and that no writer made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import LENGTH, assert_rows, open_store, resign, rewrite, write, writer

from fxfreeze.cache import CacheError, CorruptCache, StaleCache, Store, verify

EVERYONE = list(range(LENGTH))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["shards"][0].update(name="/etc/00000.safetensors"),
        lambda b: b["shards"][0].update(name="../00000.safetensors"),
        lambda b: b["shards"][0].update(name="00000.safetensors\n"),
        lambda b: b["shards"][0].update(name="\u0660\u0660\u0660\u0660\u0660.safetensors"),
        lambda b: b["shards"][0].update(name=3),
        lambda b: b["shards"][0].update(rows=-1),
        lambda b: b["shards"][0].update(rows=0),
        lambda b: b["shards"][0].update(rows=b["shards"][0]["rows"] + 1),
        lambda b: b["shards"][0].update(rows=2**80),
        lambda b: b["shards"][0].update(rows=True),
        lambda b: b["shards"][0].update(size=2**80),
        lambda b: b["shards"][0].update(size=0),
        lambda b: b["shards"][0].update(extra=1),
        lambda b: b["shards"][0].pop("xxh3"),
        lambda b: b["shards"].append(b["shards"][0]),
        lambda b: b.update(shards={"0": 1}),
        lambda b: b.update(length=2**62),
        lambda b: b.update(length=-1),
        lambda b: b.update(length=1.5),
        lambda b: b.update(length=5),
        lambda b: b.update(identity=[1]),
        lambda b: b.update(identity={"a": {"b": 1}}),
        lambda b: b["columns"][0].update(shape=[-3, 4]),
        lambda b: b["columns"][0].update(shape=[2**62, 2**62]),
        lambda b: b["columns"][0].update(shape=[2**40, 3]),
        lambda b: b["columns"][0].update(shape=[3.0, 4]),
        lambda b: b["columns"][0].update(shape="34"),
        lambda b: b["columns"][0].update(dtype="object"),
        lambda b: b["columns"][0].update(dtype=["float32"]),
        lambda b: b["columns"][0].update(name="index"),
        lambda b: b["columns"][0].update(pickle="yes"),
        lambda b: b.update(columns=None),
        lambda b: b.update(more="fields"),
    ],
)
def test_hostile_manifests(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """All with a valid checksum."""
    rewrite(folder, change)
    with pytest.raises(CorruptCache):
        Store(folder)
    assert verify(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"[]", b"null", b'"x"', b"[" * 100_000, b"9" * 5000, b'{"format":1}', b"\xff\xfe", b'{"format":NaN}'],
    ids=range(10),
)
def test_foreign_manifests(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    for call in (Store, writer):
        with pytest.raises((CorruptCache, StaleCache)):
            call(folder)
    assert verify(folder)


def test_a_manifest_that_is_too_large_is_not_read(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 2**40)
    with pytest.raises(CorruptCache, match="at most"):
        Store(folder)


def test_a_manifest_of_a_data_set_that_no_memory_holds(folder: Path) -> None:
    rewrite(folder, lambda body: body.update(length=2**40))
    store = Store(folder)
    assert_rows(store, EVERYONE)
    assert not store.holds([2**40 - 1]).any()


@pytest.mark.parametrize("name", ["manifest.json", "00000.safetensors", "lock"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_files_that_are_not_regular(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    shutil.move(path, folder.parent / "elsewhere")
    {"link": lambda: path.symlink_to("../elsewhere"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    if name == "lock" and kind == "pipe":
        return  # locks as well as a file does
    for call in (open_store, writer) if name != "lock" else (writer,):
        with pytest.raises(CacheError, match=r"regular|lock"):
            call(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["label"].update(shape=[-1]),
        lambda h: h["label"].update(dtype="F64"),
        lambda h: h["label"].update(data_offsets=[-8, h["label"]["data_offsets"][1]]),
        lambda h: h["label"].update(data_offsets=[at + 2**61 for at in h["label"]["data_offsets"]]),
        lambda h: h["label"].update(data_offsets=[at - 2**61 for at in h["label"]["data_offsets"]]),
        lambda h: h["label"].update(data_offsets=h["index"]["data_offsets"]),
        lambda h: h["rest"].update(data_offsets=[0, h["rest"]["data_offsets"][1]]),
        lambda h: h["label"].update(data_offsets=[0]),
        lambda h: h["label"].update(data_offsets=[0.0, 8.0]),
        lambda h: h["label"].pop("shape"),
        lambda h: h["rest"].update(data_offsets=[0, 0]),
        lambda h: h.pop("skip"),
        lambda h: h.update(skip=3),
        lambda h: h.update(more=h["skip"]),
    ],
)
def test_hostile_headers(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """With checksums that match, in the shard and in the manifest."""
    shard = folder / "00000.safetensors"
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    resign(folder)
    with pytest.raises(CorruptCache, match=r"00000.safetensors is not the shard"):
        Store(folder)


@pytest.mark.parametrize("length", [2**30, 2**63, 2**64 - 1])
def test_headers_longer_than_any(folder: Path, length: int) -> None:
    shard = folder / "00000.safetensors"
    shard.write_bytes(length.to_bytes(8, "little") + shard.read_bytes()[8:])
    with pytest.raises(CorruptCache, match=f"header of {length} bytes"):
        Store(folder)


@pytest.mark.parametrize("name", ["index", "rest.ends"])
@pytest.mark.parametrize("number", [-1, 2**62, 1])
def test_hostile_indices(folder: Path, name: str, number: int) -> None:
    """A sample, or an end of a row's bytes, that is out of range or there twice; checksums match."""
    shard = folder / "00000.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + json.loads(data[8:start])[name]["data_offsets"][0] + 16
    data[at : at + 8] = number.to_bytes(8, "little", signed=True)
    shard.write_bytes(data)
    resign(folder)
    with pytest.raises(CorruptCache, match="00000"):
        Store(folder)


def test_two_shards_with_one_sample(folder: Path) -> None:
    shutil.copy(folder / "00000.safetensors", folder / "00077.safetensors")
    rewrite(folder, lambda body: body["shards"].append(body["shards"][0] | {"name": "00077.safetensors"}))
    with pytest.raises(CorruptCache, match="another shard holds"):
        Store(folder)
    assert verify(folder) == ["shard 00077.safetensors holds samples that another shard holds"]
