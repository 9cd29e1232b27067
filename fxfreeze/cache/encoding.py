"""A boundary's rows as columns of a store, and back: in the dtype and layout that they were computed in."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.errors import CorruptCache
from fxfreeze.rows import Order, contiguous_rows, in_order
from fxfreeze.sizes import dtype_text

__all__ = ["Encoding"]

_NAME = re.compile(r"boundary\.(\d+):([a-z0-9_]+):([0-9,]*)")


@dataclass(frozen=True)
class Encoding:
    """Per value of the boundary: its column, the dtype it was computed in, and the order of its dimensions in memory."""

    columns: tuple[Column, ...]
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[Order, ...]

    @classmethod
    def of(cls, rows: Sequence[Tensor], store_dtype: torch.dtype | None = None) -> "Encoding":
        """For rows like these; store_dtype: what floating point of more bytes is stored in."""
        columns, orders = [], []
        for number, value in enumerate(rows):
            held, order = contiguous_rows(value)
            wider = (
                value.is_floating_point() and store_dtype is not None and value.dtype.itemsize > store_dtype.itemsize
            )
            dtype = store_dtype if wider and store_dtype is not None else value.dtype
            text = "" if order is None else ",".join(map(str, order))
            name = f"boundary.{number}:{dtype_text(value.dtype)}:{text}"
            columns.append(Column(name, dtype, tuple(held.shape[1:])))
            orders.append(order)
        return cls(tuple(columns), tuple(value.dtype for value in rows), tuple(orders))

    @classmethod
    def read_from(cls, columns: Iterable[Column | Blob]) -> "Encoding":
        """From a store's columns. CorruptCache for names that ``of`` does not give."""
        own = [column for column in columns if isinstance(column, Column) and column.name.startswith("boundary.")]
        dtypes: list[torch.dtype] = []
        orders: list[Order] = []
        for number, column in enumerate(own):
            found = _NAME.fullmatch(column.name)
            dtype = getattr(torch, found[2], None) if found else None
            order = tuple(map(int, found[3].split(","))) if found and found[3] else None
            dims = len(column.shape) + 1
            if not found or int(found[1]) != number or not isinstance(dtype, torch.dtype):
                raise CorruptCache(f"column {column.name!r} is not one of a boundary")
            if order is not None and (order[0] != 0 or sorted(order) != list(range(dims))):
                raise CorruptCache(f"column {column.name!r} names no order of {dims} dimensions")
            dtypes.append(dtype)
            orders.append(order)
        return cls(tuple(own), tuple(dtypes), tuple(orders))

    def encode(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """ValueError for rows of another dtype, shape or number."""
        encoded = {}
        for column, dtype, order, value in zip(self.columns, self.dtypes, self.orders, rows, strict=True):
            if value.dtype != dtype:
                raise ValueError(f"{column.name}: rows of {value.dtype}")
            held = value if order is None else value.permute(order)
            encoded[column.name] = held.to(column.dtype).contiguous()
        return encoded

    def decode(self, read: Mapping[str, Any]) -> list[Tensor]:
        """The rows (k, ...) of what a store gave."""
        return [
            in_order(read[column.name].to(dtype), order)
            for column, dtype, order in zip(self.columns, self.dtypes, self.orders, strict=True)
        ]
