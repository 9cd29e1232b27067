"""Weights and outputs laid out as the kernels want them."""

from collections.abc import Sequence

import torch
from torch import Tensor

_VECTOR = 16  # bytes

__all__ = ["image_like", "pack", "window_size"]


def pack(weight: Tensor) -> Tensor:
    """A convolution's weight (O, C, R, S), same shape and values, laid out for the kernels.

    The input channels of each tap lie together, and from tap to tap is a multiple of 16 bytes, so that loads are wide
    whatever C is. A depthwise weight (C, 1, R, S) has its channels together. Pack once: an op packs a weight of another
    layout at each call.
    """
    if weight.dim() != 4:
        raise ValueError(f"pack: weight has shape {tuple(weight.shape)}, expected (O, C, R, S)")
    o, c, r, s = weight.shape
    if c == 1 and o > 1:
        return weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    vector = _VECTOR // weight.element_size()
    room = weight.new_zeros((o, r, s, -(-c // vector) * vector))
    room[..., :c] = weight.detach().permute(0, 2, 3, 1)
    return room[..., :c].permute(0, 3, 1, 2)


def image_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A new channels_last image for each of x's, uninitialised, of its dtype and device."""
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def window_size(
    x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of what a convolution or a pooling makes of x; below 1 where the window does not fit."""
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], window, stride, padding, dilation, strict=True)
    )
    return h, w
