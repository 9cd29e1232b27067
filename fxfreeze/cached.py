"""The batches of a run through the cache, and what it did."""

import shutil
import tempfile
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxfreeze.batches import Batches, EpochSampler
from fxfreeze.imports import ChoiceError, optional
from fxfreeze.model import FreezableModel, compile
from fxfreeze.recipes import CACHED
from fxfreeze.schedule import FreezeOut

__all__ = ["CacheRecord", "CachedBatches", "rehearse", "require_packages"]


def require_packages() -> None:
    """Raises ChoiceError where a package that the cache needs is missing."""
    remedy = "the cache needs it: pip install xxhash 'safetensors>=0.8', or name the other rows with --rows"
    for package in ("xxhash", "safetensors"):
        optional(package, remedy, ChoiceError)


@dataclass(frozen=True)
class CacheRecord:
    """notes: what was stored or not, and why; epochs: where the samples of each came from, and what reading took."""

    notes: list[str]
    epochs: list[dict[str, Any]]


class CachedBatches:
    """(inputs or what is stored in their place, labels), batch after batch: those of `batches`, in their order."""

    def __init__(self, batches: Batches, model: FreezableModel) -> None:
        require_packages()
        from fxfreeze.cache.loader import CachedLoader

        loader: DataLoader[Any] = DataLoader(
            TensorDataset(*batches.split),
            batch_sampler=EpochSampler(batches),
            generator=torch.Generator(),  # of its own: the run's random numbers are as without a cache
        )
        folder = tempfile.mkdtemp(prefix="fxfreeze-")
        self._loader = CachedLoader(loader, model, folder)
        self._loader.tell = lambda text: None  # type: ignore[method-assign]
        self._stream = _endless(self._loader)
        self.close = weakref.finalize(self, _end, self._stream, folder)  # at the latest, the stores go with the run

    def __next__(self) -> Any:
        return next(self._stream)

    def record(self) -> CacheRecord:
        epochs = [
            {**vars(traffic), "samples": dict(traffic.samples), "bandwidth": traffic.bandwidth}
            for traffic in self._loader.traffic
        ]
        return CacheRecord(list(self._loader.notes), epochs)


def rehearse(net: nn.Module, batches: Batches) -> None:
    """Raises ChoiceError for what the cache refuses, which a run would find out at a freeze. `net` is not used again."""
    require_packages()
    from fxfreeze.cache import CacheRefusal

    model = compile(net, FreezeOut(1), example_inputs=(batches.split.images[:2],)).train()
    model.freeze(len(model.units) - 1)
    stream = CachedBatches(batches, model)
    try:
        images, _ = next(stream)
        model(images)  # with gradients, as a training step: only those tell how a row is computed
    except CacheRefusal as error:
        raise ChoiceError(f"{CACHED} can't be: {error}; or name the other rows with --rows") from error
    finally:
        stream.close()


def _endless(loader: Any) -> Generator[Any]:
    while True:
        yield from loader


def _end(stream: Generator[Any], folder: str) -> None:
    stream.close()  # an epoch that was stopped may still read and write
    shutil.rmtree(folder, ignore_errors=True)
