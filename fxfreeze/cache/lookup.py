"""What is stored of each batch, read while the one before it is used."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fxfreeze.cache.errors import CacheError
from fxfreeze.cache.fetch import Fetched
from fxfreeze.cache.library import Library
from fxfreeze.cache.shelf import Rows, Source
from fxfreeze.cache.traffic import Traffic

__all__ = ["Looked", "Lookup"]


class Looked(NamedTuple):
    """pieces: what is stored of a batch; absent: the places of what is not; lost: sources that can't be read."""

    fetched: Fetched
    keys: Tensor
    pieces: list[tuple[Source, Tensor, Rows]]
    absent: Tensor
    lost: list[tuple[Source, CacheError]]


class Lookup:
    """One epoch's. keys: the rows of a batch's samples; epoch: its number; traffic: where it is counted."""

    def __init__(self, library: Library, keys: Callable[[list[int]], Tensor], epoch: int, traffic: Traffic) -> None:
        self._library = library
        self._keys = keys
        self._epoch = epoch
        self._traffic = traffic

    def each(self, batches: Iterator[Fetched], *, ahead: int = 0) -> Iterator[Looked]:
        """ahead: how many batches there are at least, if each may be asked for while the one before it is used.

        No more are: what a sampler does at its end, it does when asked.
        """
        if ahead:
            with ThreadPoolExecutor(1, "fxfreeze-cache") as reader:
                coming: deque[Future[Looked]] = deque()
                for number in range(ahead):
                    coming.append(reader.submit(self._look_up, next(batches)))
                    if number:
                        yield coming.popleft().result()
                yield from (looked.result() for looked in coming)
        yield from map(self._look_up, batches)

    def _look_up(self, fetched: Fetched) -> Looked:
        keys = self._keys(fetched.indices)
        looked = Looked(fetched, keys, [], torch.zeros(0, dtype=torch.int64), [])
        absent = torch.arange(len(keys))
        for source in self._library.sources if self._library.model.depth else []:
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
        began, traffic = time.perf_counter(), self._traffic
        rows = source.read(keys, pinned=self._library.pinned)
        traffic.seconds += time.perf_counter() - began
        traffic.bytes += source.width * len(keys)
        traffic.count(source.tier, len(keys))
        source.epochs.add(self._epoch)
        traffic.cold |= len(source.epochs) == 1
        return rows
