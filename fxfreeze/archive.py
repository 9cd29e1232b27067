"""Images in one .npz file, under the names that Keras gives its own: x_train, y_train, x_test and y_test."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from fxfreeze.images import DataError, Images, stratified
from fxfreeze.imports import one_line, optional

KEYS = ("x_train", "y_train", "x_test", "y_test")
VAL_SHARE = 0.1  # of each class of the training images


def load(path: str) -> tuple[Images, Images, Images]:
    """(train, val, test) of the file: x_* uint8 [N, S, S] or [N, S, S, C], y_* integers [N] or [N, 1] from 0.

    val is a fixed tenth of the training images, class by class. No pickle is read.
    Raises DataError for a file that is missing or no .npz, an array that is missing, and values of another form.
    """
    arrays = _read(Path(path).expanduser())
    train, test = (_images(path, arrays, split) for split in ("train", "test"))
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        shapes = tuple(train.pixels.shape[1:]), tuple(test.pixels.shape[1:])
        raise DataError(f"{path}: images of train are {shapes[0]}, those of test {shapes[1]}; expected the same")
    classes = int(train.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        raise DataError(f"{path}: y_test has label {int(test.labels.max())}, y_train none above {classes - 1}")
    train, val = stratified(train, (VAL_SHARE,), path, [str(label) for label in range(classes)])
    return train, val, test


def _read(path: Path) -> dict[str, Any]:
    numpy = optional("numpy", "pip install numpy", DataError)
    if not path.is_file():
        raise DataError(f"npz:{path}: no such file; expected a .npz that holds {', '.join(KEYS)}")
    try:
        with path.open("rb") as file:
            archive = numpy.load(file, allow_pickle=False)
            held = getattr(archive, "files", ())  # a .npy is an array, and has none
            if missing := [key for key in KEYS if key not in held]:
                raise DataError(f"{path} holds no {missing[0]}; expected arrays {', '.join(KEYS)} (numpy.savez)")
            return {key: archive[key] for key in KEYS}
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as cause:
        raise DataError(f"{path} can't be read as a .npz ({one_line(cause)}); write it with numpy.savez") from cause


def _images(path: str, arrays: dict[str, Any], split: str) -> Images:
    pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != "uint8" or pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or not pixels.size:
        raise DataError(
            f"{path}: x_{split} is {pixels.dtype} {pixels.shape}; expected uint8 [N, side, side] or [N, side, side, "
            "channels]"
        )
    if labels.shape not in ((len(pixels),), (len(pixels), 1)) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(
            f"{path}: y_{split} is {labels.dtype} {labels.shape}; expected a label from 0 for each of {len(pixels)} images"
        )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.from_numpy(labels.astype("int64")).reshape(-1))
