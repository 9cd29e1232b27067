"""Attributes that a forward reads while it is traced: the graph holds what they were, so it is good only for these.

A temperature that is annealed, a flag that is flipped, a buffer that is set at last: each asks for another trace. So do
the settings of a torch.nn layer, which a rewriting reads though the trace does not.
"""

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["INTERNAL", "AttributeReads", "Read", "Settings", "changed"]

_ABSENT = object()
_PLAIN = (type(None), bool, int, float, complex, str)
_UNINTERESTING = (frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))) - {"forward"}
_REGISTERS = ("_parameters", "_buffers", "_modules")
INTERNAL = frozenset(vars(nn.Module()))  # what every module has of torch's
_DEPTH = 3


class Read(NamedTuple):
    """One attribute read. owner: the module's class; held: the dictionary it is kept in; value: a snapshot of it."""

    owner: type
    held: dict[str, Any]
    name: str
    value: Any


class _Object(NamedTuple):
    """A snapshot of a user's object: itself, and its plain attributes."""

    itself: Any
    plain: dict[str, Any]


class AttributeReads:
    """What is read of the modules of ``net`` within ``recorded()``, but not while ``paused()``.

    found: by dictionary and name. Parameters, buffers and submodules that are there are not among them: the graph names
    these.
    """

    def __init__(self, net: nn.Module, paused: Callable[[], bool]):
        self.found: dict[tuple[int, str], Read] = {}
        self._modules = {id(m) for m in net.modules()}
        self._paused = paused
        self._objects: dict[int, _Object] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        read = object.__getattribute__

        def reading(module: nn.Module, name: str) -> Any:
            if name in _UNINTERESTING or name.startswith("__") or id(module) not in self._modules or self._paused():
                return read(module, name)
            own = read(module, "__dict__")
            try:
                value = read(module, name)
            except AttributeError:  # a registered one, which nn.Module finds next, or none
                held = next((own[key] for key in _REGISTERS if name in own.get(key, ())), own)
                if held.get(name) is None:
                    self._note(type(module), held, name)
                raise
            self._note(type(module), own, name)
            return value

        nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def _note(self, owner: type, held: dict[str, Any], name: str) -> None:
        if (id(held), name) not in self.found:
            value = _snapshot(_now(owner, held, name), self._objects)
            self.found[id(held), name] = Read(owner, held, name, value)


class Settings:
    """What layers compute with besides tensors and submodules, as it is now: strides, slopes, a forward of their own."""

    def __init__(self, layers: Iterable[nn.Module]):
        found = [(type(layer), vars(layer)) for layer in layers]
        names = [[name for name, value in held.items() if _is_setting(name, value)] for _, held in found]
        self._reads = [
            Read(owner, held, name, _now(owner, held, name))
            for (owner, held), own in zip(found, names, strict=True)
            for name in (*own, "forward")
        ]
        self._dictionaries = [held for _, held in found]
        self._held = [held for (_, held), own in zip(found, names, strict=True) if own]
        self._getters = [operator.itemgetter(*own) for own in names if own]
        self._values = self._present()

    def changed(self) -> Read | None:
        """The first setting that is another; quick if none is."""
        try:  # Dynamo can't follow the fast way
            if not torch.compiler.is_compiling() and self._present() == self._values:
                return None
        except (KeyError, RuntimeError):  # one is gone, or has become a tensor
            pass
        return changed(self._reads)

    def __str__(self) -> str:
        return str(self._values)

    def _present(self) -> tuple[list[Any], list[Any]]:
        forwards = [held["forward"] for held in self._dictionaries if "forward" in held]
        return [*map(operator.call, self._getters, self._held)], forwards


def changed(reads: list[Read]) -> Read | None:
    """The first attribute that is no longer what was read."""
    same: set[int] = set()  # objects that were compared: many modules may hold one
    return next((r for r in reads if not _same(r.value, _now(r.owner, r.held, r.name), same)), None)


def _now(owner: type, held: dict[str, Any], name: str) -> Any:
    """The instance's own attribute, or else that of its class."""
    value = held.get(name, _ABSENT)
    return getattr(owner, name, _ABSENT) if value is _ABSENT else value


def _snapshot(value: Any, objects: dict[int, _Object], depth: int = _DEPTH) -> Any:
    """A copy of collections, to be compared by their elements, and of an object's plain attributes."""
    if isinstance(value, _PLAIN) or depth == 0:
        return value
    if type(value) in (list, tuple):
        return type(value)([_snapshot(v, objects, depth - 1) for v in value])
    if type(value) is dict:
        return {k: _snapshot(v, objects, depth - 1) for k, v in value.items()}
    if type(value) is set:
        return value.copy()
    if not hasattr(value, "__dict__") or callable(value) or isinstance(value, (nn.Module, Tensor)):
        return value
    if id(value) not in objects:
        objects[id(value)] = _Object(value, _plain_of(value))
    return objects[id(value)]


def _is_setting(name: str, value: Any) -> bool:
    if name in INTERNAL:
        return False
    return (
        isinstance(value, _PLAIN)
        or callable(value)
        or (type(value) is tuple and all(isinstance(v, _PLAIN) for v in value))
    )


def _plain_of(value: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(value).items() if isinstance(v, _PLAIN)}


def _same(then: Any, now: Any, same: set[int]) -> bool:
    if type(then) is _Object:
        if now is not then.itself:
            return False
        if id(then) not in same:
            plain = _plain_of(now)
            if plain.keys() != then.plain.keys() or not all(_same(v, plain[k], same) for k, v in then.plain.items()):
                return False
            same.add(id(then))
        return True
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(then, (*_PLAIN, set)):
        return bool(now == then)
    if isinstance(then, (list, tuple)):
        return len(now) == len(then) and all(_same(a, b, same) for a, b in zip(then, now, strict=True))
    if isinstance(then, dict):
        return list(now) == list(then) and all(_same(value, now[k], same) for k, value in then.items())
    return False
