"""What a loader's batches are made of: learned from samples, taken apart, built again, or refused by name."""

import contextlib
import json
import math
import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import register_dataclass
from torch.utils.data import default_collate
from xxhash import xxh3_64_intdigest

from fxfreeze.cache import Blob, CacheRefusal, Column, CorruptCache
from fxfreeze.cache.columns import DTYPES
from fxfreeze.cache.contents import checksum
from fxfreeze.cache.forms import BatchForm
from fxfreeze.cache.objects import ObjectCodec


class Pair(NamedTuple):
    image: Any
    label: Any


class Masked(NamedTuple):
    x: Tensor
    mask: Tensor


@dataclass
class Record:
    image: Tensor
    label: Tensor


@dataclass
class Unregistered:
    image: Tensor


register_dataclass(Record)


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a mapping that is no dict."""


def image(i: int) -> Tensor:
    return torch.arange(6, dtype=torch.float32).view(2, 3) + 10 * i


def image_label(i: int) -> tuple[Tensor, int]:
    return image(i), i % 3


def stacked(samples: list[Any]) -> tuple[Tensor, list[Any]]:
    return torch.stack([sample[0] for sample in samples]), [sample[1] for sample in samples]


def boxes(i: int) -> dict[str, Any]:
    """A detection target: as many boxes as the sample's number, none in sample 0."""
    return {"boxes": torch.rand(i, 4), "labels": torch.full((i,), i), "id": i, "name": f"im{i}", "crowd": (False, None)}


def learn(
    sample: Callable[[int], Any],
    collate: Callable[[list[Any]], Any] = default_collate,
    inputs: Any = None,
    parameters: tuple[str, ...] = (),
    count: int = 6,
) -> tuple[BatchForm, Callable[..., Any]]:
    """The form, and a function that collates other samples than those it was learned from."""
    form = BatchForm.learn(collate, [sample(i) for i in range(count)], inputs, parameters)
    return form, lambda *numbers: collate([sample(i) for i in numbers])


def assert_round_trip(form: BatchForm, batch: Any) -> None:
    rest = form.rest(batch)
    assert list(rest) == [column.name for column in form.columns]
    for column in form.columns:
        value = rest[column.name]
        if isinstance(column, Column):
            assert value.dtype == column.dtype
            assert tuple(value.shape[1:]) == column.shape
        else:
            assert all(type(item) is bytes for item in value)
    built = form.build(form.inputs(batch), rest)
    assert type(built) is type(batch)
    assert checksum(built) == checksum(batch)


LOADERS: dict[str, tuple[Any, Any, Any, tuple[str, ...], tuple[str, ...], int]] = {
    # sample, collate, inputs, parameters -> names of the inputs, number of columns
    "tensor": (image, default_collate, None, (), ("batch",), 0),
    "tuple": (image_label, default_collate, None, (), ("0",), 1),
    "tuple kept": (image_label, lambda s: tuple(default_collate(s)), None, (), ("0",), 1),
    "second": (lambda i: (i, image(i)), default_collate, 1, (), ("1",), 1),
    "both": (image_label, default_collate, [1, 0], (), ("0", "1"), 0),
    "namedtuple": (lambda i: Pair(image(i), i), default_collate, None, (), ("image",), 1),
    "field": (lambda i: Pair(i, image(i)), default_collate, "label", (), ("label",), 1),
    "position": (lambda i: Pair(i, image(i)), default_collate, [1], (), ("label",), 1),
    "dict": (lambda i: {"label": i, "x": image(i), "id": i}, default_collate, None, ("x", "y"), ("x",), 2),
    "keys": (lambda i: {"x": image(i), "m": i, "y": i}, default_collate, ["m", "x"], ("y",), ("x", "m"), 1),
    "int keys": (lambda i: {3: image(i), 4: i}, default_collate, 3, (), ("3",), 1),
    "ordered": (lambda i: OrderedDict(b=i, a=image(i)), default_collate, None, ("a",), ("a",), 1),
    "nested": (
        lambda i: ({"a": image(i), "b": [i, i * 0.5]}, i),
        default_collate,
        None,
        (),
        ("0.a", "0.b.0", "0.b.1"),
        1,
    ),
    "masked": (
        lambda i: {"x": Masked(image(i), image(i) > 9), "y": i},
        default_collate,
        ["x"],
        (),
        ("x.x", "x.mask"),
        1,
    ),
    "strings": (lambda i: (image(i), f"né {i}", i), default_collate, None, (), ("0",), 2),
    "string dict": (lambda i: {"x": image(i), "t": "a" * i}, default_collate, "x", (), ("x",), 1),
    "floats": (lambda i: (image(i), float(i), [math.nan, math.inf][i % 2]), default_collate, None, (), ("0",), 2),
    "none": (lambda i: (image(i), i), lambda s: (*default_collate(s), None, "train", 3, {}, []), None, (), ("0",), 1),
    "constant": (image, lambda s: (torch.stack(s), torch.arange(5), torch.tensor(2.0)), None, (), ("0",), 0),
    "detection": (lambda i: (image(i), boxes(i)), stacked, None, (), ("0",), 1),
    "object tuple": (
        lambda i: (image(i), boxes(i)),
        lambda s: (stacked(s)[0], tuple(stacked(s)[1])),
        None,
        (),
        ("0",),
        1,
    ),
    "list of tensors": (lambda i: (image(i), torch.ones(i)), stacked, None, (), ("0",), 1),
    "mapping": (
        lambda i: {"ids": image(i), "y": i},
        lambda s: Encoding(default_collate(s)),
        None,
        ("ids",),
        ("ids",),
        1,
    ),
    "registered": (
        image_label,
        lambda s: Record(*default_collate(s)),
        None,
        ("image",),
        ("image",),
        1,
    ),
    "none kept": (lambda i: (image(i), None if i % 2 else i), stacked, None, (), ("0",), 1),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_batches_of_any_size_come_back(name: str, count: int) -> None:
    sample, collate, inputs, parameters, names, columns = LOADERS[name]
    form, batch = learn(sample, collate, inputs, parameters, count)
    assert form.names == names
    assert [column.name for column in form.columns] == [f"rest.{number}" for number in range(columns)]
    for numbers in ([0], [3], [2, 1], [5, 0, 5], list(range(9))):
        assert_round_trip(form, batch(*numbers))


def test_columns_have_the_leaves_dtypes_and_shapes() -> None:
    form, batch = learn(lambda i: (image(i), {"y": i, "z": image(i).half(), "s": str(i)}))
    assert form.columns == (Column("rest.0", torch.int64, ()), Column("rest.1", torch.float16, (2, 3)), Blob("rest.2"))
    met = batch(4, 2)
    rest = form.rest(met)
    assert rest["rest.0"] is met[1]["y"]
    assert rest["rest.2"] == [b'"4"', b'"2"']
    assert form.inputs(met)[0] is met[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_a_column_may_have(dtype: torch.dtype) -> None:
    def sample(i: int) -> tuple[Tensor, Tensor, Any]:
        value = torch.tensor([i % 2, 1]).to(dtype)
        return value, value, {"v": value}

    form, batch = learn(sample, lambda s: (*default_collate([x[:2] for x in s]), [x[2] for x in s]))
    assert form.columns[0] == Column("rest.0", dtype, (2,))
    assert_round_trip(form, batch(1, 2, 3))


def test_what_is_built_holds_the_inputs_as_given() -> None:
    form, batch = learn(lambda i: ({"a": image(i), "b": image(i)}, i))
    stand_in = object()
    built = form.build([stand_in, "two"], form.rest(batch(0, 1)))
    assert built[0] == {"a": stand_in, "b": "two"}
    assert built[1].tolist() == [0, 1]
    with pytest.raises(ValueError):
        form.build([stand_in], form.rest(batch(0, 1)))


def test_constants_are_not_shared_between_batches() -> None:
    form, batch = learn(image, lambda s: (torch.stack(s), torch.zeros(7), [1, 2]))
    met = batch(0, 1)
    form.build(form.inputs(met), {})[1].fill_(5)
    assert form.build(form.inputs(met), {})[1].tolist() == [0] * 7


def test_an_object_that_is_always_the_same_is_a_constant() -> None:
    marker = object()
    form, batch = learn(image, lambda s: (torch.stack(s), marker))
    assert form.build([0], {})[1] is marker
    met = batch(0)
    with pytest.raises(CacheRefusal, match=r"^part 1 of the batch is a object in this batch"):
        form.rest((met[0], object()))


def test_keys_may_come_in_another_order() -> None:
    form, batch = learn(lambda i: {"x": image(i), "y": i}, parameters=("x",))
    met = batch(0, 1)
    built = form.build(form.inputs(met), form.rest(dict(reversed(met.items()))))
    assert list(built) == ["x", "y"]
    assert checksum(built) == checksum(met)


def test_checksums_are_of_the_logical_order() -> None:
    form, _ = learn(lambda i: torch.arange(24.0).view(2, 3, 4) + i)
    batch = torch.randn(5, 2, 3, 4)
    batch[1, 0, 0, 0] = -0.0
    expected = [[xxh3_64_intdigest(row.numpy().tobytes()) for row in batch]]
    assert form.checksums(batch) == expected
    assert form.checksums(batch.contiguous(memory_format=torch.channels_last)) == expected
    assert form.checksums(batch.flip(0).flip(0)) == expected
    assert form.checksums(torch.stack([batch, batch], -1)[..., 0]) == expected
    assert form.checksums(batch.neg().neg()) == expected
    batch[1, 0, 0, 0] = 0.0
    assert [a == b for a, b in zip(form.checksums(batch)[0], expected[0], strict=True)] == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_checksums_of_a_negated_view() -> None:
    form, _ = learn(lambda i: torch.ones(3))
    batch = torch._neg_view(torch.ones(2, 3))
    assert batch.is_neg()
    assert batch.is_contiguous()
    assert form.checksums(batch) == form.checksums(torch.full((2, 3), -1.0))


def test_checksums_of_a_conjugate_view_and_of_empty_rows() -> None:
    form, _ = learn(lambda i: (torch.full((3,), complex(i, 1)), torch.empty(0)), inputs=[0, 1])
    batch = torch.stack([torch.full((3,), complex(i, 1)) for i in range(2)])
    empty = torch.empty(2, 0)
    assert form.checksums([batch.conj(), empty]) == form.checksums([batch.conj().resolve_conj(), empty])
    assert form.checksums([batch.conj(), empty]) != form.checksums([batch, empty])
    assert form.checksums([batch, empty])[1] == [xxh3_64_intdigest(b"")] * 2


# What can't be cached, and what the message must name.


def padded(samples: list[Any]) -> tuple[Tensor, Tensor]:
    longest = max(len(x) for x, _ in samples)
    rows = [torch.cat([x, x.new_zeros(longest - len(x))]) for x, _ in samples]
    return torch.stack(rows), torch.tensor([y for _, y in samples])


def mixed_up(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return torch.lerp(x, x.flip(0), torch.rand(())), y


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "padding": (
        lambda i: (torch.ones(i % 3 + 1), i),
        padded,
        {},
        r"part 0 of the batch has .*float32\[\d\].*float32\[\d\].*pad to a fixed length",
    ),
    "padding, as if fixed in halves": (
        lambda i: (torch.ones([5, 3, 3, 5][i % 4]), i),
        padded,
        {"count": 4},
        r"^part 0 of the batch has rows of float32\[3\] in this batch, and rows of float32\[5\] in the samples",
    ),
    "batch mean": (
        image_label,
        lambda s: (default_collate(s)[0] - default_collate(s)[0].mean(0), default_collate(s)[1]),
        {"count": 4},
        "^part 0 of the batch: a sample's row depends on the samples .* mix samples in the part of the model that still trains",
    ),
    "sorted": (image_label, lambda s: default_collate(sorted(s, key=lambda x: -x[1])), {}, "neither sort"),
    "sorted, and so are the first samples": (
        image_label,
        lambda s: default_collate(sorted(s, key=lambda x: x[0].sum())),
        {},
        "^part 0 of the batch: .*sort",
    ),
    "sorted rest": (
        image_label,
        lambda s: (default_collate(s)[0], default_collate(s)[1].sort().values),
        {},
        "^part 1 of the batch: a sample's row depends",
    ),
    "sorted strings": (
        lambda i: (image(i), f"{-i}"),
        lambda s: (stacked(s)[0], sorted(stacked(s)[1])),
        {},
        "^part 1 of the batch: ",
    ),
    "mixup": (
        image_label,
        mixed_up,
        {},
        "^part 0 of the batch: collating .* again .* random .* mix samples in the part of the model that still trains",
    ),
    "size of the batch": (
        image_label,
        lambda s: (*default_collate(s), len(s)),
        {},
        "^part 2 of the batch is 6 in a batch of 6 .* 3 in one of 3",
    ),
    "total": (
        image_label,
        lambda s: (*default_collate(s), default_collate(s)[1].sum()),
        {},
        r"^part 2 of the batch is a tensor int64\[\]",
    ),
    "flat boxes": (
        lambda i: (image(i), torch.ones(i, 4)),
        lambda s: (stacked(s)[0], torch.cat(stacked(s)[1])),
        {},
        r"^part 1 of the batch is a tensor float32\[15, 4\] .* neither one row",
    ),
    "time first": (image, lambda s: torch.stack(s, 1), {}, r"^the batch is a tensor float32\[2, 6, 3\]"),
    "keys of the batch": (
        image,
        lambda s: {"x": torch.stack(s)} | {str(len(s)): 1},
        {"inputs": "x"},
        "^the batch is a dict of 'x', '6'",
    ),
    "unknown class": (
        image_label,
        lambda s: Unregistered(torch.stack([x for x, _ in s])),
        {},
        "Unregistered .*register_dataclass",
    ),
    "uncollated": (image_label, lambda s: s, {}, "returns the samples as a list"),
    "list of inputs": (
        image_label,
        lambda s: tuple(zip(*s, strict=True)),
        {},
        "^input 0 of the batch is tuple of an object per sample",
    ),
    "text input": (lambda i: (f"{i}", i), default_collate, {}, "^input 0 of the batch is tuple of an object"),
    "constant input": (
        image,
        lambda s: {"x": torch.stack(s), "m": None},
        {"parameters": ("x", "m")},
        "^input m of the batch is the constant None",
    ),
    "dtype of an input": (
        lambda i: (torch.ones(2, dtype=torch.complex128), i),
        default_collate,
        {},
        "^input 0 of the batch .*complex128.*float32",
    ),
    "dtype of the rest": (
        lambda i: (image(i), torch.ones(2, dtype=torch.complex128)),
        default_collate,
        {},
        "^part 1 of the batch has .*complex128",
    ),
    "sparse": (
        lambda i: (image(i), image(i)),
        lambda s: (default_collate(s)[0], default_collate(s)[1].to_sparse()),
        {},
        "^part 1 of the batch is a sparse_coo tensor",
    ),
    "no parameter": (
        lambda i: {"a": image(i), "b": i},
        default_collate,
        {"parameters": ("x", "y")},
        "'a', 'b', .* takes x, y; .*inputs=",
    ),
    "unknown key": (lambda i: {"a": image(i)}, default_collate, {"inputs": ["a", "q"]}, "no 'q'; it has 'a'"),
    "unknown position": (image_label, default_collate, {"inputs": 2}, "no 2; it has 0, 1"),
    "unknown field": (
        lambda i: Pair(image(i), i),
        default_collate,
        {"inputs": "mask"},
        "no 'mask'; it has 'image', 'label'",
    ),
    "name for a tuple": (image_label, default_collate, {"inputs": "x"}, "no 'x'"),
    "inputs of a tensor": (image, default_collate, {"inputs": 0}, "leave inputs= out"),
    "no inputs": (image_label, default_collate, {"inputs": []}, "hold no tensors"),
    "object": (lambda i: (image(i), {"a": [slice(i)]}), stacked, {}, "^part 1 of the batch: a sample holds slice"),
    "failing": (
        image_label,
        lambda s: default_collate(s) if len(s) > 1 else 1 / 0,
        {},
        "collating 1 samples .*ZeroDivisionError",
    ),
    "squeezed": (image_label, lambda s: (default_collate(s)[0].squeeze(0), default_collate(s)[1]), {}, "0 has|rows"),
    "rows that do not match": (
        image_label,
        lambda s: (default_collate(s)[0][:-1], default_collate(s)[1]),
        {},
        "^part 0 of the batch is a tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    sample, collate, how, message = REFUSED[name]
    with pytest.raises(CacheRefusal, match=message):
        learn(sample, collate, **how)


def test_no_samples() -> None:
    with pytest.raises(CacheRefusal, match="no samples"):
        BatchForm.learn(default_collate, [], None, ())


def test_a_class_that_can_not_be_made_from_its_values() -> None:
    class Strict(UserDict[str, Any]):
        def __init__(self, data: Any, *, device: str) -> None:
            super().__init__(data)

    with pytest.raises(CacheRefusal, match="Strict must be made from its values alone"):
        learn(lambda i: {"x": image(i)}, lambda s: Strict(default_collate(s), device="cpu"), "x")


def test_a_tensor_class_in_the_rest() -> None:
    class Boxes(Tensor):
        pass

    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x.as_subclass(Boxes), y.as_subclass(Boxes)

    with pytest.raises(CacheRefusal, match=r"^part 1 of the batch is a .*Boxes.*as_subclass"):
        learn(image_label, collate)
    form, batch = learn(image_label, collate, [0, 1])
    assert type(form.inputs(batch(0))[0]) is Boxes
    with pytest.raises(CacheRefusal, match=r"Boxes int64\[\] in the samples"):
        form.inputs((batch(0)[0], torch.tensor([1])))


LATER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "row shape": (
        lambda b: b | {"y": torch.ones(2, 4)},
        r"^part y of the batch has rows of float32\[4\] in this batch, and rows of float32\[3\]",
    ),
    "dtype": (
        lambda b: b | {"y": b["y"].double()},
        r"^part y of the batch has rows of float64\[3\] in this batch, and rows of float32\[3\]",
    ),
    "fewer rows": (lambda b: b | {"y": b["y"][:1]}, "^part y of the batch has 1 rows, and part x of the batch 2"),
    "fewer objects": (lambda b: b | {"s": b["s"][:1]}, "^part s of the batch has 1 rows, and part x of the batch 2"),
    "no tensor": (lambda b: b | {"y": None}, r"^part y of the batch is None in this batch, and rows of float32\[3\]"),
    "no dimension": (lambda b: b | {"y": torch.tensor(1.0)}, r"^part y of the batch is a tensor float32\[\]"),
    "another constant": (
        lambda b: b | {"c": "evaluate"},
        "^part c of the batch is 'evaluate' in this batch, and the constant 'train'",
    ),
    "another kind of list": (lambda b: b | {"s": tuple(b["s"])}, "^part s of the batch is a tuple"),
    "a key more": (
        lambda b: b | {"z": 1},
        "^the batch is a dict of 'x', 'y', 's', 'c', 'l', 'z' in this batch, and dict of 'x', 'y', 's', 'c', 'l' in",
    ),
    "a key less": (lambda b: {"x": b["x"]}, "^the batch is a dict of 'x' in this batch"),
    "another container": (lambda b: list(b.values()), "batch is a list of 5 in this batch"),
    "a leaf": (lambda b: b["x"], "batch is a tensor"),
    "another mapping": (OrderedDict, "batch is a OrderedDict of"),
    "a sparse tensor": (lambda b: b | {"y": b["y"].to_sparse()}, "^part y of the batch is a sparse_coo tensor"),
    "a longer list": (
        lambda b: b | {"l": [1, 2, 3]},
        "^part l of the batch is a list of 3 in this batch, and list of 2",
    ),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("method", ["inputs", "rest", "checksums"])
def test_a_later_batch_of_another_form(name: str, method: str) -> None:
    change, message = LATER[name]
    form, batch = learn(
        lambda i: {"x": image(i), "y": image(i)[0], "s": str(i)},
        lambda s: (
            default_collate([{k: x[k] for k in "xy"} for x in s])
            | {"s": [x["s"] for x in s], "c": "train", "l": [1, 2]}
        ),
        parameters=("x",),
    )
    assert_round_trip(form, batch(1, 2))
    with pytest.raises(CacheRefusal, match=message):
        getattr(form, method)(change(batch(1, 2)))


def test_a_later_object_that_can_not_be_stored() -> None:
    form, batch = learn(lambda i: (image(i), {"a": i} if i < 6 else {"a": Pair(1, 2)}), stacked)
    with pytest.raises(CacheRefusal, match=r"^part 1 of the batch: a sample holds .*Pair"):
        form.rest(batch(5, 6))


def test_a_collate_may_change_its_samples() -> None:
    """As transformers' do, which take the labels out of the samples' dicts."""

    def collate(samples: list[Any]) -> Any:
        labels = [sample["more"].pop("label") + sample.pop("y") for sample in samples]
        samples[0]["x"].mul_(2)
        samples[0]["array"] *= 2
        samples[0]["x"].div_(2)
        return {"x": torch.stack([sample["x"] for sample in samples]), "labels": torch.tensor(labels)}

    samples = [{"x": image(i), "y": i, "array": image(i).numpy(), "more": Encoding(label=i)} for i in range(4)]
    before = checksum(samples)
    form = BatchForm.learn(collate, samples, "x", ())
    assert checksum(samples) == before
    assert len(form.columns) == 1


def test_generators_are_left_as_found() -> None:
    own = torch.Generator().manual_seed(3)

    def collate(samples: list[Any]) -> Any:
        torch.rand(1), random.random(), torch.rand(1, generator=own)
        return default_collate(samples)

    before = torch.get_rng_state(), random.getstate(), own.get_state()
    learn(image_label, collate)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(before[2], own.get_state())


def test_a_nan_is_itself_and_zeros_have_signs() -> None:
    form, batch = learn(lambda i: (torch.tensor([math.nan, -0.0]), i), lambda s: (*default_collate(s), math.nan))
    built = form.build(form.inputs(batch(0)), form.rest(batch(0)))
    assert math.isnan(built[2])
    form, batch = learn(image, lambda s: (torch.stack(s), torch.tensor([0.0])))
    with pytest.raises(CacheRefusal, match=r"^part 1 of the batch is a tensor"):
        form.inputs((batch(0)[0], torch.tensor([-0.0])))


def test_transformers_classes() -> None:
    transformers = pytest.importorskip("transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    samples = [{"pixel_values": image(i), "labels": i} for i in range(4)]
    for collate in (
        lambda s: transformers.BatchFeature(default_collate(s)),
        lambda s: outputs.ImageClassifierOutput(logits=default_collate(s)["pixel_values"], loss=torch.zeros(())),
    ):
        form = BatchForm.learn(collate, samples, None, ("pixel_values", "logits"))
        assert len(form.names) == 1
        assert_round_trip(form, collate(samples[1:3]))


# Objects as bytes.

TENSORS = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 9),
)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9)
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())


def trees(leaf: Any) -> Any:
    return st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=3)
            | st.builds(Pair, inner, inner)
            | st.dictionaries(st.text(), inner, max_size=2).map(Encoding)
            | st.dictionaries(st.text(), inner, max_size=2).map(OrderedDict)
        ),
        max_leaves=8,
    )


CODEC = ObjectCodec("y", [[Pair(1, (Encoding(), {"a": OrderedDict()}))]])


@settings(max_examples=150, deadline=None)
@given(trees(ATOMS | TENSORS))
def test_objects_come_back(value: Any) -> None:
    data = CODEC.encode(value)
    back = CODEC.decode(data)
    assert checksum(back) == checksum(value)
    assert CODEC.encode(back) == data


@settings(max_examples=60, deadline=None)
@given(trees(ATOMS))
def test_without_tensors_it_is_json(value: Any) -> None:
    json.loads(CODEC.encode(value))


def test_the_order_of_keys_is_kept() -> None:
    assert list(CODEC.decode(CODEC.encode({"b": 1, "a": 2}))) == ["b", "a"]


@pytest.mark.parametrize(
    "value",
    [
        1j,
        object(),
        {1, 2},
        bytearray(b"a"),
        torch.ones(2).to_sparse(),
        torch.ones(2, dtype=torch.complex128),
        torch.nn.Parameter(torch.ones(2)),
        namedtuple("Other", "a")(1),
        type("Sub", (int,), {})(3),
        type("Sub", (list,), {})([3]),
        {"a": [{1: slice(3)}]},
        {frozenset(): 1},
        pytest.param(10**5000, id="huge"),
    ],
)
def test_objects_that_are_refused(value: Any) -> None:
    with pytest.raises(CacheRefusal, match=r"^y: "):
        CODEC.encode([value])


def test_an_object_without_an_end() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CacheRefusal, match=r"^y: "):
        CODEC.encode(value)


GOOD = CODEC.encode({"boxes": torch.ones(2, 4), "none": torch.ones(0, 4), "p": Pair(b"a", math.nan)})
PAIR = json.dumps(f"{__name__}.Pair")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8,
        b"nul",
        b"NaN",
        b"-Infinity",
        b"[]",
        b"{}",
        b'{"a": 1}',
        b'["list", ["nothing"]]',
        b'[["list"]]',
        b'["float"]',
        b'["float", "1.0"]',
        b'["float", []]',
        b'["bytes", "a"]',
        b'["bytes", "YQ==", 1]',
        b'["bytes", "Y$Q=="]',
        b'["bytes", 3]',
        b'["tensor", 0]',
        b'["tensor"]',
        b'["dict", 1]',
        b'["dict", [1]]',
        b'["dict", [["list"], 1]]',
        b'["dict", ["a", 1], ["a", 2]]',
        b'["class"]',
        b'["class", "os.system", ["command", "ls"]]',
        b'["class", ["list"], ["command", "ls"]]',
        f'["class", {PAIR}, ["image", 1]]'.encode(),
        f'["class", {PAIR}, ["label", 1], ["image", 1]]'.encode(),
        b"[" * 100_000,
        b'["list", ' * 50_000 + b"1" + b"]" * 50_000,
        b'"\xff"',
        b"9" * 5000,
        b"1 2",
        GOOD[:-1],
        GOOD + b"\0",
        GOOD.replace(b'"F32"', b'"U32"', 1).replace(b'"U32"', b'"F4"', 1),
        GOOD.replace(b"[0,4]", b"[0,9]").replace(b'["tensor",0]', b'["tensor",7]'),
        GOOD.replace(b'["tensor",1]', b'["tensor",0]'),
        GOOD.replace(b'["tensor",1]', b'["list"    ]'),
        GOOD.replace(b'"tree"', b'"free"'),
    ],
)
def test_hostile_bytes(data: bytes) -> None:
    assert data != GOOD
    with pytest.raises(CorruptCache, match=r"^y: .*drop the store and fill it anew"):
        CODEC.decode(data)


@pytest.mark.parametrize(
    "shape", ["[0,18446744073709551615]", "[0,9223372036854775808]", "[4294967296,4294967296]", "[0,-1]"]
)
def test_a_tensor_of_impossible_shape(shape: str) -> None:
    data = GOOD.replace(b"[0,4]", shape.encode())
    header = int.from_bytes(data[:8], "little") + len(data) - len(GOOD)
    with pytest.raises(CorruptCache, match=r"^y: "):
        CODEC.decode(header.to_bytes(8, "little") + data[8:])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    bad = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptCache):
        CODEC.decode(bytes(bad))


def test_a_class_that_fails_on_bytes_that_no_sample_gave() -> None:
    class Fussy(UserDict[str, Any]):
        def __init__(self, data: dict[str, Any]) -> None:
            super().__init__(data)
            data.get("text", "").upper()

    codec = ObjectCodec("y", [Fussy({"text": "a"})])
    data = codec.encode(Fussy({"text": "b"}))
    assert codec.decode(data) == Fussy({"text": "b"})
    with pytest.raises(CorruptCache, match=r"^y: .*AttributeError"):
        codec.decode(data.replace(b'"b"', b"3"))


def test_a_namedtuple_of_another_session_is_not_imported() -> None:
    data = CODEC.encode(Pair(1, 2))
    with pytest.raises(CorruptCache, match="Pair"):
        ObjectCodec("y", [3]).decode(data)


def test_corrupt_bytes_in_a_batch() -> None:
    form, batch = learn(lambda i: (image(i), boxes(i)), stacked)
    rest = form.rest(batch(0, 1))
    rest["rest.0"][1] = rest["rest.0"][1][:-3]
    with pytest.raises(CorruptCache, match=r"^part 1 of the batch: "):
        form.build(form.inputs(batch(0, 1)), rest)
