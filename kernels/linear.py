"""``linear``: a linear layer with bias and activation."""

import torch
from torch import Tensor
from torch.library import custom_op

from fxfreeze.kernels import checks, reference
from fxfreeze.kernels.engine import run


def linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, activation: str | None = None, out: Tensor | None = None
) -> Tensor:
    """``activation(x @ weight.T + bias)``.

    x: (..., C); weight: (O, C) of x's dtype; bias: (O,); out: (..., O); last dimensions contiguous. Activations, errors
    and what happens without ``out`` as for ``conv1x1``.
    """
    checks.inference("linear", x, weight, bias, out)
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows = checks.rows("linear", x=x, out=out)
    torch.ops.fxfreeze.linear.default(rows["x"], weight, bias, activation or "none", rows["out"])
    return out


@custom_op("fxfreeze::linear", mutates_args=("out",))
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    _check(x, weight, bias, activation, out)
    run("linear", reference.linear, out, x, weight, bias, activation)


@_linear.register_fake
def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    op = "linear"
    checks.images(op, 2, x=x, weight=weight, out=out)
    checks.weight(op, weight, x, (None, x.shape[1]))
    checks.vectors(op, x, bias=(bias, weight.shape[0]))
    checks.activation(op, activation)
    checks.output(op, out, (x.shape[0], weight.shape[0]), x=x, weight=weight, bias=bias)
