"""What fp8 (e4m3) would cost in accuracy: a folded graph whose layers take inputs and weights rounded to it.

Nothing runs in fp8: what stands in it is multiplied in float32, so this tells the error and not the time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxfreeze.fidelity import relative_error
from fxfreeze.operators import LAYERS, op_of
from fxfreeze.rewrite import constant

__all__ = ["e4m3", "fp8_error"]

_E4M3 = torch.float8_e4m3fn


def fp8_error(graph: GraphModule, x: Tensor, expected: Tensor) -> float:
    """The relative error, by norm, of what ``graph`` makes of x."""
    with torch.no_grad():
        (value,) = _Rounded(graph).run(x)
    return relative_error(value, expected)


class _Rounded(Interpreter):
    def run_node(self, n: Node) -> Any:
        op = op_of(n, self.module)
        if op is None or op.kind not in LAYERS:
            return super().run_node(n)
        arguments = dict(op.arguments)
        x = self.env[arguments.pop("input")]
        weight, bias = (constant(arguments.pop(name), self.module) for name in ("weight", "bias"))
        assert weight is not None
        return op.function(e4m3(x), e4m3(weight, dims=range(1, weight.dim())), bias, **arguments)


def e4m3(value: Tensor, dims: Any = None) -> Tensor:
    """``value`` rounded to e4m3 once scaled so that the largest over ``dims`` (None: of all) is e4m3's largest."""
    largest = value.abs().amax(tuple(dims) if dims else tuple(range(value.dim())), keepdim=True)
    scale = largest.clamp(min=torch.finfo(value.dtype).tiny) / torch.finfo(_E4M3).max
    return (value / scale).to(_E4M3).to(value.dtype) * scale
