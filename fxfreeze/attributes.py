"""Plain attributes that a forward reads while it is traced: the graph holds their values, so it is good only for these.

A temperature that is annealed, a drop rate that is scheduled, a flag that is flipped: each asks for another trace.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

__all__ = ["AttributeReads", "Read", "changed"]

_ABSENT = object()
_PLAIN = (type(None), bool, int, float, complex, str)
_INTERNAL = frozenset(vars(nn.Module()))


class Read(NamedTuple):
    """One attribute read. own: the module's ``__dict__``; value: what it held, a copy of a list or dict."""

    owner: str
    own: dict[str, Any]
    name: str
    value: Any

    def changed(self) -> bool:
        now = self.own.get(self.name, _ABSENT)
        return now is not self.value and not (type(now) is type(self.value) and _is_plain(now) and now == self.value)


class AttributeReads:
    """What is read of the modules of ``net``: numbers, flags, strings, and lists, tuples and dicts of these.

    Within ``recorded()`` only, and not while ``paused()``. found: by module and name.
    """

    def __init__(self, net: nn.Module, paused: Callable[[], bool]):
        self.found: dict[tuple[int, str], Read] = {}
        self._modules = {id(m) for m in net.modules()}
        self._paused = paused

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        def reading(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name in _INTERNAL or not _is_plain(value) or id(module) not in self._modules or self._paused():
                return value
            own = object.__getattribute__(module, "__dict__")
            then = own.get(name, _ABSENT)  # what a class holds is hidden once the instance has its own
            then = then.copy() if isinstance(then, (list, dict)) else then
            self.found.setdefault((id(module), name), Read(type(module).__qualname__, own, name, then))
            return value

        nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__


def changed(reads: list[Read]) -> Read | None:
    """The first attribute that no longer has the value that was read."""
    return next((read for read in reads if read.changed()), None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, _PLAIN) for v in value)
    if isinstance(value, dict):
        return all(isinstance(v, _PLAIN) for v in value.values())
    return isinstance(value, _PLAIN)
