"""Tensors that a frozen graph reads and that no frozen unit owns, such as a buffer of the root: what is made of the graph,
compiled code above all, may hold what they were."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from fxfreeze.layouts import is_transformed

__all__ = ["Readings", "Sign", "sign_of"]


class Sign(NamedTuple):
    """What differs once a tensor is another, was written into, or lies elsewhere."""

    identity: int
    version: int
    address: int


def sign_of(tensor: Tensor) -> Sign:
    """Of a tensor as it is now."""
    version = 0 if tensor.is_inference() else tensor._version
    return Sign(id(tensor), version, 0 if is_transformed(tensor) else tensor.data_ptr())


class Readings:
    """Those of some graphs, as they were when each was noted.

    owned: ids of the dictionaries that hold the tensors of frozen units, which are watched elsewhere, each with a key.
    """

    def __init__(self, owned: Collection[tuple[int, str]]):
        self._owned = owned
        self._seen: dict[str, tuple[dict[str, Any], str, Sign]] = {}

    def names(self, graph: GraphModule) -> list[str]:
        """What ``graph`` reads from outside."""
        return [name for name, _, _ in self._outside(graph)]

    def note(self, graph: GraphModule) -> None:
        """Watch what ``graph`` reads from outside from now on."""
        for name, held, key in self._outside(graph):
            self._seen.setdefault(name, (held, key, sign_of(held[key])))

    def changed(self) -> str | None:
        """The name of one that is not what it was."""
        for name, (held, key, sign) in self._seen.items():
            tensor = held.get(key)
            if not isinstance(tensor, Tensor) or sign_of(tensor) != sign:
                return name
        return None

    def _outside(self, graph: GraphModule) -> Iterator[tuple[str, dict[str, Any], str]]:
        for name, held, key in _read_by(graph):
            if (id(held), key) not in self._owned and isinstance(held.get(key), Tensor):
                yield name, held, key


def _read_by(graph: GraphModule) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, dictionary, key in it) of each tensor that ``graph`` reads, itself or by a module that it calls."""
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            path, _, key = target.rpartition(".")
            owner = graph.get_submodule(path)
            yield target, next((d for d in (owner._buffers, owner._parameters) if key in d), owner.__dict__), key
        elif node.op == "call_module":
            for path, module in graph.get_submodule(target).named_modules(prefix=target):
                for held in (module._buffers, module._parameters):
                    yield from ((f"{path}.{key}", held, key) for key in held)
