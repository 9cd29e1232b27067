"""Images that lie side by side, along their channels, in one buffer: what a lowered graph has in place of concatenations.

Each place in a buffer is written once, before anything reads it, so to the rest of a graph its slices are new tensors.
"""

from torch import Tensor

from fxfreeze.effects import declared
from fxfreeze.kernels.layouts import image_like, window_size

__all__ = ["allocate", "allocate_for", "joined", "placed", "room"]

_STEP = 8  # channels: from pixel to pixel is then a multiple of 16 bytes in any dtype


@declared
def allocate(like: Tensor, channels: int) -> Tensor:
    """A buffer for images of ``channels`` channels, as many and as large as ``like``."""
    return image_like(like, -(-channels // _STEP) * _STEP, *like.shape[2:])


@declared
def allocate_for(
    x: Tensor,
    channels: int,
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The same, as large as what a convolution or a pooling makes of ``x``."""
    return image_like(x, -(-channels // _STEP) * _STEP, *window_size(x, window, stride, padding, dilation))


@declared
def room(buffer: Tensor, start: int, channels: int) -> Tensor:
    """The slice of a buffer that an image of ``channels`` channels is written into."""
    return buffer[:, start : start + channels]


@declared
def placed(buffer: Tensor, start: int, image: Tensor) -> Tensor:
    """``image``, copied into the buffer."""
    return buffer[:, start : start + image.shape[1]].copy_(image)


@declared
def joined(buffer: Tensor, start: int, channels: int, *images: Tensor) -> Tensor:
    """What the concatenation of ``images`` would be, once they are in the buffer."""
    return buffer[:, start : start + channels]
