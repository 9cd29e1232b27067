"""What the launchers of the convolutions share: their arguments, and how a kernel is handed them."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.gpu.operands import image, precision, unit

__all__ = ["Convolution", "launcher"]


@dataclass
class Convolution:
    """The arguments of ``reference.conv``, where its result goes, and the tile."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    prologue: str
    residual: Tensor | None
    activation: str
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    out: Tensor
    config: Config

    def __post_init__(self) -> None:
        o, _, r, s = self.weight.stride()
        taps = self.weight.shape[2] * self.weight.shape[3]
        self.u_c = unit(self.x, pitch=o if taps == 1 else math.gcd(o, r, s))
        self.u_o = unit(self.out, self.residual)
        self.channels = self.x.shape[1] // self.u_c, self.out.shape[1] // self.u_o
        self.s_w = o // self.u_c, r // self.u_c, s // self.u_c
        images = (image(self.x, self.u_c), image(self.residual, self.u_o), image(self.out, self.u_o))
        (x, o_x, *self.s_x), (residual, o_r, *self.s_r), (out, o_y, *self.s_y) = images
        self.tensors = x, self.weight, self.bias, self.scale, self.shift, residual, out
        self.starts = o_x, o_r, o_y

    @property
    def constants(self) -> dict[str, Any]:
        """What each kernel is compiled for, and how."""
        tile = self.config
        return {
            "PRO": self.prologue, "ACT": self.activation, "PRECISION": precision(self.x.dtype),
            "VC": self.u_c, "VO": self.u_o, "BP": tile.pixels, "BO": tile.outputs, "BC": tile.channels,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip


def launcher(start: Callable[[Convolution], None]) -> Callable[..., None]:
    """``launch`` of a convolution's file: takes what ``Convolution`` is made of."""

    @functools.wraps(start)
    def launch(*arguments: Any, **named: Any) -> None:
        start(Convolution(*arguments, **named))

    return launch
