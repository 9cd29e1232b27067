"""A graph that a compiler made faster for tensors of given shapes, and which graphs can be given to one."""

import copy
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxfreeze.effects import Memory
from fxfreeze.layouts import kind_of
from fxfreeze.observers import observed

__all__ = ["Compiled", "Compiler", "kinds_of", "unrepeatable"]

# Of a graph, the tensors of one call, and autocast's dtype or None: the same for tensors of these shapes. What it raises is
# why it can't.
Compiler = Callable[[GraphModule, Sequence[Tensor], torch.dtype | None], Callable[..., Sequence[Tensor]]]


_one_at_a_time = threading.Lock()  # compilers are not made for several threads


@dataclass(frozen=True)
class Compiled:
    """function: the compiler's; kinds: of the inputs that it is for, with their shapes. Printed, it names the shapes."""

    function: Callable[..., Sequence[Tensor]]
    kinds: tuple[Any, ...]

    @classmethod
    def of(
        cls, graph: GraphModule, inputs: Sequence[Any], compiler: Compiler, autocast: torch.dtype | None
    ) -> "Compiled":
        """``graph``, compiled; raises what the compiler raises, and ValueError where the graph holds more than tensors."""
        if not all(isinstance(x, Tensor) for x in inputs):
            raise ValueError("its inputs hold something beside tensors")
        (outputs,) = graph.graph.output_node().args
        if not all(isinstance(n, Node) and n.meta.get("value") is not None for n in outputs):  # type: ignore[union-attr]
            raise ValueError("its outputs hold something beside tensors")
        if (node := _integer(graph)) is not None:
            raise ValueError(f"{node.name} computes integers, which compiled code may index by, or round, unchecked")
        with _one_at_a_time:
            return cls(compiler(_self_contained(graph), inputs, autocast), kinds_of(inputs))

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Whether it is for these, and nobody needs to see the graph's own operators."""
        return not observed() and kinds_of(inputs) == self.kinds

    @property
    def ranges(self) -> list[float] | None:
        """By which it quantizes activations; None where it does not."""
        return getattr(self.function, "ranges", None)

    def __str__(self) -> str:
        return ", ".join("x".join(map(str, shape)) for _, shape, _ in self.kinds)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.function(*inputs))


def kinds_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([(kind_of(x), x.shape, x.stride()) if isinstance(x, Tensor) else x for x in inputs])


def _integer(graph: GraphModule) -> Node | None:
    """The first node that holds integers which depend on the inputs."""
    given: set[Node] = set()
    node: Node
    for node in graph.graph.nodes:
        if node.op == "placeholder" or given.intersection(node.all_input_nodes):
            given.add(node)
            value = node.meta.get("value")
            if value is not None and not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool):
                return node
    return None


def _self_contained(graph: GraphModule) -> GraphModule:
    """A copy that shares no parameter with the user's network, for a compiler to convert as it likes."""
    module, copied = GraphModule(nn.Module(), Graph()), Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for i, node in enumerate(copied.nodes):
        if node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(graph)
            node.target = f"constant_{i}"
            module.register_buffer(node.target, tensor.detach())
        elif node.op == "call_module":
            layer = copy.deepcopy(graph.get_submodule(str(node.target)))
            node.target = f"layer_{i}"
            module.add_module(node.target, layer)
    module.graph = copied
    return module


def unrepeatable(graph: GraphModule) -> str | None:
    """Why running a graph twice, or in another order, is not the same: random numbers, or writes into what it is given."""
    memory = Memory(graph.graph, graph.get_submodule)
    given = {memory.class_of(n): n.name for n in graph.graph.nodes if n.op in ("placeholder", "get_attr")}
    for node, does in memory.effects.items():
        if does.random:
            return f"{node.name} draws random numbers"
        if written := next((given[memory.class_of(n)] for n in does.writes if memory.class_of(n) in given), None):
            return f"{node.name} writes into {written}"
    return None
