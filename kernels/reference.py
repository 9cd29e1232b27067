"""Every op in plain PyTorch: the specification, and what runs where Triton can't.

Computed in fp32, or in fp64 for fp64 inputs, and rounded once, to the dtype of x. Shapes as in ``fxfreeze.kernels``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    residual: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``activation(conv2d(prologue(x * scale + shift), weight) + bias + residual)``, zero padding after the prologue."""
    wide = _affine(x, scale, shift, prologue)
    y = F.conv2d(wide, weight.to(wide.dtype), _to(bias, wide), tuple(stride), tuple(padding), tuple(dilation))
    if residual is not None:
        y = y + residual.to(y.dtype)
    return ACTIVATIONS[activation](y).to(x.dtype)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``activation(conv2d(x, weight, groups=C) + bias)``."""
    wide = _wide(x)
    window = tuple(stride), tuple(padding), tuple(dilation)
    y = F.conv2d(wide, weight.to(wide.dtype), _to(bias, wide), *window, groups=x.shape[1])
    return ACTIVATIONS[activation](y).to(x.dtype)


def pointwise(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    pool: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
) -> Tensor:
    """``pool(activation(x * scale + shift))``."""
    y = _affine(x, scale, shift, activation)
    if pool == "global":
        y = y.mean((2, 3), keepdim=True)
    elif pool == "avg":
        y = F.avg_pool2d(y, tuple(kernel), tuple(stride), tuple(padding), count_include_pad=count_include_pad)
    elif pool == "max":
        y = F.max_pool2d(y, tuple(kernel), tuple(stride), tuple(padding))
    return y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x @ weight.T + bias)``."""
    wide = _wide(x)
    return ACTIVATIONS[activation](F.linear(wide, weight.to(wide.dtype), _to(bias, wide))).to(x.dtype)


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, biased variance."""
    wide = _wide(x)
    return F.layer_norm(wide, (x.shape[-1],), _to(weight, wide), _to(bias, wide), eps).to(x.dtype)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    wide = _wide(x)
    if scale is not None:
        wide = wide * scale.to(wide.dtype)[:, None, None]
    if shift is not None:
        wide = wide + shift.to(wide.dtype)[:, None, None]
    return ACTIVATIONS[activation](wide)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _to(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like.dtype)
