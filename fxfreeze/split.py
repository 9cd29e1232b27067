"""Cut a traced graph at a depth into a frozen prefix and a live suffix, joined by a boundary.

A node is in the prefix exactly when its units are frozen and everything it depends on, memory included, is in the
prefix. Any ownership of nodes is therefore right; ownership decides only how much the prefix holds.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxfreeze.boundary import Boundary
from fxfreeze.effects import Memory, name_of, silenced
from fxfreeze.regions import without_grad
from fxfreeze.trace import Traced
from fxfreeze.units import Ownership

__all__ = ["Split", "as_module", "between", "split"]


@dataclass(frozen=True)
class Split:
    """prefix: tensors of the call -> boundary; suffix: boundary -> flat outputs; boundary: names of what crosses.

    Both are GraphModules whose targets start with ``root.``: they read the original's modules at each call.
    kept_live: why nodes of frozen units had to stay in the suffix.
    """

    prefix: GraphModule
    suffix: GraphModule
    boundary: tuple[str, ...]
    kept_live: tuple[str, ...] = ()


def split(net: nn.Module, traced: Traced, ownership: Ownership, depth: int) -> Split:
    """Cut ``traced`` after the first ``depth`` units of ``ownership``."""
    cut = _Cut(net, traced, ownership, depth)
    prefix = as_module(net, cut.prefix_graph(), traced.constants)
    suffix = as_module(net, cut.suffix_graph(), traced.constants)
    return Split(prefix, suffix, tuple(n.name for n in cut.boundary.crossing), tuple(cut.kept_live))


def between(net: nn.Module, traced: Traced, ownership: Ownership, start: int, end: int) -> GraphModule | None:
    """The segment from the boundary at depth ``start`` to that at ``end``, both as ``split`` makes them of this trace.

    None where it can't be had: a deeper cut may leave live, for what it shares with the suffix, what a shallower one froze.
    """
    first, last = (_Cut(net, traced, ownership, depth) for depth in (start, end))
    return as_module(net, last.prefix_graph(first), traced.constants) if first.inside <= last.inside else None


def as_module(net: nn.Module, graph: Graph, constants: dict[str, Tensor]) -> GraphModule:
    """``graph``, whose targets are qualified names in ``net``, as a module that reads them at each call."""
    module = GraphModule(nn.Module(), Graph())
    module.root = net
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            module.register_buffer(str(node.target), constants[str(node.target)])
        elif node.op in ("get_attr", "call_module"):
            node.target = f"root.{node.target}"
    graph.lint()
    module.graph = graph
    return module


@dataclass
class _Cut:
    net: nn.Module
    traced: Traced
    ownership: Ownership
    depth: int
    inside: set[Node] = field(default_factory=set)  # the prefix's nodes
    boundary: Boundary = field(init=False)
    kept_live: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = self.traced.graph
        self.memory = Memory(self.graph, self.net.get_submodule)
        self.state = {self.memory.class_of(n) for n in self.graph.nodes if n.op == "get_attr"}
        self.owner = {node: self._owner(node) for node in self.graph.nodes}
        for node, own in self.owner.items():
            node.meta["unit"] = own  # passes keep apart what a cut may put apart
        excluded: set[Node] = set()
        while True:
            self.inside = self._inside(excluded)
            self.boundary = Boundary(self.graph, self.memory, self.inside)
            if not self.boundary.entangled:
                break
            excluded |= self.boundary.entangled

    # ---- which side a node is on

    def _owner(self, node: Node) -> int:
        own = self.ownership.of(node)
        if own < 0 and self.memory.effects[node].random:
            return self._first_consumer(node)
        return own

    def _first_consumer(self, node: Node) -> int:
        """A random op that stands outside every unit's modules belongs to the first unit that its values reach."""
        seen, queue = {node}, list(node.users)
        while queue:
            user = queue.pop(0)
            if (own := self.ownership.of(user)) >= 0 or user.op == "output":
                return own if own >= 0 else len(self.ownership.units)
            queue += [n for n in user.users if n not in seen]
            seen.update(user.users)
        return len(self.ownership.units)

    def _inside(self, excluded: set[Node]) -> set[Node]:
        inside: set[Node] = set()
        drawn_live = False
        self.kept_live = []
        for node in self.graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            if node.op == "placeholder":
                inside.add(node)
                continue
            frozen = self.owner[node] < self.depth and all(
                n in inside for n in self.memory.depends[node] if n.op != "get_attr"
            )
            reason = self._live_reason(node, drawn_live) or (
                "shares memory with what the suffix writes" if node in excluded else None
            )
            if frozen and reason is None:
                inside.add(node)
                continue
            if frozen and self.owner[node] >= 0:
                self.kept_live.append(f"{node.name}: {reason}")
            drawn_live = drawn_live or self.memory.effects[node].random
        return inside

    @staticmethod
    def _may_update_buffers(module: nn.Module) -> bool:
        return module.training and any(True for _ in module.buffers())

    def _live_reason(self, node: Node, drawn_live: bool) -> str | None:
        """Why a node must run live although nothing that it depends on does."""
        does = self.memory.effects[node]
        if not does.opaque and any(self.memory.class_of(n) in self.state for n in does.writes):
            return "it writes into a buffer or parameter"
        if node.op == "call_module" and self._may_update_buffers(self.net.get_submodule(str(node.target))):
            return "it is in training mode, and may update its buffers"
        if self._draws(node) and self._in_training(node):
            return "it draws random numbers outside any frozen module"
        if self._draws(node) and drawn_live:
            return "it draws random numbers after a live operator that does"
        return None

    def _is_silenced(self, node: Node) -> bool:
        """Whether the prefix turns off a functional dropout that the caller's own code, in training, has on."""
        return self.memory.effects[node].random and self._in_training(node) and silenced(node) is not None

    def _draws(self, node: Node) -> bool:
        """Whether a node would draw random numbers in the prefix."""
        return self.memory.effects[node].random and not self._is_silenced(node)

    def _in_training(self, node: Node) -> bool:
        scope = node.meta["scope"]
        return self.net.get_submodule(scope[-1] if scope else "").training

    # ---- the two graphs

    def prefix_graph(self, start: "_Cut | None" = None) -> Graph:
        """What leads to this cut's boundary from the tensors of a call, or from the boundary of a shallower cut."""
        kept = self._prefix_nodes()
        if start is None:
            written = {self.memory.class_of(w) for n in kept for w in self.memory.effects[n].writes}
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            copies = _Copies(
                inputs, [n for n in inputs if self.memory.class_of(n) in written]
            )  # not ours to write into
        else:
            copies = _Behind(start.boundary)
            kept -= start.inside
        for node in self.graph.nodes:
            if node in kept and node.target is without_grad:
                copies[node] = copies[node.all_input_nodes[0]]  # nothing has a gradient here
            elif node in kept:
                copied = copies[node]
                if self._is_silenced(node) and (off := silenced(node)) is not None:
                    copied.args, copied.kwargs = torch.fx.node.map_arg(off, copies.__getitem__)
        copies.graph.output(tuple(copies[n] for n in self.boundary.crossing))
        return copies.graph

    def _prefix_nodes(self) -> set[Node]:
        """What the crossing values need: their inputs, and whatever wrote into the memory of any of these."""
        crossed = {self.memory.class_of(n) for n in self.boundary.crossing}
        kept: set[Node] = set()
        stack = [n for n in self.inside if self._draws(n) or name_of(n) in ("assert_fn", "_assert")]
        stack += self.boundary.crossing
        stack += [
            n for n in self.inside if any(self.memory.class_of(w) in crossed for w in self.memory.effects[n].writes)
        ]
        while stack:
            node = stack.pop()
            if node in self.inside and node not in kept and node.op != "placeholder":
                kept.add(node)
                stack += self.memory.depends[node]
        return kept

    def suffix_graph(self) -> Graph:
        copies = _Behind(self.boundary)
        for node in self.graph.nodes:
            if node not in self.inside and node.op not in ("get_attr", "output"):
                copies[node]
        copies.graph.node_copy(next(iter(reversed(self.graph.nodes))), copies.__getitem__)
        return copies.graph


def _own_copy(value: Any) -> Any:
    """A boundary's value that may be written into: a tensor, or what modules kept whole hand to each other."""
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class _Copies(dict[Node, Node]):
    """Nodes of one graph -> their copies in a new one, made when first asked for.

    inputs: what the new graph is given; written: those of them that it works on a clone of.
    """

    def __init__(self, inputs: Iterable[Node], written: Iterable[Node]):
        super().__init__()
        self.graph = Graph()
        for node in inputs:
            self[node] = self.graph.placeholder(node.name)
            self[node].meta.update(node.meta)
        for node in written:
            clone = self.graph.call_function(_own_copy, (self[node],))
            clone.meta.update(node.meta)
            self[node] = clone

    def __missing__(self, node: Node) -> Node:
        self[node] = copied = self.graph.node_copy(node, self.__getitem__)
        return copied


class _Behind(_Copies):
    """Copies behind a boundary: what did not cross is made again from what did."""

    def __init__(self, boundary: Boundary):
        super().__init__(boundary.crossing, [n for n in boundary.crossing if n in boundary.cloned])
        self._boundary = boundary
        for node in boundary.remade():  # before any live operator, which may write into what these read
            self[node]

    def __missing__(self, node: Node) -> Node:
        crossed = self._boundary.crossed_as(node) or self._boundary.same_tensor(node)
        if node not in self._boundary.inside or crossed is node:
            return super().__missing__(node)
        self[node] = copied = self[crossed]
        return copied
