"""What a tile moves and computes for each output element, at a shape that is typical of its kernel.

DRAM bytes: each input and output once. L2 bytes: what the blocks ask of the L2 cache, as if none kept what another, or
another tap, has read before; the vectors of an epilogue are left out.
"""

from dataclasses import dataclass
from math import ceil

from fxfreeze.kernels.configs import ALL, Config

__all__ = ["SHAPES", "Shape", "Traffic", "traffic", "typical"]


@dataclass(frozen=True)
class Shape:
    """Images of h x w pixels, to each of which one output pixel belongs; taps: of the kernel."""

    images: int
    h: int
    w: int
    inputs: int
    taps: int = 1

    @property
    def pixels(self) -> int:
        return self.images * self.h * self.w


SHAPES = {
    "conv1x1": Shape(128, 28, 28, inputs=256),  # the middle of DenseNet-121's second block
    "linear": Shape(128, 196, 1, inputs=384),  # tokens of ViT-S
    "conv3x3": Shape(128, 28, 28, inputs=128, taps=9),  # ResNet-18's second stage
    "rolling3x3": Shape(128, 28, 28, inputs=128, taps=9),  # a dense layer
    "depthwise": Shape(128, 28, 28, inputs=1, taps=9),
    "pointwise": Shape(128, 28, 28, inputs=1),
    "layernorm": Shape(128, 196, 1, inputs=1),
}
_ELEMENTWISE_FLOPS = {"depthwise": 18, "pointwise": 3, "layernorm": 8}


def typical(most: int) -> int:
    """Output channels to try a tile on that serves so many at most."""
    return most if most < ALL else 256


@dataclass(frozen=True)
class Traffic:
    """Of one output element."""

    flops: float
    dram_bytes: float
    l2_bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte of DRAM."""
        return self.flops / self.dram_bytes


def traffic(kernel: str, config: Config, dtype: str, most: int) -> Traffic:
    """``most``: the output channels that the tile serves."""
    shape, outputs = SHAPES[kernel], typical(most)
    size = 2 if dtype in ("fp16", "bf16") else 4
    if kernel in _ELEMENTWISE_FLOPS:
        return Traffic(_ELEMENTWISE_FLOPS[kernel], 2 * size, (shape.taps + 1) * size)
    elements = shape.pixels * outputs
    once = shape.pixels * shape.inputs + shape.taps * shape.inputs * outputs + elements
    asked = _rolling(config, shape, outputs) if kernel == "rolling3x3" else _blocks(config, shape, outputs)
    return Traffic(
        2 * shape.inputs * shape.taps, once * size / elements, (asked * shape.inputs + elements) * size / elements
    )


def _blocks(config: Config, shape: Shape, outputs: int) -> int:
    """Rows of input channels that all blocks of an implicit matrix product load."""
    blocks = ceil(shape.pixels / config.pixels) * ceil(outputs / config.outputs)
    return blocks * shape.taps * (config.pixels + min(outputs, config.outputs))


def _rolling(config: Config, shape: Shape, outputs: int) -> int:
    """The same: for each row of a strip and each of those beside it, three columns of pixels and all nine taps."""
    blocks = ceil(shape.images * shape.w / config.pixels) * ceil(shape.h / config.rows)
    return blocks * (config.rows + 2) * (3 * config.pixels + 9 * outputs)
