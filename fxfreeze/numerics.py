"""What decides the last bits of what an operator computes, throughout a process: torch's version, its switches, the machine."""

from functools import partial
from typing import Any

import torch
from torch.backends import mha

__all__ = ["numerics", "switches"]

_precision: Any = torch._C._get_fp32_precision_getter
_EVERYWHERE = {
    "deterministic": torch._C._get_deterministic_algorithms,
    "fast attention": mha.get_fastpath_enabled,
    "fp32": partial(_precision, "generic", "all"),
}
_CPU = {
    "mkldnn": torch._C._get_mkldnn_enabled,
    "mkldnn deterministic": torch._C._get_mkldnn_deterministic,
    **{f"mkldnn {op}": partial(_precision, "mkldnn", op) for op in ("all", "matmul", "conv", "rnn")},
}
_CUDA = {
    "cudnn": torch._C._get_cudnn_enabled,
    "cudnn deterministic": torch._C._get_cudnn_deterministic,
    "cudnn benchmark": torch._C._get_cudnn_benchmark,
    **{f"cuda {op}": partial(_precision, "cuda", op) for op in ("all", "matmul", "conv", "rnn")},
    "fp16 sums": torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    "bf16 sums": torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
}
_BY_DEVICE: dict[str, dict[str, Any]] = {"cpu": _EVERYWHERE | _CPU, "cuda": _EVERYWHERE | _CUDA}


def switches(device: str) -> tuple[Any, ...]:
    """Those that count on a kind of device. The number of threads is none of them."""
    return tuple([read() for read in _BY_DEVICE.get(device, _EVERYWHERE).values()])


def numerics(device: str) -> str:
    """The whole of it as text."""
    machine = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    names = _BY_DEVICE.get(device, _EVERYWHERE)
    read = ", ".join(f"{name} {value}" for name, value in zip(names, switches(device), strict=True))
    return f"torch {torch.__version__} on {machine}: {read}"
