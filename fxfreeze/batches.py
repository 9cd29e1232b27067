"""The data of one training as tensors, and the order in which its batches come."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fxfreeze.imports import ChoiceError


class Split(NamedTuple):
    """images: [N, C, H, W] floating point; labels: [N] int64; both on the device that trains."""

    images: Tensor
    labels: Tensor


def of_classes(split: Split, classes: range) -> Split:
    """The samples whose label is in `classes`, labels counted from the first of them."""
    chosen = (split.labels >= classes.start) & (split.labels < classes.stop)
    return Split(split.images[chosen], split.labels[chosen] - classes.start)


class Batches:
    """Whole batches by step, in an order that depends on (seed, epoch) alone. A last partial batch is left out."""

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        if len(split.labels) < batch_size:
            raise ChoiceError(
                f"a batch of {batch_size} samples was asked for, but the training split holds {len(split.labels)}: "
                "use a smaller batch size (--batch-size)"
            )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.steps_per_epoch = len(split.labels) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Split:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.order(epoch).to(self.split.labels.device)
        chosen = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        return Split(self.split.images[chosen], self.split.labels[chosen])

    def order(self, epoch: int) -> Tensor:
        """[N] int64, the samples in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.split.labels), generator=generator)


class EpochSampler:
    """The batches of one epoch after another, from `first` on, as lists of indices: a DataLoader's batch sampler."""

    def __init__(self, batches: Batches, first: int = 0) -> None:
        self.batches, self.epoch = batches, first

    def __iter__(self) -> Iterator[list[int]]:
        order = self.batches.order(self.epoch)
        self.epoch += 1
        whole = order[: len(self) * self.batches.batch_size]
        yield from whole.view(len(self), -1).tolist()

    def __len__(self) -> int:
        return self.batches.steps_per_epoch
