"""The batches that a CachedLoader gives out: as the wrapped loader yielded them, or with stored activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from fxfreeze.cache.errors import CacheError
from fxfreeze.cache.shelf import Rows, Source
from fxfreeze.rows import like, movable
from fxfreeze.stored import Fill, Part

if TYPE_CHECKING:
    from torch import nn

    from fxfreeze.chain import Chain
    from fxfreeze.model import FreezableModel

__all__ = ["Called", "Provider", "Served", "Yielded", "joined", "own", "sums_of"]


class Called(NamedTuple):
    """A call of the model. slots: which of the loader's inputs each tensor is."""

    chain: Chain
    tensors: Sequence[Tensor]
    slots: Sequence[int]


class Provider(Protocol):
    """The loader, as its batches see it."""

    model: FreezableModel

    def valid(self, source: Source, call: Called) -> bool: ...

    def fill_for(self, call: Called, batch: Yielded | Served) -> Fill | None: ...

    def inputs_of(self, keys: Tensor) -> list[Tensor]: ...


@dataclass
class Yielded:
    """A batch as the wrapped loader yields it. keys: (n,) int64 of its rows; sums: per input leaf, of each row's bytes;
    seen: whether the model has received it; instead: dtypes and shapes of what it was trained on meanwhile, if not."""

    keys: Tensor
    sums: list[list[int]]
    rest: Mapping[str, Any]
    seen: bool = False
    instead: str | None = None

    @property
    def input_sums(self) -> Tensor:
        return sums_of(self.sums)


@dataclass
class Served:
    """A batch of which at least some samples are stored.

    pieces: (source, places (k,) int64, rows), of places that are stored; fetched: (places, inputs), of the others.
    """

    provider: Provider
    keys: Tensor
    rest: Mapping[str, Any]
    input_sums: Tensor
    pieces: list[tuple[Source, Tensor, Rows]]
    fetched: tuple[Tensor, list[Tensor]] | None
    size: int = field(init=False)
    depth: int = field(init=False)
    least: int = field(init=False)
    _given: set[int] = field(default_factory=set)  # pieces whose very rows a call of the model has

    def __post_init__(self) -> None:
        self.size = len(self.keys)
        depths = [source.depth for source, _, _ in self.pieces]
        self.depth, self.least = max(depths), 0 if self.fetched else min(depths)

    def parts(self, chain: Chain, tensors: Sequence[Tensor], slots: Sequence[int]) -> list[Part]:
        call = Called(chain, tensors, slots)
        parts, lost = [], []
        for number, (source, places, _) in enumerate(self.pieces):
            rows = self._rows(number, tensors[0].device) if self.provider.valid(source, call) else None
            if rows is None:
                lost.append(places)
            else:
                parts.append(Part(source.depth, None if len(places) == self.size else places, rows))
        if self.fetched is not None:
            places, inputs = self.fetched
            parts.append(self._inputs_part(places, [value.clone() for value in inputs], call))
        if lost:
            places = torch.cat(lost).sort().values
            parts.append(self._inputs_part(places, self.provider.inputs_of(self.keys[places]), call))
        return parts

    def fill(self, chain: Chain, tensors: Sequence[Tensor], slots: Sequence[int]) -> Fill | None:
        return self.provider.fill_for(Called(chain, tensors, slots), self)

    def inputs(self) -> list[Tensor]:
        return self.provider.inputs_of(self.keys)

    def is_for(self, net: nn.Module) -> bool:
        return self.provider.model.original is net

    def _rows(self, number: int, device: torch.device) -> list[Tensor] | None:
        """A piece's rows for one call, which may hand them to the user: no other call has their memory. None if lost."""
        source, places, rows = self.pieces[number]
        if number in self._given:  # and perhaps written into since
            try:
                rows = source.read(self.keys[places])
            except CacheError:
                return None
        moved = [row.to(device, non_blocking=True) for row in rows.boundary]
        if any(a is b for a, b in zip(moved, rows.boundary, strict=True)):
            self._given.add(number)
        return moved

    def _inputs_part(self, places: Tensor, inputs: list[Tensor], call: Called) -> Part:
        """places: ascending."""
        moved = [like(inputs[slot], tensor) for slot, tensor in zip(call.slots, call.tensors, strict=True)]
        return Part(0, None if len(places) == self.size else places, moved)


def sums_of(sums: list[list[int]]) -> Tensor:
    """(n,) int64: one checksum for each row, of those of its input leaves."""
    rows = sums[0] if len(sums) == 1 else [xxh3_64_intdigest(repr(row).encode()) for row in zip(*sums, strict=True)]
    return torch.tensor(rows, dtype=torch.uint64).view(torch.int64)


def own(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Copies: a training loop may change the labels that it was given."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in columns.items()}


def joined(size: int, pieces: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> dict[str, Any]:
    """Columns of a whole batch, tensors or lists, from (places, columns)."""
    if len(pieces) == 1 and len(pieces[0][0]) == size:
        return dict(pieces[0][1])
    whole: dict[str, Any] = {}
    for places, columns in pieces:
        for name, value in columns.items():
            if isinstance(value, Tensor):
                target = whole.setdefault(name, value.new_empty((size, *value.shape[1:])))
                movable(target)[places] = movable(value)
            else:
                target = whole.setdefault(name, [None] * size)
                for place, item in zip(places.tolist(), value, strict=True):
                    target[place] = item
    return whole
