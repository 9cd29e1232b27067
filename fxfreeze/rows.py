"""Samples of a batch, taken, repeated and put together in the layout that the batch has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfreeze.layouts import order_of

__all__ = [
    "batch_size",
    "contiguous_rows",
    "in_order",
    "like",
    "merged",
    "movable",
    "repeated",
    "resized",
    "take",
    "with_another",
]

Order = tuple[int, ...] | None


def batch_size(values: Sequence[Any]) -> int | None:
    """The common size of the first dimension of all tensors; None if they have none in common, or have no strides."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes = {t.shape[0] if t.dim() and t.layout == torch.strided else None for t in tensors}
    return next(iter(sizes)) if len(sizes) == 1 else None


def contiguous_rows(tensor: Tensor) -> tuple[Tensor, Order]:
    """``tensor`` (n, ...) as contiguous rows, and the order of dimensions that ``in_order`` needs to undo it.

    Nothing is copied where the layout is dense and the samples come one after the other.
    """
    order = order_of(tensor)
    if order is None or order[0] != 0:
        return tensor.contiguous(), None
    return tensor.permute(order).contiguous(), order


def in_order(rows: Tensor, order: Order) -> Tensor:
    """The tensor of which ``contiguous_rows`` made ``rows`` and ``order``."""
    return rows if order is None else rows.permute(sorted(range(len(order)), key=order.__getitem__))


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """``tensor`` on the device and in the layout of ``example``."""
    order = order_of(example)
    moved = tensor.to(example.device, non_blocking=True)
    return moved.contiguous() if order is None else in_order(moved.permute(order).contiguous(), order)


def take(tensor: Tensor, samples: Tensor) -> Tensor:
    """Copies of the samples (k,) int64."""
    rows, order = contiguous_rows(tensor)
    return in_order(rows.index_select(0, samples.to(rows.device)), order)


_OF_A_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def movable(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that PyTorch can index, where it can't those of uint16 and the like, or of float8."""
    unsigned = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    small = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    return tensor.view(_OF_A_WIDTH[tensor.dtype.itemsize]) if unsigned or small else tensor


def resized(values: Sequence[Any], size: int) -> Sequence[Any]:
    """A batch cut, or its first sample repeated, to have ``size``: every value stays one that the network knows."""
    count = batch_size(values)
    if count is None or count == size:
        return values
    samples = torch.arange(size)
    samples[count:] = 0
    return [take(value, samples) if isinstance(value, Tensor) else value for value in values]


def repeated(values: Sequence[Any], size: int) -> Sequence[Any]:
    """A batch with its samples over again, to have at least ``size``."""
    count = batch_size(values)
    if not count or count >= size:
        return values
    samples = torch.arange(size) % count
    return [take(value, samples) if isinstance(value, Tensor) else value for value in values]


def with_another(values: Sequence[Any]) -> Sequence[Any]:
    """A batch with as many other samples: of half the value and somewhat more, rounded so that an index stays one."""
    return [torch.cat([v, _another(v)]) if isinstance(v, Tensor) else v for v in values]


def _another(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_complex():
        return tensor / 2 + 0.25
    if tensor.is_floating_point():
        return (tensor.double() / 2 + 0.25).to(tensor.dtype)  # float8 has no division
    return (tensor.long() // 2).to(tensor.dtype)


def merged(size: int, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One batch of ``size`` samples from (places (k,) int64, samples (k, ...)), laid out as the first piece is."""
    rows, order = contiguous_rows(pieces[0][1])
    whole = rows.new_empty((size, *rows.shape[1:]))
    for places, piece in pieces:
        part = piece if order is None else piece.permute(order)
        movable(whole).index_copy_(0, places.to(whole.device), movable(part))
    return in_order(whole, order)
