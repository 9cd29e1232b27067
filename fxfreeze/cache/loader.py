"""CachedLoader: a DataLoader that gives out the frozen part's activations in place of its inputs, once they are stored."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fxfreeze.cache.arguments import as_bytes, as_directory, as_dtype, check_choice, check_model
from fxfreeze.cache.dataset import KnownData
from fxfreeze.cache.fetch import Batches, Fetched, check_loader, draws_at_once
from fxfreeze.cache.library import Library
from fxfreeze.cache.lookup import Looked, Lookup
from fxfreeze.cache.placement import Placement
from fxfreeze.cache.served import Called, Served, Yielded, joined, own, sums_of
from fxfreeze.cache.shelf import Shelf, Source
from fxfreeze.cache.traffic import Traffic
from fxfreeze.cache.views import Views
from fxfreeze.cache.watch import Watch
from fxfreeze.cache.worth import Worth
from fxfreeze.stored import Boundary, Example, Fill

if TYPE_CHECKING:
    from fxfreeze.chain import Chain
    from fxfreeze.model import FreezableModel

__all__ = ["CachedLoader"]

NEVER_CALLED = (
    "the model was not called in a whole epoch, so nothing could be stored: call what fxfreeze.compile returned, in place of "
    "the network that was compiled"
)
_CHECKED = 8  # batches before anything is frozen whose way to the model is watched: mixup is refused before it costs


class CachedLoader:
    """Iterates like ``loader``: the same samples in the same order and batches, the same random numbers drawn.

    Once units of ``model`` are frozen, what they compute is stored by sample while training goes on; later the batches hold
    a ``Boundary`` in place of each model input, which the model takes like the input. Labels, and whatever else a batch
    holds, are stored too: then the data set is read only for a few probed samples each epoch. Other attributes are the
    wrapped loader's, to read and to set.

    directory: of the stores, one for each frozen part and data set, made when it is needed; runs with the same share them.
    inputs: what of a batch the model receives: keys of a dict (default: those that are parameters of its forward), positions
    or fields of a tuple (default: the first).
    fingerprint: names the data set, in place of checksums of probed samples.
    when: "auto" stores only what pays, measured; "always".
    max_bytes: no store takes more; nor does any take the last 5% of a disk.
    views: how many drawings of a randomly augmented sample are stored; "flip": a sample and its mirror image.
    augmented: "freeze" trains on the first drawing of each sample.
    placement: where complete stores are kept while they serve: "device", "ram", "disk", or "auto" by what has room.
    store_dtype: a narrower floating point type to store in, such as torch.bfloat16 or "bf16".

    Raises CacheRefusal (a ValueError) for what can't be cached with right results, at once or in the first epoch, and
    ValueError or TypeError for impossible arguments, such as a directory that can be neither written nor made.
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
        store_dtype: torch.dtype | str | None = None,
    ) -> None:
        check_choice("when", when, ("auto", "always"))
        check_choice("augmented", augmented, ("refuse", "freeze"))
        check_choice("placement", placement, ("auto", "device", "ram", "disk"))
        most, dtype, folder = as_bytes(max_bytes), as_dtype(store_dtype), as_directory(directory)
        check_model(model)
        check_loader(loader)
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
        self._examples: list[Example] = []  # of as many samples as the largest batch
        length = self._data.length * self._views.count
        shelf = Shelf(folder, self._data.identity, length)
        worth = Worth(model, shelf, when=when, max_bytes=most, store_dtype=dtype, say=self._say)
        kept = Placement(placement, self._say)
        self._library = Library(model, shelf, self._form.columns, dtype, worth, kept, self._data.examples, self._say)
        self._watch = Watch(self._form.names)
        self._watched = 0
        self._running = 0  # iterators
        self._called = False  # whether the model was, in this round
        self._reread = False  # whether the data set was looked at in this round
        self._batches = Batches(loader, self._missing)
        model._forward.attach(self)
        self.loader = loader  # last, for from now on what it has is set there

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

    def __setattr__(self, name: str, value: Any) -> None:
        own = "loader" not in vars(self) or name in vars(self) or hasattr(type(self), name)
        if own or not hasattr(self.loader, name):
            super().__setattr__(name, value)
        else:
            setattr(self.loader, name, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CachedLoader can't be pickled or copied, for its model hands it what it computes: pickle the DataLoader that "
            "it wraps, its .loader, and make another CachedLoader of that and of the model there"
        )

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
        lookup = Lookup(self._library, self._keys, len(self.traffic), self.traffic[-1])
        ahead = len(self) if complete and draws_at_once(self.loader) else 0
        return self._given_out(lookup.each(self._arriving(batches), ahead=ahead))

    def _arriving(self, batches: Iterator[Fetched]) -> Iterator[Fetched]:
        """Before the first one that may be stored, the data set is looked at."""
        for fetched in batches:
            if self.model.depth and not self._reread:
                self._look_at_data(reread=True)
            yield fetched

    def _given_out(self, batches: Iterator[Looked]) -> Iterator[Any]:
        yielded, replaced = None, True  # whether all batches were replaced on their way to the model
        self._running += 1
        frozen = self.model.depth > 0
        try:
            for looked in batches:
                batch, yielded = self._given(looked)
                yield batch
                replaced &= yielded is not None and self._watch.settle(yielded)
                self._watched += yielded is not None
            if yielded is not None and replaced:
                self._watch.refuse(yielded)
            if frozen and not self._called and not self.model._forward.compiled:
                self._say(NEVER_CALLED)
        finally:
            self._running -= 1
            self._watch.blind = False
            self._library.commit()

    # ---- a round

    def _begin(self) -> None:
        if not self._running:
            self._watch.forget()
            self._called = False
        self._look_at_data(reread=self.model.depth > 0)
        self._library.begin()

    def _look_at_data(self, *, reread: bool) -> None:
        """Give up what is stored if the data set is another than it was."""
        self._reread = reread
        if self._data.changed(reread=reread):
            self._say("the data set is another than it was: what is stored is not used any more")
            self._library.forget()
            self._library.shelf.data = self._data.identity
            self._library.shelf.length = self._data.length * self._views.count
            self._examples.clear()
            self._watch.forget()

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

    def _given(self, looked: Looked) -> tuple[Any, Yielded | None]:
        """The batch to give out; and what is to come to the model of one that is as it was, if that is watched."""
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
        return self._served(looked, keys, places, batch), None

    def _yielded(self, keys: Tensor, batch: Any) -> tuple[Any, Yielded | None]:
        """A batch as it is."""
        if self._views.flip:
            batch = self._form.build(self._views.shown(self._form.inputs(batch), keys), self._form.rest(batch))
        listening = self._library.listening
        if listening and self.model._forward.compiled:
            self._say(
                "nothing is stored by a model under torch.compile, which nobody can look into; what the model itself stores "
                "in an epoch will be used"
            )
        if not listening and self._watched >= _CHECKED:
            self._watch.blind = True
            return batch, None
        yielded = Yielded(keys, self._form.checksums(batch), own(self._form.rest(batch)))
        self._watch.expect(yielded)
        return batch, yielded

    def _served(self, looked: Looked, keys: Tensor, places: Tensor, batch: Any) -> Any:
        self._watch.blind = False
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
        if not self._examples or size > len(self._examples[0].tensor):
            self._examples = [Example(tensor) for tensor in self._data.examples(size)]
        return [example.first(size) for example in self._examples]

    # ---- what the model asks

    def received(self, tensors: Sequence[Tensor], chain: Chain | None) -> Fill | None:
        """A call of the model: the rows of which batch it will compute."""
        self._called = True
        forward = self.model._forward
        beside = [tap._watch for tap in forward.taps if isinstance(tap, CachedLoader) and tap is not self]
        found = self._watch.match(tensors, training=forward.training, beside=beside)
        if found is None or chain is None or not self._reread:
            return None
        batch, slots = found
        return self._library.fill_for(Called(chain, tensors, slots), batch)

    def valid(self, source: Source, call: Called) -> bool:
        self._called = True
        return self._library.valid(source, call)

    def fill_for(self, call: Called, batch: Yielded | Served) -> Fill | None:
        return self._library.fill_for(call, batch)

    def inputs_of(self, keys: Tensor) -> list[Tensor]:
        """The model's inputs of these rows, read from the data set."""
        batch = self._batches.read((keys // self._views.count).tolist())
        return self._views.shown(self._form.inputs(batch), keys)
