"""CachedLoader when things go wrong: killed, out of space, on a disk that lies, beside another run.

Whatever happens, training goes on, and is that without a cache by every bit.
"""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_runs import COUNT, PROBES, Samples, Training, difference, folders, shards_of, wrong_rows
from store_samples import rewrite

from fxfreeze.cache import Store, StoreWriter, files
from fxfreeze.cache.lookup import Lookup
from fxfreeze.cache.validity import Validity

HERE = Path(__file__).parent
STEPS = -(-COUNT // 8)  # an epoch


@pytest.fixture(autouse=True)
def _small_shards() -> Any:
    before = StoreWriter.__init__.__kwdefaults__["shard_bytes"]
    shards_of(16)
    yield
    StoreWriter.__init__.__kwdefaults__["shard_bytes"] = before


def run(scenario: str, folder: Path, *arguments: int) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, HERE / "loader_crash.py", scenario, folder, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def only_store(directory: Path) -> Path:
    [name] = folders(directory)
    return directory / name


def assert_good(directory: Path, training: Training, **options: Any) -> None:
    """What is stored is right, and training as it was without a cache."""
    straight = Training(None, **options).epochs(training.done)
    assert difference(training, straight) == ""
    for path in directory.glob("*/manifest.json"):
        assert wrong_rows(path.parent, training.net, training.data) == []


# -------------------------------------------------------------------------------------------------------------- killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("killed")
    return folder, run("kill", folder)


@pytest.mark.slow
def test_killed_at_every_point(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    """While nothing is stored, while a first store is filled, and while a deeper one is made from it and it is dropped."""
    reports = killed[1]
    assert len({report["name"] for report in reports}) >= 30
    assert {tuple(report["depths"]) for report in reports} >= {(1,), (1, 2), (2,)}
    for report in reports:
        assert (report["different"], report["wrong"]) == ("", []), report
        assert 2 in report["given"], report  # the cache was of use again
        if report["name"] in ("manifest: in place", "manifest: folder synced", "commit: done"):
            assert report["given"][0] == max(report["depths"]), report  # what was committed is there


@pytest.mark.slow
def test_a_drop_that_was_killed_is_gone_on_with(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    """What nothing reads any more does not stay on the disk for good; an empty folder, or one with a lock, may."""
    left = {path.parent.name[:3] for path in killed[0].glob("*/cache/*/*") if path.name != "lock"}
    assert left == {"002"}


def test_points_that_a_training_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the test above kills at, without the kills."""
    names: list[str] = []
    monkeypatch.setattr(files, "point", names.append)
    training = Training(tmp_path, milestones={"stem": 0, "mid": 2 * STEPS}).epochs(4)
    assert len(set(names)) >= 30, sorted(set(names))
    assert training.given == [0] * STEPS + [1] * 2 * STEPS + [2] * STEPS


def test_reading_ahead_while_a_freeze_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch after it comes from the store too, however long that takes."""
    find, look_up = Validity._find, Lookup._look_up

    def slowly(validity: Validity, *call: Any) -> Any:
        time.sleep(0.3)
        return find(validity, *call)

    def late(lookup: Lookup, fetched: Any) -> Any:
        time.sleep(0.1)
        return look_up(lookup, fetched)

    monkeypatch.setattr(Validity, "_find", slowly)
    monkeypatch.setattr(Lookup, "_look_up", late)
    training = Training(tmp_path, milestones={"stem": 0, "mid": 2 * STEPS}).epochs(3)
    assert training.given == [0] * STEPS + [1] * 2 * STEPS


# ---------------------------------------------------------------------------------------------------- a disk that lies


def _cut(store: Path) -> None:
    shard = store / "00001.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)


def _cut_by_a_byte(store: Path) -> None:
    shard = store / "00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def _delete(store: Path) -> None:
    (store / "00001.safetensors").unlink()


def _flip(store: Path) -> None:
    """One bit of a row."""
    _flip_at(store / "00000.safetensors", -100)


def _flip_index(store: Path) -> None:
    shard = store / "00000.safetensors"
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    _flip_at(shard, start + json.loads(data[8:start])["index"]["data_offsets"][0])


def _flip_at(path: Path, at: int) -> None:
    """In place, so that what is mapped changes."""
    with path.open("r+b") as file:
        at = file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def _garbage(store: Path) -> None:
    (store / "manifest.json").write_bytes(b"\x00garbage")


def _future(store: Path) -> None:
    rewrite(store, lambda body: body.update(format=2))


def _no_manifest(store: Path) -> None:
    (store / "manifest.json").unlink()


def _file(store: Path) -> None:
    shutil.rmtree(store)
    store.write_bytes(b"a file")


def _dangling(store: Path) -> None:
    shutil.rmtree(store)
    store.symlink_to("nowhere")


def _moved(store: Path) -> None:
    elsewhere = store.parent.parent / "elsewhere"
    shutil.move(store, elsewhere)
    store.symlink_to(elsewhere)


def _gone(store: Path) -> None:
    shutil.rmtree(store)


def _linked_shard(store: Path) -> None:
    target = store.parent.parent / "target"
    shutil.move(store / "00001.safetensors", target)
    (store / "00001.safetensors").symlink_to(target)


Fault = Callable[[Path], None]
LOST = "can't be used any more"
REPAIRED = [_cut, _cut_by_a_byte, _delete, _flip, _garbage, _future, _no_manifest, _gone, _linked_shard]


@pytest.mark.parametrize("placement", ["disk", "ram"])
@pytest.mark.parametrize("fault", REPAIRED)
def test_a_fault_between_epochs(tmp_path: Path, fault: Fault, placement: str) -> None:
    """It is found, said, and the store filled anew."""
    directory = tmp_path / "c"
    training = Training(directory, placement=placement).epochs(1 if placement == "ram" else 2)
    fault(only_store(directory))
    training.epochs(3)
    assert_good(directory, training)
    assert LOST in training.notes
    training.data.taken()
    training.epochs(1)
    assert len(training.data.taken()) == PROBES
    assert wrong_rows(only_store(directory), training.net, training.data) == []


@pytest.mark.parametrize("fault", [*REPAIRED, _flip_index])
def test_a_fault_between_runs(tmp_path: Path, fault: Fault) -> None:
    directory = tmp_path / "c"
    Training(directory).epochs(1)
    fault(only_store(directory))
    training = Training(directory).epochs(3)
    assert_good(directory, training)
    training.data.taken()
    training.epochs(1)
    assert len(training.data.taken()) == PROBES


@pytest.mark.parametrize("placement", ["disk", "ram"])
@pytest.mark.parametrize("fault", [f for f in REPAIRED if f is not _cut])  # cut, a mapping ends the process: SIGBUS
def test_a_fault_within_a_cached_epoch(tmp_path: Path, fault: Fault, placement: str) -> None:
    directory = tmp_path / "c"
    training = Training(directory, placement=placement).epochs(1)
    broken: list[int] = []

    def breaks(step: int) -> None:
        if step == STEPS + 2:
            broken.append(step)
            fault(only_store(directory))

    training.epochs(3, before=breaks)
    assert broken
    if fault is _flip and placement == "ram":  # only who reads the disk again finds it
        assert LOST not in training.notes
        training = Training(directory, placement=placement).epochs(2)
    assert_good(directory, training)
    assert LOST in training.notes


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("fault", [_file, _dangling])
def test_the_folder_s_place_is_taken(tmp_path: Path, fault: Fault, within: bool) -> None:
    """Nothing can be stored there: training goes on without."""
    directory = tmp_path / "c"
    training = Training(directory).epochs(1)

    def breaks(step: int) -> None:
        if step == STEPS + 2 and within:
            fault(only_store(directory))

    if not within:
        fault(only_store(directory))
    training.epochs(3, before=breaks)
    assert_good(directory, training)
    assert LOST in training.notes
    assert "nothing more is stored, for it can't be written" in training.notes
    assert training.given[-STEPS:] == [0] * STEPS


def test_the_folder_becomes_a_link(tmp_path: Path) -> None:
    """To the same files: nothing is lost."""
    directory = tmp_path / "c"
    training = Training(directory, placement="disk").epochs(2)
    _moved(only_store(directory))
    training.epochs(2)
    assert_good(directory, training)
    assert training.given[STEPS:] == [1] * 3 * STEPS
    assert LOST not in training.notes


def test_a_fault_while_it_fills(tmp_path: Path) -> None:
    """Shards that were committed an instant ago are not to be trusted either."""
    directory = tmp_path / "c"
    training = Training(directory)

    def breaks(step: int) -> None:
        if step == 3:
            (only_store(directory) / "00000.safetensors").unlink()

    training.epochs(3, before=breaks)
    assert difference(training, Training(None).epochs(3)) == ""
    assert "00000.safetensors is missing" in training.notes
    again = Training(directory).epochs(2)
    assert_good(directory, again)
    assert again.given[-STEPS:] == [1] * STEPS


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """What is there beside the stores: files, a folder with somebody's model, an unreadable name."""
    directory = tmp_path / "c"
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "00000.safetensors").write_bytes(b"weights")
    (directory / "000-notes").write_text("mine")
    (directory / os.fsdecode(b"\xff")).mkdir()
    training = Training(directory).epochs(3)
    assert_good(directory, training)
    assert training.given[-1] == 1
    assert (directory / "model" / "00000.safetensors").read_bytes() == b"weights"
    assert (directory / "000-notes").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------ no space


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    """Hit by the manifest, by a first shard, and when one store is complete and a deeper one is begun."""
    reports = run("full", tmp_path, 100, 0, 2000, 0, 9000, 0, 9000, 2)
    for report in reports:
        assert (report["different"], report["wrong"], report["left"]) == ("", [], [])
        assert "nothing more is stored, for there is no space left" in report["notes"]
    assert [report["given"][-1] for report in reports] == [0, 0, 0, 1]


POINTS = ["create: opened", "create: synced", "commit: packed", "shard: opened"]
POINTS += ["shard: space reserved", "shard: piece written", "shard: synced", "manifest: synced", "shard: in place"]
POINTS += ["shard: folder synced", "manifest: in place", "manifest: folder synced", "lock taken", "folder made"]


@pytest.mark.parametrize("name", POINTS)
def test_no_space_at_a_point(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second passage, where there is one: something is stored then. Once, or from then on."""
    again = POINTS.index(name) % 2 == 0
    directory = tmp_path / "c"
    left = [2]

    def full(point: str) -> None:
        if point == name:
            left[0] -= 1
        if left[0] == 0 or (again and left[0] < 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not name.startswith(("append", "commit", "shard", "manifest")):
        left[0] = 1
    monkeypatch.setattr(files, "point", full)
    training = Training(directory).epochs(3)
    monkeypatch.undo()
    assert left[0] <= 0
    assert_good(directory, training)
    assert "no space left" in training.notes
    reused = Training(directory).epochs(2)  # when there is space again
    assert_good(directory, reused)
    assert reused.given[-STEPS:] == [1] * STEPS
    assert not list(directory.rglob("*.tmp"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, for root may write anywhere: what is there is read. Where nothing is, it is refused at once."""
    directory = tmp_path / "c"
    Training(directory).epochs(1)
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *rest, **options)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    for name in ("mkdir", "utime", "unlink", "replace", "rmdir"):
        monkeypatch.setattr(os, name, refused)
    options: dict[str, Any] = {"milestones": {"stem": 0, "mid": 2 * STEPS}}
    known = Training(directory, **options).epochs(4)
    with pytest.raises(ValueError, match=f"new' can't hold a cache .*{os.strerror(code)}"):
        Training(directory / "new", **options)
    monkeypatch.undo()
    assert_good(directory, known, **options)
    assert known.given == [1] * 4 * STEPS
    assert "nothing more is stored, for it can't be written" in known.notes
    assert not (directory / "new").exists()


@pytest.mark.parametrize("when", ["auto", "always"])
def test_the_directory_becomes_a_file(tmp_path: Path, when: str) -> None:
    """After the loader was made: then only the storing stops."""
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        training = Training(directory, when=when)
        (tmp_path / "file").write_text("mine")
        training.epochs(2)
        assert_good(directory, training)
        assert training.given == [0] * 2 * STEPS
        assert "file" in training.notes
        assert (tmp_path / "file").read_text() == "mine"
        (tmp_path / "file").unlink()


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no wrong path: there may be space when there is something to store."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    training = Training(tmp_path)
    monkeypatch.undo()
    training.epochs(2)
    assert_good(tmp_path, training)
    assert training.given[-STEPS:] == [1] * STEPS


@pytest.mark.parametrize("when", ["auto", "always"])
def test_max_bytes(tmp_path: Path, when: str) -> None:
    """The stem's 45 kB are too much, mid's 17 kB are not."""
    options: dict[str, Any] = {"milestones": {"stem": 0, "mid": STEPS}}
    training = Training(tmp_path, max_bytes=30_000, when=when, **options).epochs(3)
    assert_good(tmp_path, training, **options)
    assert "depth 1 is not stored: it takes 45.1 kB, and max_bytes is 30.0 kB" in training.notes
    if when == "always":
        assert [name[:3] for name in folders(tmp_path)] == ["002"]
        assert Store(only_store(tmp_path)).nbytes <= 30_000


# -------------------------------------------------------------------------------------------------------- other processes


def test_two_trainings_on_one_directory(tmp_path: Path) -> None:
    """One fills, the other computes until there is something to read; a third reads everything."""
    *both, third = run("pair", tmp_path)
    for report in (*both, third):
        assert (report["different"], report["wrong"]) == ("", []), report
        assert report["reads"][-1] == PROBES, report
    assert third["reads"] == [PROBES] * 3
    assert third["given"] == [1] * 3 * STEPS
    fillers = [report for report in both if "is stored" in report["notes"]]
    assert len(fillers) >= 1
    assert all("another run fills this cache" in report["notes"] for report in both if report not in fillers)


def test_another_writer_has_the_store(tmp_path: Path) -> None:
    """What it has committed is read, the rest computed; once it lets go, this run fills what is missing."""
    training = Training(tmp_path)
    training.order.manual_seed(0)
    with training.own_random():
        for number, batch in enumerate(training.loader):
            training.step(batch)
            if number == 2:
                break
    opened = Store(only_store(tmp_path))
    held = opened.holds(range(COUNT))
    writer = StoreWriter(opened.directory, identity=opened.identity, length=COUNT, columns=opened.columns)
    training.epochs(2)
    assert f"being written by process {os.getpid()}" in training.notes
    opened.refresh()
    assert torch.equal(opened.holds(range(COUNT)), held)
    assert 1 in training.given[3:]
    writer.close()
    training.epochs(2)
    assert training.given[-STEPS:] == [1] * STEPS
    assert Store(only_store(tmp_path)).complete
    straight = Training(None)
    straight.order.manual_seed(0)
    with straight.own_random():
        for number, batch in enumerate(straight.loader):
            straight.step(batch)
            if number == 2:
                break
    assert difference(training, straight.epochs(4)) == ""


def test_a_store_is_dropped_while_it_is_read(tmp_path: Path) -> None:
    """By another run that stored a deeper one: who reads it goes on reading to the end of the epoch."""
    options: dict[str, Any] = {"milestones": {"stem": 0, "mid": 4 * STEPS}}
    reader = Training(tmp_path, placement="disk", **options).epochs(2)

    def drops(step: int) -> None:
        if step == 2 * STEPS + 2:
            Training(tmp_path, milestones={"mid": 0}).epochs(1)

    reader.epochs(1, before=drops)
    assert reader.given[-STEPS:] == [1] * STEPS
    assert [name[:3] for name in folders(tmp_path)] == ["002"]
    reader.epochs(3)
    assert difference(reader, Training(None, **options).epochs(6)) == ""
    assert "there is no activation store" in reader.notes
    assert reader.given[-3 * STEPS : -2 * STEPS] == [0] * STEPS
    assert reader.given[-STEPS:] == [2] * STEPS
    assert [] in [wrong_rows(path.parent, reader.net, reader.data) for path in tmp_path.glob("002*/manifest.json")]


def test_fill_of_a_run_that_ended_is_gone_on_with(tmp_path: Path) -> None:
    """Broken off in the middle of an epoch, by an error in the training loop."""
    training = Training(tmp_path)

    def breaks(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):  # with it goes the iterator, which commits
        training.epochs(1, before=breaks)
    held = Store(only_store(tmp_path)).held
    assert 0 < held < COUNT
    again = Training(tmp_path)
    again.data.taken()
    again.epochs(2)
    assert_good(tmp_path, again)
    assert again.notes.count(f"storing depth 1: resuming, {held} of {COUNT} rows are there") == 1
    assert "storing depth 1 (" not in again.notes  # it was begun by the first run
    assert len(again.data.taken()) == 2 * PROBES + COUNT - held


def test_workers_do_not_hold_the_lock(tmp_path: Path) -> None:
    """Of a loader with worker processes; its data set's copies read, this one does not."""
    data = Samples()
    training = Training(tmp_path, data=data, wrapped={"num_workers": 1, "persistent_workers": True}).epochs(3)
    straight = Training(None, wrapped={"num_workers": 1, "persistent_workers": True}).epochs(3)
    assert difference(training, straight) == ""
    assert training.given == [0] * STEPS + [1] * 2 * STEPS
    StoreWriter(
        only_store(tmp_path),
        identity=Store(only_store(tmp_path)).identity,
        length=COUNT,
        columns=Store(only_store(tmp_path)).columns,
    ).close()


def test_the_row_of_a_lost_batch_is_that_of_the_rest(tmp_path: Path) -> None:
    """A batch of which a row turns out damaged is computed whole: the model gets no row twice nor another's."""
    training = Training(tmp_path, placement="disk").epochs(1)
    _flip(only_store(tmp_path))
    received = training.rows_received()
    training.epochs(1)
    assert sorted(received) == list(range(COUNT))
    assert all(len(rows) == 1 for rows in received.values())
    fresh = Training(None).epochs(0)
    other = fresh.rows_received()
    fresh.epochs(1)
    assert all(torch.equal(rows[0], other[index][0]) for index, rows in received.items())
