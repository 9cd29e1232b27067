"""The tree of a batch, derived from two batches of different sizes: what follows the samples, and what is always the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxfreeze.cache.contents import ContentsError, checksum
from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.trees import Kind, fresh, opened, qualified, rebuild

__all__ = ["Constant", "Fork", "Leaf", "Node", "Objects", "Rows", "assemble", "derive", "leaves", "part_values"]

_LEARNED = "in the samples that the cache was set up with"
_PAD = (
    "a sample's row must be the same in any batch: pad to a fixed length in the data set, not to the longest in a batch"
)


@dataclass(frozen=True)
class Rows:
    """A tensor (n, *shape), one row per sample."""

    name: str
    type: type
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"rows of {_described(self.type, self.dtype, self.shape)}"


@dataclass(frozen=True)
class Objects:
    """A list or tuple of n objects, one per sample."""

    name: str
    type: type

    def __str__(self) -> str:
        return f"{self.type.__name__} of an object per sample"


@dataclass(frozen=True)
class Constant:
    """What is the same in every batch. checksum: of its contents; None where only the object itself tells."""

    name: str
    value: Any
    checksum: str | None

    def __str__(self) -> str:
        return f"the constant {_short(self.value)}"


@dataclass(frozen=True)
class Fork:
    """A container of the same kind in every batch."""

    name: str
    kind: Kind
    children: tuple["Node", ...]

    def __str__(self) -> str:
        return str(self.kind)


Leaf = Rows | Objects | Constant
Node = Fork | Leaf


def derive(one: Any, other: Any, sizes: tuple[int, int], name: str = "") -> Node:
    """The tree that two batches of `sizes` samples share. CacheRefusal naming the first part that fits no tree."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _tensor(one, other, sizes, name or "batch")
    if type(one) is type(other) in (list, tuple) and (len(one), len(other)) == sizes:
        return Objects(name or "batch", type(one))
    found, again = opened(one), opened(other)
    if found is None or again is None:
        return _constant(one, other, sizes, name or "batch")
    kind, values = found
    matched = _values_as(other, kind)
    if matched is None:
        raise CacheRefusal(
            f"{part_text(name)} is a {kind} in a batch of {sizes[0]} samples and a {again[0]} in one of {sizes[1]}; "
            "it must be the same in any batch: change the collate function"
        )
    children = (
        derive(a, b, sizes, f"{name}.{key}" if name else str(key))
        for key, a, b in zip(kind.keys, values, matched, strict=True)
    )
    return Fork(name or "batch", kind, tuple(children))


def part_text(name: str, kind: str = "part") -> str:
    """A node as messages name it: a position alone would read like a value."""
    return "the batch" if name in ("", "batch") else f"{kind} {name} of the batch"


def leaves(node: Node) -> Iterator[Leaf]:
    """In the order of the batch."""
    if isinstance(node, Fork):
        for child in node.children:
            yield from leaves(child)
    else:
        yield node


def part_values(node: Node, batch: Any) -> list[Any]:
    """What a batch has at each leaf. CacheRefusal naming the leaf where it is no batch of that tree."""
    values = list(_walk(node, batch))
    sizes = [(leaf, len(value)) for leaf, value in zip(leaves(node), values, strict=True) if not _is_constant(leaf)]
    for leaf, size in sizes:
        if size != sizes[0][1]:
            raise CacheRefusal(
                f"{part_text(leaf.name)} has {size} rows, and {part_text(sizes[0][0].name)} {sizes[0][1]}; a "
                "batch has one row per sample"
            )
    return values


def assemble(node: Node, values: Iterator[Any]) -> Any:
    """A batch with the next of `values` at each leaf that is no constant."""
    if isinstance(node, Fork):
        return rebuild(node.kind, [assemble(child, values) for child in node.children])
    return fresh(node.value) if isinstance(node, Constant) else next(values)


def _tensor(one: Tensor, other: Tensor, sizes: tuple[int, int], name: str) -> Leaf:
    if one.ndim and other.ndim and (len(one), len(other)) == sizes:
        rows = Rows(name, type(one), one.dtype, tuple(one.shape[1:]))
        _check_rows(rows, other, f"in a batch of {sizes[0]} samples", f"in one of {sizes[1]}")
        return rows
    if (same := _same_contents(one, other)) is not None:
        return Constant(name, fresh(one), same)
    raise CacheRefusal(
        f"{part_text(name)} is {_of(one)} in a batch of {sizes[0]} samples and {_of(other)} in one of {sizes[1]}: neither one "
        "row per sample along its first dimension nor the same in every batch; change the collate function"
    )


def _constant(one: Any, other: Any, sizes: tuple[int, int], name: str) -> Leaf:
    if (same := _same_contents(one, other)) is not None or one is other:
        return Constant(name, fresh(one), same)
    raise CacheRefusal(
        f"{part_text(name)} is {_short(one)} in a batch of {sizes[0]} samples and {_short(other)} in one of {sizes[1]}; a "
        "batch can be dicts, lists, tuples, namedtuples and classes known to torch.utils._pytree (register_dataclass makes "
        "a dataclass known), of tensors with a row per sample, lists with an object per sample, and constants"
    )


def _walk(node: Node, value: Any) -> Iterator[Any]:
    if isinstance(node, Fork):
        values = _values_as(value, node.kind)
        if values is None:
            found = opened(value)
            _refuse(node, f"a {found[0]}" if found else _short(value))
        for child, item in zip(node.children, values, strict=True):
            yield from _walk(child, item)
        return
    if isinstance(node, Rows):
        _check_rows(node, value, _LEARNED, "in this batch")
    elif isinstance(node, Objects):
        if type(value) is not node.type:
            _refuse(node, _short(value))
    elif value is not node.value and (node.checksum is None or _checksum(value) != node.checksum):
        _refuse(node, _short(value))
    yield value


def _check_rows(rows: Rows, value: Any, where: str, here: str) -> None:
    if not isinstance(value, Tensor) or not value.ndim or value.layout is not torch.strided:
        _refuse(rows, _short(value))
    met = type(value), value.dtype, tuple(value.shape[1:])
    if met != (rows.type, rows.dtype, rows.shape):
        raise CacheRefusal(f"{part_text(rows.name)} has rows of {_described(*met)} {here}, and {rows} {where}; {_PAD}")


def _refuse(node: Node, met: str) -> NoReturn:
    raise CacheRefusal(
        f"{part_text(node.name)} is {met} in this batch, and {node} {_LEARNED}; it must be alike in every batch: "
        "change the data set or its collate function"
    )


def _values_as(value: Any, kind: Kind) -> list[Any] | None:
    """The container's values in the order of `kind`; None if it is of another kind."""
    found = opened(value)
    if found is None or found[0].type is not kind.type:
        return None
    if issubclass(kind.type, Mapping):
        by_key = dict(zip(found[0].keys, found[1], strict=True))
        return [by_key[key] for key in kind.keys] if by_key.keys() == set(kind.keys) else None
    return found[1] if found[0] == kind else None


def _same_contents(one: Any, other: Any) -> str | None:
    found = _checksum(one)
    return found if found == _checksum(other) else None


def _checksum(value: Any) -> str | None:
    try:
        return checksum(value)
    except ContentsError:
        return None


def _is_constant(leaf: Leaf) -> bool:
    return isinstance(leaf, Constant)


def _of(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"a {layout}tensor {_described(type(tensor), tensor.dtype, tuple(tensor.shape))}"


def _described(kind: type, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{'' if kind is Tensor else f'{qualified(kind)} '}{str(dtype).removeprefix('torch.')}{list(shape)}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return _of(value)
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return f"a {qualified(type(value))}"
