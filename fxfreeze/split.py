"""Cut a traced graph at a depth into a frozen prefix and a live suffix, joined by a boundary.

A node is in the prefix exactly when its units are frozen and everything it depends on, memory included, is in the
prefix. Any ownership of nodes is therefore right; ownership decides only how much the prefix holds.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxfreeze.effects import Alias, Memory, silenced
from fxfreeze.trace import Traced
from fxfreeze.units import Ownership

__all__ = ["Split", "as_module", "split"]


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
    return Split(prefix, suffix, tuple(n.name for n in cut.crossing), tuple(cut.kept_live))


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
    crossing: list[Node] = field(default_factory=list)
    cloned: set[Node] = field(default_factory=set)  # crossing values that the suffix writes into
    kept_live: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = self.traced.graph
        self.memory = Memory(self.graph, self.net.get_submodule)
        self.state = {self.memory.class_of(n) for n in self.graph.nodes if n.op == "get_attr"}
        self.owner = {node: self._owner(node) for node in self.graph.nodes}
        excluded: set[Node] = set()
        while True:
            self.inside = self._inside(excluded)
            entangled = self._cross()
            if not entangled:
                break
            excluded |= entangled

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
        self.kept_live = []
        for node in self.graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            if node.op == "placeholder":
                inside.add(node)
                continue
            if self.owner[node] >= self.depth or not all(
                n in inside for n in self.memory.depends[node] if n.op != "get_attr"
            ):
                continue
            reason = self._live_reason(node) or (
                "shares memory with what the suffix writes" if node in excluded else None
            )
            if reason is None:
                inside.add(node)
            elif self.owner[node] >= 0:
                self.kept_live.append(f"{node.name}: {reason}")
        return inside

    def _live_reason(self, node: Node) -> str | None:
        """Why a node must run live although nothing that it depends on does."""
        does = self.memory.effects[node]
        if not does.opaque and any(self.memory.class_of(n) in self.state for n in does.writes):
            return "it writes into a buffer or parameter"
        if does.random and self._in_training(node) and silenced(node) is None:
            return "it draws random numbers outside any frozen module"
        return None

    def _in_training(self, node: Node) -> bool:
        scope = node.meta["scope"]
        return self.net.get_submodule(scope[-1] if scope else "").training

    # ---- what crosses

    def _cross(self) -> set[Node]:
        """Set ``crossing`` and ``cloned``; return the nodes that can't be on both sides of this cut, if any."""
        inside = [n for n in self.graph.nodes if n in self.inside]
        needed = {n for n in inside if any(user not in self.inside for user in n.users)}
        tensors = {n for n in needed if not n.meta["scalar"] and not self._is_constant(n)}
        for node in inside:  # an in-place result is the tensor it was computed in: one of the two is enough
            if node in tensors and (base := self._same_tensor(node)) is not node:
                tensors.discard(base)
        self.cloned, entangled = set(), set()
        written = self._written_by_suffix()
        for c in {self.memory.class_of(n) for n in tensors} & written:
            base, *others = [n for n in inside if n in tensors and self.memory.class_of(n) is c]
            self.cloned.add(base)
            if all(self._is_view_of(n, base) for n in others):
                tensors -= set(others)
            else:
                entangled |= {n for n in inside if self.memory.class_of(n) is c and n.op != "placeholder"}
        scalars = {n for n in needed if n.meta["scalar"] and not self._sources(n) <= tensors}
        self.crossing = [n for n in inside if n in tensors or n in scalars]
        return entangled

    def _same_tensor(self, node: Node) -> Node:
        """The node whose very tensor an in-place operator returns; ``node`` itself for any other operator."""
        does = self.memory.effects[node]
        return does.aliases[0] if does.writes and does.alias is Alias.SAME else node

    def _written_by_suffix(self) -> set[Node]:
        live = (n for n in self.graph.nodes if n not in self.inside)
        return {self.memory.class_of(w) for n in live for w in self.memory.effects[n].writes}

    def _is_view_of(self, node: Node, base: Node) -> bool:
        """Whether ``node`` can be made again from ``base`` as the same piece of memory."""
        while node is not base:
            does = self.memory.effects[node]
            if does.alias not in (Alias.VIEW, Alias.SAME) or len(does.aliases) != 1:
                return False
            node = does.aliases[0]
        return True

    def _is_constant(self, node: Node) -> bool:
        """Whether a value depends on no input, so that the suffix makes it anew."""
        if node.op == "placeholder" or self.memory.effects[node].random:
            return False
        return all(n.op == "get_attr" or self._is_constant(n) for n in node.all_input_nodes)

    def _sources(self, node: Node) -> set[Node]:
        """The tensors whose shapes a scalar was computed from."""
        stack, sources = [node], set()
        while stack:
            for n in stack.pop().all_input_nodes:
                if n.meta["scalar"]:
                    stack.append(n)
                else:
                    sources.add(n)
        return sources

    # ---- the two graphs

    def prefix_graph(self) -> Graph:
        graph, copies = Graph(), dict[Node, Node]()
        kept = self._prefix_nodes()
        written = {self.memory.class_of(w) for n in kept for w in self.memory.effects[n].writes}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                copies[node] = graph.node_copy(node)
        for node in self.graph.nodes:
            if node.op == "placeholder" and self.memory.class_of(node) in written:
                copies[node] = _clone(graph, copies[node])  # the caller's input is not ours to write into
        for node in self.graph.nodes:
            if node in kept or (node.op == "get_attr" and any(user in kept for user in node.users)):
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if self.memory.effects[node].random and self._in_training(node) and (off := silenced(node)):
                    copies[node].args, copies[node].kwargs = torch.fx.node.map_arg(off, copies.__getitem__)
        graph.output(tuple(copies[n] for n in self.crossing))
        return graph

    def _prefix_nodes(self) -> set[Node]:
        """What the crossing values need: their inputs, and whatever wrote into the memory of any of these."""
        crossed = {self.memory.class_of(n) for n in self.crossing}
        kept: set[Node] = set()
        stack = list(self.crossing)
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
        graph, copies = Graph(), dict[Node, Node]()
        for node in self.crossing:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta.update(node.meta)
        for node in self.crossing:
            if node in self.cloned:
                copies[node] = _clone(graph, copies[node])

        def value(node: Node) -> Node:
            if node not in copies:
                crossed = next((n for n in self.crossing if self._same_tensor(n) is node), None)
                same = self._same_tensor(node)
                if crossed is not None:
                    copies[node] = copies[crossed]
                elif node in self.inside and same is not node:
                    copies[node] = value(same)
                else:
                    copies[node] = graph.node_copy(node, value)
            return copies[node]

        for node in self.graph.nodes:
            if node not in self.inside and node.op not in ("get_attr", "output"):
                value(node)
        output = next(iter(reversed(self.graph.nodes)))
        graph.node_copy(output, value)
        return graph


def _clone(graph: Graph, node: Node) -> Node:
    copy = graph.call_function(torch.clone, (node,))
    copy.meta.update(node.meta)
    return copy
