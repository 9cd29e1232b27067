"""The stores that serve one model: which of them hold what its frozen part computes, and the one that is being filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.errors import CacheError, CorruptCache
from fxfreeze.cache.filling import BatchFill, Filling
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.placement import Placement
from fxfreeze.cache.served import Called, Served, Yielded
from fxfreeze.cache.shelf import Shelf, Source
from fxfreeze.cache.validity import Validity
from fxfreeze.cache.worth import Worth
from fxfreeze.sizes import bytes_text

if TYPE_CHECKING:
    from fxfreeze.model import FreezableModel

__all__ = ["Library"]

_KEPT = 2  # stores of one depth: of the weights in training, and of an average of them
_MOST = 0.8  # of a round's samples that a store has to hold before the next deeper one may be begun


class Library:
    """Works in rounds of the data: what is written in one is read from the next on.

    shelf: of the data set; rest: columns beside the boundary; worth: decides whether to fill; placement: where complete
    stores serve from; examples: of the model's inputs, as many as asked for; say: tells the user.
    """

    def __init__(
        self,
        model: FreezableModel,
        shelf: Shelf,
        rest: Sequence[Column | Blob],
        store_dtype: torch.dtype | None,
        worth: Worth,
        placement: Placement,
        examples: Callable[[int], list[Tensor]],
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
        self._may_begin = self._may_retire = False
        self._asked: list[Tensor] = []  # keys of this round, and their number
        self._count = 0
        self._declined = 0  # the deepest depth that was found not to be worth storing
        self._placed: set[Path] = set()
        self._validity = Validity(model, shelf, store_dtype, examples)
        self._begun: list[Identity] = []  # stores that this loader began, the one last computed or served at the end

    # ---- reading

    @property
    def sources(self) -> list[Source]:
        """Those that hold, as far as is known, what the model computes at its depth or before; deepest first."""
        return [s for s in self._sources if s.depth <= self.model.depth and self._validity.known(s) is not False]

    @property
    def pinned(self) -> bool:
        """Whether what is read goes on to a GPU."""
        return self._validity.device is not None and self._validity.device.type == "cuda"

    def held(self, keys: Tensor) -> Tensor:
        """(n,) bool, whether each row is held by one of the sources."""
        held = torch.zeros(len(keys), dtype=torch.bool)
        for source in self.sources:
            held |= source.holds(keys)
        return held

    @property
    def listening(self) -> bool:
        """Whether what the model computes now may be stored."""
        return self.filling is not None or (self._may_begin and self.model.depth > self._declined)

    @property
    def serving(self) -> Source | None:
        """The deepest complete store of which is known that it holds what the model computes."""
        return next((source for source in self.sources if source.store.complete and self._validity.known(source)), None)

    def valid(self, source: Source, call: Called) -> bool:
        """Whether the source holds what is computed from the call."""
        self._validity.meet(call)
        if source not in self._sources or self._validity.identity(call, source.depth) != source.identity:
            return False
        self._used(source.identity)
        return True

    def lose(self, source: Source, error: CacheError) -> None:
        """Give up a source that can't be read; what it held is computed again."""
        if source in self._sources:
            self._sources.remove(source)
            self.say(f"{source.path.name} can't be used any more, and is filled anew: {error}")
            if isinstance(error, CorruptCache):
                self._drop(source)  # or whoever fills it would find the bad row held

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
        self._may_retire = True
        self._let_go()
        self._asked, self._count = [], 0

    def asked(self, keys: Tensor) -> None:
        """Take note of what a batch is made of."""
        if self._count < self.shelf.length:
            self._asked.append(keys)
            self._count += len(keys)

    def _let_go(self) -> None:
        """Of what is filled, where a deeper store is there, or may be begun now."""
        filling, serving = self.filling, self.serving
        if filling is not None and serving is not None and filling.depth < serving.depth:
            self._close(f"depth {serving.depth}, which is stored, serves in its place")
        elif filling is not None and filling.depth < self.model.depth and self._mostly_held():
            # Some samples may never be asked for; what is missing is made from what there is.
            self._close("a deeper store may be begun, and is made from it")

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
            self.stopped |= filling.broken
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
        self._close("it is of the data set as it was")
        self._sources.clear()
        self._validity.forget()
        self._begun.clear()

    # ---- filling

    def fill_for(self, call: Called, batch: Yielded | Served) -> BatchFill | None:
        """What takes the rows of a batch that are computed in this call."""
        if call.chain.net is not self.model.original or not self.model._forward.batch_size:
            return None  # it is not known yet how training will compute a row
        self._validity.meet(call)
        self._retire(call)
        filling = self.filling
        if filling is not None and self.model._forward.training and self._is_of_another(filling, call):
            self.commit()
            self._close("the frozen part is another than it was")
        if self.filling is None and self._may_begin and call.chain.depth > self._declined:
            self._begin(call, batch)
        filling = self.filling
        if filling is None or filling.ended or filling.depth > call.chain.depth or self._is_of_another(filling, call):
            return None
        return None if self._is_held(batch, filling, call) else BatchFill(filling, batch)

    def _is_of_another(self, filling: Filling, call: Called) -> bool:
        """Whether what is filled is not what this call computes at its depth."""
        return filling.depth <= call.chain.depth and self._validity.identity(call, filling.depth) != filling.identity

    def _is_held(self, batch: Yielded | Served, filling: Filling, call: Called) -> bool:
        """Whether all of a batch comes from as deep as what is filled."""
        if isinstance(batch, Yielded) or batch.fetched is not None:
            return False
        return all(source.depth >= filling.depth and self.valid(source, call) for source, _, _ in batch.pieces)

    def _begin(self, call: Called, batch: Yielded | Served) -> None:
        self._may_begin = False
        identity = self._validity.identity(call, call.chain.depth)
        if identity is None:
            self.say(f"depth {call.chain.depth} is not stored: {self._validity.refuse(call)}")
            return
        served = [s for s in self._sources if s.identity == identity]
        if any(source.store.complete for source in served):
            return
        first = not any(self._validity.known(source) for source in self.sources)
        if not served and not self.worth.pays(call, batch, first=first):
            self._declined = call.chain.depth  # and it pays less with every step
            return
        self.filling = Filling(self.shelf, identity, self._rest, self._store_dtype, self.say)
        if served:
            self._used(identity)
        else:
            self._begun.append(identity)
            self._drop_outdated(identity)

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
        serving = self.serving
        if (
            serving is None
            or serving.resident is not None
            or serving.path in self._placed
            or self._validity.device is None
        ):
            return
        self._placed.add(serving.path)
        try:
            serving.resident = self.placement.resident(serving.store, self._validity.device)
        except CacheError as error:
            self.lose(serving, error)

    def _add(self, source: Source) -> None:
        self._sources = sorted([*self._sources, source], key=lambda s: -s.depth)

    def _finished(self, source: Source) -> None:
        """A store is complete: those that it was made from are needed no more."""
        size = bytes_text(source.store.nbytes)
        self.say(f"depth {source.depth} is stored: {source.store.held} rows, {size} in {source.path.name}")
        for old in [s for s in self._sources if s.depth < source.depth and self._validity.known(s)]:
            self._drop(old)

    def _retire(self, call: Called) -> None:
        """Drop, once a round, the stores that the one that serves was made from: a run that was killed did not come to it."""
        serving = self.serving
        if serving is None or not self._may_retire:
            return
        self._may_retire = False
        for old in [s for s in self._sources if s.depth < serving.depth]:
            if self.valid(old, call):
                self._drop(old)

    def _drop(self, source: Source) -> None:
        if source in self._sources:
            self._sources.remove(source)
        with suppress(CacheError):  # another run writes it, or the folder is read-only
            self.shelf.drop(source.identity)

    def _used(self, identity: Identity) -> None:
        if identity in self._begun[:-1]:
            self._begun.remove(identity)
            self._begun.append(identity)

    def _drop_outdated(self, latest: Identity) -> None:
        """Of the stores that this loader began at a depth, all but those of the last weights: an average that is swapped in
        for each evaluation would leave one behind every time."""
        alike = [identity for identity in self._begun if identity["depth"] == latest["depth"]]
        for old in alike[:-_KEPT]:
            self._begun.remove(old)
            self._sources = [source for source in self._sources if source.identity != old]
            with suppress(CacheError):  # another run writes it
                self.shelf.drop(old)

    def _close(self, why: str) -> None:
        """Fill no more what is filled, if anything is."""
        if self.filling is not None:
            self.filling.give_up(why)
            self.filling = None
