"""The transforms of a data set that draw random numbers, for a message to name."""

import functools
import re
import sys
from collections.abc import Iterator
from types import FrameType, FunctionType, MethodType
from typing import Any

from torch import nn

from fxfreeze.cache.generators import generators_kept, random_state

__all__ = ["random_transforms"]

_DATASETS = ("dataset", "datasets")
_TRANSFORMS = ("transform", "transforms", "target_transform", "pipeline", "augment", "augmentation", "augmentations")
_DEPTH = 16
_OBSERVED = 4  # samples
_RANDOM_NAME = re.compile(
    r"Random|Rand[A-Z]|Jitter|Augment|AugMix|Mix[Uu]p|CutMix|Cutout|Dropout|Noise|Elastic|GaussianBlur"
)


def random_transforms(dataset: Any) -> list[str]:
    """The classes' names, functions' own names, without duplicates; empty if none can be found.

    Those that draw while a few samples are read; and of those not called meanwhile, or all while a profiler is on, those
    whose name, or a base class's, is a random one's, or that apply with a probability. Generators are left as found.
    """
    transforms = list(_transforms(dataset))
    if not transforms:
        return []
    watch = _Watch(dataset, transforms)
    if sys.getprofile() is None:
        watch.read(dataset)
    found = [t for t in transforms if (id(t) in watch.drew if id(t) in watch.called else _named_random(t))]
    return list(dict.fromkeys(map(_name, found)))


class _Watch:
    """Which transforms are called while samples are read, and which draw, by looking at each call as a profiler does."""

    def __init__(self, dataset: Any, transforms: list[Any]) -> None:
        self.called: set[int] = set()
        self.drew: set[int] = set()
        self._dataset = dataset
        self._known = {id(transform) for transform in transforms}
        self._codes = {id(_function(t).__code__): id(t) for t in transforms if isinstance(_function(t), FunctionType)}
        self._active: list[int] = []

    def read(self, dataset: Any) -> None:
        with generators_kept(dataset) as self._state:
            sys.setprofile(self._event)
            try:
                for index in range(min(_OBSERVED, len(dataset))):
                    dataset[index]
            finally:
                sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        transform = self._transform_of(frame)
        if transform is None:
            return
        # What was drawn since the last event is the innermost transform's, not that of a Compose around it.
        if not self._state.unchanged():
            self.drew.update(self._active[-1:])
            self._state = random_state(self._dataset)
        if event == "call":
            self.called.add(transform)
            self._active.append(transform)
        else:
            self._active.pop()

    def _transform_of(self, frame: FrameType) -> int | None:
        code = frame.f_code
        if id(code) in self._codes:
            return self._codes[id(code)]
        first = id(frame.f_locals.get(code.co_varnames[0])) if code.co_argcount else None
        return first if first in self._known else None


def _transforms(dataset: Any) -> Iterator[Any]:
    """In the order of their application, as far as the nesting tells."""
    stack = [(dataset, 0, False)]
    met: list[Any] = []
    while stack:
        value, depth, is_transform = stack.pop()
        if value is None or depth > _DEPTH or any(value is other for other in met):
            continue
        met.append(value)
        if is_transform and not isinstance(value, list | tuple | dict | nn.ModuleList):
            yield value
        stack += [(item, depth + 1, kind) for item, kind in reversed(list(_within(value, is_transform)))]


def _within(value: Any, is_transform: bool) -> Iterator[tuple[Any, bool]]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        yield from ((item, is_transform) for item in value)
        return
    if is_transform and isinstance(value, nn.Module):
        yield from ((module, True) for module in value.children())
    own = getattr(value, "__dict__", {})
    if not is_transform:
        yield from ((own[name], False) for name in _DATASETS if name in own)
    yield from ((own[name], True) for name in _TRANSFORMS if name in own)


def _named_random(transform: Any) -> bool:
    names = [base.__name__ for base in type(transform).__mro__]
    probability = getattr(transform, "p", None)
    return any(map(_RANDOM_NAME.search, names)) or (isinstance(probability, int | float) and 0 < probability < 1)


def _function(transform: Any) -> Any:
    while isinstance(transform, functools.partial):
        transform = transform.func
    return transform.__func__ if isinstance(transform, MethodType) else transform


def _name(transform: Any) -> str:
    function = _function(transform)
    return function.__qualname__ if isinstance(function, FunctionType) else type(transform).__name__
