"""What each kernel is timed on: operands, the call of the kernel, the same in PyTorch, and its specification."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.scale import DEVICE, INTERPRETING
from fxfreeze import kernels
from fxfreeze.kernels import reference


@dataclass(frozen=True)
class Case:
    """make: operands by name, for a dtype; kernel, aten, exact: the op, the same in PyTorch, and its specification."""

    make: Callable[[torch.dtype], dict[str, Any]]
    kernel: Callable[..., Tensor]
    aten: Callable[..., Tensor]
    exact: Callable[..., Tensor]


def image(dtype: torch.dtype, channels: int, side: int, images: int = 128) -> Tensor:
    images, side = (2, min(side, 8)) if INTERPRETING else (images, side)
    x = torch.randn(images, channels, side, side, device=DEVICE, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def weight(dtype: torch.dtype, *shape: int) -> Tensor:
    return kernels.pack((torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(DEVICE, dtype))


def vectors(count: int, channels: int) -> list[Tensor]:
    return [torch.randn(channels, device=DEVICE) for _ in range(count)]


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, prologue: str) -> Tensor:
    if scale is not None and shift is not None:
        x = torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])
    return reference.ACTIVATIONS[prologue](x)


def convolution(
    kernel: Callable[..., Tensor], channels: int, outputs: int, side: int, window: int, **flags: bool
) -> Case:
    """flags: prologue, residual."""
    padding = window // 2

    def make(dtype: torch.dtype) -> dict[str, Any]:
        x = image(dtype, channels, side)
        scale, shift = vectors(2, channels) if flags.get("prologue") else (None, None)
        residual = image(dtype, outputs, side) if flags.get("residual") else None
        bias = vectors(1, outputs)[0]
        prologue = "relu" if flags.get("prologue") else "none"
        operands = {"x": x, "weight": weight(dtype, outputs, channels, window, window), "bias": bias}
        return operands | {"scale": scale, "shift": shift, "prologue": prologue, "residual": residual}

    def op(x: Tensor, weight: Tensor, prologue: str, **rest: Any) -> Tensor:
        return kernel(x, weight, prologue=None if prologue == "none" else prologue, activation="relu", **rest)

    def aten(x: Tensor, weight: Tensor, bias: Tensor, scale: Any, shift: Any, prologue: str, residual: Any) -> Tensor:
        y = F.conv2d(_affine(x, scale, shift, prologue), weight, bias.to(x.dtype), padding=padding)
        return F.relu(y if residual is None else y + residual)

    def exact(**operands: Any) -> Tensor:
        pads = (padding, padding)
        return reference.conv(**operands, activation="relu", stride=(1, 1), padding=pads, dilation=(1, 1))

    return Case(make, op, aten, exact)


def depthwise(channels: int, side: int, window: int) -> Case:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": image(dtype, channels, side),
            "weight": weight(dtype, channels, 1, window, window),
            "bias": vectors(1, channels)[0],
        }

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.depthwise(x, weight, bias=bias, activation="relu6", padding=window // 2)

    def aten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu6(F.conv2d(x, weight, bias.to(x.dtype), padding=window // 2, groups=channels))

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.depthwise(x, weight, bias, "relu6", (1, 1), (window // 2, window // 2), (1, 1))

    return Case(make, op, aten, exact)


def pointwise(channels: int, side: int, pool: str) -> Case:
    size = 2 if pool == "avg" else 1

    def make(dtype: torch.dtype) -> dict[str, Any]:
        scale, shift = vectors(2, channels)
        return {"x": image(dtype, channels, side), "scale": scale, "shift": shift}

    def op(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        window = {"pool": pool, "kernel": size} if pool == "avg" else {"pool": None if pool == "none" else pool}
        return kernels.pointwise(x, scale=scale, shift=shift, activation="relu", **window)

    def aten(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = _affine(x, scale, shift, "relu")
        return F.avg_pool2d(y, 2) if pool == "avg" else F.adaptive_avg_pool2d(y, 1) if pool == "global" else y

    def exact(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return reference.pointwise(x, scale, shift, "relu", pool, (size, size), (size, size), (0, 0), True)

    return Case(make, op, aten, exact)


def rows(dtype: torch.dtype, channels: int) -> Tensor:
    return torch.randn(64 if INTERPRETING else 25216, channels, device=DEVICE, dtype=dtype)


def linear(channels: int, outputs: int) -> Case:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        w = torch.randn(outputs, channels, device=DEVICE) / channels**0.5
        return {"x": rows(dtype, channels), "weight": w.to(dtype), "bias": vectors(1, outputs)[0]}

    return Case(
        make,
        lambda x, weight, bias: kernels.linear(x, weight, bias=bias, activation="gelu"),
        lambda x, weight, bias: F.gelu(F.linear(x, weight, bias.to(x.dtype))),
        lambda x, weight, bias: reference.linear(x, weight, bias, "gelu"),
    )


def layernorm(channels: int) -> Case:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        scale, shift = vectors(2, channels)
        return {"x": rows(dtype, channels), "weight": scale, "bias": shift}

    return Case(
        make,
        lambda x, weight, bias: kernels.layernorm(x, weight=weight, bias=bias),
        lambda x, weight, bias: F.layer_norm(x, (channels,), weight.to(x.dtype), bias.to(x.dtype)),
        lambda x, weight, bias: reference.layernorm(x, weight, bias, 1e-5),
    )


CASES = {
    "1x1 of a dense layer, 256 -> 128, 28 px": convolution(kernels.conv1x1, 256, 128, 28, 1, prologue=True),
    "1x1 of a bottleneck, 64 -> 256, 56 px": convolution(kernels.conv1x1, 64, 256, 56, 1, residual=True),
    "3x3 of a dense layer, 128 -> 32, 28 px": convolution(kernels.conv3x3, 128, 32, 28, 3),
    "3x3 of growth 12, 48 -> 12, 32 px": convolution(kernels.conv3x3, 48, 12, 32, 3),
    "3x3 of a wide residual block, 64 -> 64, 32 px": convolution(kernels.conv3x3, 64, 64, 32, 3, prologue=True, residual=True),
    "depthwise 3x3, 144 channels, 56 px": depthwise(144, 56, 3),
    "depthwise 5x5, 240 channels, 28 px": depthwise(240, 28, 5),
    "scale, shift, relu, 256 channels, 28 px": pointwise(256, 28, "none"),
    "the same and an average, 256 channels, 28 px": pointwise(256, 28, "avg"),
    "the same and the mean, 1024 channels, 7 px": pointwise(1024, 7, "global"),
    "linear and gelu, 384 -> 1536, 197 x 128 rows": linear(384, 1536),
    "layer norm, 384 channels, 197 x 128 rows": layernorm(384),
}  # fmt: skip
