"""What runs an op on a device: its Triton kernel, the same kernel in Triton's interpreter, or plain PyTorch."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxfreeze.kernels import configs

__all__ = ["engine", "run"]


def engine(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """What runs the ops there.

    "triton" on an NVIDIA GPU, "interpreter" on a CPU with ``TRITON_INTERPRET=1``, "reference" elsewhere, for fp64, and
    where triton is not installed.
    """
    kind = torch.device(device).type
    if dtype is torch.float64 or not _has_triton():
        return "reference"
    if kind == "cuda" and torch.version.hip is None:
        return "triton"
    return "interpreter" if kind == "cpu" and _interpreting() else "reference"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interpreting() -> bool:
    """Triton decides it once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(kernel: str, reference: Callable[..., Tensor], out: Tensor, *arguments: Any) -> None:
    """Compute an op into ``out``, by ``reference`` or by ``launch`` of the file ``gpu/<kernel>.py``: same arguments."""
    if not out.numel():
        return
    if engine(out.device, out.dtype) == "reference":
        with torch.autocast(out.device.type, enabled=False):  # which would multiply in another dtype
            out.copy_(reference(*arguments))
        return
    launch = importlib.import_module(f"fxfreeze.kernels.gpu.{kernel}").launch
    launch(*arguments, out, configs.choose(kernel, out))
