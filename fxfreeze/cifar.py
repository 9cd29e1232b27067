"""CIFAR-10 and CIFAR-100 from the files of their authors' "python version", the ones that torchvision uses too.

The files are pickles. They are read by an unpickler that can build arrays, strings, numbers, lists and dictionaries and
nothing else, so a file from anywhere can be opened.
"""

import hashlib
import http.client
import os
import pickle
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fxfreeze.images import DataError, Images, stratified
from fxfreeze.imports import one_line, optional


class Source(NamedTuple):
    """Where a data set comes from, and the files of its folder; md5 is the archive's."""

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str  # the key of a batch that holds them
    classes: int


SOURCES = {
    "cifar10": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        classes=10,
    ),
    "cifar100": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        classes=100,
    ),
}
COUNTS = (45_000, 5_000, 10_000)  # images in train, val and test
VAL_SHARE = 0.1  # of the training images: 5,000
TIMEOUT = 60.0  # seconds without a byte


def default_root() -> Path:
    """Where the data sets are looked for and downloaded to when no root is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxfreeze" / "data"


def load(name: str, root: Path, download: bool) -> tuple[Images, Images, Images]:
    """(train, val, test) of "cifar10" or "cifar100": 32 x 32 RGB.

    root: the folder that holds `cifar-10-batches-py` or `cifar-100-python`; download: fetch them into it if a file is
    missing. val is a fixed tenth of the training images, class by class.
    Raises DataError for a missing or foreign file, and for a download that fails or is not what was expected.
    """
    source = SOURCES[name]
    folder = root / source.folder
    missing = [file for file in (*source.train, source.test) if not (folder / file).is_file()]
    if missing and download:
        _download(source, root)
    elif missing:
        raise DataError(
            f"{name}: no file {missing[0]} in {folder}; name the folder that holds {source.folder} with root= "
            "(--data-root), or allow the download with download=True (--download)"
        )
    batches = [_read(folder / file, source) for file in source.train]
    whole = Images(torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches]))
    train, val = stratified(whole, (VAL_SHARE,), name, [str(label) for label in range(source.classes)])
    return train, val, _read(folder / source.test, source)


def _read(path: Path, source: Source) -> Images:
    batch = _unpickle(path)
    numpy = optional("numpy", "pip install numpy", DataError)
    pixels, labels = (batch.get(key) for key in ("data", source.labels)) if isinstance(batch, dict) else (None, None)
    if not (
        isinstance(pixels, numpy.ndarray)
        and pixels.dtype == numpy.uint8
        and pixels.shape[1:] == (3 * 32 * 32,)
        and isinstance(labels, list)
        and len(labels) == len(pixels) > 0
        and all(type(label) is int and 0 <= label < source.classes for label in labels)
    ):
        raise DataError(
            f"{path} does not hold uint8 images [N, 3072] as 'data' and N labels below {source.classes} as "
            f"{source.labels!r}; delete it and download {source.folder} again"
        )
    return Images(torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels))


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's plain values; any other name in the pickle is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        numpy = optional("numpy", "pip install numpy", DataError)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return numpy.empty(0).__reduce__()[0]  # the module that holds it moved in numpy 2
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(numpy, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def _unpickle(path: Path) -> Any:
    # Latin-1 maps Python 2's byte strings to text one to one, and numpy takes an array's bytes in that form.
    malformed = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError)
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except malformed as cause:
            raise DataError(
                f"{path} is not a CIFAR batch ({one_line(cause)}); delete it and download it again"
            ) from cause


def _download(source: Source, root: Path) -> None:
    """Fetch and check the archive, then put its files in place one by one: a file that exists is whole."""
    by_hand = f"or fetch {source.url} by hand and unpack it in {root}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            archive = Path(temporary) / "archive.tar.gz"
            digest = _fetch(source.url, archive)
            if digest != source.md5:
                raise DataError(f"{source.url} has md5 {digest}; expected {source.md5}: try again, {by_hand}")
            (root / source.folder).mkdir(exist_ok=True)
            with tarfile.open(archive) as tar:
                for file in (*source.train, source.test, source.meta):
                    member = tar.extractfile(f"{source.folder}/{file}")
                    assert member is not None, "the archive with this md5 holds files of these names"
                    unpacked = Path(temporary) / file
                    unpacked.write_bytes(member.read())
                    unpacked.replace(root / source.folder / file)
    except (OSError, http.client.HTTPException) as cause:
        raise DataError(
            f"can't download {source.url} into {root} ({one_line(cause)}); check the network and the disk, {by_hand}"
        ) from cause


def _fetch(url: str, path: Path) -> str:
    """Write what `url` serves to `path`; the md5 of its bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
        while chunk := response.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
