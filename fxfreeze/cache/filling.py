"""Writing the boundary of one depth, as training computes it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.encoding import Encoding
from fxfreeze.cache.errors import CacheError
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.served import Served, Yielded
from fxfreeze.cache.shelf import SUMS, Shelf, Source
from fxfreeze.cache.writer import StoreWriter

__all__ = ["BatchFill", "Filling"]


class Filling:
    """The store that is being filled; in each round of the data it is opened anew, so that others may write between.

    rest: its columns beside the boundary; failed: told once why it can't go on; rounded: told the relative error of what
    store_dtype keeps of the first rows. ended: whether nothing more is written, for whatever reason.
    """

    def __init__(
        self,
        shelf: Shelf,
        identity: Identity,
        rest: Sequence[Column | Blob],
        store_dtype: torch.dtype | None,
        failed: Callable[[CacheError], None],
        rounded: Callable[[float], None],
    ) -> None:
        self.identity = identity
        self.depth = int(identity["depth"] or 0)
        self.ended = False
        self._shelf = shelf
        self._rest = tuple(rest)
        self._store_dtype = store_dtype
        self._failed = failed
        self._rounded = rounded
        self._encoding: Encoding | None = None
        self._writer: StoreWriter | None = None

    def take(self, keys: Tensor, rows: Sequence[Tensor], batch: Yielded | Served, places: Tensor | None) -> None:
        """Rows (k, ...) of a batch's samples at ``places``."""
        if self.ended:
            return
        try:
            encoding = self._encoding or self._find_encoding(rows)
            self._writer = writer = self._writer or self._shelf.writer(
                self.identity, (*encoding.columns, *self._rest, SUMS)
            )
            if not bool(writer.holds(keys).all()):
                rest = {c.name: _at(batch.rest[c.name], places) for c in self._rest}
                sums = {SUMS.name: _at(batch.input_sums, places)}
                writer.append(keys, {**encoding.encode(rows), **rest, **sums})
        except CacheError as error:
            self._fail(error)

    def commit(self) -> Source | None:
        """What can be read by now; None if there is nothing new."""
        if self._writer is None:
            return None
        writer, self._writer = self._writer, None
        try:
            writer.close()
            self.ended = writer.complete
            return self._shelf.open(self.identity)
        except CacheError as error:
            self._fail(error)
            return None

    def _find_encoding(self, rows: Sequence[Tensor]) -> Encoding:
        self._encoding = encoding = Encoding.of(rows, self._store_dtype)
        if self._store_dtype is not None:
            decoded = encoding.decode(encoding.encode(rows))
            distance = sum(float((a.double() - b.double()).norm()) ** 2 for a, b in zip(rows, decoded, strict=True))
            length = sum(float(a.double().norm()) ** 2 for a in rows)
            self._rounded((distance / length) ** 0.5 if length else 0.0)
        return encoding

    def _fail(self, error: CacheError) -> None:
        self._failed(error)
        self.ended = True
        if self._writer is not None:
            self._writer.__exit__(type(error), error, None)  # lets the lock go, and writes no more
            self._writer = None


class BatchFill:
    """What a model hands the rows of one batch to."""

    def __init__(self, filling: Filling, batch: Yielded | Served) -> None:
        self.depth = filling.depth
        self._filling = filling
        self._batch = batch

    def take(self, places: Tensor | None, rows: Sequence[Tensor]) -> None:
        keys = self._batch.keys
        self._filling.take(keys if places is None else keys[places], rows, self._batch, places)


def _at(value: Tensor | list[bytes], places: Tensor | None) -> Tensor | list[bytes]:
    if places is None:
        return value
    return value[places] if isinstance(value, Tensor) else [value[place] for place in places.tolist()]
