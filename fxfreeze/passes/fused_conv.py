"""Convolutions that add a residual and apply an activation before an output is written: by oneDNN, by cuDNN, by neither.

PyTorch's own ops, which TorchInductor and TorchScript fuse into (``torch/_inductor/fx_passes/mkldnn_fusion.py``,
``torch/csrc/jit/passes/frozen_conv_add_relu_fusion.cpp``). Images are (N, C, H, W); the last argument of each function
holds the convolution's steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfreeze.effects import declared
from fxfreeze.kernels.layouts import window_size
from fxfreeze.kernels.reference import ACTIVATIONS
from fxfreeze.sizes import dtype_text

__all__ = ["Steps", "cudnn_conv", "onednn_conv", "onednn_supports", "reordered", "unfused_conv"]


class Steps(NamedTuple):
    """What a convolution needs beside tensors."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@declared
def unfused_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, steps: Steps
) -> Tensor:
    """``activation(conv2d(x, weight) + bias + residual)``, one operator after the other."""
    return _finished(F.conv2d(x.to(weight.dtype), weight, bias, *steps), residual, activation)


def _finished(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(y + residual)`` of a convolution's output, broadcast as PyTorch does."""
    if residual is not None:
        y = y + residual
    return F.relu_(y) if activation == "relu" else ACTIVATIONS[activation](y)


# By the names of ``fxfreeze.kernels``: oneDNN's name, its scalars, and which variant.
_ONEDNN: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


def onednn_supports(dtype: torch.dtype) -> str | None:
    """Why oneDNN has no convolutions of ``dtype`` here, or None."""
    if not torch._C._has_mkldnn:
        return "this PyTorch is built without oneDNN"
    able: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in able or not able[dtype]():
        return f"oneDNN has no {dtype_text(dtype)} convolutions for this processor"
    return None


def reordered(weight: Tensor, steps: Steps, shape: torch.Size) -> Tensor:
    """``weight`` (K, C / groups, R, S) in the order that oneDNN likes best for images of ``shape``; it takes others too."""
    stride, padding, dilation, groups = steps
    reorder: Callable[..., Tensor] = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(weight, padding, stride, dilation, groups, list(shape))


@declared
def onednn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, steps: Steps
) -> Tensor:
    """The same by oneDNN, channels_last; weight: from ``reordered``."""
    stride, padding, dilation, groups = steps
    windows = (padding, stride, dilation, groups)
    x = _channels_last(x, weight.dtype)
    conv = torch.ops.mkldnn._convolution_pointwise
    y: Tensor
    if residual is None:
        y = conv(x, weight, bias, *windows, *_ONEDNN[activation])
        return y
    if residual.shape != _shape(x, weight, steps):  # which oneDNN's call does not look at
        return _finished(conv(x, weight, bias, *windows, *_ONEDNN["none"]), residual, activation)
    relu = "relu" if activation == "relu" else None  # the only one that it has after a sum
    residual = _channels_last(residual, weight.dtype)
    y = conv.binary(x, residual, weight, bias, *windows, "add", None, relu, [], None)
    return y if relu else ACTIVATIONS[activation](y)


_refused: set[tuple[object, ...]] = set()  # cases that cuDNN has no fused kernel for


@declared
def cudnn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, steps: Steps
) -> Tensor:
    """The same by cuDNN, channels_last, for a ReLU; by two operators where it says NOT_SUPPORTED."""
    x = _channels_last(x, weight.dtype)
    case = (x.shape, x.dtype, weight.shape, bias is None, residual is None, steps)
    broadcast = residual is not None and residual.shape != _shape(x, weight, steps)
    if activation == "relu" and case not in _refused and not broadcast:
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *steps)
            residual = _channels_last(residual, weight.dtype)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *steps)
        except RuntimeError as error:
            if "NOT_SUPPORTED" not in str(error):
                raise
            _refused.add(case)
    return unfused_conv(x, weight, bias, residual, activation, steps)


def _shape(x: Tensor, weight: Tensor, steps: Steps) -> tuple[int, ...]:
    """Of what a convolution makes."""
    return x.shape[0], weight.shape[0], *window_size(x, (weight.shape[2], weight.shape[3]), *steps[:3])


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
