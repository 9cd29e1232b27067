"""The probes of a data set: which samples, read without a trace, told apart by any bit, and who draws random numbers."""

import copy
import functools
import random
import sys
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

import conftest  # noqa: F401 (makes torchvision importable)
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

from fxfreeze.cache import CacheRefusal
from fxfreeze.cache.probes import check_dataset, differing, digest, probed, random_transforms, read

SHARED = np.random.default_rng(7)


class Drawing(Dataset[Any]):
    """Eight samples, each whatever `draw` gives for its number."""

    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.draw(index)


class Pictures(Dataset[Any]):
    """Eight images, transformed as torchvision's data sets do."""

    def __init__(self, transform: Any = None, **more: Any) -> None:
        self.transform = transform
        vars(self).update(more)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        pixels = np.random.RandomState(index).randint(0, 255, (8, 8, 3)).astype("uint8")
        image = Image.fromarray(pixels)
        return (self.transform(image) if self.transform else image), index


# Which samples.


@given(st.integers(0, 2**41))
def test_as_many_probes_as_stated(length: int) -> None:
    found = probed(length)
    assert len(found) == min(64, max(4, length // 16), length)
    assert found == sorted(set(found))
    assert all(0 <= index < length for index in found)


def test_probes_are_fixed_and_spread() -> None:
    before = random.getstate(), torch.get_rng_state()
    assert probed(50_000) == probed(50_000)
    assert (random.getstate(), torch.equal(before[1], torch.get_rng_state())) == (before[0], True)
    quarters = torch.bincount(torch.tensor(probed(50_000)) // 12_500)
    assert quarters.min() >= 8
    assert probed(3) == [0, 1, 2]
    # The cache's identity rests on them: another choice would make every cache stale.
    assert probed(100) == [10, 45, 46, 65, 88, 98]


# Reading.


class Batched(Drawing):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [("at once", index) for index in indices]


def test_reading_goes_by_getitems_where_there_is_one() -> None:
    assert read(Batched(int), (2, 5)) == [("at once", 2), ("at once", 5)]
    assert read(Drawing(str), [2, 5]) == ["2", "5"]
    assert read(Subset(Batched(int), [4, 3]), [1]) == [("at once", 3)]
    assert read([10, 20, 30], [2]) == [30]


def private() -> dict[str, tuple[Any, Any, Callable[[Any], Any]]]:
    """Per kind a generator, how to draw from it, and its state."""
    return {
        "torch": (
            torch.Generator().manual_seed(1),
            lambda g: torch.rand(1, generator=g),
            lambda g: g.get_state().tolist(),
        ),
        "random": (random.Random(1), lambda g: g.random(), lambda g: g.getstate()),
        "numpy": (np.random.default_rng(1), lambda g: g.random(), lambda g: g.bit_generator.state),
        "older numpy": (np.random.RandomState(1), lambda g: g.rand(), lambda g: str(g.get_state())),
        "bits": (np.random.PCG64(1), lambda g: g.random_raw(), lambda g: g.state),
    }


class Transform:
    def __init__(self, generator: Any, draw: Callable[[Any], Any]) -> None:
        self.generator, self.draw_from = generator, draw

    def __call__(self, value: Any) -> Any:
        return value, self.draw_from(self.generator)

    def method(self, value: Any) -> Any:
        return self(value)


class ModuleTransform(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = [inner]

    def forward(self, value: Any) -> Any:
        return self.inner[0](value)


class OfTheClass(Drawing):
    """The generator is an attribute of the class."""

    def __getitem__(self, index: int) -> Any:
        return self.transform(index)


def of_the_class(transform: Any) -> Any:
    return type("OfItsClass", (OfTheClass,), {"transform": transform})(None)


def closure(transform: Any) -> Callable[[Any], Any]:
    return lambda value: next(transform(value) for _ in range(1))


HOLDERS: dict[str, Callable[[Transform], Any]] = {
    "attribute": Drawing,
    "method": lambda t: Drawing(t.method),
    "closure": lambda t: Drawing(closure(t)),
    "default": lambda t: Drawing(lambda value, t=t: t(value)),
    "partial": lambda t: Drawing(functools.partial(lambda t, value: t(value), t)),
    "subset of a subset": lambda t: Subset(Subset(Pictures(transforms.Compose([t])), range(8)), range(8)),
    "four subsets": lambda t: functools.reduce(Subset, [range(8)] * 4, Pictures(transforms.Compose([t]))),
    "static method": lambda t: of_the_class(staticmethod(closure(t))),
    "concatenation": lambda t: ConcatDataset([Drawing(lambda i: i), Drawing(t)]),
    "sequential": lambda t: Pictures(nn.Sequential(ModuleTransform(t))),
    "dict": lambda t: Drawing({"a": deque([(t,)])}["a"][0][0]),
    "class": of_the_class,
    "module in a list": lambda t: Drawing(transforms.Compose([ModuleTransform(t)])),
}


@pytest.mark.parametrize("kind", private())
@pytest.mark.parametrize("holder", HOLDERS)
def test_generators_of_the_data_set_are_left_as_found(holder: str, kind: str) -> None:
    generator, draw, state = private()[kind]
    dataset = HOLDERS[holder](Transform(generator, draw))
    before = copy.deepcopy(state(generator))
    samples = read(dataset, range(8, 12) if holder == "concatenation" else range(4))
    assert state(generator) == before
    assert digest(read(dataset, range(len(dataset)))[-4:]) == digest(read(dataset, range(len(dataset)))[-4:])
    assert digest(samples) != digest(samples[::-1])
    assert differing(dataset, range(len(dataset) - 3, len(dataset))) == len(dataset) - 3
    assert state(generator) == before


GLOBAL: dict[str, Callable[[int], Any]] = {
    "torch": lambda i: torch.rand(1),
    "random": lambda i: random.random(),
    "numpy": lambda i: np.random.rand(),
    "a function's global": lambda i: [SHARED.random() for _ in range(2)],
}


def state_of_all() -> str:
    return digest(
        [torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3], str(SHARED.bit_generator.state)]
    )


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_generators_are_left_as_found(kind: str) -> None:
    before = state_of_all()
    read(Drawing(GLOBAL[kind]), range(4))
    assert differing(Drawing(GLOBAL[kind]), [1, 2]) == 1
    assert state_of_all() == before


@pytest.mark.parametrize("reading", [read, differing, lambda d, _: random_transforms(d)])
def test_and_when_the_data_set_raises(reading: Any) -> None:
    generator = random.Random(3)

    def draw(index: int) -> Any:
        torch.rand(1), random.random(), np.random.rand(), SHARED.random(), generator.random()
        if index == 2:
            raise OSError("a broken image")

    dataset = Drawing(draw)
    dataset.transform = draw  # type: ignore[attr-defined]
    before = state_of_all(), generator.getstate()
    with pytest.raises(OSError, match="a broken image"):
        reading(dataset, [0, 1, 2])
    assert (state_of_all(), generator.getstate()) == before
    assert sys.getprofile() is None


def test_a_container_that_loads_is_not_asked_for_what_it_holds() -> None:
    class Lazy(dict[Any, Any]):
        def values(self) -> Any:
            raise AssertionError("loaded")

    dataset = Drawing(str)
    dataset.lazy, dataset.many = Lazy(a=1), [random.Random(i) for i in range(2000)]  # type: ignore[attr-defined]
    assert read(dataset, [1]) == ["1"]


# Differing.


def test_the_same_samples_do_not_differ() -> None:
    assert differing(Pictures(), range(8)) is None
    assert differing(Drawing(lambda i: {"x": torch.tensor([float("nan"), i]), "y": float("nan")}), range(8)) is None
    assert differing(TensorDataset(torch.randn(5, 3)), range(5)) is None


def test_the_first_that_differs() -> None:
    dataset = Drawing(lambda i: (torch.ones(2), {"a": [i, random.random() if i >= 3 else 0]}))
    assert differing(dataset, [0, 2, 5, 3]) == 5
    assert differing(dataset, [0, 2]) is None


def test_random_augmentation_differs() -> None:
    flip = Pictures(transforms.Compose([transforms.RandomCrop(6), transforms.ToTensor()]))
    assert differing(flip, range(8)) is not None
    assert differing(Pictures(transforms.Compose([transforms.CenterCrop(6), transforms.ToTensor()])), range(8)) is None


# Digests.


@dataclass
class Box:
    left: int
    label: str


class Colour(Enum):
    RED = 1
    BLUE = 2


Pair = namedtuple("Pair", "a b")
PALETTE = Image.fromarray(np.eye(3, dtype="uint8"), "L").convert("P")
OTHER_PALETTE = PALETTE.copy()
OTHER_PALETTE.putpalette(list(range(30)))

DISTINCT: list[Any] = [
    None,
    True,
    1,
    1.0,
    0.0,
    -0.0,
    float("nan"),
    2**80,
    -(2**80),
    1j,
    "1",
    "",
    "\ud800",
    b"1",
    bytearray(b"1"),
    "True",
    [],
    (),
    {},
    [1],
    (1,),
    [[1]],
    [1, [2]],
    [[1], 2],
    ["a", "b"],
    ["ab", ""],
    ["", "ab"],
    {"a": 1},
    {"a": 2},
    {1: "a"},
    OrderedDict(a=1),
    {"a": 1, "b": 2},
    Pair(1, 2),
    (1, 2),
    {1, 2},
    frozenset({1, 2}),
    Box(1, "a"),
    Box(2, "a"),
    Colour.RED,
    Colour.BLUE,
    torch.float32,
    torch.device("cpu"),
    PurePosixPath("a/b"),
    torch.tensor(1),
    torch.tensor([1]),
    torch.tensor([[1]]),
    torch.tensor([1], dtype=torch.int32),
    torch.tensor([0.0]),
    torch.tensor([-0.0]),
    torch.tensor([1.0], dtype=torch.bfloat16),
    torch.tensor([1.0], dtype=torch.float16),
    torch.zeros(0, 3),
    torch.zeros(3, 0),
    torch.arange(6).view(2, 3),
    torch.arange(6).view(3, 2),
    torch.arange(6).view(3, 2).T,
    torch.tensor([1 + 2j]),
    torch.tensor([1 + 2j]).conj(),
    torch.tensor([True]),
    np.array([1]),
    np.array([1.0]),
    np.array([[1.0]]),
    np.float32(1),
    np.float64(1),
    np.array([1.0], dtype=">f8"),
    np.array([1, "a"], dtype=object),
    np.array([1, "b"], dtype=object),
    np.array(["2020-01-01"], dtype="datetime64[D]"),
    np.arange(6).reshape(2, 3).T,
    Image.new("L", (2, 3), 4),
    Image.new("L", (3, 2), 4),
    Image.new("L", (2, 3), 5),
    Image.new("1", (2, 3)),
    PALETTE,
    OTHER_PALETTE,
]


def test_different_contents_have_different_digests() -> None:
    digests = [digest([value]) for value in DISTINCT]
    alike = [(DISTINCT[i], DISTINCT[j]) for i in range(len(digests)) for j in range(i) if digests[i] == digests[j]]
    assert alike == []
    assert len(digest([])) == 32
    assert digest([[1], [2]]) != digest([[1, 2]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3).T.contiguous().T),
        (torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)),
        (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
        (np.array([int("9" * 30), "a"], dtype=object), np.array([int("9" * 30), "a"], dtype=object)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        (torch.ones(2, requires_grad=True) * 1, torch.ones(2)),
        (float("nan"), -float("nan")),
        (1 - 1e-17, 1.0),
    ],
)
def test_equal_contents_have_equal_digests(one: Any, other: Any) -> None:
    assert digest([one]) == digest([other])


def test_a_digest_is_the_same_in_any_process() -> None:
    """This one hashes strings with a seed of its own, as the process did that this digest was written by."""
    samples = [
        [torch.arange(5), np.ones(3), np.float32(2), Image.new("RGB", (2, 2), "red")],
        {"k": Box(1, "é"), "s": {"b", "a", "c"}, "c": Colour.RED, "p": Pair(1.5, None)},
        (torch.float16, 3, b"x", True, 2j, PurePosixPath("a")),
    ]
    assert digest(samples) == "0a3f22bb427cd119fcad9138332c03e1"


@pytest.mark.parametrize(
    "value", [object(), slice(3), torch.ones(2).to_sparse(), {"a": [print]}, iter([]), torch.nn.ReLU()]
)
def test_contents_that_can_not_be_told(value: Any) -> None:
    with pytest.raises(CacheRefusal, match=r"a sample holds a \S+, .*fingerprint="):
        digest([value])
    with pytest.raises(CacheRefusal, match="fingerprint="):
        differing(Drawing(lambda i: value), [0])


# Data sets that won't do.


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


class Unsized(Endless):
    def __len__(self) -> int:
        raise NotImplementedError("streaming")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "Stream, is iterable"),
        (Endless(), "Endless, has no __len__"),
        (Unsized(), r"Unsized, has no length \(streaming\)"),
        ({1, 2}, "set, has no __getitem__"),
        (iter([1]), "has no __getitem__"),
    ],
)
def test_data_sets_that_have_no_numbered_samples(dataset: Any, message: str) -> None:
    with pytest.raises(CacheRefusal, match=f"{message}.*use a map-style data set"):
        check_dataset(dataset)


@pytest.mark.parametrize("dataset", [[1, 2], TensorDataset(torch.ones(3)), Subset(Pictures(), [1]), Pictures()])
def test_data_sets_that_will_do(dataset: Any) -> None:
    check_dataset(dataset)


# Who draws.


class Shaky:
    """A name that tells nothing."""

    def __call__(self, image: Any) -> Any:
        return image.rotate(random.random())


class RandomButNot:
    def __call__(self, image: Any) -> Any:
        return image


class Sometimes:
    """As albumentations' transforms, which apply with a probability."""

    p = 0.5

    def __call__(self, image: Any) -> Any:
        return image


class Failing:
    """Draws, raises within, goes on."""

    def inner(self) -> None:
        raise KeyError

    def __call__(self, image: Any) -> Any:
        try:
            self.inner()
        except KeyError:
            random.random()
        return image


class Around:
    """Draws after the transforms within it."""

    def __init__(self, *inner: Any) -> None:
        self.transforms = inner

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image, random.random()


def shake(image: Any) -> Any:
    return image.rotate(random.random())


def keep(image: Any) -> Any:
    return image


COMPOSE = transforms.Compose(
    [transforms.Resize(9), transforms.RandomCrop(6), transforms.ToTensor(), transforms.ColorJitter(0.5)]
)

WHO: dict[str, tuple[Any, list[str]]] = {
    "none": (Pictures(), []),
    "no attributes": ([1, 2], []),
    "deterministic": (Pictures(transforms.Compose([transforms.Resize(9), transforms.ToTensor()])), []),
    "compose": (Pictures(COMPOSE), ["RandomCrop", "ColorJitter"]),
    "subset": (Subset(Subset(Pictures(COMPOSE), range(8)), range(8)), ["RandomCrop", "ColorJitter"]),
    "concatenation": (ConcatDataset([Pictures(), Pictures(transforms.TrivialAugmentWide())]), ["TrivialAugmentWide"]),
    "version 2": (
        Pictures(v2.Compose([v2.RandAugment(), v2.ToImage(), v2.GaussianBlur(3)])),
        ["RandAugment", "GaussianBlur"],
    ),
    "sequential": (Pictures(nn.Sequential(v2.PILToTensor(), transforms.RandomErasing(p=1.0))), ["RandomErasing"]),
    "nested": (Pictures(v2.RandomApply([v2.RandomHorizontalFlip()], p=1.0)), ["RandomApply", "RandomHorizontalFlip"]),
    "not called, by name": (Pictures(None, target_transform=transforms.RandAugment()), ["RandAugment"]),
    "not called, by a base's name": (Pictures(None, pipeline=[type("Mine", (RandomButNot,), {})()]), ["Mine"]),
    "not called, with a probability": (
        Pictures(None, transforms=[Sometimes(), RandomButNot()]),
        ["Sometimes", "RandomButNot"],
    ),
    "called, whatever its name": (Pictures(transforms.Compose([RandomButNot(), Sometimes(), Shaky()])), ["Shaky"]),
    "function": (Pictures(transforms.Compose([keep, shake])), ["shake"]),
    "bound": (Pictures(functools.partial(shake)), ["shake"]),
    "twice": (Pictures(transforms.Compose([transforms.RandomCrop(7), transforms.RandomCrop(6)])), ["RandomCrop"]),
    "private": (Pictures(transforms.Compose([Transform(*private()["numpy"][:2])])), ["Transform"]),
    "private after global": (
        Pictures(Around(Shaky(), Transform(*private()["random"][:2]))),
        ["Around", "Shaky", "Transform"],
    ),
    "after what is within": (Pictures(Around(RandomButNot())), ["Around"]),
    "failing": (Pictures(transforms.Compose([Failing(), keep, RandomButNot()])), ["Failing"]),
}


@pytest.mark.parametrize("name", WHO)
def test_transforms_that_draw(name: str) -> None:
    dataset, expected = WHO[name]
    before = state_of_all()
    held = copy.copy(getattr(dataset, "__dict__", None))
    assert random_transforms(dataset) == expected
    assert state_of_all() == before
    assert getattr(dataset, "__dict__", None) == held


def test_a_profiler_is_left_alone() -> None:
    def profiler(*_: Any) -> None:
        pass

    sys.setprofile(profiler)
    try:
        assert random_transforms(Pictures(COMPOSE)) == ["RandomCrop", "ColorJitter"]
        assert random_transforms(Pictures(Shaky())) == []
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_tensors_are_not_transforms() -> None:
    dataset = TensorDataset(torch.ones(3))
    dataset.transform = None  # type: ignore[attr-defined]
    assert random_transforms(dataset) == []
    assert isinstance(read(dataset, [0])[0][0], Tensor)
