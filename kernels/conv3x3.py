"""``conv3x3``: a convolution of any small kernel, with what ``conv1x1`` has before and after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fxfreeze.kernels import checks, reference
from fxfreeze.kernels.engine import run
from fxfreeze.kernels.layouts import image_like, pack

ROLLING_OUTPUTS = 32  # the most output channels of the rolling form

_ONE = (1, 1)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    prologue: str | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    out: Tensor | None = None,
) -> Tensor:
    """``activation(conv2d(prologue(x * scale + shift), weight, bias, stride, padding, dilation) + residual)``.

    weight: (O, C, R, S) for small R and S, of x's dtype, laid out by ``pack``. The padding is zero after the prologue.
    A 3x3 with at most 32 output channels whose stride, padding and dilation are 1 runs in a rolling form that reads x a
    third as often. Everything else as for ``conv1x1``.
    """
    checks.inference("conv3x3", x, weight, bias, scale, shift, residual, out)
    windows = checks.windows("conv3x3", stride, padding, dilation)
    if out is None:
        checks.images("conv3x3", 4, x=x)
        checks.weight("conv3x3", weight, x, (None, x.shape[1], None, None))
        out = image_like(x, weight.shape[0], *checks.size("conv3x3", x, weight.shape[2:], *windows))
    torch.ops.fxfreeze.conv3x3.default(
        x,
        weight,
        bias,
        scale,
        shift,
        prologue or "none",
        checks.broadcast(residual, out),
        activation or "none",
        *windows,
        out,
    )
    return out


@custom_op("fxfreeze::conv3x3", mutates_args=("out",))
def _conv3x3(
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
    out: Tensor,
) -> None:
    operands = x, weight, bias, scale, shift, prologue, residual, activation
    windows = stride, padding, dilation
    _check(*operands, *windows, out)
    kernel = "rolling3x3" if _rolls(weight, *windows) else "conv3x3"
    weight = weight if weight.stride(1) == 1 else pack(weight)
    run(kernel, reference.conv, out, x, weight, *operands[2:], *windows)


@_conv3x3.register_fake
def _check(*operands: Any) -> None:
    checks.convolution("conv3x3", *operands)


def _rolls(weight: Tensor, *windows: Sequence[int]) -> bool:
    """Whether the rolling form computes it."""
    return (
        weight.shape[0] <= ROLLING_OUTPUTS
        and tuple(weight.shape[2:]) == (3, 3)
        and all(tuple(w) == _ONE for w in windows)
    )
