"""What a forward costs, counted node by node in its graph and added up by unit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from fxfreeze.randomness import random_state_kept
from fxfreeze.split import as_module
from fxfreeze.trace import Traced
from fxfreeze.units import Ownership

__all__ = ["Counter", "count", "forward_costs", "owners", "whole_graph"]


def forward_costs(
    net: nn.Module, traced: Traced, ownership: Ownership, tensors: Sequence[Tensor]
) -> tuple[list[int], list[int]]:
    """By unit: FLOPs of a forward in train mode, and the bytes that it keeps for its backward, for all of the batch.

    traced: of the train mode; tensors: of the call. Leaves ``net`` in train mode, its running statistics moved.
    """
    flops, saved = [0] * len(ownership.units), [0] * len(ownership.units)
    with random_state_kept(), torch.enable_grad():
        counted = count(net.train(), traced, tensors)
    for name, owner in owners(traced, ownership).items():
        flops[owner] += counted.flops[name]
        saved[owner] += counted.saved[name]
    return flops, saved


class Counter(Interpreter):
    """Runs a graph once and counts, by node name: FLOPs, bytes saved for the backward, and bytes of the value."""

    def __init__(self, module: GraphModule):
        super().__init__(module)
        self.flops: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self._seen = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._kept: list[Tensor] = []  # alive, so that no address is counted twice

    def run_node(self, n: Node) -> Any:
        self.saved[n.name] = 0

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:  # what several operators keep is held once
                self._seen.add(storage.data_ptr())
                self._kept.append(tensor)
                self.saved[n.name] += storage.nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = super().run_node(n)
        self.flops[n.name] = counter.get_total_flops()
        self.sizes[n.name] = value.nbytes if isinstance(value, Tensor) else 0
        return value


def count(net: nn.Module, traced: Traced, tensors: Sequence[Tensor]) -> Counter:
    """Run ``traced`` once on the tensors of a call, and count."""
    counter = Counter(whole_graph(net, traced))
    counter.run(*tensors)
    return counter


def whole_graph(net: nn.Module, traced: Traced) -> GraphModule:
    """``traced``, uncut, from the tensors of a call to its flat outputs; nodes keep their names."""
    graph = Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    return as_module(net, graph, traced.constants)


def owners(traced: Traced, ownership: Ownership) -> dict[str, int]:
    """The unit of every node; an operator outside all units counts with the unit whose output it works on."""
    found: dict[Node, int] = {}
    for node in traced.graph.nodes:
        own = ownership.of(node)
        found[node] = own if own >= 0 else max((found[n] for n in node.all_input_nodes), default=0)
    return {node.name: owner for node, owner in found.items()}
