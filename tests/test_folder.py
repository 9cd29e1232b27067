"""Images in folders: layouts, geometry, splits, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxfreeze import data, folder
from fxfreeze.images import Images

CLASSES = ("cat", "dog", "eel")


def put(path: Path, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> None:
    """An image of `size` (width, height): noise that the path determines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(sum(map(ord, str(path)))).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def fill(path: Path, each: int, classes: tuple[str, ...] = CLASSES, mode: str = "RGB") -> None:
    for name in classes:
        for i in range(each):
            put(path / name / f"{i:02}.png", mode=mode)


def refusal(path: Path | str) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(f"folder:{path}")
    message = str(caught.value)
    assert "\n" not in message
    return message


def counts(*splits: Images) -> list[list[int]]:
    return [images.labels.bincount(minlength=len(CLASSES)).tolist() for images in splits]


def rows(*splits: Images) -> list[tuple[int, ...]]:
    """Every image's pixels and label, sorted."""
    return sorted(
        (*pixels, label)
        for images in splits
        for pixels, label in zip(images.pixels.flatten(1).tolist(), images.labels.tolist(), strict=True)
    )


def on_disk(path: Path) -> list[tuple[int, ...]]:
    """What `rows` should say of the images under `path`, read by hand."""
    return sorted(
        (*np.asarray(Image.open(file)).transpose(2, 0, 1).flatten().tolist(), label)
        for label, name in enumerate(CLASSES)
        for file in (path / name).iterdir()
    )


# Layouts


def test_classes_alone_are_split_by_class(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    train, val, test = folder.load(str(tmp_path))
    assert counts(train, val, test) == [[6] * 3, [2] * 3, [2] * 3]
    assert rows(train, val, test) == on_disk(tmp_path), "each image is in one split, with its label"
    assert rows(folder.load(str(tmp_path))[1]) == rows(val), "always the same one"


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for split, each in (("train", 3), ("val", 2), ("test", 1)):
        fill(tmp_path / split, each)
    loaded = folder.load(str(tmp_path))
    for split, images in zip(("train", "val", "test"), loaded, strict=True):
        assert rows(images) == on_disk(tmp_path / split)


@pytest.mark.parametrize(("given", "taken"), [("val", "test"), ("test", "val")])
def test_a_split_without_a_folder_is_taken_out_of_train(given: str, taken: str, tmp_path: Path) -> None:
    fill(tmp_path / "train", 10)
    fill(tmp_path / given, 3)
    splits = dict(zip(("train", "val", "test"), folder.load(str(tmp_path)), strict=True))
    assert rows(splits[given]) == on_disk(tmp_path / given)
    assert counts(splits["train"], splits[taken]) == [[8] * 3, [2] * 3]
    assert rows(splits["train"], splits[taken]) == on_disk(tmp_path / "train")


def test_train_alone_is_split_twice(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    assert counts(*folder.load(str(tmp_path))) == [[3] * 3, [1] * 3, [1] * 3]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, 5, ("car", "plane", "train"))
    assert counts(*folder.load(str(tmp_path))) == [[3] * 3, [1] * 3, [1] * 3]


def test_labels_of_every_split_are_by_trains_classes(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 2, CLASSES[1:])
    fill(tmp_path / "test", 2, CLASSES[2:])
    assert counts(*folder.load(str(tmp_path))) == [[3, 3, 3], [0, 2, 2], [0, 0, 2]]


def test_images_lie_at_any_depth_among_other_files(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    put(tmp_path / "cat" / "more" / "deep" / "one.JPG")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "README.png").write_text("not in a class")
    put(tmp_path / ".hidden" / "a.png")
    assert torch.tensor(counts(*folder.load(str(tmp_path)))).sum(0).tolist() == [5, 4, 4]


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "pets", 3)
    found = data.load("folder:~/pets")
    assert (found.name, found.num_classes, found.in_channels, found.image_size) == ("folder:~/pets", 3, 3, 12)
    assert found.train.tensors[0].mean((0, 2, 3)).abs().max() < 1e-5


# Geometry


def test_side_is_the_median_short_side_of_train(tmp_path: Path) -> None:
    fill(tmp_path / "val", 1)
    fill(tmp_path / "test", 1)
    for i, size in enumerate([(20, 9), (16, 30), (40, 18)]):
        for name in CLASSES:
            put(tmp_path / "train" / name / f"{i}.png", size)
    assert [images.pixels.shape[1:] for images in folder.load(str(tmp_path))] == [(3, 16, 16)] * 3


def test_side_is_at_most_224(tmp_path: Path) -> None:
    for name in CLASSES[:2]:
        for i in range(3):
            put(tmp_path / name / f"{i}.png", (250, 240))
    assert folder.load(str(tmp_path))[0].pixels.shape[1:] == (3, 224, 224)


def test_the_central_square_is_kept_and_resized(tmp_path: Path) -> None:
    fill(tmp_path / "train", 1)
    wide = np.zeros((24, 48, 3), np.uint8)
    wide[:, 12:36] = (200, 100, 50)  # the central square; what lies beside it is black
    for split, pixels in (("val", wide), ("test", wide.transpose(1, 0, 2))):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "cat" / "one.png")
    _, val, test = folder.load(str(tmp_path))
    for images in (val, test):
        assert images.pixels.shape == (1, 3, 12, 12)
        assert torch.equal(images.pixels, torch.tensor([200, 100, 50]).reshape(1, 3, 1, 1).expand(1, 3, 12, 12))


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_images_without_colour_have_one_channel(mode: str, tmp_path: Path) -> None:
    fill(tmp_path, 3, mode=mode)
    train, _, _ = folder.load(str(tmp_path))
    assert train.pixels.shape == (3, 1, 12, 12)
    expected = {tuple(Image.open(file).convert("L").tobytes()) for file in (tmp_path / "cat").iterdir()}
    assert tuple(train.pixels[0].flatten().tolist()) in expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_one_image_with_colour_gives_all_three_channels(mode: str, tmp_path: Path) -> None:
    fill(tmp_path, 3, mode="L")
    put(tmp_path / "dog" / "colour.png", mode=mode)
    splits = folder.load(str(tmp_path))
    assert {images.pixels.shape[1] for images in splits} == {3}
    with Image.open(tmp_path / "dog" / "colour.png") as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1).flatten().tolist()
    assert (*expected, 1) in rows(*splits)


# Refusals


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file", ""):
        assert refusal(path) == (
            f"folder:{path}: no such folder; expected folder:PATH with one subfolder of images a class"
        )


def test_fewer_than_two_classes(tmp_path: Path) -> None:
    message = f"{tmp_path} has {{}} subfolders; expected one for each class, two at least"
    assert refusal(tmp_path) == message.format(0)
    fill(tmp_path, 3, ("cat",))
    assert refusal(tmp_path) == message.format(1)


def test_a_class_without_images(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "notes.txt").touch()
    assert refusal(tmp_path).startswith(f"{tmp_path / 'fox'} holds no images; expected files ending in .bmp, .gif, ")


def test_a_class_of_too_few_images(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    fill(tmp_path, 2, ("fox",))
    assert refusal(tmp_path) == (
        f"folder:{tmp_path}: class 'fox' has 2 images; at least 3 are needed, one for each of 3 splits"
    )


def test_a_class_that_train_has_not(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 1, ("fox",))
    message = f"{tmp_path / 'test' / 'fox'} is a class that train has not; its classes are cat, dog, eel"
    assert refusal(tmp_path) == message


def test_an_empty_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    (tmp_path / "test").mkdir()
    assert refusal(tmp_path) == f"{tmp_path / 'test'} has no subfolders; expected one of images for each class"


@pytest.mark.parametrize(("present", "listed"), [(("train", "validation"), "train, validation"), (("test",), "test")])
def test_other_split_folders(present: tuple[str, ...], listed: str, tmp_path: Path) -> None:
    for split in present:
        fill(tmp_path / split, 3)
    message = f"{tmp_path} has the subfolders {listed}; expected train, and beside it val, test or both"
    assert refusal(tmp_path) == message


@pytest.mark.parametrize("kept", [0, 20, 200])
def test_a_truncated_image(kept: int, tmp_path: Path) -> None:
    fill(tmp_path, 3)
    path = tmp_path / "dog" / "01.png"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(tmp_path)
    assert message.startswith(f"{path} can't be read as an image of 8 bits (")
    assert message.endswith("); convert or delete it")


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_an_image_of_deeper_pixels(dtype: type, mode: str, tmp_path: Path) -> None:
    fill(tmp_path, 3)
    path = tmp_path / "dog" / "deep.tiff"
    Image.fromarray(np.full((12, 12), 300, dtype)).save(path)
    assert refusal(tmp_path) == (
        f"{path} can't be read as an image of 8 bits (ValueError: pixels of more than 8 bits, mode {mode}); "
        "convert or delete it"
    )


def test_more_images_than_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)
    size = 9 * 3 * 12 * 12 * 4
    monkeypatch.setattr(folder, "MAX_BYTES", size)
    folder.load(str(tmp_path))
    monkeypatch.setattr(folder, "MAX_BYTES", size - 1)
    assert refusal(tmp_path).startswith(f"folder:{tmp_path}: 0.0 GiB as float32 images of 3 x 12 x 12, more than 0.0; ")
