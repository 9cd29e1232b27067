"""Tiles that were measured on this user's GPU: one JSON file by device and version of triton, in the user's cache folder.

A file that can't be read as such is ignored with a warning: the built-in table serves.
"""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

__all__ = ["Tile", "key", "load", "path", "save", "triton_version"]

Tile = dict[str, int]  # the fields of a Config


def key(kernel: str, dtype: str, most: int) -> str:
    """A shape class: of a kernel, a dtype, and at most so many output channels."""
    return f"{kernel} {dtype} {most}"


@cache
def triton_version() -> str:
    import triton  # not above: the tables are read where it is not installed, too

    return str(triton.__version__)


def path(device: str) -> Path:
    """Where the measurements of a device, by its name, lie."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"  # relative ones are to be ignored, says XDG
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} triton {triton_version()}")
    return base / "fxfreeze" / "kernels" / f"{plain}.json"


@cache
def load(device: str) -> Mapping[str, Tile]:
    """The best tile by shape class; empty where nothing was measured."""
    file = path(device)
    try:
        tiles = json.loads(file.read_bytes())["tiles"]
        return {str(name): {str(field): int(value) for field, value in tile.items()} for name, tile in tiles.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"{file} is ignored ({type(error).__name__}: {error}); `fxfreeze kernels tune` writes it anew", stacklevel=2
        )
        return {}


def save(device: str, tiles: Mapping[str, Tile]) -> Path:
    """Writes all at once, readable by the user alone; the file. OSError."""
    file = path(device)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"device": device, "triton": triton_version(), "tiles": dict(tiles)}, indent=1)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError:
        os.unlink(temporary)
        raise
    load.cache_clear()
    return file
