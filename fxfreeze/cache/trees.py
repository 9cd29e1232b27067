"""Containers, opened one level at a time and built again: what batches and samples are trees of."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Kind", "fresh", "is_named", "opened", "qualified", "rebuild"]

_BUILT_IN = (dict, OrderedDict, list, tuple)


@dataclass(frozen=True)
class Kind:
    """A container without its values.

    keys: a mapping's keys, a namedtuple's fields, a sequence's positions; context: for a class that torch's pytree
    flattens, what it needs to build one again; None for others.
    """

    type: type
    keys: tuple[Any, ...]
    context: Any = None

    @property
    def by_key(self) -> bool:
        """Whether the values are known by name, not by position."""
        return issubclass(self.type, Mapping) or not all(isinstance(key, int) for key in self.keys)

    def __str__(self) -> str:
        if self.by_key:
            return f"{self.type.__name__} of {', '.join(map(repr, self.keys))}"
        return f"{self.type.__name__} of {len(self.keys)}"


def opened(value: Any) -> tuple[Kind, list[Any]] | None:
    """A container's kind and values; None for what is none, or is of a class that nobody can open."""
    kind = type(value)
    if is_named(kind):
        return Kind(kind, kind._fields), list(value)
    if kind not in _BUILT_IN and kind in pytree.SUPPORTED_NODES:
        return _flattened(kind, value)
    if isinstance(value, Mapping):
        return Kind(kind, tuple(value)), [value[key] for key in value]
    if isinstance(value, list | tuple):
        return Kind(kind, tuple(range(len(value)))), list(value)
    return None


def rebuild(kind: Kind, values: Sequence[Any]) -> Any:
    """A container of that kind. Whatever its class raises when it can't be made from its values alone."""
    if is_named(kind.type):
        return kind.type._make(values)  # type: ignore[attr-defined]
    if kind.type not in _BUILT_IN and kind.type in pytree.SUPPORTED_NODES:
        return pytree.SUPPORTED_NODES[kind.type].unflatten_fn(values, kind.context)
    if issubclass(kind.type, Mapping):
        return kind.type(dict(zip(kind.keys, values, strict=True)))  # type: ignore[call-arg]
    return kind.type(values)  # type: ignore[call-arg]


def fresh(value: Any) -> Any:
    """A copy that shares no container, tensor or array with `value`: a collate may change the samples it is handed."""
    if isinstance(value, Tensor):
        return value.clone()
    found = opened(value)
    if found is None:
        return value.copy() if _is_array(type(value)) else value
    kind, values = found
    if issubclass(kind.type, _BUILT_IN) and (kind.type in _BUILT_IN or is_named(kind.type)):
        return rebuild(kind, [fresh(item) for item in values])
    return copy.copy(value)


def is_named(kind: type) -> Any:
    """Whether the class is a namedtuple's."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and hasattr(kind, "_make")


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _is_array(kind: type) -> bool:
    return qualified(kind) == "numpy.ndarray"


def _flattened(kind: type, value: Any) -> tuple[Kind, list[Any]]:
    node = pytree.SUPPORTED_NODES[kind]
    values, context = node.flatten_fn(value)
    # For its keys alone: the context that register_dataclass returns with them is not one to build from.
    pairs = node.flatten_with_keys_fn(value)[0] if node.flatten_with_keys_fn else []
    keys = tuple(_key(entry) for entry, _ in pairs) or tuple(range(len(values)))
    return Kind(kind, keys, context), list(values)


def _key(entry: Any) -> Any:
    names = {pytree.MappingKey: "key", pytree.GetAttrKey: "name", pytree.SequenceKey: "idx"}
    return getattr(entry, names[type(entry)]) if type(entry) in names else str(entry)
