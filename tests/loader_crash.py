"""Trainings that fill a cache, in processes of their own, which fork.

usage: loader_crash.py kill <folder>: a training killed by SIGKILL at each named point of the write path in turn, and gone
on with from its last checkpoint on what the kill left. Prints as JSON a list of dicts: name of the point, depths of
the stores that were there then, and of the run that went on: different, wrong (rows), given.
loader_crash.py pair <folder>: two trainings at once on one directory, then a third.
loader_crash.py full <folder> {<bytes> <epochs>}: trainings that from then on may write no file larger than that.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from loader_runs import Training, difference, folders, shards_of, wrong_rows

from fxfreeze.cache import files

EPOCHS = 4
MILESTONES = {"stem": 0, "mid": 12}  # six batches an epoch: both are filled for one and read for one


def save(training: Training, path: Path) -> None:
    torch.save(training.state(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(root: Path) -> Training:
    """With a checkpoint after each epoch; goes on from the last one."""
    training = Training(root / "cache", milestones=MILESTONES)
    root.mkdir(parents=True, exist_ok=True)
    if (root / "saved.pt").exists():
        training.load(torch.load(root / "saved.pt"))
    while training.done < EPOCHS:
        training.epochs(1)
        save(training, root / "saved.pt")
    return training


def stored(root: Path) -> list[int]:
    return [int(name[:3]) for name in folders(root / "cache")] if (root / "cache").exists() else []


def wrong(root: Path, training: Training) -> list[tuple[str, int]]:
    stores = [path.parent for path in root.glob("cache/*/manifest.json")]
    return [(store.name, row) for store in stores for row in wrong_rows(store, training.net, training.data)]


def kill(root: Path) -> list[dict[str, Any]]:
    shards_of(16)
    straight = Training(None, milestones=MILESTONES).epochs(EPOCHS)
    passed: list[tuple[str, list[int]]] = []
    files.point = lambda name: passed.append((name, stored(root / "all")))
    train(root / "all")
    files.point = lambda name: None
    reports = []
    for k, (name, depths) in enumerate(passed):
        if (name, depths) in passed[:k] or (depths == [1] and k % 3):
            continue
        if not (child := os.fork()):
            left = iter(range(k, -1, -1))
            files.point = lambda name: os.kill(os.getpid(), signal.SIGKILL) if not next(left) else None  # noqa: B023
            train(root / str(k))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (name, status)
        assert os.WTERMSIG(status) == signal.SIGKILL, (name, status)
        training = train(root / str(k))
        report = {"name": name, "depths": depths, "different": difference(training, straight)}
        reports.append(report | {"wrong": wrong(root / str(k), training), "given": training.given})
    return reports


def pair(root: Path) -> list[dict[str, Any]]:
    """What each of three runs read of the data set by epochs, two of them at once."""
    straight = Training(None).epochs(3)
    pipes = [os.pipe() for _ in range(2)]
    for at, (_, write) in enumerate(pipes):
        if not os.fork():
            (root / f"ready{at}").touch()
            while not (root / f"ready{1 - at}").exists():
                time.sleep(0.001)
            os.write(write, json.dumps(_read(root, straight)).encode())
            os._exit(0)
    statuses = [os.wait()[1] for _ in pipes]
    assert statuses == [0, 0]
    reports = [json.loads(os.read(read, 2**16)) for read, _ in pipes]
    return [*reports, _read(root, straight)]


def _read(root: Path, straight: Training) -> dict[str, Any]:
    training = Training(root / "cache")
    training.data.taken()
    reads = []
    for _ in range(3):
        training.epochs(1, before=lambda _: time.sleep(0.005))
        reads.append(len(training.data.taken()))
    report = {"different": difference(training, straight), "reads": reads, "given": training.given}
    return report | {"wrong": wrong(root, training), "notes": training.notes}


def full(root: Path, *limits: int) -> list[dict[str, Any]]:
    straight = Training(None, milestones=MILESTONES).epochs(EPOCHS)
    shards_of(16)
    reports = []
    for limit, after in zip(limits[::2], limits[1::2], strict=True):
        cache = root / f"{limit}-{after}"
        training = Training(cache / "cache", milestones=MILESTONES).epochs(after)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        training.epochs(EPOCHS - after)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = [path.name for path in cache.rglob("*.tmp")]
        report = {"different": difference(training, straight), "given": training.given, "left": left}
        reports.append(report | {"wrong": wrong(cache, training), "notes": training.notes})
    return reports


def main() -> None:
    root = Path(sys.argv[2])
    what = {"kill": kill, "pair": pair, "full": full}[sys.argv[1]]
    print(json.dumps(what(root, *map(int, sys.argv[3:]))))


if __name__ == "__main__":
    main()
