"""CachedLoader: a DataLoader that gives out the frozen part's activations in place of its inputs, once they are stored."""

from __future__ import annotations

import inspect
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fxfreeze.cache.dataset import KnownData
from fxfreeze.cache.errors import CacheError
from fxfreeze.cache.fetch import Batches, Fetched, check_loader, draws_at_once
from fxfreeze.cache.library import Library
from fxfreeze.cache.placement import Placement
from fxfreeze.cache.served import Called, Served, Yielded, joined, own, sums_of
from fxfreeze.cache.shelf import Rows, Shelf, Source
from fxfreeze.cache.traffic import Traffic
from fxfreeze.cache.views import Views
from fxfreeze.cache.watch import Watch
from fxfreeze.cache.worth import Worth
from fxfreeze.stored import Boundary, Example, Fill

if TYPE_CHECKING:
    from fxfreeze.chain import Chain
    from fxfreeze.model import FreezableModel

__all__ = ["CachedLoader"]

_CHECKED = 8  # batches before anything is frozen whose way to the model is watched: mixup is refused before it costs


class Looked(NamedTuple):
    """pieces: what is stored of a batch; absent: the places of what is not."""

    fetched: Fetched
    keys: Tensor
    pieces: list[tuple[Source, Tensor, Rows]]
    absent: Tensor
    lost: list[tuple[Source, CacheError]]


class CachedLoader:
    """Iterates like ``loader``: the same samples in the same order and batches, the same random numbers drawn.

    Once units of ``model`` are frozen, what they compute is stored by sample while training goes on; later the batches hold
    a ``Boundary`` in place of each model input, which the model takes like the input. Labels, and whatever else a batch
    holds, are stored too: then the data set is read only for a few probed samples each epoch. Other attributes are the
    wrapped loader's.

    directory: of the stores, one for each frozen part and data set; runs with the same share them.
    inputs: what of a batch the model receives: keys of a dict (default: those that are parameters of its forward), positions
    or fields of a tuple (default: the first).
    fingerprint: names the data set, in place of checksums of probed samples.
    when: "auto" stores only what pays, measured; "always".
    max_bytes: no store takes more; nor does any take the last 5% of a disk.
    views: how many drawings of a randomly augmented sample are stored; "flip": a sample and its mirror image.
    augmented: "freeze" trains on the first drawing of each sample.
    placement: where complete stores are kept while they serve: "device", "ram", "disk", or "auto" by what has room.
    store_dtype: a narrower floating point type to store in, such as torch.bfloat16.

    Raises CacheRefusal (a ValueError) for what can't be cached with right results, at once or in the first epoch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        model: FreezableModel,
        directory: str | Path,
        *,
        inputs: str | int | Sequence[str | int] | None = None,
        fingerprint: str | None = None,
        when: Literal["auto", "always"] = "auto",
        max_bytes: int | None = None,
        views: int | Literal["flip"] = 1,
        augmented: Literal["refuse", "freeze"] = "refuse",
        placement: Literal["auto", "device", "ram", "disk"] = "auto",
        store_dtype: torch.dtype | None = None,
    ) -> None:
        _check_choice("when", when, ("auto", "always"))
        _check_choice("augmented", augmented, ("refuse", "freeze"))
        _check_choice("placement", placement, ("auto", "device", "ram", "disk"))
        _check_model(model)
        check_loader(loader)
        self.loader = loader
        self.model = model
        self.notes: list[str] = []  # what was decided and why, as it was printed
        self.traffic: list[Traffic] = []  # of each epoch
        self.epoch = -1
        self._views = Views(views)
        parameters = list(inspect.signature(model.forward).parameters)
        self._data = KnownData(
            loader, parameters, inputs=inputs, fingerprint=fingerprint, views=self._views, augmented=augmented
        )
        self._form = self._data.form
        self._examples: dict[int, list[Example]] = {}
        length = self._data.length * self._views.count
        shelf = Shelf(directory, self._data.identity, length)
        worth = Worth(
            model,
            shelf,
            when=when,
            max_bytes=max_bytes,
            store_dtype=store_dtype,
            say=self._say,
        )
        kept = Placement(placement, self._say)
        self._library = Library(
            model, shelf, self._form.columns, store_dtype, worth, kept, self._data.examples, self._say
        )
        self._watch = Watch(self._form.names)
        self._watched = 0
        self._batches = Batches(loader, self._missing)
        model._forward.attach(self)

    @staticmethod
    def tell(text: str) -> None:
        """Says what is stored or not, and why, on stderr; to be replaced by whoever shows it otherwise."""
        print(text, file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is iterated next: it decides which view of a sample is shown. Counted if it is never set."""
        self.epoch = epoch - 1

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        self._begin()
        self.traffic.append(Traffic())
        complete = self._library.serving is not None
        # Made here and not when the first batch is asked for, for it draws from the loader's generator.
        batches = self._batches.epoch(workers=not complete)
        return self._given_out(batches, ahead=complete and draws_at_once(self.loader))

    def _given_out(self, batches: Iterator[Fetched], *, ahead: bool) -> Iterator[Any]:
        try:
            yield from map(self._given, self._looked_up(batches, ahead=ahead))
            self._watch.settle()
        finally:
            self._library.commit()

    # ---- a round

    def _begin(self) -> None:
        self._watch.settle()
        self._watch.forget()
        if self._data.changed(reread=self.model.depth > 0):
            self._say("the data set is another than it was: what is stored is not used any more")
            self._library.forget()
            self._library.shelf.data = self._data.identity
            self._library.shelf.length = self._data.length * self._views.count
        self._library.begin()

    def _say(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.tell(f"fxfreeze cache: {text}")

    # ---- a batch

    def _keys(self, indices: list[int]) -> Tensor:
        indices = [index + self._data.length if index < 0 else index for index in indices]
        return self._views.keys(indices, self.epoch, self._data.length)

    def _missing(self, indices: list[int]) -> list[int]:
        """The places of a batch that are stored nowhere."""
        if not self.model.depth:
            return list(range(len(indices)))
        return (~self._library.held(self._keys(indices))).nonzero().flatten().tolist()

    def _looked_up(self, batches: Iterator[Fetched], *, ahead: bool) -> Iterator[Looked]:
        """What is stored of each batch; the next one's is read while this one is used, if nothing else is to be read."""
        if not ahead:
            yield from map(self._look_up, batches)
            return
        with ThreadPoolExecutor(1, "fxfreeze-cache") as reader:
            coming: deque[Future[Looked]] = deque()
            for asked in range(len(self)):  # no more than there are: what a sampler does at its end, it does when asked
                coming.append(reader.submit(self._look_up, next(batches)))
                if asked:
                    yield coming.popleft().result()
            yield from (looked.result() for looked in coming)
            yield from map(self._look_up, batches)

    def _look_up(self, fetched: Fetched) -> Looked:
        keys = self._keys(fetched.indices)
        looked = Looked(fetched, keys, [], torch.zeros(0, dtype=torch.int64), [])
        absent = torch.arange(len(keys))
        for source in self._library.sources if self.model.depth else []:
            held = source.holds(keys[absent])
            if bool(held.any()):
                places = absent[held]
                try:
                    looked.pieces.append((source, places, self._read(source, keys[places])))
                except CacheError as error:
                    looked.lost.append((source, error))
                    continue
                absent = absent[~held]
        return looked._replace(absent=absent)

    def _read(self, source: Source, keys: Tensor) -> Rows:
        began, traffic = time.perf_counter(), self.traffic[-1]
        rows = source.read(keys, pinned=self._library.pinned)
        traffic.seconds += time.perf_counter() - began
        traffic.bytes += source.width * len(keys)
        traffic.count(source.tier, len(keys))
        source.epochs.add(len(self.traffic))
        traffic.cold |= len(source.epochs) == 1
        return rows

    def _given(self, looked: Looked) -> Any:
        """The batch to give out."""
        for source, error in looked.lost:
            self._library.lose(source, error)
        self._library.asked(looked.keys)
        fetched, keys, places = looked.fetched, looked.keys, looked.absent
        batch = fetched.batch
        self.traffic[-1].count("forward", len(places))
        if len(places) and places.tolist() != fetched.places:
            batch = self._batches.read([fetched.indices[place] for place in places.tolist()])
        if not looked.pieces:
            return self._yielded(keys, batch)
        return self._served(looked, keys, places, batch)

    def _yielded(self, keys: Tensor, batch: Any) -> Any:
        """A batch as it is, whose way to the model is watched."""
        if self._views.flip:
            batch = self._form.build(self._views.shown(self._form.inputs(batch), keys), self._form.rest(batch))
        if self._library.listening or self._watched < _CHECKED:
            self._watched += 1
            self._watch.expect(Yielded(keys, self._form.checksums(batch), own(self._form.rest(batch))))
        return batch

    def _served(self, looked: Looked, keys: Tensor, places: Tensor, batch: Any) -> Any:
        self._watch.forget()
        columns = [(where, {**rows.rest, "": rows.sums}) for _, where, rows in looked.pieces]
        fetched = None
        if len(places):
            inputs = self._views.shown(self._form.inputs(batch), keys[places])
            rest = self._form.rest(batch)
            sums = sums_of(self._form.checksums(self._form.build(inputs, rest)))
            columns.append((places, {**rest, "": sums}))
            fetched = places, inputs
        whole = joined(len(keys), columns)
        sums = whole.pop("")
        served = Served(self, keys, own(whole), sums, looked.pieces, fetched)
        boundaries = [Boundary(served, slot, example) for slot, example in enumerate(self._examples_of(len(keys)))]
        return self._form.build(boundaries, whole)

    def _examples_of(self, size: int) -> list[Example]:
        if size not in self._examples:
            self._examples[size] = [Example(tensor) for tensor in self._data.examples(size)]
        return self._examples[size]

    # ---- what the model asks

    def received(self, tensors: Sequence[Tensor], chain: Chain | None) -> Fill | None:
        """A call of the model: the rows of which batch it will compute."""
        found = self._watch.match(tensors, training=self.model._forward.training)
        if found is None or chain is None:
            return None
        batch, slots = found
        return self._library.fill_for(Called(chain, tensors, slots), batch)

    def valid(self, source: Source, call: Called) -> bool:
        return self._library.valid(source, call)

    def fill_for(self, call: Called, batch: Yielded | Served) -> Fill | None:
        return self._library.fill_for(call, batch)

    def inputs_of(self, keys: Tensor) -> list[Tensor]:
        """The model's inputs of these rows, read from the data set."""
        batch = self._batches.read((keys // self._views.count).tolist())
        return self._views.shown(self._form.inputs(batch), keys)


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(repr, known))}")


def _check_model(model: object) -> None:
    if not hasattr(model, "_forward") or not hasattr(model, "units"):
        raise TypeError(
            f"CachedLoader needs a FreezableModel, and got a {type(model).__name__}: pass what fxfreeze.compile(net, schedule) "
            "returned"
        )
