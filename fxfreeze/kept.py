"""What a forward may change in modules and in what they hold, kept while it is traced and put back afterwards."""

import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from types import BuiltinMethodType, FunctionType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy

from fxfreeze.attributes import INTERNAL

__all__ = ["ModuleState", "held", "holders"]

_DEPTH = 3  # how far from a module: a dict of lists in an object is the farthest kept
_MANY = 1000  # elements: of a container that has more, the elements are kept, not what they hold
_DICTIONARIES = ("_parameters", "_buffers", "_modules")
_BUILT_IN = frozenset([dict, OrderedDict, list, set, deque])
_PYTHONS = (NoneType, bool, int, float, complex, str, bytes, type, FunctionType)
_ATOMS = frozenset([*_PYTHONS, Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device])
# Their objects change for reasons of their own (a logger caches its level); these packages' namespaces are like a user's.
_FOREIGN = (sys.stdlib_module_names | {"torch", "numpy", "fxfreeze"}) - {"types", "argparse", "collections"}


class ModuleState:
    """A snapshot of modules' attributes and, by identity, of what is in the containers and plain objects they hold.

    touched: the containers and objects that ``restore`` found changed.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]):
        modules = list(modules)
        self.touched: list[Any] = []
        self._dictionaries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._objects: list[tuple[str, Any, dict[str, Any]]] = []
        self._containers: list[tuple[str, Any, Any]] = []
        self._empty: list[tuple[str, dict[str, Any], list[Any]]] = []  # most are: collections of hooks
        for name, module in modules:
            own = vars(module)
            self._dictionaries.append((name, own, dict(own)))
            self._empty.append((name, own, [v for v in own.values() if type(v) in _BUILT_IN and not v]))
            for key, value in own.items():
                if key in INTERNAL and type(value) in _BUILT_IN and value:
                    if key in _DICTIONARIES:
                        self._dictionaries.append((name, value, dict(value)))
                    else:
                        self._containers.append((_join(name, key), value, _elements(value)))
        for name, value in held(modules):
            if issubclass(type(value), (dict, list, set, deque)):
                self._containers.append((name, value, _elements(value)))
            elif _is_plain_object(type(value)):
                self._objects.append((name, value, dict(vars(value))))

    def restore(self) -> str | None:
        """Put everything back; the qualified name of the first attribute that had changed, or None."""
        changed = []
        for name, live, before in self._dictionaries:
            if not _same(live, before):
                changed += [_join(name, key) for key in _restore(live, before)]
        for name, own, empty in self._empty:  # after the attributes, which say what these are called
            for value in filter(None, empty):
                self.touched.append(value)
                key = next(key for key, v in own.items() if v is value)
                changed += [_join(name, k) for k in value] if key in _DICTIONARIES else [_join(name, key)]
                value.clear()
        for name, value, before in self._objects:
            if not _same(vars(value), before):
                self.touched.append(value)
                changed += [_join(name, key) for key in _restore(vars(value), before)]
        for name, value, elements in self._containers:
            if not _same(_elements(value), elements):
                self.touched.append(value)
                _refill(value, elements)
                changed.append(name)
        return changed[0] if changed else None


def holders(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """The names of the modules that hold each container, object or other thing that can change, by its id."""
    names: dict[int, list[str]] = {}
    for name, module in modules:
        values = [value for _, value in held([("", module)])]
        for value in {id(v) for v in (*vars(module).values(), *values) if type(v) not in _ATOMS}:
            names.setdefault(value, []).append(name)
    return names


def held(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """What can change in the modules' attributes, each once: (qualified name of the attribute, value).

    Seen through are containers, plain objects and bound methods; modules and tensors are not. Left out are torch's own
    attributes of a module, and empty containers that it holds itself.
    """
    nearest: dict[int, int] = {}
    for name, module in modules:
        for key, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMS or key in INTERNAL or (kind in _BUILT_IN and not value):
                continue
            if kind is not tuple or not _ATOMS.issuperset(map(type, value)):
                yield from _within(_join(name, key), value, nearest)
        for key, value in _class_attributes(type(module), nearest):
            yield from _within(_join(name, key), value, nearest)


def _class_attributes(kind: type, met: dict[int, int]) -> Iterator[tuple[str, Any]]:
    """Of a module's classes that torch doesn't define, those not ``met`` yet."""
    for base in kind.__mro__:
        if id(base) not in met:
            met[id(base)] = 0
            if base.__module__.partition(".")[0] not in _FOREIGN:
                own = vars(base).items()
                yield from ((key, v) for key, v in own if type(v) not in _ATOMS and not key.startswith("__"))


def _within(name: str, value: Any, nearest: dict[int, int]) -> Iterator[tuple[str, Any]]:
    """``value`` and what it holds. nearest: how far from a module each was met."""
    stack = [(name, value, 1)]
    while stack:
        name, value, depth = stack.pop()
        known = nearest.get(id(value))
        if known is not None and known <= depth:
            continue
        nearest[id(value)] = depth
        if known is None:
            yield name, value
        if depth < _DEPTH:
            inside = _inside(value, type(value))
            stack += [(_join(name, key), v, depth + 1) for key, v in inside if type(v) not in _ATOMS]


def _inside(value: Any, kind: type) -> Iterable[tuple[str, Any]]:
    """What one value holds; only an object's attributes have names."""
    if issubclass(kind, (dict, list, tuple, set, frozenset, deque)):
        elements = _elements(value)
        if len(elements) > _MANY:
            return []
        return [("", v) for v in (elements.values() if type(elements) is dict else elements)]
    if kind is MethodType or kind is BuiltinMethodType:
        return [("", value.__self__)]
    return vars(value).items() if _is_plain_object(kind) else []


def _is_plain_object(kind: type) -> bool:
    if kind.__dictoffset__ == 0 or kind.__module__.partition(".")[0] in _FOREIGN:
        return False
    return not issubclass(kind, (nn.Module, Tensor, Proxy, type))


def _elements(value: Any) -> Any:
    """A plain dict or list of what is in a container, whatever its class makes of iteration."""
    kind = type(value)
    if issubclass(kind, OrderedDict):
        return dict(OrderedDict.items(value))
    if issubclass(kind, dict):
        return dict(dict.items(value))
    base = next(base for base in (list, tuple, set, frozenset, deque) if issubclass(kind, base))
    return list(base.__iter__(value))


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before) or not all(map(operator.is_, now, before)):
        return False
    return type(before) is list or all(map(operator.is_, now.values(), before.values()))


def _refill(live: Any, before: Any) -> None:
    if issubclass(type(live), dict):
        base = OrderedDict if issubclass(type(live), OrderedDict) else dict
        base.clear(live)
        for key, value in before.items():
            base.__setitem__(live, key, value)
    elif issubclass(type(live), list):
        list.__setitem__(live, slice(None), before)
    elif issubclass(type(live), set):
        set.clear(live)
        set.update(live, before)
    else:
        deque.clear(live)
        deque.extend(live, before)


def _restore(live: dict[str, Any], before: dict[str, Any]) -> list[str]:
    changed = [key for key in {**live, **before} if live.get(key, live) is not before.get(key, live)]
    for key in changed:
        if key in before:
            live[key] = before[key]
        else:
            del live[key]
    if list(live) != list(before):
        live.clear()
        live.update(before)
    return changed


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
