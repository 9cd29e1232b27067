"""How images are handed to a kernel: an aligned pointer, and strides and offsets in units that wide loads need.

A load is 16 bytes wide only when the compiler can prove that its address is a multiple of 16 bytes. It knows that of a
pointer, never of an integer that is no multiple of 16, such as the steps of 8 channels between slices. So channels,
strides and offsets are passed divided by a unit of 1, 2, 4 or 8 elements, and the kernel multiplies by that constant.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_VECTOR = 16  # bytes


class Image(NamedTuple):
    """A tensor (N, C, H, W) with contiguous channels, for a kernel; all but ``base`` in units.

    base: a tensor that begins on 16 bytes where its storage has such a place; start: where the image begins in it;
    n, h, w: from a sample, row or column to the next.
    """

    base: Tensor | None
    start: int
    n: int
    h: int
    w: int


def unit(*images: Tensor | None, pitch: int = 0) -> int:
    """The largest number of elements up to 16 bytes that divides every start, step and number of channels, and ``pitch``."""
    given = [t for t in images if t is not None]
    most = _VECTOR // given[0].element_size()
    return math.gcd(most, pitch, *(n for t in given for n in (_lead(t), t.shape[1], *_steps(t))))


def image(t: Tensor | None, unit: int) -> Image:
    """``t`` as a kernel takes it."""
    if t is None:
        return Image(None, 0, 0, 0, 0)
    lead = _lead(t)
    base = t.as_strided((1,), (1,), t.storage_offset() - lead) if lead else t
    return Image(base, lead // unit, *(step // unit for step in _steps(t)))


def flat(*images: Tensor | None) -> bool:
    """Whether in each image all pixels lie at one distance from the next, across rows and samples."""
    for t in images:
        if t is not None:
            n, h, w = _steps(t)
            if h != t.shape[3] * w or n != t.shape[2] * h:
                return False
    return True


def _lead(t: Tensor) -> int:
    """Elements since the last 16-byte address; 0 where the storage does not reach back to it."""
    lead = t.data_ptr() % _VECTOR // t.element_size()
    return lead if lead <= t.storage_offset() else 0


def _steps(t: Tensor) -> tuple[int, int, int]:
    """Elements from sample to sample, row to row and column to column; where there is one of them, as if packed."""
    n, _, h, w = t.shape
    by_column = next((t.stride(d) for d in (3, 2, 0) if t.shape[d] > 1), t.shape[1])
    by_row = t.stride(2) if h > 1 else w * by_column
    return (t.stride(0) if n > 1 else h * by_row), by_row, by_column


def precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: fp32 in "tf32" where ``torch.set_float32_matmul_precision`` allows it, else "ieee"."""
    exact = dtype is not torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
