"""Samples of a batch, taken, repeated and put together in the layout that the batch has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfreeze.layouts import order_of

__all__ = ["batch_size", "contiguous_rows", "in_order", "like", "merged", "repeated", "resized", "take", "with_halves"]

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


def with_halves(values: Sequence[Any]) -> Sequence[Any]:
    """A batch with as many other samples: of half the value, so that an index stays one."""
    return [torch.cat([v, v if v.dtype == torch.bool else _half(v)]) if isinstance(v, Tensor) else v for v in values]


def _half(tensor: Tensor) -> Tensor:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return torch.div(tensor, 2, rounding_mode="floor") if whole else tensor / 2


def merged(size: int, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One batch of ``size`` samples from (places (k,) int64, samples (k, ...)), laid out as the first piece is."""
    rows, order = contiguous_rows(pieces[0][1])
    whole = rows.new_empty((size, *rows.shape[1:]))
    for places, piece in pieces:
        part = piece if order is None else piece.permute(order)
        whole.index_copy_(0, places.to(whole.device), part)
    return in_order(whole, order)
