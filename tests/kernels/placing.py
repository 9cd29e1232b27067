"""Tensors in wider buffers: slices of channels, crops, steps, any order of dimensions. What lies around them is poison."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROOM = 8  # elements of poison after a vector
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Layout:
    """How an image lies in its buffer.

    order: dimensions from the outermost in, the channels being innermost; crop: rows and columns of the buffer on either
    side of the image; step: columns of the buffer from one of the image's to the next; before, after: channels of the
    buffer beside the image's; lead: elements before the buffer's first pixel, which then is not aligned.
    """

    order: str = "nhw"
    crop: tuple[int, int] = (0, 0)
    step: int = 1
    before: int = 0
    after: int = 0
    lead: int = 0


ALONE = Layout()


def place(values: Tensor, layout: Layout) -> Tensor:
    """A view (N, C, H, W) of ``values`` in a buffer of that layout, which is NaN and infinite elsewhere."""
    n, c, h, w = values.shape
    top, left = layout.crop
    room = {"n": n, "h": h + 2 * top, "w": (w + 2 * left) * layout.step}
    pitch = layout.before + c + layout.after
    buffer = _poison(layout.lead + math.prod(room.values()) * pitch, values)
    image = buffer[layout.lead :].view(*(room[d] for d in layout.order), pitch)
    image = image.permute(layout.order.index("n"), 3, layout.order.index("h"), layout.order.index("w"))
    columns = slice(left * layout.step, (left + w) * layout.step, layout.step)
    view = image[:, layout.before : layout.before + c, top : top + h, columns]
    return view.copy_(values)


def place_rows(values: Tensor, layout: Layout) -> Tensor:
    """The same for rows (..., C)."""
    rows = place(values.reshape(-1, values.shape[-1], 1, 1), layout)[:, :, 0, 0]
    return rows.as_strided(values.shape, (*_row_strides(values.shape[:-1], rows.stride(0)), 1), rows.storage_offset())


def place_vector(values: Tensor, lead: int = 1) -> Tensor:
    """A view (C,) of ``values`` between poisoned neighbours."""
    return _poison(lead + values.numel() + _ROOM, values)[lead : lead + values.numel()].copy_(values)


def bystanders(view: Tensor) -> Tensor:
    """The bits of everything in the buffer of ``view`` that is not of ``view``."""
    whole = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return whole.view(_BITS[view.element_size()])[outside]


def bits(t: Tensor) -> Tensor:
    """The bits of ``t``, to tell whether it was written to, NaN or not."""
    return t.contiguous().view(_BITS[t.element_size()]).clone()


def _poison(size: int, like: Tensor) -> Tensor:
    buffer = torch.full((size,), math.nan, dtype=like.dtype, device=like.device)
    buffer[1::3] = math.inf
    buffer[2::3] = -math.inf
    return buffer


def _row_strides(lead: torch.Size, pitch: int) -> list[int]:
    strides = []
    for n in reversed(lead):
        strides.insert(0, pitch)
        pitch *= n
    return strides
