"""What a CachedLoader is given, checked before anything is made of it: a wrong argument must not wait for a first freeze."""

import errno
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fxfreeze.cache.columns import DTYPES
from fxfreeze.cache.files import FULL
from fxfreeze.cache.manifest import MANIFEST
from fxfreeze.model import PRECISIONS

__all__ = ["as_bytes", "as_directory", "as_dtype", "check_choice", "check_model"]


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(repr, known))}")


def check_model(model: object) -> None:
    if not hasattr(model, "_forward") or not hasattr(model, "units"):
        raise TypeError(
            f"CachedLoader needs a FreezableModel, and got a {type(model).__name__}: pass what fxfreeze.compile(net, schedule) "
            "returned"
        )
    if getattr(model, "precision", None) is torch.int8:
        raise ValueError(
            "the model's precision is int8, whose rounding depends on the batch that each run is calibrated on, so what it "
            "computes is of use to no other run and is not stored: compile with another precision, or train without a "
            "CachedLoader"
        )


def as_bytes(value: object) -> int | None:
    """max_bytes: None, or a whole number, also written as 2e9. ValueError."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if value is not None and (isinstance(value, bool) or not whole or value < 0):  # type: ignore[operator]
        raise ValueError(
            f"max_bytes is {value!r}: expected None or a number of bytes from 0, such as 2 * 10**9 for 2 GB"
        )
    return None if value is None else int(value)  # type: ignore[call-overload]


def as_dtype(value: object) -> torch.dtype | None:
    """store_dtype: None, a floating point type, or its name as compile's precision has it. ValueError."""
    dtype = PRECISIONS.get(value) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype in DTYPES):
        raise ValueError(
            f"store_dtype is {value!r}: expected None, {', '.join(map(repr, PRECISIONS))}, or a floating point dtype such as "
            "torch.bfloat16"
        )
    return dtype  # type: ignore[return-value]


def as_directory(value: object) -> Path:
    """directory: one that can be written, or made. One that can only be read must have stores in it. ValueError.

    A full disk is none of its faults: it may have room again when there is something to store.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"directory is {value!r}: expected the path of a folder for the stores, such as 'cache/'")
    if not os.fspath(value):
        raise ValueError(f"directory is {value!r}, which names no folder: give the path of one, such as 'cache/'")
    directory = Path(os.fsdecode(value))
    try:
        _try(directory)
    except OSError as error:
        if error.errno not in FULL:
            raise ValueError(
                f"directory {str(directory)!r} can't hold a cache ({error.strerror or error}): name a folder that can be "
                "written, or that can be made"
            ) from error
    return directory


def _try(directory: Path) -> None:
    """Leaves nothing behind. OSError."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
    with suppress(FileNotFoundError):
        os.stat(directory)  # a name that no file can have is as good as absent to whoever only asks for it
    try:
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=nearest):
            pass
    except OSError:
        if nearest != directory or not any(directory.glob(f"*/{MANIFEST}")):
            raise
