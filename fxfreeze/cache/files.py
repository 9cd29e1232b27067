"""Files that are whole or absent, and are nobody else's."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fxfreeze.cache.errors import CacheError, CacheFull, CorruptCache

__all__ = ["FULL", "make_folder", "open_regular", "place", "point", "read_capped", "stage", "sync_folder", "translated"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def point(name: str) -> None:
    """A named point of the write path. Does nothing: crash tests put a kill in its place."""


@contextmanager
def translated(folder: Path, doing: str) -> Iterator[None]:
    """OSError as CacheFull where space or a size limit ran out, as CacheError otherwise."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CacheFull(f"no space left {doing} {folder} ({error}); free some, or cache elsewhere") from error
        raise CacheError(f"{doing} {folder} failed ({error}); is the folder writable?") from error


def make_folder(folder: Path) -> None:
    """`folder` and its parents, where absent, for this user alone: activations give away the data set."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir(0o700)
    if not folder.is_dir():
        raise CacheError(f"{folder} is not a folder")
    point("folder made")


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor to read a regular file, never through a link, and the file's size. CorruptCache, OSError."""
    try:
        # Not to wait: a pipe in place of the file would have nobody at its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise CorruptCache(f"{path} is not a regular file") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CorruptCache(f"{path} is not a regular file")
    return descriptor, status.st_size


def read_capped(path: Path, most: int) -> bytes:
    """CorruptCache if the file has more than `most` bytes, OSError if it can't be opened."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > most:
            raise CorruptCache(f"{path} has {size} bytes; at most {most} are expected")
        return file.read(most + 1)


def stage(folder: Path, name: str, data: Sequence[bytes | memoryview], kind: str) -> None:
    """Writes `data`, piece after piece, to the temporary file of `name` and to the disk. OSError, with nothing left.

    Space is reserved first, so that a full disk is known before anything is written. The calls are plain writes: a
    mapping's would die by SIGBUS.
    """
    path = folder / f"{name}.tmp"
    with suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        point(f"{kind}: opened")
        _reserve(descriptor, sum(map(len, data)))
        point(f"{kind}: space reserved")
        for piece in data:
            _write(descriptor, memoryview(piece))
            point(f"{kind}: piece written")
        os.fsync(descriptor)
        point(f"{kind}: synced")
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def place(folder: Path, name: str, kind: str) -> None:
    """Moves the staged file to its name: after this it is there, whole, whatever happens. OSError."""
    os.replace(folder / f"{name}.tmp", folder / name)
    point(f"{kind}: in place")
    sync_folder(folder)
    point(f"{kind}: folder synced")


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
