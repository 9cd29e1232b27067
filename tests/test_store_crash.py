"""The activation store when writing ends badly: killed at any point, out of space, on a folder that can't be written."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import COLUMNS, LENGTH, assert_rows, open_store, values, writer

from fxfreeze.cache import CacheError, CacheFull, CorruptCache, MissingCache, StoreWriter, drop, verify

HERE = Path(__file__).parent


def crash(scenario: str, folder: Path) -> list[tuple[str, int]]:
    """Each point passed, and the rows committed when it was (-1: no store); the k-th killed run is in <folder>/<k>."""
    done = run(HERE / "store_crash.py", scenario, folder)
    return [(name, rows) for name, rows in json.loads(done)]


def run(*arguments: Any) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finish(folder: Path) -> None:
    """Fills what is not held, as a run after the kill would, and finds the store whole and nothing left over."""
    with writer(folder) as store:
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
    assert verify(folder) == []
    store = open_store(folder)
    assert_rows(store, list(range(LENGTH)))
    shards = {shard.name for shard in store._open.manifest.shards}
    assert {path.name for path in folder.iterdir()} == shards | {"manifest.json", "lock"}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["fill", "resume"])
def test_killed_at_every_point_of_a_fill(tmp_path: Path, scenario: str) -> None:
    passed = crash(scenario, tmp_path)
    assert len({name for name, _ in passed}) >= 15
    for k, (_, rows) in enumerate(passed):
        folder = tmp_path / str(k)
        if rows < 0:
            with pytest.raises(MissingCache):
                open_store(folder)
        else:
            store = open_store(folder)
            assert store.held == rows
            assert_rows(store, store.holds(range(LENGTH)).nonzero().flatten().tolist())
            assert verify(folder) == []
        finish(folder)
    assert sorted({rows for _, rows in passed}) == {"fill": [-1, 0, 5, 10, 15], "resume": [10, 18, 20]}[scenario]


def test_killed_at_every_point_of_a_drop(tmp_path: Path) -> None:
    passed = crash("drop", tmp_path)
    assert {rows for _, rows in passed} == {10, -1}
    for k, (_, rows) in enumerate(passed):
        folder = tmp_path / str(k)
        if rows < 0:
            with pytest.raises(MissingCache):
                open_store(folder)
        else:
            assert_rows(open_store(folder), list(range(10)))
        if k % 2:
            finish(folder)
        drop(folder)
        assert not folder.exists()


def test_points_of_the_write_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    monkeypatch.setattr("fxfreeze.cache.files.point", names.add)
    with writer(tmp_path / "s") as store:
        store.append([1], values(COLUMNS, [1]))
    (tmp_path / "s" / "manifest.json.tmp").write_bytes(b"")
    writer(tmp_path / "s").close()
    drop(tmp_path / "s")
    assert len(names) >= 20, sorted(names)


def test_everything_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kill shows, and a power cut would: the order of the calls that reach the disk."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        calls.append(f"name {target.name}")
        replace(source, target)

    with writer(tmp_path / "s") as store:
        store.append([1], values(COLUMNS, [1]))
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_replace)
    assert calls == [
        "sync 00000.safetensors.tmp",
        "sync manifest.json.tmp",
        "name 00000.safetensors",
        "sync s",
        "name manifest.json",
        "sync s",
    ]


# ------------------------------------------------------------------------------------------------------------- no space


FULL = """
import resource, sys
from pathlib import Path
from store_samples import *
from fxfreeze.cache import CacheFull
folder = Path(sys.argv[1])
with writer(folder) as store:
    store.append(range(5), values(COLUMNS, range(5)))
limit = int(sys.argv[2])
store = writer(folder, shard_bytes=100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
store.append(range(5, 30), values(COLUMNS, range(5, 30)))
try:
    store.commit()
except CacheFull as error:
    assert "no space left" in str(error), error
else:
    raise SystemExit("not full")
assert (store.held, store.committed) == (5, 5)
assert sorted(path.name for path in folder.iterdir()) == ["00000.safetensors", "lock", "manifest.json"]
assert_rows(open_store(folder), list(range(5)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.append(range(7), values(COLUMNS, range(7)))
store.close()
assert_rows(open_store(folder), list(range(7)))
"""


@pytest.mark.parametrize("limit", [100, 10_000])
def test_a_limit_on_file_size(tmp_path: Path, limit: int) -> None:
    """Hit by the reservation of a shard's space; 100 bytes is less than any file but the lock."""
    run("-c", FULL, tmp_path / "s", limit)


def test_a_limit_that_only_the_manifest_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path) as store:
        store.append(range(5), values(COLUMNS, range(5)))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(name: str) -> None:
            if name == "shard: synced":
                resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))

        monkeypatch.setattr("fxfreeze.cache.files.point", limit)
        try:
            with pytest.raises(CacheFull):
                store.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "manifest.json"]
        assert open_store(tmp_path).held == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    folder = small_disk / "s"
    store = writer(folder, shard_bytes=12_000)
    with pytest.raises(CacheFull, match="no space left"):
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
    held = store.committed
    assert 0 < held < LENGTH
    assert not list(folder.glob("*.tmp"))
    reader = open_store(folder)
    assert reader.held == held
    assert_rows(reader, reader.holds(range(LENGTH)).nonzero().flatten().tolist())
    (small_disk / "ballast").write_bytes(b"\0" * os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize)
    with pytest.raises(CacheFull):
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
    store.close()
    drop(folder)
    assert not folder.exists()


def test_a_full_disk_at_creation(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"\0" * 40 * 1024)
    with pytest.raises(CacheFull):
        writer(small_disk / "s")


# ------------------------------------------------------------------------------------------------------- not writable


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path / "s") as store:
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    for folder in (tmp_path / "s", tmp_path / "new"):
        with pytest.raises(CacheError, match="is the folder writable") as caught:
            writer(folder)
        assert not isinstance(caught.value, CacheFull | CorruptCache)
    with pytest.raises(CacheError, match="is the folder writable"):
        drop(tmp_path / "s")
    assert_rows(open_store(tmp_path / "s"), list(range(LENGTH)))


def test_a_read_only_mount(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        store.append(range(LENGTH), values(COLUMNS, range(LENGTH)))
    mount = ["mount", "--bind", tmp_path / "s", tmp_path / "s"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path / "s"], check=True)
        for call in (writer, drop):
            with pytest.raises(CacheError, match="Read-only"):
                call(tmp_path / "s")
        assert_rows(open_store(tmp_path / "s"), list(range(LENGTH)))
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "s"], check=True)


def test_a_folder_s_place_is_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "s"):
        with pytest.raises(CacheError):
            StoreWriter(folder, identity={}, length=1, columns=[])
        with pytest.raises(MissingCache):
            open_store(folder)


def test_an_error_in_the_block_commits_nothing(tmp_path: Path) -> None:
    store = writer(tmp_path)
    store.append([1], values(COLUMNS, [1]))
    with pytest.raises(KeyError), store:
        raise KeyError
    assert open_store(tmp_path).held == 0
    with pytest.raises(CacheError, match="closed"):
        store.append([1], values(COLUMNS, [1]))
    with pytest.raises(CacheError, match="closed"):
        store.commit()
