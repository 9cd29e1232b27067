"""The samples that a data set is known by: read anew each epoch, and twice to find random augmentation."""

import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from fxfreeze.cache.contents import ContentsError, checksum
from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.generators import generators_kept
from fxfreeze.cache.transforms import random_transforms
from fxfreeze.cache.trees import qualified

__all__ = ["check_dataset", "differing", "digest", "probed", "random_transforms", "read", "read_seeded"]

_SEED = 20170615


def check_dataset(dataset: Any) -> None:
    """CacheRefusal for a data set that can't be asked for its i-th sample."""
    what = f"the data set, a {qualified(type(dataset))},"
    remedy = "use a map-style data set, which has __len__ and __getitem__"
    if isinstance(dataset, IterableDataset):
        raise CacheRefusal(f"{what} is iterable: its samples have no numbers to store activations under; {remedy}")
    for method in ("__getitem__", "__len__"):
        if not hasattr(type(dataset), method):
            raise CacheRefusal(f"{what} has no {method}; {remedy}")
    try:
        len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise CacheRefusal(f"{what} has no length ({error}); {remedy}") from error


def probed(length: int) -> list[int]:
    """Which samples, min(64, max(4, length // 16), length) of them, ascending: the same for one length, on any machine."""
    count = min(64, max(4, length // 16), length)
    return sorted(random.Random(_SEED).sample(range(length), count))


def read(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The samples, as a DataLoader reads them. Random generators are left as found, whatever the data set raises."""
    with generators_kept(dataset):
        return _samples(dataset, indices)


def read_seeded(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The samples, with the global generators seeded: random augmentation draws the same in any process."""
    with generators_kept(dataset):
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(_SEED)
        return _samples(dataset, indices)


def differing(dataset: Any, indices: Sequence[int]) -> int | None:
    """The first of the indices whose sample is another when read again, by one bit; None if there is none.

    The second reading goes on in the random stream where the first one ends; generators are left as found.
    CacheRefusal for samples that hold something whose contents can't be told.
    """
    with generators_kept(dataset):
        first = [_checksum(sample) for sample in _samples(dataset, indices)]
        again = [_checksum(sample) for sample in _samples(dataset, indices)]
    return next((index for index, a, b in zip(indices, first, again, strict=True) if a != b), None)


def digest(samples: Sequence[Any]) -> str:
    """Hex xxh3_128 over all that the samples hold, the same in any process. CacheRefusal as for `differing`."""
    return _checksum(list(samples))


def _samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    at_once = getattr(dataset, "__getitems__", None)
    return list(at_once(list(indices))) if at_once else [dataset[index] for index in indices]


def _checksum(value: Any) -> str:
    try:
        return checksum(value)
    except ContentsError as error:
        raise CacheRefusal(
            f"a sample holds a {error}, whose contents can't be told; return tensors, arrays, images, numbers or "
            "texts, or give fingerprint=, a text that changes whenever the data set does"
        ) from error
