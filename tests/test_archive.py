"""Images in one .npz file: what is read, and the one line that refuses the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxfreeze import archive, data

SIDE, CLASSES, TRAIN, TEST = 4, 3, 60, 12


def arrays(**changed: Any) -> dict[str, Any]:
    """What a sound file holds, but for what is changed; None leaves an array out."""
    random = np.random.RandomState(0)
    whole = {
        "x_train": random.randint(0, 256, (TRAIN, SIDE, SIDE, 3)).astype(np.uint8),
        "y_train": np.arange(TRAIN) % CLASSES,
        "x_test": random.randint(0, 256, (TEST, SIDE, SIDE, 3)).astype(np.uint8),
        "y_test": np.arange(TEST) % CLASSES,
    }
    return {key: array for key, array in (whole | changed).items() if array is not None}


def write(folder: Path, **changed: Any) -> str:
    path = folder / "images.npz"
    np.savez(path, **arrays(**changed))
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(f"npz:{path}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_image_is_in_one_split_with_its_label(tmp_path: Path) -> None:
    train, val, test = archive.load(write(tmp_path))
    assert [len(part.labels) for part in (train, val, test)] == [54, 6, TEST]
    assert val.labels.bincount().tolist() == [2] * CLASSES
    given = arrays()

    def rows(pixels: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, ...]]:
        return sorted((*row, label) for row, label in zip(pixels.flatten(1).tolist(), labels.tolist(), strict=True))

    for parts, split in (((train, val), "train"), ((test,), "test")):
        pixels = torch.from_numpy(given[f"x_{split}"].transpose(0, 3, 1, 2).copy())
        found = torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts])
        assert rows(*found) == rows(pixels, torch.from_numpy(given[f"y_{split}"]))


def test_as_a_data_set(tmp_path: Path) -> None:
    found = data.load(f"npz:{write(tmp_path)}")
    assert (found.num_classes, found.in_channels, found.image_size) == (CLASSES, 3, SIDE)
    images, labels = found.train.tensors
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.mean((0, 2, 3)).abs().max() < 1e-5


def test_gray_images_and_labels_in_a_column(tmp_path: Path) -> None:
    """As Keras gives MNIST, and CIFAR's labels."""
    whole = arrays()
    gray = {key: whole[key][..., 0] for key in ("x_train", "x_test")}
    column = {key: whole[key][:, None].astype(np.uint8) for key in ("y_train", "y_test")}
    found = data.load(f"npz:{write(tmp_path, **gray, **column)}")
    assert found.in_channels == 1
    assert found.test.tensors[1].tolist() == whole["y_test"].tolist()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"y_test": None}, "holds no y_test"),
        ({"x_train": np.zeros((TRAIN, SIDE, SIDE, 3), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((TRAIN, 3, SIDE, SIDE), np.uint8)}, r"(60, 3, 4, 4)"),
        ({"x_test": np.zeros((0, SIDE, SIDE, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test is uint8 (0,"),
        ({"x_test": np.zeros((TEST, 5, 5, 3), np.uint8)}, "expected the same"),
        ({"y_train": np.zeros(TRAIN - 1, int)}, "a label from 0 for each of 60"),
        ({"y_train": np.zeros(TRAIN, np.float64)}, "y_train is float64"),
        ({"y_train": np.arange(TRAIN) % CLASSES - 1}, "y_train is int64"),
        ({"y_test": np.full(TEST, CLASSES)}, "y_test has label 3"),
        ({"y_train": np.minimum(np.arange(TRAIN), 2)}, "class '0' has 1 images"),
        ({"y_train": np.array([{}] * TRAIN)}, "can't be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    assert reason in refusal(write(tmp_path, **changed))


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    assert "no such file" in refusal(str(tmp_path / "absent.npz"))
    for name, content in (("text.npz", b"not an archive"), ("empty.npz", b""), ("cut.npz", None)):
        path = tmp_path / name
        path.write_bytes(Path(write(tmp_path)).read_bytes()[:900] if content is None else content)
        assert "can't be read" in refusal(str(path))
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "holds no x_train" in refusal(str(tmp_path / "array.npy"))


def test_a_byte_that_changed_on_the_disk(tmp_path: Path) -> None:
    path = Path(write(tmp_path))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF  # within x_train
    path.write_bytes(content)
    assert "can't be read" in refusal(str(path))
