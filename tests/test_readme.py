"""README's code runs as it is written, given what it speaks of."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import network
from torch.utils.data import DataLoader, TensorDataset

import fxfreeze
from fxfreeze.fidelity import BOUNDS, relative_error

TEXT = (Path(fxfreeze.__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_block_is_tried() -> None:
    assert len(BLOCKS) == 3


def test_the_training_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,)))
    given: dict[str, Any] = {"fxfreeze": fxfreeze, "torch": torch, "F": F, "epochs": 6}
    given |= {"net": network(), "loader": DataLoader(data, batch_size=8, shuffle=True)}
    exec(BLOCKS[0], given)
    assert given["model"].depth == len(given["model"].units) - 1  # all that ever freezes, at the last step


def test_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    exec(BLOCKS[1], {"fxfreeze": fxfreeze, "net": network(), "x": x, "y": y, "loader": loader})
    assert "predicted" in capsys.readouterr().out
    assert Path("profile.png").stat().st_size > 10_000


def test_a_kernel_from_one_slice_of_a_buffer_into_another() -> None:
    buffer = torch.randn(2, 96, 6, 6).to(memory_format=torch.channels_last)
    x, weight = buffer[:, :64].clone(), torch.randn(32, 64, 1, 1)
    scale, shift, bias = torch.rand(64), torch.rand(64), torch.rand(32)
    exec(BLOCKS[2], {"torch": torch, "buffer": buffer, "weight": weight, "scale": scale, "shift": shift, "bias": bias})
    normal = F.relu(x * scale[:, None, None] + shift[:, None, None])
    assert relative_error(buffer[:, 64:], F.relu(F.conv2d(normal, weight, bias))) <= BOUNDS[torch.float32]
    assert torch.equal(buffer[:, :64], x)
