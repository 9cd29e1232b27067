"""CIFAR from files in the authors' format: Python 2's pickles of an array and lists."""

import hashlib
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fxfreeze import cifar, data
from fxfreeze.images import Images

PER_CLASS = 20  # training images of each class
KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}


PythonPickler: Any = pickle._Pickler  # the one written in Python, which can be overridden; the stubs lack its methods


class Python2Pickler(PythonPickler):  # type: ignore[misc]  # a class of type Any
    """Writes text and bytes as Python 2 did: one opcode for both, without an encoding."""

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch: ClassVar[dict[type, Any]] = {**PythonPickler.dispatch, str: save_string, bytes: save_string}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    # The module's name in the numpy of that time.
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def batch(size: int, classes: int, key: str, seed: int) -> dict[str, Any]:
    pixels = np.random.RandomState(seed).randint(0, 256, (size, 3072)).astype(np.uint8)
    labels = [i % classes for i in range(size)]
    names = [f"image_{i}.png" for i in range(size)]
    coarse = {"coarse_labels": [label // 5 for label in labels]} if key == "fine_labels" else {}
    return {"batch_label": "a batch", key: labels, "data": pixels, "filenames": names, **coarse}


def make(root: Path, name: str) -> None:
    """A small data set in the layout and format of the real one."""
    source = cifar.SOURCES[name]
    size = source.classes * PER_CLASS // len(source.train)
    for seed, file in enumerate((*source.train, source.test)):
        write(root / source.folder / file, batch(size, source.classes, KEYS[name], seed))
    write(root / source.folder / source.meta, {"label_names": ["a"] * source.classes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make(tmp_path, "cifar10")
    return tmp_path


def refusal(name: str, root: Path, download: bool = False) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(name, root=str(root), download=download)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows(*splits: Images) -> list[tuple[int, ...]]:
    """Every image's pixels and label, sorted."""
    return sorted(
        (*pixels, label)
        for images in splits
        for pixels, label in zip(images.pixels.flatten(1).tolist(), images.labels.tolist(), strict=True)
    )


def test_the_files_are_in_the_format_of_python_2(root: Path) -> None:
    raw = (root / "cifar-10-batches-py" / "data_batch_1").read_bytes()
    assert raw.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in raw
    assert b"_codecs" not in raw, "Python 3 would write bytes as a call of _codecs.encode"
    assert pickle.loads(raw, encoding="bytes").keys() == {b"batch_label", b"labels", b"data", b"filenames"}


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_splits(name: str, classes: int, tmp_path: Path) -> None:
    make(tmp_path, name)
    train, val, test = cifar.load(name, tmp_path, download=False)
    for images, each in ((train, PER_CLASS * 9 // 10), (val, PER_CLASS // 10)):
        assert images.pixels.shape == (classes * each, 3, 32, 32)
        assert images.labels.bincount().tolist() == [each] * classes
    source = cifar.SOURCES[name]
    size = classes * PER_CLASS // len(source.train)
    written = [batch(size, classes, KEYS[name], seed) for seed in range(len(source.train) + 1)]
    whole = sorted(
        (*row, label) for b in written[:-1] for row, label in zip(b["data"].tolist(), b[KEYS[name]], strict=True)
    )
    assert rows(train, val) == whole
    # Red, green and blue planes, row by row: the order of the file is the order of the tensor.
    assert test.pixels.flatten(1).tolist() == written[-1]["data"].tolist()
    assert test.labels.tolist() == written[-1][KEYS[name]]


def test_load(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = data.load("CIFAR10", root=str(root))
    assert (found.name, found.num_classes, found.in_channels, found.image_size) == ("cifar10", 10, 3, 32)
    assert [len(split) for split in (found.train, found.val, found.test)] == [180, 20, 40]
    assert found.train.tensors[0].mean((0, 2, 3)).abs().max() < 1e-5
    monkeypatch.setenv("HOME", str(root.parent))
    again = data.load("cifar10", root=f"~/{root.name}", seed=4)
    assert torch.equal(found.val.tensors[0], again.val.tensors[0])


def test_default_root_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make(tmp_path / "fxfreeze" / "data", "cifar10")
    assert data.load("cifar10").num_classes == 10
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cifar.default_root() == tmp_path / "home" / ".cache" / "fxfreeze" / "data"


# Files that are not what they should be


def test_missing_file_is_named(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    (folder / "data_batch_3").unlink()
    assert refusal("cifar10", root) == (
        f"cifar10: no file data_batch_3 in {folder}; name the folder that holds cifar-10-batches-py with root= "
        "(--data-root), or allow the download with download=True (--download)"
    )
    assert refusal("cifar100", root / "absent").startswith("cifar100: no file train in ")


class Malicious:
    """Unpickled by pickle itself, makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused(protocol: int, root: Path, tmp_path: Path) -> None:
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({"data": Malicious(tmp_path / "made"), "labels": []}, protocol=protocol))
    message = refusal("cifar10", root)
    assert message.startswith(
        f"{path} is not a CIFAR batch (UnpicklingError: it asks for {os.mkdir.__module__}.mkdir, "
    )
    assert message.endswith("which no array needs); delete it and download it again")
    assert not (tmp_path / "made").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "made").exists(), "this pickle is really malicious"


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "numpy.load",
        "numpy.core.multiarray.scalar",
        "numpy.ndarray.tofile",
        "os.system",
    ],
)
def test_only_what_an_array_needs_is_found(name: str, root: Path) -> None:
    module, _, attribute = name.rpartition(".")
    if name == "numpy.ndarray.tofile":  # dotted names reach into classes from protocol 4 on
        module, attribute = "numpy", "ndarray.tofile"
    path = root / "cifar-10-batches-py" / "test_batch"
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute))
    path.write_bytes(b"\x80\x04" + strings + b"\x93.")  # protocol 4, two strings, STACK_GLOBAL, STOP
    assert f"(UnpicklingError: it asks for {module}.{attribute}, which no array needs)" in refusal("cifar10", root)


@pytest.mark.parametrize("kept", [0, 1, 50, 5_000, -1])
def test_a_truncated_file_is_refused(kept: int, root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal("cifar10", root).startswith(f"{path} is not a CIFAR batch (")


@pytest.mark.parametrize("raw", [b"PK\x03\x04 a zip archive", b"<html>not found</html>", b"\x80\x04K\x01\x85b."])
def test_a_file_that_is_no_pickle_is_refused(raw: bytes, root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(raw)
    assert refusal("cifar10", root).startswith(f"{path} is not a CIFAR batch (")


GOOD = batch(40, 10, "labels", 0)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {**GOOD, "data": GOOD["data"].tolist()},
        {**GOOD, "data": GOOD["data"].astype(np.float32)},
        {**GOOD, "data": GOOD["data"][:, :-1]},
        {**GOOD, "data": GOOD["data"].reshape(40, 3, 32, 32)},
        {**GOOD, "data": GOOD["data"][:-1]},
        {**GOOD, "data": GOOD["data"][:0], "labels": []},
        {**GOOD, "labels": GOOD["labels"][:-1]},
        {**GOOD, "labels": [*GOOD["labels"][:-1], 10]},
        {**GOOD, "labels": [*GOOD["labels"][:-1], -1]},
        {**GOOD, "labels": [*GOOD["labels"][:-1], 1.0]},
        {**GOOD, "labels": None, "fine_labels": GOOD["labels"]},
    ],
)
def test_a_pickle_of_something_else_is_refused(value: object, root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_4"
    write(path, value)
    assert refusal("cifar10", root) == (
        f"{path} does not hold uint8 images [N, 3072] as 'data' and N labels below 10 as 'labels'; delete it and "
        "download cifar-10-batches-py again"
    )
    write(path, GOOD)
    data.load("cifar10", root=str(root))


# Downloading, from an archive on this machine


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive like the real one, served where cifar10's is looked for."""
    make(tmp_path / "made", "cifar10")
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.SOURCES, "cifar10", cifar.SOURCES["cifar10"]._replace(url=path.as_uri(), md5=md5))
    return path


def test_download_puts_the_files_in_place_and_is_not_repeated(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    found = data.load("cifar10", root=str(root), download=True)
    assert len(found.train) == 180
    source = cifar.SOURCES["cifar10"]
    assert [path.name for path in root.iterdir()] == [source.folder], "nothing else is left behind"
    files = {path.name: path.read_bytes() for path in (root / source.folder).iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "made" / source.folder).iterdir()}
    archive.unlink()
    assert len(data.load("cifar10", root=str(root), download=True).train) == 180


def test_download_completes_a_folder(archive: Path, root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_5"
    path.unlink()
    data.load("cifar10", root=str(root), download=True)
    assert path.is_file()


def test_download_of_another_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    source = cifar.SOURCES["cifar10"]
    archive.write_bytes(archive.read_bytes()[:-10])
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    root = tmp_path / "new"
    assert refusal("cifar10", root, download=True) == (
        f"{source.url} has md5 {digest}; expected {source.md5}: try again, or fetch {source.url} by hand and "
        f"unpack it in {root}"
    )
    assert list(root.iterdir()) == []


def test_download_that_fails_says_why(archive: Path, tmp_path: Path) -> None:
    archive.unlink()
    root = tmp_path / "new"
    message = refusal("cifar10", root, download=True)
    assert message.startswith(f"can't download {archive.as_uri()} into {root} (URLError: ")
    assert message.endswith(
        f"check the network and the disk, or fetch {archive.as_uri()} by hand and unpack it in {root}"
    )
    assert list(root.iterdir()) == []


def test_download_into_a_file_says_why(archive: Path) -> None:
    message = refusal("cifar10", archive, download=True)
    assert message.startswith(f"can't download {archive.as_uri()} into {archive} (FileExistsError: ")


def test_addresses_and_sums_are_the_authors() -> None:
    assert {(source.url.rpartition("/")[2], source.md5) for source in cifar.SOURCES.values()} == {
        ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    }
