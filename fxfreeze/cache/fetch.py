"""The batches of a wrapped loader, in its order, of which only those samples are read that are asked for."""

import operator
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    get_worker_info,
)

from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.generators import generators_kept
from fxfreeze.cache.trees import fresh

__all__ = ["Batches", "Fetched", "check_loader", "collated", "draws_at_once"]


class Request(NamedTuple):
    """indices: of a batch's samples; places: which of them are to be read."""

    indices: list[int]
    places: list[int]


class Fetched(NamedTuple):
    """batch: the samples at ``places``, collated; None if there are none."""

    indices: list[int]
    places: list[int]
    batch: Any


class Batches:
    """Iterates as ``loader`` would: same order, workers and pinning, and the same numbers drawn from its generator.

    missing: of a batch's indices, the places of those to be read; asked as soon as the sampler has given them, up to the
    workers' prefetching ahead.
    """

    def __init__(self, loader: DataLoader[Any], missing: Callable[[list[int]], list[int]]) -> None:
        self._loader = loader
        self._missing = missing
        self._persistent: DataLoader[Any] | None = None
        self._seeded = False  # a loader whose workers persist draws their seed once

    def epoch(self, *, workers: bool) -> Iterator[Fetched]:
        """workers: whether the wrapped loader's read the samples, or this process does."""
        loader = self._loader
        count = loader.num_workers
        keep = count > 0 and loader.persistent_workers
        first = not (keep and self._seeded)
        self._seeded = True
        if count and workers:
            made = self._persistent or self._make(_Requests(loader._index_sampler, self._missing), count, seeded=first)
            self._persistent = made if keep else None
            return iter(made)
        requests = _Requests(loader._index_sampler, self._missing)
        iterator = iter(self._make(requests, 0, seeded=first))
        if count:
            assert loader.prefetch_factor is not None
            requests.run_ahead(count * loader.prefetch_factor, again=first)
        return iterator

    def read(self, indices: list[int]) -> Any:
        """These samples, collated, at once and in this process."""
        return self._loader.collate_fn(_Samples(self._loader.dataset).of(indices))

    def _make(self, requests: "_Requests", workers: int, *, seeded: bool) -> DataLoader[Any]:
        """seeded: whether the workers' seed is drawn from the wrapped loader's generator."""
        loader = self._loader
        own: dict[str, Any] = {"num_workers": 0}
        if workers:
            own = {
                "num_workers": workers,
                "timeout": loader.timeout,
                "worker_init_fn": _Start(loader.worker_init_fn),
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
        samples: Any = _Samples(loader.dataset)
        collate: Any = _Collate(loader.collate_fn)
        return DataLoader(
            samples,
            batch_sampler=requests,  # type: ignore[arg-type]
            collate_fn=collate,
            pin_memory=loader.pin_memory,
            generator=loader.generator if seeded else torch.Generator(),
            **own,
        )


class _Requests:
    """A batch sampler that says of each batch what is to be read. One iterator at a time: itself."""

    def __init__(self, batches: Any, missing: Callable[[list[int]], list[int]]) -> None:
        self._batches = batches
        self._missing = missing
        self._ahead: deque[list[int]] | None = None

    def run_ahead(self, count: int, *, again: bool) -> None:
        """Draw so many batches now, and from now on one with each that is asked for, as if it had gone to a worker.

        again: begin anew, which a loader does once its workers have started.
        """
        if again:
            iter(self)
        self._ahead = deque(islice(self._drawn, count))

    def __iter__(self) -> Iterator[Request]:
        # At once: a batch sampler may draw when it is asked for an iterator.
        self._drawn = ([_index(value) for value in batch] for batch in iter(self._batches))
        return self

    def __next__(self) -> Request:
        if self._ahead:
            indices = self._ahead.popleft()
            self._ahead.extend(islice(self._drawn, 1))
        else:
            indices = next(self._drawn)
        return Request(indices, self._missing(indices))

    def __len__(self) -> int:
        return len(self._batches)


class _Samples:
    """A data set that reads what a request asks for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def of(self, indices: list[int]) -> list[Any]:
        many = getattr(self.dataset, "__getitems__", None)
        return list(many(indices)) if many else [self.dataset[index] for index in indices]

    def __getitems__(self, request: Request) -> tuple[Request, list[Any]]:
        return request, self.of([request.indices[place] for place in request.places])

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("samples are read by request")

    def __len__(self) -> int:
        return len(self.dataset)


class _Start:
    """Begins a worker: to the user's function, and all that runs there, its data set is the user's."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self._function = function

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # it is frozen
        if self._function is not None:
            self._function(worker)


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, read: tuple[Request, list[Any]]) -> Fetched:
        request, samples = read
        return Fetched(*request, self._collate(samples) if samples else None)


def _index(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise CacheRefusal(
            f"the sampler gives {value!r}, a {type(value).__qualname__}: rows are stored by whole numbers that index samples"
        ) from None


def draws_at_once(loader: DataLoader[Any]) -> bool:
    """Whether the loader's sampler draws the order of an epoch all at once, so that asking it early changes nothing."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler or getattr(sampler, "replacement", False):
        return False
    return type(sampler) in (RandomSampler, SequentialSampler, SubsetRandomSampler, DistributedSampler)


def collated(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch of samples; random generators that the collate function draws from are left as found."""
    with generators_kept(collate):
        return collate([fresh(sample) for sample in samples])


def check_loader(loader: Any) -> None:
    """CacheRefusal for loaders whose batches can't be told apart by samples."""
    if not isinstance(loader, DataLoader):
        raise CacheRefusal(f"loader is a {type(loader).__qualname__}: expected a torch.utils.data.DataLoader")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise CacheRefusal(
            f"the loader is a {type(loader).__qualname__} with an __iter__ of its own, whose batches may be others than its "
            "samples collated; pass a torch.utils.data.DataLoader"
        )
    if loader.batch_sampler is None:
        raise CacheRefusal(
            "the loader has batch_size=None: its data set makes the batches itself, and no sample has an index of its own; "
            "let the DataLoader batch"
        )
    if not getattr(loader, "in_order", True):
        raise CacheRefusal("the loader has in_order=False: its batches come in an order that can't be repeated")
