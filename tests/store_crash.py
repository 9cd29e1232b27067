"""Runs what writes a store, killed by SIGKILL at each named point in turn. Its own process, which forks.

usage: store_crash.py <scenario> <folder>: leaves <folder>/<k> for the k-th time that a point is passed, and prints as
JSON the list of [point, rows that were committed when it was passed].
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from store_samples import COLUMNS, values, write, writer

from fxfreeze.cache import drop, files, manifest


def fill(folder: Path) -> None:
    with writer(folder) as store:
        for start in (0, 5, 10):
            store.append(range(start, start + 5), values(COLUMNS, range(start, start + 5)))
            store.commit()
            store.append([start, 3], values(COLUMNS, [0, 1]))


def resume(folder: Path) -> None:
    with writer(folder) as store:
        store.append(range(20), values(COLUMNS, range(20)))


def left_by_a_kill(folder: Path) -> None:
    write(folder, samples=range(10))
    shutil.copy(folder / "00000.safetensors", folder / "00009.safetensors")
    for name in ("00010.safetensors.tmp", "manifest.json.tmp"):
        (folder / name).write_bytes(b"half of it")


SCENARIOS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "fill": (lambda folder: None, fill),
    "resume": (left_by_a_kill, resume),
    "drop": (left_by_a_kill, drop),
}


def committed(folder: Path) -> int:
    """-1 where there is no store."""
    path = folder / "manifest.json"
    return sum(shard.rows for shard in manifest.Manifest.decode(path.read_bytes()).shards) if path.exists() else -1


def main() -> None:
    prepare, run = SCENARIOS[sys.argv[1]]
    root = Path(sys.argv[2])
    passed: list[tuple[str, int]] = []
    files.point = lambda name: passed.append((name, committed(root / "all")))
    prepare(root / "all")
    passed.clear()
    run(root / "all")
    for k in range(len(passed)):
        files.point = lambda name: None
        prepare(root / str(k))
        child = os.fork()
        if not child:
            left = iter(range(k, -1, -1))
            files.point = lambda name: os.kill(os.getpid(), signal.SIGKILL) if not next(left) else None  # noqa: B023
            run(root / str(k))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (passed[k], status)
        assert os.WTERMSIG(status) == signal.SIGKILL, (passed[k], status)
    print(json.dumps(passed))


if __name__ == "__main__":
    main()
