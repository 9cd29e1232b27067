"""``pointwise``: scale, shift and activation of each channel, and the pooling after it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fxfreeze.kernels import checks, reference
from fxfreeze.kernels.engine import run
from fxfreeze.kernels.layouts import image_like

POOLS = ("none", "avg", "max", "global")


def pointwise(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    pool: str | None = None,
    kernel: int | Sequence[int] = 1,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    count_include_pad: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """``pool(activation(x * scale + shift))``.

    scale, shift: (C,); pool: "avg" or "max" over windows of ``kernel`` as ``avg_pool2d`` and ``max_pool2d`` of
    ``torch.nn.functional`` do without ``ceil_mode`` (``stride`` None: that of the kernel), "global", the mean of each
    image and out (N, C, 1, 1), or None. Everything else as for ``conv1x1``.
    """
    op = "pointwise"
    checks.inference(op, x, scale, shift, out)
    window = checks.pair(op, "kernel", kernel)
    steps = checks.pair(op, "stride", window if stride is None else stride)
    padding = checks.pair(op, "padding", padding, least=0)
    if out is None:
        checks.images(op, 4, x=x)
        out = image_like(x, x.shape[1], *_size(x, pool or "none", window, steps, padding))
    torch.ops.fxfreeze.pointwise.default(
        x, scale, shift, activation or "none", pool or "none", window, steps, padding, count_include_pad, out
    )
    return out


@custom_op("fxfreeze::pointwise", mutates_args=("out",))
def _pointwise(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    pool: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    out: Tensor,
) -> None:
    operands = x, scale, shift, activation, pool, kernel, stride, padding, count_include_pad
    _check(*operands, out)
    run("pointwise", reference.pointwise, out, *operands)


@_pointwise.register_fake
def _check(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    pool: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    out: Tensor,
) -> None:
    op = "pointwise"
    checks.images(op, 4, x=x, out=out)
    checks.vectors(op, x, scale=(scale, x.shape[1]), shift=(shift, x.shape[1]))
    checks.activation(op, activation)
    if pool not in POOLS:
        raise ValueError(f"{op}: no pooling {pool!r}; expected None or one of {', '.join(POOLS[1:])}")
    if pool in ("none", "global") and (*kernel, *stride, *padding) != (1, 1, 1, 1, 0, 0):
        raise ValueError(f"{op}: a kernel, stride or padding is for pool='avg' or 'max', not for pool={pool!r}")
    if pool in ("avg", "max") and any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"{op}: padding {tuple(padding)} is more than half of the kernel {tuple(kernel)}")
    checks.output(op, out, (*x.shape[:2], *_size(x, pool, kernel, stride, padding)), x=x, scale=scale, shift=shift)


def _size(
    x: Tensor, pool: str, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    return (1, 1) if pool == "global" else checks.size("pointwise", x, kernel, stride, padding, (1, 1))
