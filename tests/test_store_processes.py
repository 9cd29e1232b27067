"""The activation store between processes: many readers, one writer, and locks that die with their process."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_samples import COLUMNS, LENGTH, assert_rows, open_store, values, write, writer
from torch.utils.data import DataLoader, Dataset

from fxfreeze.cache import CacheError, CacheLocked, StaleCache, Store, drop

HERE = Path(__file__).parent


class Rows(Dataset[torch.Tensor]):
    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return LENGTH

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return list(self.store.read(indices)["skip"])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read(tmp_path: Path, method: str) -> None:
    write(tmp_path / "s")
    rows = Rows(open_store(tmp_path / "s", verify="once"))
    loader = DataLoader(rows, batch_size=8, num_workers=2, multiprocessing_context=method, collate_fn=torch.stack)
    found = torch.cat(list(loader))
    assert torch.equal(found.view(torch.int32), values(COLUMNS, range(LENGTH))["skip"].view(torch.int32))


def test_a_worker_s_error_keeps_its_class() -> None:
    """A loader makes the error anew from its class and message; a pool pickles it."""
    for kind in (CacheError, *CacheError.__subclasses__()):
        assert str(kind("message")) == "message"
        assert type(pickle.loads(pickle.dumps(kind("message")))) is kind
    assert pickle.loads(pickle.dumps(StaleCache("message", "depth"))).field == "depth"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        store.append([1], values(COLUMNS, [1]))
        for call in (writer, drop):
            with pytest.raises(CacheLocked, match=f"being written by process {os.getpid()}; wait"):
                call(tmp_path / "s")
        store.append([2], values(COLUMNS, [2]))
    writer(tmp_path / "s").close()
    assert_rows(open_store(tmp_path / "s"), [1, 2])


HOLD = """
import os, sys, time
from pathlib import Path
from store_samples import *
store = writer(Path(sys.argv[1]))
store.append([1], values(COLUMNS, [1]))
store.commit()
store.append([2], values(COLUMNS, [2]))
child = os.fork()
if child == 0:
    try:
        store.append([3], values(COLUMNS, [3]))
    except Exception as error:
        os.write(1, f"child {type(error).__name__}\\n".encode())
    time.sleep(60)
os.write(1, f"parent {child}\\n".encode())
time.sleep(60)
"""


def test_sigkill_frees_the_lock_though_a_forked_child_lives(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        child = 0
        try:
            assert process.stdout is not None
            said = sorted(process.stdout.readline().split() for _ in range(2))
            assert [words[0] for words in said] == ["child", "parent"], said
            child = int(said[1][1])
            assert said[0] == ["child", "CacheError"]
            with pytest.raises(CacheLocked, match=f"process {process.pid}"):
                writer(tmp_path / "s")
            process.kill()
            process.wait()
            os.kill(child, 0)
            with writer(tmp_path / "s") as store:
                assert store.holds([1, 2]).tolist() == [True, False]
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def test_a_writer_that_is_forgotten_frees_the_lock(tmp_path: Path) -> None:
    store = writer(tmp_path / "s")
    del store
    writer(tmp_path / "s").close()


def test_a_writer_waiting_for_a_dropped_store_locks_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of the lock and its locking another process drops the store, lock and all."""
    write(tmp_path / "s")
    (tmp_path / "s" / "other").write_text("keeps the folder")
    dropped = []

    def meanwhile(name: str) -> None:
        if name == "lock opened" and not dropped:
            dropped.append(True)
            multiprocessing.get_context("fork").Process(target=drop, args=(tmp_path / "s",)).run()

    monkeypatch.setattr("fxfreeze.cache.files.point", meanwhile)
    with writer(tmp_path / "s"), pytest.raises(CacheLocked):
        writer(tmp_path / "s")
    assert open_store(tmp_path / "s").held == 0


def test_a_forked_writer_says_whose_it_is(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        child = os.fork()
        if not child:
            try:
                store.append([1], values(COLUMNS, [1]))
            except CacheError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        store.append([1], values(COLUMNS, [1]))
    assert_rows(open_store(tmp_path / "s"), [1])
