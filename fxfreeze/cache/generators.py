"""The random generators that a data set or a collate function holds, and all others, left as they were found."""

import contextlib
import functools
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze.randomness import RandomState

__all__ = ["generators_kept", "random_state"]

_DEPTH = 16  # steps from the data set; a generator of a transform in a list in a Compose of a Subset's data set is at 5
_MANY = 1000  # elements: a container that has more is of samples, not of transforms
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, Tensor, type, ModuleType)
_SEEN_THROUGH = ("torch.nn", "torch.utils.data", "types")  # of the packages below, what may hold a user's generators
_CLOSED = sys.stdlib_module_names | {"torch", "numpy", "PIL"}


@contextlib.contextmanager
def generators_kept(*roots: Any) -> Iterator[RandomState]:
    """Puts every generator back on leaving: torch's, CUDA's, random's, numpy's, and those that the roots hold."""
    state = random_state(*roots)
    try:
        yield state
    finally:
        state.restore()


def random_state(*roots: Any) -> RandomState:
    """A snapshot of them.

    Found are those in attributes of objects and their classes, in containers, closures, bound methods and partials,
    data sets within data sets, modules, and those that a function names as globals.
    """
    holder = nn.Module()
    vars(holder)["generators"] = list(_generators(roots))
    return RandomState([holder])


def _generators(roots: Iterable[Any]) -> Iterator[Any]:
    kinds = _generator_kinds()
    # Nearest first, so that no value is met at the end of a long way and then not looked into.
    queue = deque((root, 0) for root in roots)
    met: dict[int, Any] = {}  # holds on to what it has met, or an id might be given to another
    while queue:
        value, depth = queue.popleft()
        if id(value) in met or issubclass(type(value), _ATOMS):
            continue
        met[id(value)] = value
        if issubclass(type(value), kinds):
            yield value
        elif depth < _DEPTH:
            queue.extend((item, depth + 1) for item in _inside(value, kinds))


def _inside(value: Any, kinds: tuple[type, ...]) -> Iterable[Any]:
    kind = type(value)
    own = vars(value).values() if kind.__dictoffset__ else ()
    if issubclass(kind, _CONTAINERS):
        return [*_elements(value, kind), *own]
    if kind is FunctionType:
        return _of_function(value, kinds)
    if kind in (MethodType, BuiltinMethodType):
        return [value.__self__, getattr(value, "__func__", None)]
    if kind in (staticmethod, classmethod):
        return [value.__func__]
    if kind is functools.partial:
        return [value.func, value.args, value.keywords]
    if _is_closed(kind) and not kind.__module__.startswith(_SEEN_THROUGH):
        return []
    return [*own, *_of_classes(kind)]


def _elements(value: Any, kind: type) -> Iterable[Any]:
    """By the built-in class's own methods: a user's may load something."""
    if len(value) > _MANY:
        return []
    if issubclass(kind, dict):
        return dict.values(value)
    return next(base for base in _CONTAINERS if issubclass(kind, base)).__iter__(value)


def _of_function(function: FunctionType, kinds: tuple[type, ...]) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield function.__defaults__
    for name in _global_names(function.__code__):
        if issubclass(type(function.__globals__.get(name)), kinds):
            yield function.__globals__[name]


def _global_names(code: CodeType) -> Iterator[str]:
    """Those of the comprehensions and functions within, too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _of_classes(kind: type) -> Iterator[Any]:
    for base in kind.__mro__:
        if not _is_closed(base):
            yield from vars(base).values()


def _is_closed(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _CLOSED


def _generator_kinds() -> tuple[type, ...]:
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    numpy = sys.modules.get("numpy")
    return (*kinds, numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator) if numpy else kinds
