"""``depthwise``: a convolution of each channel by itself, with bias and activation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fxfreeze.kernels import checks, reference
from fxfreeze.kernels.engine import run
from fxfreeze.kernels.layouts import image_like


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    out: Tensor | None = None,
) -> Tensor:
    """``activation(conv2d(x, weight, bias, stride, padding, dilation, groups=C))``.

    weight: (C, 1, R, S) for small R and S, of x's dtype, laid out by ``pack``; out: (N, C, ...). Everything else as for
    ``conv1x1``.
    """
    checks.inference("depthwise", x, weight, bias, out)
    windows = checks.windows("depthwise", stride, padding, dilation)
    if out is None:
        checks.images("depthwise", 4, x=x)
        checks.weight("depthwise", weight, x, (x.shape[1], 1, None, None))
        out = image_like(x, x.shape[1], *checks.size("depthwise", x, weight.shape[2:], *windows))
    torch.ops.fxfreeze.depthwise.default(x, weight, bias, activation or "none", *windows, out)
    return out


@custom_op("fxfreeze::depthwise", mutates_args=("out",))
def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Tensor,
) -> None:
    _check(x, weight, bias, activation, stride, padding, dilation, out)
    run("depthwise", reference.depthwise, out, x, weight, bias, activation, stride, padding, dilation)


@_depthwise.register_fake
def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Tensor,
) -> None:
    op = "depthwise"
    checks.images(op, 4, x=x, out=out)
    checks.weight(op, weight, x, (x.shape[1], 1, None, None))
    checks.vectors(op, x, bias=(bias, x.shape[1]))
    checks.activation(op, activation)
    windows = checks.windows(op, stride, padding, dilation)
    checks.output(
        op,
        out,
        (x.shape[0], x.shape[1], *checks.size(op, x, weight.shape[2:], *windows)),
        x=x,
        weight=weight,
        bias=bias,
    )
