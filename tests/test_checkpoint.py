"""A checkpoint is whole or the one before, and what is none is refused."""

from pathlib import Path

import pytest
import torch
from tiny import Tiny

from fxfreeze import checkpoint
from fxfreeze.imports import ChoiceError


def test_a_checkpoint_outlives_a_failed_save(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoint.save(path, run={"step": 1}, about={})
    with pytest.raises(AttributeError):  # a local function can't be pickled
        checkpoint.save(path, run={"step": lambda: 2}, about={})
    assert checkpoint.load(path)[0] == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"hello world\n", b"\x89PNG\r\n", b"plain step 1\n" * 9, None]
)
def test_what_is_not_a_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    if content is None:
        torch.save({"weights": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ChoiceError, match=r"file\.pt"):
        checkpoint.load(path)


def test_a_file_that_only_begins_like_one_is_refused(tmp_path: Path) -> None:
    torch.save({"fxfreeze": checkpoint.FORMAT}, tmp_path / "file.pt")
    with pytest.raises(ChoiceError, match=r"file\.pt is not a checkpoint"):
        checkpoint.load(tmp_path / "file.pt")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"fxfreeze": 1, "about": {}, "run": Tiny()}, tmp_path / "code.pt")
    with pytest.raises(ChoiceError, match="is not a whole checkpoint of"):
        checkpoint.load(tmp_path / "code.pt")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChoiceError, match=r"no checkpoint at .*absent"):
        checkpoint.load(tmp_path / "absent")
