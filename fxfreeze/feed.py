"""The batches of a profile: one again and again, or those of a loader."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from fxfreeze.imports import ChoiceError

__all__ = ["Feed"]

Arguments = tuple[tuple[Any, ...], dict[str, Any], Any]  # of a call, and the targets


class Feed:
    """Gives out arguments and targets, on the device of ``batch``.

    batch: (inputs, targets); loader: yields such batches, begun again at its end; those that have another number of samples
    than ``batch``, as the last one may, are passed over. Raises ChoiceError for what is no such batch.
    """

    def __init__(self, batch: Sequence[Any], loader: Iterable[Any] | None) -> None:
        self._given = _arguments(batch)
        args, kwargs, _ = copies = self.copied()
        self.example = kwargs if kwargs else args
        self.tensors = _tensors(copies)
        if not self.tensors or not self.tensors[0].dim():
            raise ChoiceError(
                "the batch's inputs hold no tensor with a dimension of samples: expected (inputs, targets)"
            )
        self.samples, self.device = len(self.tensors[0]), self.tensors[0].device
        self.fetches = loader is not None
        self._loader: Iterable[Any] = () if loader is None else loader
        self._batches: Iterator[Any] = iter(())

    def next(self) -> Arguments:
        """The next batch."""
        return self._fetched() if self.fetches else self.copied()

    def copied(self) -> Arguments:
        """A copy of the given batch, which whoever gets it may write into."""
        return pytree.tree_map_only(Tensor, _copy, self._given)  # type: ignore[no-any-return]

    def _fetched(self) -> Arguments:
        for begun_again in (False, True):
            if begun_again:
                self._batches = iter(self._loader)
            for batch in self._batches:
                given = _arguments(batch)
                if len(_tensors(given)[0]) == self.samples:
                    return pytree.tree_map_only(Tensor, self._here, given)  # type: ignore[no-any-return]
        raise ChoiceError(
            f"the loader yields no batch of {self.samples} samples, as the given one has: give profile one of the loader's"
        )

    def _here(self, tensor: Tensor) -> Tensor:
        here = tensor.to(self.device, non_blocking=True)
        return here.clone() if here.is_inference() else here


def _copy(tensor: Tensor) -> Tensor:
    """No part of the caller's tape, nor made in inference mode."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _arguments(batch: Any) -> Arguments:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = (
            f"{type(batch).__qualname__} of {len(batch)}"
            if isinstance(batch, tuple | list)
            else type(batch).__qualname__
        )
        raise ChoiceError(f"a batch is a {what}: expected (inputs, targets)")
    inputs, targets = batch
    if isinstance(inputs, dict):
        return (), inputs, targets
    return inputs if isinstance(inputs, tuple) else (inputs,), {}, targets


def _tensors(given: Arguments) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(given[:2]) if isinstance(leaf, Tensor)]
