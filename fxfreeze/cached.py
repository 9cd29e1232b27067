"""The batches of a run through the cache, and what it did."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from fxfreeze.batches import Batches, EpochSampler
from fxfreeze.imports import ChoiceError, optional
from fxfreeze.model import FreezableModel

__all__ = ["CacheRecord", "CachedBatches"]

_REMEDY = "the cache needs it: pip install xxhash 'safetensors>=0.8'"


@dataclass(frozen=True)
class CacheRecord:
    """notes: what was stored or not, and why; epochs: where the samples of each came from, and what reading took."""

    notes: list[str]
    epochs: list[dict[str, Any]]


class CachedBatches:
    """(inputs or what is stored in their place, labels), batch after batch: those of `batches`, in their order."""

    def __init__(self, batches: Batches, model: FreezableModel) -> None:
        for package in ("xxhash", "safetensors"):
            optional(package, _REMEDY, ChoiceError)
        from fxfreeze.cache.loader import CachedLoader

        loader: DataLoader[Any] = DataLoader(
            TensorDataset(*batches.split),
            batch_sampler=EpochSampler(batches),
            generator=torch.Generator(),  # of its own: the run's random numbers are as without a cache
        )
        self._folder = tempfile.TemporaryDirectory(prefix="fxfreeze-")  # goes with the run
        self._loader = CachedLoader(loader, model, self._folder.name)
        self._loader.tell = lambda text: None  # type: ignore[method-assign]
        self._stream = self._epochs()

    def __next__(self) -> Any:
        return next(self._stream)

    def record(self) -> CacheRecord:
        epochs = [
            {**vars(traffic), "samples": dict(traffic.samples), "bandwidth": traffic.bandwidth}
            for traffic in self._loader.traffic
        ]
        return CacheRecord(list(self._loader.notes), epochs)

    def _epochs(self) -> Iterator[Any]:
        while True:
            yield from self._loader
