"""``layernorm``: normalisation over the last dimension, with scale and shift."""

import torch
from torch import Tensor
from torch.library import custom_op

from fxfreeze.kernels import checks, reference
from fxfreeze.kernels.engine import run

MOST_CHANNELS = 16384  # a row is held in registers


def layernorm(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, biased variance.

    x, out: (..., C), last dimension contiguous, C at most 16,384; weight, bias: (C,), floating point. Errors and what
    happens without ``out`` as for ``conv1x1``.
    """
    checks.inference("layernorm", x, weight, bias, out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = checks.rows("layernorm", x=x, out=out)
    torch.ops.fxfreeze.layernorm.default(rows["x"], weight, bias, eps, rows["out"])
    return out


@custom_op("fxfreeze::layernorm", mutates_args=("out",))
def _layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    _check(x, weight, bias, eps, out)
    run("layernorm", reference.layernorm, out, x, weight, bias, eps)


@_layernorm.register_fake
def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    op = "layernorm"
    checks.images(op, 2, x=x, out=out)
    checks.vectors(op, x, weight=(weight, x.shape[1]), bias=(bias, x.shape[1]))
    if x.shape[1] > MOST_CHANNELS:
        raise ValueError(f"{op}: x has {x.shape[1]} channels, expected at most {MOST_CHANNELS}")
    checks.output(op, out, x.shape, x=x, weight=weight, bias=bias)
