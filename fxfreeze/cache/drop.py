"""Removing a store: its own files, nothing else, and so that a kill in between leaves no half of it."""

import os
from contextlib import suppress
from pathlib import Path

from fxfreeze.cache import files
from fxfreeze.cache.errors import CacheError
from fxfreeze.cache.lock import LOCK, Lock
from fxfreeze.cache.manifest import MANIFEST, is_shard_name, shard_names

__all__ = ["drop", "finish", "finish_drop", "refuse_foreign", "remove_strays"]

_DROPPED = f"{MANIFEST}.dropped"  # what the manifest is called while its shards are removed


def drop(directory: str | Path) -> None:
    """Removes the store's files, and the folder if nothing else is in it. Does nothing where there is no store.

    CacheLocked while it is written; CacheError. Who has the store open goes on reading what was there.
    """
    folder = Path(directory).absolute()
    if not _is_store(folder):
        return
    with files.translated(folder, "dropping"):
        lock = Lock(folder)
        try:
            files.point("drop: locked")
            with suppress(FileNotFoundError):
                os.replace(folder / MANIFEST, folder / _DROPPED)
                files.point("drop: manifest set aside")
                files.sync_folder(folder)
                files.point("drop: folder synced")
            finish_drop(folder)
            remove_strays(folder, keep=set())
            lock.remove()
            files.point("drop: lock removed")
        finally:
            lock.release()
        with suppress(OSError):
            folder.rmdir()
        files.point("drop: done")


def finish(directory: Path) -> None:
    """Goes on with a drop that a kill broke off, if there was one. CacheError."""
    if os.path.lexists(directory / _DROPPED):
        drop(directory)


def _is_store(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (MANIFEST, _DROPPED, LOCK))


def finish_drop(folder: Path) -> None:
    """Goes on with a drop that a kill broke off, under the writer's lock. OSError."""
    if not os.path.lexists(folder / _DROPPED):
        return
    remove_strays(folder, keep=set())
    (folder / _DROPPED).unlink()
    files.point("drop: set-aside manifest removed")


def remove_strays(folder: Path, keep: set[str]) -> None:
    """Deletes shards that are not in `keep`, and all temporary files, under the writer's lock. OSError."""
    for name in os.listdir(folder):
        final = name.removesuffix(".tmp")
        if (name != final and (final == MANIFEST or is_shard_name(final))) or (
            is_shard_name(name) and name not in keep
        ):
            (folder / name).unlink()
            files.point("stray removed")


def refuse_foreign(folder: Path) -> None:
    """CacheError where there are shards but nothing else of a store: they are somebody's model, say."""
    found = shard_names(folder)
    if found and not _is_store(folder):
        raise CacheError(f"{folder} has {found[0]} and no manifest: it is no activation store; name another folder")
