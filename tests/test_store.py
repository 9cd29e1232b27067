"""The activation store, undisturbed: what was written is read, whatever its dtype, shape, order and process."""

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_samples import (
    COLUMNS,
    EVERY_DTYPE,
    IDENTITY,
    LENGTH,
    assert_rows,
    assert_same,
    open_store,
    values,
    write,
    writer,
)
from xxhash import xxh3_64_intdigest

from fxfreeze.cache import (
    Blob,
    CacheError,
    Column,
    MissingCache,
    MissingRow,
    StaleCache,
    Store,
    StoreWriter,
    drop,
    verify,
)
from fxfreeze.cache.gather import NARROW
from fxfreeze.cache.store import Verify

VERIFY = ["always", "once", "never"]


@pytest.mark.parametrize("mode", VERIFY)
def test_rows_come_back_in_any_order(tmp_path: Path, mode: str) -> None:
    write(tmp_path / "s", samples=torch.randperm(LENGTH).tolist())
    store = open_store(tmp_path / "s", verify=mode)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    assert (store.held, store.complete, store.identity) == (LENGTH, True, IDENTITY)
    for _ in range(2):
        assert_rows(store, torch.randperm(LENGTH).tolist())
        assert_rows(store, [5, 5, 39, 0, 5])
    assert_rows(store, [])
    assert verify(tmp_path / "s") == []


def test_huge_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfreeze.cache.gather.HUGE", 1)
    write(tmp_path / "s", COLUMNS[1:2])
    store = Store(tmp_path / "s", verify="never")
    assert_rows(store, [9, 2, 30, 9])
    with pytest.raises(IndexError):
        store.read([-1])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (4, 0, 2), (NARROW,)], ids=str)
def test_every_dtype(tmp_path: Path, shape: tuple[int, ...]) -> None:
    columns = [Column(column.name, column.dtype, shape) for column in EVERY_DTYPE]
    write(tmp_path / "s", columns)
    assert_rows(Store(tmp_path / "s"), torch.randperm(LENGTH).tolist())


@pytest.mark.parametrize(
    "columns", [[], [Blob("a"), Blob("b")], [Column("a", torch.int8, (0,))]], ids=["none", "blobs", "0"]
)
def test_rows_without_fixed_bytes(tmp_path: Path, columns: list[Column | Blob]) -> None:
    write(tmp_path / "s", columns)
    assert Store(tmp_path / "s").complete
    assert_rows(Store(tmp_path / "s"), [7, 3, 0])


def test_shards_are_standard_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "00000.safetensors")
    samples = tensors["index"].tolist()
    expected = values(COLUMNS, samples)
    blobs = expected.pop("rest")
    assert_same({name: tensors[name] for name in expected}, expected)
    assert tensors["rest.ends"].tolist() == torch.tensor([len(blob) for blob in blobs]).cumsum(0).tolist()
    assert bytes(tensors["rest"].tolist()) == b"".join(blobs)


def test_wide_rows_start_at_a_page(tmp_path: Path) -> None:
    columns = [Column("x", torch.uint8, (4096,))]
    with StoreWriter(tmp_path, identity={}, length=700, columns=columns, shard_bytes=600 * 4112) as store:
        store.append(range(700), {"x": torch.arange(700).remainder(256).to(torch.uint8)[:, None].expand(-1, 4096)})
    data = (tmp_path / "00000.safetensors").read_bytes()
    assert len(data) % 4096 == 0
    start = len(data) - 4096 * 512
    assert [data[start + at] for at in (0, 4095, 4096)] == [0, 0, 1]
    assert int.from_bytes(data[start - 8 : start], "little") == xxh3_64_intdigest(data[-4096:], 511)


def test_read_into_the_caller_s_tensors(tmp_path: Path) -> None:
    write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    out = {"features": torch.empty(3, 3, 4, dtype=torch.bfloat16), "skip": torch.empty(3, 160)}
    result = store.read(torch.tensor([9, 2, 30]), out)
    assert result["features"] is out["features"]
    assert result["skip"] is out["skip"]
    assert_same(result, values(COLUMNS, [9, 2, 30]))
    for wrong in (
        {"skip": torch.empty(2, 160)},
        {"skip": torch.empty(3, 160, dtype=torch.float64)},
        {"skip": torch.empty(160, 3).t()},
        {"other": torch.empty(3)},
    ):
        with pytest.raises(ValueError, match="out"):
            store.read([9, 2, 30], wrong)


def test_a_tape_notices_that_its_tensor_was_read_into(tmp_path: Path) -> None:
    write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    batch = store.read([1, 2])["skip"]
    weight = torch.ones(160, requires_grad=True)
    loss = (batch * weight).sum()
    store.read([3, 4], {"skip": batch})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_held_keeps_its_row(tmp_path: Path) -> None:
    with writer(tmp_path) as store:
        store.append([3, 4, 3], values(COLUMNS, [3, 4, 5]))
        store.append([4], values(COLUMNS, [6]))
        assert (store.held, store.committed) == (2, 0)
        store.commit()
        store.append([3, 9], values(COLUMNS, [7, 9]))
        assert (store.held, store.committed) == (3, 2)
        assert store.holds([3, 4, 9, 5]).tolist() == [True, True, True, False]
    assert_rows(open_store(tmp_path), [3, 4, 9])


def test_batches_larger_than_a_shard(tmp_path: Path) -> None:
    with writer(tmp_path, shard_bytes=1) as store:
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
        assert store.committed == LENGTH
    assert len(open_store(tmp_path)._open.manifest.shards) == LENGTH
    assert_rows(open_store(tmp_path), list(range(LENGTH)))


def test_a_fill_goes_on_and_a_reader_sees_it(tmp_path: Path) -> None:
    with writer(tmp_path) as store:
        store.append(range(10), values(COLUMNS, range(10)))
    reader = open_store(tmp_path, verify="once")
    assert (reader.held, reader.complete) == (10, False)
    assert reader.holds([9, 10]).tolist() == [True, False]
    with pytest.raises(MissingRow, match="sample 10"):
        reader.read([9, 10])
    with writer(tmp_path) as store:
        assert store.holds(range(LENGTH)).sum() == 10
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
    assert reader.held == 10
    reader.refresh()
    reader.check()
    assert reader.complete
    assert_rows(reader, list(range(LENGTH)))


@pytest.mark.parametrize("mode", VERIFY)
@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[1:2]], ids=["all", "wide"])
def test_rows_that_are_not_held(tmp_path: Path, columns: list[Column | Blob], mode: Verify) -> None:
    write(tmp_path / "s", columns, samples=[3, 4, 0])
    store = Store(tmp_path / "s", verify=mode)
    for _ in range(2):
        assert_rows(store, [4, 0, 3])
        for samples in ([1], [3, 39, 4]):
            with pytest.raises(MissingRow, match=f"sample {max(set(samples) - {3, 4})} is not held"):
                store.read(samples)
        for samples in ([-1], [3, LENGTH]):
            with pytest.raises(IndexError):
                store.read(samples)


def test_a_reader_without_room_opens_everything_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfreeze.cache.store._ROOM", 0)
    write(tmp_path / "s", samples=[1])
    reader = open_store(tmp_path / "s")
    first = reader._open
    for start in (5, 10, 15):
        write(tmp_path / "s", samples=range(start, start + 5))
        reader.refresh()
        assert_rows(reader, [1, *range(5, start + 5)])
    assert reader._open is not first


@pytest.mark.parametrize("bad", [[-1], [LENGTH], [0, LENGTH]])
def test_samples_outside_the_data_set(tmp_path: Path, bad: list[int]) -> None:
    write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    for call in (store.read, store.holds):
        with pytest.raises(IndexError):
            call(bad)
    with writer(tmp_path / "s") as again, pytest.raises(IndexError):
        again.append(bad, values(COLUMNS, range(len(bad))))


def test_values_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    with writer(tmp_path) as store:
        good = values(COLUMNS, [0, 1])
        for name, bad in {
            "features": good["features"].float(),
            "skip": good["skip"][:1],
            "label": good["label"][:, None],
            "rest": [b"", "text"],
        }.items():
            with pytest.raises(ValueError, match=name):
                store.append([0, 1], good | {name: bad})
        with pytest.raises(ValueError, match="columns"):
            store.append([0, 1], {"features": good["features"]})
        assert store.held == 0


def test_values_with_gradient_and_strides(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, identity={}, length=4, columns=[Column("x", torch.float32, (2, 3))]) as store:
        x = torch.randn(4, 3, 2, requires_grad=True).transpose(1, 2)
        store.append([3, 0, 1, 2], {"x": x})
    assert torch.equal(Store(tmp_path).read([3, 0, 1, 2])["x"], x)


def test_files_are_the_user_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in (tmp_path / "a" / "b").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_drop_removes_the_store_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write(folder)
    reader = open_store(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_text("mine")
    (folder / "00007.safetensors.tmp").write_text("left by a kill")
    drop(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "notes.txt"]
    assert_rows(reader, [1, 2])
    with pytest.raises(MissingCache):
        open_store(folder)
    drop(folder)
    drop(tmp_path / "never")
    write(folder)
    with pytest.raises(StaleCache, match="anew"):
        _refreshed(reader, folder)
    for name in ("notes.txt", "model.safetensors"):
        (folder / name).unlink()
    drop(folder)
    assert not folder.exists()


def _refreshed(reader: Store, folder: Path) -> None:
    drop(folder)
    write(folder, samples=reversed(range(LENGTH)))
    reader.refresh()


def test_a_folder_of_somebody_s_shards_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "00000.safetensors").write_text("a model")
    with pytest.raises(CacheError, match="no activation store"):
        writer(tmp_path)
    drop(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]


def test_pickled_by_path(tmp_path: Path) -> None:
    write(tmp_path / "s")
    data = pickle.dumps(open_store(tmp_path / "s"))
    assert len(data) < 2000
    assert_rows(pickle.loads(data), [4, 2])


@pytest.mark.parametrize(
    "columns",
    [
        [Column("index", torch.int8, ())],
        [Blob("")],
        [Blob("a"), Blob("a")],
        [Blob("a"), Column("a.ends", torch.int8, ())],
    ],
)
def test_names_that_collide(tmp_path: Path, columns: list[Column | Blob]) -> None:
    with pytest.raises(ValueError, match="name a column"):
        StoreWriter(tmp_path / "s", identity={}, length=1, columns=columns)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value", [b"bytes", [1], float("nan"), float("inf")], ids=str)
def test_identities_that_json_can_not_hold(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="identity"):
        StoreWriter(tmp_path / "s", identity={"a": value}, length=1, columns=[])  # type: ignore[dict-item]


def test_shapes_and_dtypes_that_can_not_be() -> None:
    for dtype, shape in (
        (torch.complex128, ()),
        (torch.int8, (-1,)),
        (torch.int8, (2**40, 2**40)),
        (torch.int8, (1.0,)),
    ):
        with pytest.raises(ValueError, match="column 'x'"):
            Column("x", dtype, shape)  # type: ignore[arg-type]
