"""Fused inference kernels for frozen networks, imported as ``fxfreeze.kernels``: torch and triton, nothing else.

One file an op: a function that returns ``out``, and a ``torch.library`` op ``fxfreeze::<name>`` that writes into it.
``gpu/`` holds their Triton kernels, ``reference.py`` their specification in PyTorch, ``engine.py`` what runs where.

Images are (N, C, H, W) with contiguous channels and otherwise any strides: channels_last tensors, and channel slices of
wider ones, which are read and written in place. fp16, bf16 and fp32; sums in fp32; fp32 operands are multiplied exactly
unless ``torch.set_float32_matmul_precision`` allows TF32. fp64 runs by the reference. No op has a backward.
"""

from fxfreeze.kernels.conv1x1 import conv1x1
from fxfreeze.kernels.conv3x3 import conv3x3
from fxfreeze.kernels.depthwise import depthwise
from fxfreeze.kernels.engine import engine
from fxfreeze.kernels.layernorm import layernorm
from fxfreeze.kernels.layouts import pack
from fxfreeze.kernels.linear import linear
from fxfreeze.kernels.pointwise import pointwise
from fxfreeze.kernels.reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "conv1x1",
    "conv3x3",
    "depthwise",
    "engine",
    "layernorm",
    "linear",
    "pack",
    "pointwise",
]
