"""Several views of a sample: which one an epoch shows, and the two of a horizontal flip."""

from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from fxfreeze.cache.contents import row_bytes
from fxfreeze.cache.errors import CacheRefusal

__all__ = ["Views"]

_SEED = 1706_04983


class Views:
    """views: how many of each sample are stored, each one drawn by the data set; or "flip": it and its mirror image.

    In each block of as many epochs every sample shows each of its views once, in the first block in their order, later
    from a random one on. ValueError.
    """

    def __init__(self, views: int | str) -> None:
        if views != "flip" and (isinstance(views, bool) or not isinstance(views, int) or views < 1):
            raise ValueError(f'views is {views!r}: expected a number of views from 1, or "flip"')
        self.flip = views == "flip"
        self.count = 2 if views == "flip" else int(views)
        self._block: int | None = None
        self._first = torch.empty(0, dtype=torch.int64)

    def __str__(self) -> str:
        return "flip" if self.flip else str(self.count)

    def keys(self, indices: list[int], epoch: int, length: int) -> Tensor:
        """(n,) int64: the rows of samples in an epoch."""
        samples = torch.tensor(indices, dtype=torch.int64)
        if self.count == 1:
            return samples
        block, turn = divmod(epoch, self.count)
        if block != self._block:
            generator = torch.Generator().manual_seed(_SEED + block)
            drawn = torch.randint(self.count, (length,), generator=generator)
            # The first block fills the views one after the other, so that an epoch is stored whole or not at all.
            self._first, self._block = (drawn if block or self.flip else torch.zeros_like(drawn)), block
        return samples * self.count + (self._first[samples] + turn) % self.count

    def shown(self, inputs: list[Tensor], keys: Tensor) -> list[Tensor]:
        """The inputs (n, ...) in the views that the keys name; whatever the data set drew, for it draws views itself."""
        if not self.flip:
            return inputs
        for value in inputs:
            if value.dim() != 4:
                raise CacheRefusal(f'views="flip" mirrors images (n, c, h, w), and an input is {tuple(value.shape)}')
        mirrored = [value.flip(-1) for value in inputs]
        pairs = zip(_sums(inputs), _sums(mirrored), strict=True)
        other = torch.tensor([a > b for a, b in pairs]) != (keys % 2 == 1)
        return [torch.where(other.view(-1, 1, 1, 1), b, a) for a, b in zip(inputs, mirrored, strict=True)]


def _sums(inputs: list[Tensor]) -> list[Any]:
    return list(zip(*(map(xxh3_64_intdigest, row_bytes(value)) for value in inputs), strict=True))
