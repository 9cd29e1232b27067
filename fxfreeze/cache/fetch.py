"""The batches of a wrapped loader, in its order, of which only those samples are read that are asked for."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
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
        keep = self._loader.num_workers > 0 and self._loader.persistent_workers
        if keep and workers:
            self._persistent = self._persistent or self._make(workers)
            loader = self._persistent
        else:
            loader = self._make(workers)
        generator = torch.default_generator if self._loader.generator is None else self._loader.generator
        before = generator.get_state()
        iterator = iter(loader)
        if keep and not workers and self._seeded:
            generator.set_state(before)
        self._seeded = True
        return iterator

    def read(self, indices: list[int]) -> Any:
        """These samples, collated, at once and in this process."""
        return self._loader.collate_fn(_Samples(self._loader.dataset).of(indices))

    def _make(self, workers: bool) -> DataLoader[Any]:
        loader = self._loader
        own: dict[str, Any] = {"num_workers": 0}
        if workers and loader.num_workers:
            own = {
                "num_workers": loader.num_workers,
                "timeout": loader.timeout,
                "worker_init_fn": loader.worker_init_fn,
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
        samples: Any = _Samples(loader.dataset)
        collate: Any = _Collate(loader.collate_fn)
        return DataLoader(
            samples,
            batch_sampler=_Requests(loader._index_sampler, self._missing),  # type: ignore[arg-type]
            collate_fn=collate,
            pin_memory=loader.pin_memory,
            generator=loader.generator,
            **own,
        )


class _Requests:
    """A batch sampler that says of each batch what is to be read."""

    def __init__(self, batches: Any, missing: Callable[[list[int]], list[int]]) -> None:
        self._batches = batches
        self._missing = missing

    def __iter__(self) -> Iterator[Request]:
        for batch in self._batches:
            indices = [_index(value) for value in batch]
            yield Request(indices, self._missing(indices))

    def __len__(self) -> int:
        return len(self._batches)


class _Samples:
    """A data set that reads what a request asks for."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def of(self, indices: list[int]) -> list[Any]:
        many = getattr(self._dataset, "__getitems__", None)
        return list(many(indices)) if many else [self._dataset[index] for index in indices]

    def __getitems__(self, request: Request) -> tuple[Request, list[Any]]:
        return request, self.of([request.indices[place] for place in request.places])

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("samples are read by request")

    def __len__(self) -> int:
        return len(self._dataset)


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
