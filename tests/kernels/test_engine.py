"""What runs the ops where: the reference on CPU, for fp64 and without triton; and what importing them brings in."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from samples import NAMES, in_fp64, sample, without_out
from torch import Tensor

from fxfreeze.kernels import engine, reference

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_each = pytest.mark.parametrize("name", NAMES)


def _python(source: str, **environment: str) -> str:
    """What a fresh interpreter prints, without ``TRITON_INTERPRET`` unless given."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the reference's functions, as they are called."""
    called: list[str] = []
    for name in ("conv", "depthwise", "pointwise", "linear", "layernorm"):
        monkeypatch.setattr(reference, name, _noted(name, getattr(reference, name), called))
    return called


def _noted(name: str, function: Callable[..., Tensor], called: list[str]) -> Callable[..., Tensor]:
    def noted(*arguments: object) -> Tensor:
        called.append(name)
        return function(*arguments)

    return noted


@_each
def test_fp64_runs_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = _counting(monkeypatch)
    assert engine("cpu", torch.float64) == engine("cuda", torch.float64) == "reference"
    y = without_out(in_fp64(sample(name)))()
    assert y.dtype is torch.float64
    assert len(called) == 1
    narrow = without_out(sample(name))()
    assert (narrow - y).norm() <= 1e-5 * y.norm()


@pytest.mark.skipif(_INTERPRETING, reason="TRITON_INTERPRET=1 runs the kernels")
@_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cpu_runs_the_reference(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called = _counting(monkeypatch)
    assert engine("cpu", dtype) == engine(torch.device("cpu"), dtype) == "reference"
    call = sample(name, dtype=dtype)
    assert call().dtype is dtype
    assert len(called) == 1


@pytest.mark.skipif(not _INTERPRETING, reason="run by `make test`, with TRITON_INTERPRET=1")
@_each
def test_an_interpreting_cpu_does_not_run_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = _counting(monkeypatch)
    assert engine("cpu") == engine("cpu", torch.bfloat16) == "interpreter"
    sample(name)()
    assert not called


def test_other_devices_run_the_reference() -> None:
    assert engine("meta") == "reference"
    assert engine("xpu", torch.float16) == "reference"


def test_importing_brings_no_kernel() -> None:
    """Nor triton, but that PyTorch may bring it of its own accord."""
    source = "import sys, fxfreeze.kernels; print([m for m in sys.modules if m.startswith('fxfreeze.kernels.gpu')])"
    assert _python(source) == "[]"


def test_without_triton_the_reference_runs() -> None:
    """Even where the interpreter is asked for."""
    source = """
import sys
sys.modules["triton"] = None  # to Python, a module that isn't there
import torch
from fxfreeze.kernels import conv1x1, engine
x = torch.ones(1, 4, 2, 2).to(memory_format=torch.channels_last)
print(engine("cpu"), engine("cuda"), conv1x1(x, torch.ones(3, 4)).sum().item())
"""
    assert _python(source, TRITON_INTERPRET="1") == "reference reference 48.0"
