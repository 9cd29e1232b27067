"""Labelled images as bytes: split once and for all, class by class, then standardised by the training split."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fxfreeze.imports import ChoiceError, optional


class DataError(ChoiceError):
    """A data set's name that can't be turned into images; the message is one line with the remedy."""


class Images(NamedTuple):
    """pixels: [N, C, H, W] uint8; labels: [N] int64."""

    pixels: Tensor
    labels: Tensor


def stratified(images: Images, shares: Sequence[float], name: str, classes: Sequence[str]) -> list[Images]:
    """Disjoint parts of `images`: the rest, then for each share that part of every class, rounded, at least one image.

    The choice is random and fixed: numpy promises that RandomState's stream never changes. Each part keeps the order of
    `images`. `name` is the data set and `classes` its labels' names, for the DataError when a class has too few images.
    """
    stream = optional("numpy", "pip install numpy", DataError).random.RandomState(0)
    parts: list[list[Tensor]] = [[] for _ in range(1 + len(shares))]
    for label, title in enumerate(classes):
        members = (images.labels == label).nonzero().flatten()
        counts = [max(1, round(share * len(members))) for share in shares]
        rest = len(members) - sum(counts)
        if rest < 1:
            raise DataError(
                f"{name}: class {title!r} has {len(members)} images; at least {1 + len(shares)} are needed, "
                f"one for each of {1 + len(shares)} splits"
            )
        shuffled = members[torch.from_numpy(stream.permutation(len(members)))]
        for part, chosen in zip(parts, torch.split(shuffled, [rest, *counts]), strict=True):
            part.append(chosen)
    chosen_indices = (torch.cat(part).sort().values for part in parts)
    return [Images(images.pixels[indices], images.labels[indices]) for indices in chosen_indices]


def standardise(train: Images, *others: Images) -> list[TensorDataset]:
    """(pixel - mean) / deviation of each channel over `train`, as float32, beside the labels.

    A channel that is constant over `train` is only centred.
    """
    levels = torch.arange(256, dtype=torch.float64)
    # A histogram of each channel gives both moments exactly, without a float copy of the images.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in train.pixels.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)  # [C, 256]
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    deviation = torch.where(variance > 0, variance, 1).sqrt()
    shift, scale = (moment.float().reshape(-1, 1, 1) for moment in (mean, deviation))
    return [
        TensorDataset(images.pixels.to(torch.float32).sub_(shift).div_(scale), images.labels)
        for images in (train, *others)
    ]
