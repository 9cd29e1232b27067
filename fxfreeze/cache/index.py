"""Which row holds which sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxfreeze.cache.errors import CorruptCache, MissingRow
from fxfreeze.cache.memory import sparse_zeros, tensor_bytes

__all__ = ["ROW", "SHARD", "RowIndex", "as_indices"]

# A place is a number: 1 + the row within its shard in the low 40 bits, the shard above. 0 is no place.
SHARD = 40
ROW = 2**SHARD - 1


def as_indices(indices: Tensor | Sequence[int], length: int) -> Tensor:
    """(n,) int64; IndexError for a sample that a data set of `length` does not have."""
    result = torch.as_tensor(indices, dtype=torch.int64, device="cpu").flatten()
    if result.numel() and (int(result.min()) < 0 or int(result.max()) >= length):
        raise IndexError(f"samples {int(result.min())} to {int(result.max())} of a data set of {length}")
    return result


class RowIndex:
    """The place of each sample's row; a sample has one at most. rows: how many have."""

    def __init__(self, length: int) -> None:
        self.rows = 0
        self._length = length
        self._shards = 0
        self._places = sparse_zeros(length)
        self._fast = tensor_bytes(self._places).cast("q")

    def add(self, name: str, samples: Tensor) -> None:
        """The next shard, with the samples (rows,) int64 of its rows. CorruptCache if one of them has a row already."""
        places = torch.arange(1, len(samples) + 1) + (self._shards << SHARD)
        if bool(self._places[samples].any()):
            raise CorruptCache(f"shard {name} holds samples that another shard holds")
        self._places[samples] = places
        if not torch.equal(self._places[samples], places):
            raise CorruptCache(f"shard {name} holds a sample twice")
        self._shards += 1
        self.rows += len(samples)

    def holds(self, samples: Tensor) -> Tensor:
        """(n,) bool."""
        return self._places[samples] != 0

    def places(self, samples: list[int]) -> list[int]:
        """Of each sample's row. MissingRow if one has none, IndexError if there is no such sample.

        By hand: for a batch's few hundred numbers a tensor operation costs more in its call than in its work.
        """
        if samples and min(samples) < 0:
            raise IndexError(f"sample {min(samples)} of a data set of {self._length}")
        places = list(map(self._fast.__getitem__, samples))
        if 0 in places:
            raise MissingRow(f"sample {samples[places.index(0)]} is not held")
        return places
