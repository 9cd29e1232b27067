"""What a model computes at each depth, as identities of stores: found once, and anew when something that counts changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.identity import prefix_identity
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.outside import Outside
from fxfreeze.cache.served import Called
from fxfreeze.cache.shelf import Shelf, Source
from fxfreeze.numerics import switches
from fxfreeze.rows import like
from fxfreeze.rowwise import NotRowwise, Undecided, find_rows
from fxfreeze.sizes import dtype_text

if TYPE_CHECKING:
    from fxfreeze.chain import Chain
    from fxfreeze.frontier import Frontier
    from fxfreeze.model import FreezableModel

__all__ = ["Validity"]


@dataclass
class _Known:
    """identity: as of ``signs``; None where there is none."""

    outside: Outside
    signs: Any = None
    identity: Identity | None = None


class Validity:
    """shelf: of the data set; store_dtype: that rows are stored in; examples: of the model's inputs, as many as asked for.

    device: that the model runs on, once it is known.
    """

    def __init__(
        self,
        model: FreezableModel,
        shelf: Shelf,
        store_dtype: torch.dtype | None,
        examples: Callable[[int], list[Tensor]],
    ) -> None:
        self.model = model
        self.device: torch.device | None = None
        self.stored_as = "computed" if store_dtype is None else dtype_text(store_dtype)
        self._shelf = shelf
        self._examples = examples
        self._chain: weakref.ref[Chain] | None = None
        self._known: weakref.WeakKeyDictionary[Chain, dict[int, _Known]] = weakref.WeakKeyDictionary()
        self._checked: weakref.WeakKeyDictionary[Frontier, int] = weakref.WeakKeyDictionary()  # with how large a batch

    def meet(self, call: Called) -> None:
        """The model's latest call."""
        if call.chain.net is self.model.original:
            self._chain = weakref.ref(call.chain)
            self.device = call.tensors[0].device

    def forget(self) -> None:
        self._known.clear()

    def known(self, source: Source) -> bool | None:
        """Whether the source was found to hold what the model computes; None if it was never asked."""
        chain = None if self._chain is None else self._chain()
        known = None if chain is None else self._known.get(chain, {}).get(source.depth)
        if known is None or known.signs is None:  # the thread that reads ahead may ask while it is being found
            return None
        return known.identity == source.identity

    def identity(self, call: Called, depth: int) -> Identity | None:
        """Of the store of that depth; None where the chain has none, or does not treat each sample by itself."""
        chain = call.chain
        depths = self._known.setdefault(chain, {})
        if depth not in depths:
            depths[depth] = _Known(Outside(chain.frontier(depth).plain))
        known = depths[depth]
        device = chain.computation.device
        signs = self.model._forward.batch_size, list(call.slots), switches(device), known.outside.signs()
        if known.signs != signs:
            known.identity = self._find(call, depth)
            known.signs = signs
        return known.identity

    def _find(self, call: Called, depth: int) -> Identity | None:
        chain = call.chain
        if depth > chain.depth or not chain.reaches(depth):
            return None
        try:
            for each in {depth, chain.depth}:
                if not any(self._rows(call, chain.frontier(each))):
                    return None
        except NotRowwise:
            return None
        backend = "plain" if self.model.backend == "auto" else self.model.backend
        prefix = prefix_identity(chain, depth, call.tensors, call.slots, self.model._forward.batch_size, backend)
        return self._shelf.whole({**prefix, "stored as": self.stored_as})

    def refuse(self, call: Called) -> str:
        """CacheRefusal that says why the chain's boundary has no rows; or why the data set's samples can't tell."""
        try:
            self._rows(call, call.chain.frontier(call.chain.depth))
        except Undecided as error:
            return str(error)
        except NotRowwise as error:
            raise CacheRefusal(
                f"the frozen part can't be cached: {error}, so a sample has no activations of its own. Freeze to a depth "
                "before it, or change the layer (give a batch norm running statistics)"
            ) from error
        raise CacheRefusal(
            f"the frozen part can't be cached: nothing that crosses to the live part at depth {call.chain.depth} is of a sample"
        )

    def _rows(self, call: Called, frontier: Frontier) -> tuple[bool, ...]:
        """Which values hold rows, found with as many different samples as a step has. NotRowwise."""
        size = max(self.model._forward.batch_size, len(call.tensors[0]))
        samples = self._samples(call, size)
        fresh = frontier._rows is None
        rows = frontier.rows(samples)
        if not fresh and self._checked.get(frontier, 0) < size:  # of fewer samples, it may have seemed so
            rows = find_rows(frontier.plain, frontier.names, samples, frontier.whole)
        self._checked[frontier] = size
        return rows

    def _samples(self, call: Called, size: int) -> list[Tensor]:
        """Samples of the data set, as the call has them."""
        examples = self._examples(size if size > 1 else 4)
        return [like(examples[slot], tensor) for slot, tensor in zip(call.slots, call.tensors, strict=True)]
