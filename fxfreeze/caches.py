"""`fxfreeze cache`: what a cache directory holds, whether it is sound, and its removal."""

import errno
import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxfreeze.cache import Blob, CacheError, MissingCache, drop, verify
from fxfreeze.cache.files import translated
from fxfreeze.cache.lock import LOCK
from fxfreeze.cache.manifest import MANIFEST, Manifest, is_shard_name
from fxfreeze.cache.shard import same_file
from fxfreeze.cache.store import read_manifest
from fxfreeze.commands import refusing, wide_console
from fxfreeze.imports import ChoiceError
from fxfreeze.sizes import bytes_text

__all__ = ["find", "run_list", "run_remove", "run_verify"]

WRONG = 1  # the exit status of a command that did what it could
NONE = "-"
COLUMNS = ("store", "network", "depth", "up to", "data", "rows", "size", "dtype", "last used", "state")
NUMBERS = ("depth", "rows", "size")


@dataclass(frozen=True)
class Found:
    """A store as it stands. size: bytes of its files; manifest: None if it can't be read; problem: what is wrong."""

    folder: Path
    size: int
    written: bool
    manifest: Manifest | None
    problem: str | None

    @property
    def state(self) -> str:
        if self.problem:
            return "damaged, being written" if self.written else "damaged"
        if self.written:
            return "being written"
        assert self.manifest is not None
        return "complete" if _held(self.manifest) == self.manifest.length else "partial"


def run_list(directory: Path) -> int:
    """Prints a table of the stores, and below it what is wrong with any; the exit status."""
    console = wide_console()
    found = [_look(folder) for folder in _stores(directory)]
    if not found:
        _say(console, f"{directory} has no stores.")
        return 0
    console.print(_table(found))
    for store in found:
        if store.problem:
            _say(console, f"{store.folder.name}: {store.problem}")
    count = "1 store" if len(found) == 1 else f"{len(found)} stores"
    _say(console, f"{count}, {bytes_text(sum(store.size for store in found))}.")
    return 0


def run_verify(directory: Path, names: Sequence[str]) -> int:
    """Reads every byte of the stores (without names, of all) and says a line for each; the exit status."""
    found = _stores(directory)
    if not found:
        raise ChoiceError(f"{directory} has no stores; there is nothing to verify")
    console, status = wide_console(), 0
    for folder in _choose(found, names, directory) if names else found:
        began = time.perf_counter()
        manifest, problem = _read(folder)
        seconds = time.perf_counter() - began
        if problem is not None or manifest is None:
            status = WRONG
            _say(console, f"{folder.name}: {problem}")
        else:
            size = sum(shard.size for shard in manifest.shards)
            rows = f"{_held(manifest):,} of {manifest.length:,} rows"
            _say(console, f"{folder.name}: ok, {rows}, {bytes_text(size)} at {size / seconds / 1e6:,.0f} MB/s")
    return status


def run_remove(directory: Path, names: Sequence[str], everything: bool) -> int:
    """Removes the named stores, or all, except those that are being written; the exit status."""
    if names and everything:
        raise ChoiceError(f"names ({', '.join(names)}) and --all were given; give one of the two")
    found = _stores(directory)
    if not names and not everything:
        raise ChoiceError(f"name the stores of {directory} that shall go, or give --all; it has {_listing(found)}")
    console, aside = wide_console(), Console(stderr=True)
    if everything and not found:
        _say(console, f"{directory} has no stores.")
        return 0
    freed, status = 0, 0
    for folder in found if everything else _choose(found, names, directory):
        before = _bytes(folder)
        try:
            drop(folder)
            stays = "; its folder stays, for the other files in it" if _names(folder) else ""
            _say(console, f"{folder.name}: removed{stays}")
        except CacheError as error:
            status = WRONG
            _say(aside, f"{folder.name}: not removed: {error}")
        freed += before - _bytes(folder)
    _say(console, f"Freed {bytes_text(freed)} ({freed:,} bytes).")
    return status


def _stores(directory: Path) -> list[Path]:
    """As `find`. ChoiceError where there is no such folder too."""
    found = find(directory)
    if not found and not directory.exists():
        raise ChoiceError(f"there is no folder {directory}; name the directory that the CachedLoader was given")
    return found


def find(directory: Path) -> list[Path]:
    """The store folders in a directory, or itself if it is one; none if it is absent. ChoiceError if it can't be read."""
    with refusing(f"{directory} can't be read"):
        directory = Path(os.path.abspath(directory))
        if not directory.exists():
            return []
        if _is_store(directory, os.listdir(directory)):
            return [directory]
        return sorted(path for path in directory.iterdir() if _is_store(path, _names(path)))


def _is_store(folder: Path, names: Sequence[str]) -> bool:
    # Web pages, extensions and models have files of such names too, but one of the three at a time.
    signs = (
        any(name.startswith(MANIFEST) for name in names),
        any(name == LOCK for name in names),
        any(is_shard_name(name) for name in names),
    )
    if sum(signs) > 1:
        return True
    with suppress(CacheError):
        return MANIFEST in names and bool(read_manifest(folder))
    return False


def _names(folder: Path) -> list[str]:
    """The files in a folder; none if it is a file, is gone, or is closed to this user."""
    with suppress(NotADirectoryError, FileNotFoundError, PermissionError):
        return os.listdir(folder)
    return []


def _choose(found: Sequence[Path], names: Sequence[str], directory: Path) -> list[Path]:
    """The stores that the names, or unique beginnings of names, mean. ChoiceError if one means none, or several."""
    chosen: dict[Path, None] = {}
    for name in names:
        matches = [folder for folder in found if folder.name == name]
        # An empty name is a shell variable that was not set, and the beginning of every name.
        matches = matches or [folder for folder in found if name and folder.name.startswith(name)]
        if len(matches) != 1:
            means = f"{len(matches)} stores" if matches else "no store"
            no_folder = "" if matches or os.path.exists(name) else "; nor is there such a folder"
            raise ChoiceError(f"{name!r} means {means} of {directory}, which has {_listing(found)}{no_folder}")
        chosen[matches[0]] = None
    return list(chosen)


def _look(folder: Path) -> Found:
    """Reads the manifest, and no shard."""
    manifest = problem = None
    written = False
    try:
        with translated(folder, "reading"):
            written = _being_written(folder)
            manifest = read_manifest(folder)
            for entry in manifest.shards:
                same_file(folder, entry)
    except CacheError as error:
        problem = _problem(error)
    return Found(folder, _bytes(folder), written, manifest, problem)


def _read(folder: Path) -> tuple[Manifest | None, str | None]:
    """Reads all; the manifest, and what is wrong, on one line."""
    try:
        manifest = read_manifest(folder)
        return manifest, "; ".join(verify(folder)) or None
    except CacheError as error:
        return None, _problem(error)


def _problem(error: CacheError) -> str:
    if isinstance(error, MissingCache):
        return "it has no manifest: its making or removal was broken off, or is under way"
    return str(error)


def _being_written(folder: Path) -> bool:
    """Whether a writer has the lock. OSError."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look do not see each other, and for microseconds: a writer that begins in just these
        # is refused. Linux's list of locks would disturb nobody, but does not show those of other containers.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return True
        raise
    finally:
        os.close(descriptor)
    return False


def _bytes(folder: Path) -> int:
    """Of the store's own files."""
    size = 0
    for name in _names(folder):
        if name == LOCK or name.startswith(MANIFEST) or is_shard_name(name.removesuffix(".tmp")):
            with suppress(FileNotFoundError):
                size += os.lstat(folder / name).st_size
    return size


def _held(manifest: Manifest) -> int:
    return sum(shard.rows for shard in manifest.shards)


def _table(found: Sequence[Found]) -> Table:
    table = Table(header_style="bold")
    for column in COLUMNS:
        side: Literal["left", "right"] = "right" if column in NUMBERS else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column == "store")
    for store in found:
        table.add_row(*(Text(_printable(cell)) for cell in _cells(store)))
    return table


def _cells(store: Found) -> list[str]:
    manifest, used = store.manifest, NONE
    with suppress(OSError):
        used = f"{datetime.fromtimestamp((store.folder / MANIFEST).lstat().st_mtime):%Y-%m-%d %H:%M}"
    if manifest is None:
        described, rows, dtypes = [NONE] * 4, NONE, NONE
    else:
        described = [str(manifest.identity.get(field, NONE)) for field in ("network", "depth", "unit", "data")]
        rows = f"{_held(manifest):,} of {manifest.length:,}"
        dtypes = ", ".join(
            dict.fromkeys(
                "bytes" if isinstance(c, Blob) else str(c.dtype).removeprefix("torch.") for c in manifest.columns
            )
        )
    return [store.folder.name, *described, rows, bytes_text(store.size), dtypes, used, store.state]


def _listing(found: Sequence[Path]) -> str:
    return ", ".join(folder.name for folder in found) or "none"


def _say(console: Console, line: str) -> None:
    console.print(_printable(line), markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """On one line, and free of what would steer the terminal: names and manifests may come from anywhere."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
