"""A run on disk: either the whole of it or the one before, whenever the process dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxfreeze.imports import ChoiceError, one_line

FORMAT = 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it replaces `path` when the block ends, and goes if the block raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, *, run: dict[str, Any], about: dict[str, Any]) -> None:
    """run: the state of a Run; about: what it trains (network, data, settings), plain values by name."""
    with replacing(path) as temporary:
        torch.save({"fxfreeze": FORMAT, "about": about, "run": run}, temporary)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(run, about) as they were saved. Only tensors and plain values are read: a checkpoint can't run code."""
    if not path.is_file():
        raise ChoiceError(f"no checkpoint at {path}: --resume takes a file that --save wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ChoiceError(f"{path} can't be read: {one_line(error)}") from error
    except Exception as error:  # on bytes that are none of its own, the unpickler raises anything
        raise ChoiceError(f"{path} is not a whole checkpoint of `fxfreeze train`") from error
    if not isinstance(content, dict) or content.get("fxfreeze") != FORMAT or not {"run", "about"} <= content.keys():
        raise ChoiceError(f"{path} is not a checkpoint of `fxfreeze train` in format {FORMAT}")
    return content["run"], content["about"]
