"""Tensors that a traced forward makes from no input, or finds outside every module.

Python computes them while the trace is made, but traced operators may write into them (``zeros`` filled with slices).
So each storage is cloned once per run of the graph, every tensor on it is a view of that clone, and once it has been
written into, operators on it are traced even where none of their arguments is.
"""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from fxfreeze.effects import effects
from fxfreeze.inputs import TraceRefusal
from fxfreeze.proxies import IN_PLACE, SCALAR_NAMES

__all__ = ["Constants", "Recorded"]

# What is still true of a constant that the trace has written into.
_LASTING = (SCALAR_NAMES - {"item", "tolist"}) | {"_version", "is_inference", "untyped_storage"}

_IN_PLACE = {"__setitem__", *(f"__{name}__" for name in IN_PLACE)}

_Key = tuple[int, torch.dtype]  # a storage, and the dtype that it is read in


class Constants:
    """The constants of one trace.

    tensors: by ``get_attr`` target, each the whole of a storage, read at each run.
    """

    def __init__(self, tracer: Any):
        self.tensors: dict[str, Tensor] = {}
        self._tracer = tracer
        self._clones: dict[_Key, Node] = {}
        self._nodes: dict[int, Node] = {}
        self._met: list[tuple[Tensor, int]] = []  # keeps them alive, so that no id or address is used again
        self._origins: dict[Node, frozenset[_Key]] = {}  # of the nodes that may share memory with a constant
        self._written: frozenset[_Key] = frozenset()

    def copy(self) -> "Constants":
        """What is known now; ``tensors`` stays shared, and its names unique."""
        copy = Constants(self._tracer)
        copy.tensors = self.tensors
        copy._clones, copy._nodes = dict(self._clones), dict(self._nodes)
        copy._met, copy._origins, copy._written = list(self._met), dict(self._origins), self._written
        return copy

    def written_by_python(self) -> bool:
        """Whether Python wrote into a constant after it was met: traced operators would all read the last value."""
        return any(_version(tensor) != version for tensor, version in self._met)

    def written_in_trace(self, tensor: Tensor) -> bool:
        """Whether a traced operator has written into ``tensor``, so that Python's copy of it is out of date."""
        return bool(self._written) and _has_storage(tensor) and _key(tensor) in self._written

    def node(self, tensor: Tensor) -> Node:
        """The node that stands for ``tensor``."""
        if id(tensor) not in self._nodes:
            self._met.append((tensor, _version(tensor)))
            node = self._nodes[id(tensor)] = self._view(tensor)
            self._origins[node] = frozenset([_key(tensor)] if _has_storage(tensor) else [])
        return self._nodes[id(tensor)]

    def note(self, node: Node) -> None:
        """Take notice of a new node, which may look into a constant, or write into it."""
        if not any(n in self._origins for n in node.all_input_nodes):
            return
        does = effects(node, self._tracer.net.get_submodule)
        none = frozenset[_Key]()
        self._written = self._written.union(*(self._origins.get(n, none) for n in does.writes))
        self._origins[node] = none.union(*(self._origins.get(n, none) for n in does.aliases))

    def _view(self, tensor: Tensor) -> Node:
        if not _has_storage(tensor):
            return self._clone(tensor)
        key = _key(tensor)
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.is_contiguous() and tensor.numel() == elements and key not in self._clones:
            self._clones[key] = self._clone(tensor)
            return self._clones[key]
        if key not in self._clones:
            self._clones[key] = self._clone(tensor.detach().as_strided((elements,), (1,), 0))
        place = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        view: Node = self._tracer.create_node("call_method", "as_strided", (self._clones[key], *place), {})
        return view

    def _clone(self, tensor: Tensor) -> Node:
        name = f"_constant_{len(self.tensors)}"
        self.tensors[name] = tensor
        held = self._tracer.create_node("get_attr", name, (), {})
        clone: Node = self._tracer.create_node("call_function", torch.clone, (held,), {})
        return clone


class Recorded(TorchFunctionMode):
    """Within, operators on tensors that the graph reads or has written into are traced, though Python could run them.

    A write into any other tensor that forward did not make itself is refused: it would last.
    """

    def __init__(self, tracer: Any):
        super().__init__()
        self._tracer = tracer
        self._made: dict[int, Tensor] = {}  # by storage: what has been made since

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in _LASTING:
            return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        held = [isinstance(leaf, Tensor) and self._tracer.holds(leaf) for leaf in leaves]
        if any(held):
            proxies = [self._tracer.proxy_of(leaf) if its else leaf for leaf, its in zip(leaves, held, strict=True)]
            return self._record(func, name, *pytree.tree_unflatten(proxies, spec))
        if any(_storage(t) not in self._made for t in _written(name, leaves, kwargs)):
            raise TraceRefusal("it writes into a tensor that is neither a buffer nor made by forward")
        result = func(*args, **kwargs)
        self._made.update((_storage(t), t) for t in pytree.tree_leaves(result) if type(t) is Tensor and _has_storage(t))
        return result

    def _record(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.__name__ == "__get__":  # an attribute
            return getattr(args[0], name)
        if is_tensor_method_or_property(func):
            return self._tracer.create_proxy("call_method", name, args, kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs)


def _written(name: str, leaves: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The real tensors that an operator writes into."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    targets = [*leaves[: int(in_place)], *pytree.tree_leaves(kwargs.get("out"))]
    return [t for t in targets if type(t) is Tensor and _has_storage(t)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _key(tensor: Tensor) -> _Key:
    return _storage(tensor), tensor.dtype


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
