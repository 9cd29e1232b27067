"""Typical operands for each kernel, as its launcher takes them: what tiles are measured on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fxfreeze.kernels.layouts import image_like, pack
from fxfreeze.kernels.traffic import SHAPES

__all__ = ["multiplying", "problem"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
_ONE, _NONE = (1, 1), (0, 0)


@contextmanager
def multiplying(dtype: str) -> Iterator[None]:
    """fp32 operands as "tf32" or exactly as "fp32"; other dtypes do not care."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def problem(kernel: str, dtype: str, outputs: int, device: torch.device) -> tuple[Any, ...]:
    """The arguments of ``gpu/<kernel>.py``'s ``launch`` but for the configuration, ``out`` last; random values."""
    shape = SHAPES[kernel]
    like: dict[str, Any] = {"dtype": _DTYPES[dtype], "device": device}
    channels = shape.inputs if shape.inputs > 1 else outputs  # one input channel to an output
    if kernel in ("linear", "layernorm"):
        x = torch.randn(shape.pixels, channels, **like)
        out = torch.empty(shape.pixels, outputs, **like)
        scale, shift = (torch.randn(outputs, device=device) for _ in range(2))
        if kernel == "layernorm":
            return x, scale, shift, 1e-5, out
        return x, torch.randn(outputs, channels, **like), shift, "gelu", out
    x = torch.randn(shape.images, channels, shape.h, shape.w, **like).contiguous(memory_format=torch.channels_last)
    return _of_images(kernel, x, outputs)


def _of_images(kernel: str, x: Tensor, outputs: int) -> tuple[Any, ...]:
    out = image_like(x, outputs, *x.shape[2:])
    scale, shift = (torch.randn(x.shape[1], device=x.device) for _ in range(2))
    bias = torch.randn(outputs, device=x.device)
    if kernel == "pointwise":
        return x, scale, shift, "relu", "none", _ONE, _ONE, _NONE, True, out
    side, padding = (1, _NONE) if kernel == "conv1x1" else (3, _ONE)
    if kernel == "depthwise":
        return x, pack(x.new_empty(outputs, 1, side, side).normal_()), bias, "relu6", _ONE, padding, _ONE, out
    weight = pack(x.new_empty(outputs, x.shape[1], side, side).normal_())
    return x, weight, bias, scale, shift, "relu", None, "relu", _ONE, padding, _ONE, out
