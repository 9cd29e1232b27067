"""Images in folders: one subfolder a class, with or without train, val and test folders above."""

from collections.abc import Callable
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from fxfreeze.images import DataError, Images, stratified
from fxfreeze.imports import one_line, optional

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLITS = ("train", "val", "test")
SHARE = 0.2  # of each class, for a split that has no folder
MAX_SIDE = 224  # pixels
MAX_BYTES = 4 << 30  # of all images as float32
GRAY = frozenset({"1", "L", "LA"})  # PIL's names for pixels without colour
DEEP = ("I", "F")  # how its names for pixels of more than 8 bits begin


def load(path: str) -> tuple[Images, Images, Images]:
    """(train, val, test) of the images under `path`, whose classes are its subfolders in alphabetical order.

    Where `path` holds train/CLASS/..., val and test are read from the folders beside it. A split that has no folder is
    a fixed fifth of each class, taken out of train. Hidden folders and files that are not images are passed over.

    Every image is cut to its central square and resized to one side: the median short side of the training images, at
    most 224, so images of one square size up to 224 stay as they are. One channel if no training image has colour, else
    three.

    Raises DataError for a folder without such images, an image that can't be read, and more than 4 GiB as float32.
    """
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise DataError(f"folder:{path}: no such folder; expected folder:PATH with one subfolder of images a class")
    folders = _split_folders(root)
    classes = [child.name for child in _subfolders(folders["train"])]
    if len(classes) < 2:
        raise DataError(f"{folders['train']} has {len(classes)} subfolders; expected one for each class, two at least")
    files = {split: _files(folder, classes) for split, folder in folders.items()}
    open_image = optional("PIL.Image", "pip install pillow", DataError).open
    side, channels = _geometry([file for file, _ in files["train"]], open_image)
    size = sum(map(len, files.values())) * channels * side * side * 4
    if size > MAX_BYTES:
        raise DataError(
            f"folder:{path}: {size / 2**30:.1f} GiB as float32 images of {channels} x {side} x {side}, more than "
            f"{MAX_BYTES / 2**30:.1f}; name a package.module:callable that returns fewer or smaller images"
        )
    images = {split: _read(listed, side, channels, open_image) for split, listed in files.items()}
    absent = [split for split in SPLITS if split not in images]
    parts = stratified(images["train"], [SHARE] * len(absent), f"folder:{path}", classes)
    images.update(zip(["train", *absent], parts, strict=True))
    return images["train"], images["val"], images["test"]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split that has one; at least train's, which is `root` itself where it holds classes."""
    children = _subfolders(root)
    # A class may be called "train" too, but then there are images in it, not folders.
    if not any(child.name in SPLITS and _subfolders(child) for child in children):
        return {"train": root}
    names = [child.name for child in children]
    if "train" not in names or not set(names) <= set(SPLITS):
        raise DataError(
            f"{root} has the subfolders {', '.join(names)}; expected train, and beside it val, test or both"
        )
    return {child.name: child for child in children}


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Every image below a class's folder, with its label. Raises DataError for a foreign class, and for none."""
    listed = []
    for child in _subfolders(folder):
        if child.name not in classes:
            raise DataError(f"{child} is a class that train has not; its classes are {', '.join(classes)}")
        found = sorted(file for file in child.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise DataError(f"{child} holds no images; expected files ending in {', '.join(sorted(SUFFIXES))}")
        listed += [(file, classes.index(child.name)) for file in found]
    if not listed:
        raise DataError(f"{folder} has no subfolders; expected one of images for each class")
    return listed


def _geometry(files: list[Path], open_image: Callable[[Path], Any]) -> tuple[int, int]:
    """(side, channels) for these files, from their headers."""
    sides, modes = [], set()
    for file in files:
        try:
            with open_image(file) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except (OSError, SyntaxError, ValueError) as cause:
            raise _unreadable(file, cause) from cause
    return min(median_low(sides), MAX_SIDE), 1 if modes <= GRAY else 3


def _read(files: list[tuple[Path, int]], side: int, channels: int, open_image: Callable[[Path], Any]) -> Images:
    numpy = optional("numpy", "pip install numpy", DataError)
    pixels = torch.empty(len(files), channels, side, side, dtype=torch.uint8)
    for i, (file, _) in enumerate(files):
        try:
            with open_image(file) as image:
                square = _square(image, side, "L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as cause:
            raise _unreadable(file, cause) from cause
        pixels[i] = torch.from_numpy(numpy.array(square).reshape(side, side, channels)).permute(2, 0, 1)
    return Images(pixels, torch.tensor([label for _, label in files]))


def _square(image: Any, side: int, mode: str) -> Any:
    if image.mode.startswith(DEEP):
        raise ValueError(f"pixels of more than 8 bits, mode {image.mode}")
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    square = image.convert(mode).crop((left, top, left + short, top + short))
    return square if short == side else square.resize((side, side))


def _unreadable(file: Path, cause: Exception) -> DataError:
    return DataError(f"{file} can't be read as an image of 8 bits ({one_line(cause)}); convert or delete it")
