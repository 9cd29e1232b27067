"""Writing the boundary of one depth, as training computes it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.encoding import Encoding
from fxfreeze.cache.errors import CacheError, CacheFull, CacheLocked
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.served import Served, Yielded
from fxfreeze.cache.shelf import SUMS, Shelf, Source
from fxfreeze.cache.writer import StoreWriter
from fxfreeze.sizes import dtype_text

__all__ = ["BatchFill", "Filling"]


class Filling:
    """The store that is being filled; in each round of the data it is opened anew, so that others may write between.

    rest: its columns beside the boundary; say: tells the user that it goes on with a store, how well store_dtype keeps the
    first rows, and why it ends, if not because all rows are there. ended: whether nothing more is written, for whatever
    reason; broken: whether nothing could be written elsewhere either.
    """

    def __init__(
        self,
        shelf: Shelf,
        identity: Identity,
        rest: Sequence[Column | Blob],
        store_dtype: torch.dtype | None,
        say: Callable[[str], None],
    ) -> None:
        self.identity = identity
        self.depth = int(identity["depth"] or 0)
        self.ended = False
        self.broken = False
        self._held: int | None = None  # rows, as far as is known
        self._shelf = shelf
        self._rest = tuple(rest)
        self._store_dtype = store_dtype
        self._say = say
        self._encoding: Encoding | None = None
        self._writer: StoreWriter | None = None

    def take(self, keys: Tensor, rows: Sequence[Tensor], batch: Yielded | Served, places: Tensor | None) -> None:
        """Rows (k, ...) of a batch's samples at ``places``."""
        if self.ended:
            return
        try:
            encoding = self._encoding or self._find_encoding(rows)
            writer = self._writer = self._writer or self._open((*encoding.columns, *self._rest, SUMS))
            if not bool(writer.holds(keys).all()):
                rest = {c.name: _at(batch.rest[c.name], places) for c in self._rest}
                sums = {SUMS.name: _at(batch.input_sums, places)}
                writer.append(keys, {**encoding.encode(rows), **rest, **sums})
                self._held = writer.held
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

    def give_up(self, why: str) -> None:
        """Write no more, after a commit."""
        self.ended = True
        self._say(f"storing depth {self.depth} ends with {self._held or 0} of {self._shelf.length} rows: {why}")

    def _open(self, columns: Sequence[Column | Blob]) -> StoreWriter:
        """CacheError."""
        writer = self._shelf.writer(self.identity, columns)
        if self._held is None and writer.held:
            self._say(f"storing depth {self.depth}: resuming, {writer.held} of {self._shelf.length} rows are there")
        self._held = writer.held
        return writer

    def _find_encoding(self, rows: Sequence[Tensor]) -> Encoding:
        self._encoding = encoding = Encoding.of(rows, self._store_dtype)
        if self._store_dtype is not None:
            decoded = encoding.decode(encoding.encode(rows))
            distance = sum(float((a.double() - b.double()).norm()) ** 2 for a, b in zip(rows, decoded, strict=True))
            length = sum(float(a.double().norm()) ** 2 for a in rows)
            error = (distance / length) ** 0.5 if length else 0.0
            self._say(f"rows are stored as {dtype_text(self._store_dtype)}, with a relative error of {error:.1e}")
        return encoding

    def _fail(self, error: CacheError) -> None:
        self.ended = True
        self.broken = not isinstance(error, CacheLocked)
        if self.broken:
            why = "there is no space left" if isinstance(error, CacheFull) else "it can't be written"
            self._say(f"nothing more is stored, for {why}: {error}")
        else:
            self._say(f"another run fills this cache; this one reads what is there ({error})")
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
