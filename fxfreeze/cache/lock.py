"""One writer at a time, by a lock that dies with its process."""

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from fxfreeze.cache import files
from fxfreeze.cache.errors import CacheLocked

__all__ = ["LOCK", "Lock"]

LOCK = "lock"


class Lock:
    """The writer's lock on a folder. CacheLocked if another has it, OSError if there can be none."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor = _take(self._path)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        _held.add(self)
        with suppress(OSError):  # for the message of whoever is refused; a full disk has no room for it
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, b"%d\n" % os.getpid())
        files.point("lock taken")

    @property
    def held(self) -> bool:
        """False after `release`, and in a forked child."""
        return self._close.alive

    def release(self) -> None:
        self._close()

    def remove(self) -> None:
        """Deletes the lock's file and releases: whoever waits for it finds that the file is another."""
        self._path.unlink()
        self.release()


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _release_in_child() -> None:
    # A lock belongs to the open file, which a fork shares: workers that outlive a killed writer would go on holding it.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            files.point("lock opened")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed, with its store, between the opening and the locking.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
        except BlockingIOError as error:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CacheLocked(
                f"{path.parent} is being written by process {owner}; wait for it to end, stop it, or name another folder"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
