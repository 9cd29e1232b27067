"""``conv1x1``: a matrix product with scale, shift and activation before it, and bias, residual and activation after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fxfreeze.kernels import checks, reference
from fxfreeze.kernels.engine import run
from fxfreeze.kernels.layouts import image_like, pack

_ONE, _NONE = (1, 1), (0, 0)


def conv1x1(
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
    out: Tensor | None = None,
) -> Tensor:
    """``activation(conv2d(prologue(x * scale + shift), weight, bias, stride) + residual)``.

    x: (N, C, H, W); weight: (O, C, 1, 1) or (O, C), of x's dtype; bias: (O,); scale, shift: (C,), floating point;
    residual, out: (N, O, ceil(H / stride), ceil(W / stride)) of x's dtype; ``residual`` is broadcast; ``out`` is made
    channels_last when None, and may be ``residual``. prologue, activation: a name of ``fxfreeze.kernels.ACTIVATIONS``.

    Raises ValueError for a shape, stride or name, TypeError for a dtype or device, RuntimeError where an input requires
    a gradient.
    """
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    checks.inference("conv1x1", x, weight, bias, scale, shift, residual, out)
    stride = checks.pair("conv1x1", "stride", stride)
    if out is None:
        checks.images("conv1x1", 4, x=x)
        checks.weight("conv1x1", weight, x, (None, x.shape[1], None, None))
        out = image_like(x, weight.shape[0], *checks.size("conv1x1", x, _ONE, stride, _NONE, _ONE))
    torch.ops.fxfreeze.conv1x1.default(
        x,
        weight,
        bias,
        scale,
        shift,
        prologue or "none",
        checks.broadcast(residual, out),
        activation or "none",
        stride,
        out,
    )
    return out


@custom_op("fxfreeze::conv1x1", mutates_args=("out",))
def _conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    residual: Tensor | None,
    activation: str,
    stride: Sequence[int],
    out: Tensor,
) -> None:
    operands = x, weight, bias, scale, shift, prologue, residual, activation
    _check(*operands, stride, out)
    weight = weight if weight.stride(1) == 1 else pack(weight)
    run("conv1x1", reference.conv, out, x, weight, *operands[2:], stride, _NONE, _ONE)


@_conv1x1.register_fake
def _check(x: Tensor, weight: Tensor, *rest: Any) -> None:
    if weight.dim() == 4 and tuple(weight.shape[2:]) != _ONE:
        raise ValueError(f"conv1x1: weight has shape {tuple(weight.shape)}, expected (O, C, 1, 1); use conv3x3")
    *others, out = rest
    given: list[Any] = [x, weight, *others, _NONE, _ONE, out]
    checks.convolution("conv1x1", *given)
