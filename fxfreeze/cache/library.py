"""The stores that serve one model: which of them hold what its frozen part computes, and the one that is being filled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.errors import CacheError, CacheFull, CacheLocked, CacheRefusal
from fxfreeze.cache.filling import BatchFill, Filling
from fxfreeze.cache.identity import prefix_identity, weights_digest
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.placement import Placement
from fxfreeze.cache.served import Served, Yielded
from fxfreeze.cache.shelf import Shelf, Source
from fxfreeze.cache.worth import Worth
from fxfreeze.frontier import NotRowwise
from fxfreeze.sizes import bytes_text

if TYPE_CHECKING:
    from fxfreeze.chain import Chain
    from fxfreeze.model import FreezableModel

__all__ = ["Library"]

_MOST = 0.8  # of a round's samples that a store has to hold before the next deeper one may be begun


class Library:
    """Works in rounds of the data: what is written in one is read from the next on.

    shelf: of the data set; rest: columns beside the boundary; worth: decides whether to fill; say: tells the user.
    """

    def __init__(
        self,
        model: FreezableModel,
        shelf: Shelf,
        rest: Sequence[Column | Blob],
        store_dtype: torch.dtype | None,
        worth: Worth,
        placement: Placement,
        say: Callable[[str], None],
    ) -> None:
        self.model = model
        self.shelf = shelf
        self.worth = worth
        self.placement = placement
        self.say = say
        self.filling: Filling | None = None
        self.stopped = False  # nothing is written any more
        self._rest = tuple(rest)
        self._store_dtype = store_dtype
        self._sources: list[Source] = []  # deepest first
        self._may_begin = False
        self._asked: list[Tensor] = []  # keys of this round, and their number
        self._count = 0
        self._placed: set[Path] = set()
        self._device: torch.device | None = None  # that the model runs on, once it is known
        self._chain: weakref.ref[Chain] | None = None
        self._identities: weakref.WeakKeyDictionary[Chain, dict[int, Identity | None]] = weakref.WeakKeyDictionary()

    # ---- reading

    @property
    def sources(self) -> list[Source]:
        """Those that hold, as far as is known, what the model computes at its depth or before; deepest first."""
        known = self._identities.get(self._chain()) if self._chain is not None and self._chain() is not None else None  # type: ignore[arg-type]
        return [
            source
            for source in self._sources
            if source.depth <= self.model.depth
            and (known is None or known.get(source.depth, source.identity) == source.identity)
        ]

    @property
    def pinned(self) -> bool:
        """Whether what is read goes on to a GPU."""
        return self._device is not None and self._device.type == "cuda"

    def held(self, keys: Tensor) -> Tensor:
        """(n,) bool, whether each row is held by one of the sources."""
        held = torch.zeros(len(keys), dtype=torch.bool)
        for source in self.sources:
            held |= source.holds(keys)
        return held

    @property
    def complete(self) -> bool:
        """Whether every row is."""
        return any(source.store.complete for source in self.sources)

    def valid(self, source: Source, chain: Chain, tensors: Sequence[Tensor]) -> bool:
        """Whether the source holds what ``chain`` computes from a call with ``tensors``."""
        self._meet(chain, tensors)
        return source in self._sources and self._identity(chain, source.depth, tensors) == source.identity

    def lose(self, source: Source, error: CacheError) -> None:
        """Give up a source that can't be read; what it held is computed again."""
        if source in self._sources:
            self._sources.remove(source)
            self.say(f"{source.path.name} can't be used any more, and is filled anew: {error}")

    # ---- rounds

    def begin(self) -> None:
        """A round: what others, or an earlier run, have written can be read; a filling may begin."""
        self.commit()
        for source in list(self._sources):
            try:
                source.store.refresh()
                source.store.check()
                source.touch()
            except CacheError as error:
                self.lose(source, error)
        self._discover()
        self._place()
        self._may_begin = not self.stopped
        if self.filling is not None and self.filling.depth < self.model.depth and self._mostly_held():
            self.filling = None  # some samples may never be asked for; what is missing is made from what there is
        self._asked, self._count = [], 0

    def asked(self, keys: Tensor) -> None:
        """Take note of what a batch is made of."""
        if self._count < self.shelf.length:
            self._asked.append(keys)
            self._count += len(keys)

    def _mostly_held(self) -> bool:
        """Whether the store that is being filled holds most of what was asked for in the last round."""
        assert self.filling is not None
        filled = next((s for s in self._sources if s.identity == self.filling.identity), None)
        if filled is None or not self._asked:
            return False
        return float(filled.holds(torch.cat(self._asked)).double().mean()) >= _MOST

    def commit(self) -> None:
        """What was filled so far can be read."""
        filling = self.filling
        source = None if filling is None else filling.commit()
        if filling is not None and filling.ended:
            self.filling = None
        if source is None:
            return
        self._sources = [s for s in self._sources if s.identity != source.identity]
        self._add(source)
        if source.store.complete:
            self._finished(source)

    def forget(self) -> None:
        """The data set is another: nothing that is stored is of it."""
        self.commit()
        self.filling = None
        self._sources.clear()
        self._identities.clear()

    # ---- filling

    def fill_for(self, chain: Chain, batch: Yielded | Served, tensors: Sequence[Tensor]) -> BatchFill | None:
        """What takes the rows of a batch that ``chain`` computes now."""
        self._meet(chain, tensors)
        if self._may_begin and self.filling is None:
            self._begin(chain, batch, tensors)
        filling = self.filling
        if filling is None or filling.ended or filling.depth > chain.depth:
            return None
        if (
            isinstance(batch, Served)
            and all(s.depth >= filling.depth for s, _, _ in batch.pieces)
            and not batch.fetched
        ):
            return None
        if self._identity(chain, filling.depth, tensors) != filling.identity:
            return None
        return BatchFill(filling, batch)

    def _meet(self, chain: Chain, tensors: Sequence[Tensor]) -> None:
        self._chain = weakref.ref(chain)
        self._device = tensors[0].device

    def _begin(self, chain: Chain, batch: Yielded | Served, tensors: Sequence[Tensor]) -> None:
        identity = self._identity(chain, chain.depth, tensors)
        if identity is None:
            self._refuse(chain, tensors)
            return
        self._may_begin = False
        served = [s for s in self._sources if s.identity == identity]
        if any(source.store.complete for source in served):
            return
        if not served and not self.worth.pays(chain, batch, tensors, first=not self.sources):
            return
        self.filling = Filling(self.shelf, identity, self._rest, self._store_dtype, self._failed, self._rounded)

    def _refuse(self, chain: Chain, tensors: Sequence[Tensor]) -> None:
        """CacheRefusal if samples are mixed; nothing if this batch is too small to tell."""
        try:
            chain.frontier(chain.depth).rows(tensors)
        except NotRowwise as error:
            if len(tensors[0]) < 2:
                return
            raise CacheRefusal(
                f"the frozen part can't be cached: {error}, so a sample has no activations of its own. Give the layer running "
                "statistics, or freeze to a depth before it"
            ) from error

    def _identity(self, chain: Chain, depth: int, tensors: Sequence[Tensor]) -> Identity | None:
        """Of the store of that depth; None where the chain has none, or does not treat each sample by itself."""
        known = self._identities.setdefault(chain, {})
        if depth not in known or (known[depth] is None and len(tensors[0]) > 1):
            known[depth] = self._find_identity(chain, depth, tensors)
        return known[depth]

    def _find_identity(self, chain: Chain, depth: int, tensors: Sequence[Tensor]) -> Identity | None:
        if depth > chain.depth or not chain.reaches(depth):
            return None
        try:
            for each in {depth, chain.depth}:
                if not any(chain.frontier(each).rows(tensors)):
                    return None
        except NotRowwise:
            return None
        weights = weights_digest(self.model.original, self.model.units[:depth])
        prefix = prefix_identity(self.model.original, chain, depth, tensors, weights)
        return self.shelf.whole({**prefix, "stored as": _short(self._store_dtype)})

    # ---- stores come and go

    def _discover(self) -> None:
        """Take up stores of this data set that are not known yet."""
        known = [source.identity for source in self._sources]
        if self.filling is not None:
            known.append(self.filling.identity)
        for identity in self.shelf.identities():
            if identity not in known:
                try:
                    self._add(self.shelf.open(identity))
                except CacheError:
                    continue  # whoever fills it finds out; here it is as good as absent

    def _place(self) -> None:
        """Take the store that serves now into the memory where it should be."""
        serving = next((source for source in self.sources if source.store.complete), None)
        if serving is None or serving.resident is not None or serving.path in self._placed or self._device is None:
            return
        self._placed.add(serving.path)
        try:
            serving.resident = self.placement.resident(serving.store, self._device)
        except CacheError as error:
            self.lose(serving, error)

    def _add(self, source: Source) -> None:
        self._sources = sorted([*self._sources, source], key=lambda s: -s.depth)

    def _finished(self, source: Source) -> None:
        """A store is complete: those that it was made from are needed no more."""
        size = bytes_text(source.store.nbytes)
        self.say(f"depth {source.depth} is stored: {source.store.held} rows, {size} in {source.path.name}")
        usable = self.sources
        for old in [s for s in self._sources if s in usable and s.depth < source.depth]:
            self._sources.remove(old)
            try:
                self.shelf.drop(old.identity)
            except CacheError:
                continue  # another run writes it, or the folder is read-only

    def _rounded(self, error: float) -> None:
        self.say(f"rows are stored as {_short(self._store_dtype)}, with a relative error of {error:.1e}")

    def _failed(self, error: CacheError) -> None:
        if isinstance(error, CacheLocked):
            self.say(f"another run fills this cache; this one reads what is there ({error})")
            return
        self.stopped = True
        why = "there is no space left" if isinstance(error, CacheFull) else "it can't be written"
        self.say(f"nothing more is stored, for {why}: {error}")


def _short(dtype: torch.dtype | None) -> str:
    return "computed" if dtype is None else str(dtype).removeprefix("torch.")
