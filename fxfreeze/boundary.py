"""What crosses a cut of a traced graph: the fewest values from which the suffix has all that it reads.

A view is made again from the tensor that it looks into, an in-place result is the tensor it was written into, a size is
read again, and what depends on no input is computed again. What the suffix writes into crosses once, as the tensor that
owns the memory, and is cloned there with all its views.
"""

from dataclasses import dataclass, field

from torch.fx import Graph, Node

from fxfreeze.effects import Alias, Memory, name_of, reshapes

__all__ = ["Boundary"]

# Numbers that depend on what is in a tensor, or on how it lies in memory, and not on its shape alone.
_VALUE_SCALARS = frozenset("item tolist data_ptr stride storage_offset is_contiguous".split())


@dataclass
class Boundary:
    """The boundary of a cut.

    inside: the prefix's nodes; crossing: what is handed over, in graph order; cloned: those of it that the suffix writes
    into; entangled: nodes that can't be in the prefix, for the suffix writes into memory that it could not make again.
    """

    graph: Graph
    memory: Memory
    inside: set[Node]
    crossing: list[Node] = field(init=False)
    cloned: set[Node] = field(default_factory=set)
    entangled: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._order = {node: i for i, node in enumerate(self.graph.nodes)}
        class_of = self.memory.class_of
        writes = [(n, class_of(w)) for n in self.graph.nodes for w in self.memory.effects[n].writes]
        self._written_inside = {c for n, c in writes if n in self.inside}
        self._reshaped_inside = {c for n, c in writes if n in self.inside and reshapes(n)}
        self._written_outside = {c for n, c in writes if n not in self.inside}
        self._shared = self._find_shared()
        self._constants = self._find_constants()
        needed = {n for n in self.inside if any(user not in self.inside for user in n.users)}
        while more := self._cross(needed) - needed:
            needed |= more

    def same_tensor(self, node: Node) -> Node:
        """The node whose very tensor ``node`` is, after in-place operators; ``node`` itself for any other."""
        does = self.memory.effects[node]
        while does.writes and does.alias is Alias.SAME:
            node = does.aliases[0]
            does = self.memory.effects[node]
        return node

    def crossed_as(self, node: Node) -> Node | None:
        """What crosses in place of ``node``: itself, or another name of the same tensor."""
        if node in self.crossing or node not in self.inside:
            return node if node in self.crossing else None
        same = self.same_tensor(node)
        return next((n for n in self.crossing if self.same_tensor(n) is same), None)

    def remade(self) -> list[Node]:
        """The prefix's nodes that the suffix runs again, in an order in which it can: views, sizes and constants."""
        wanted = [a for n in self.graph.nodes if n not in self.inside for a in n.all_input_nodes]
        found: set[Node] = set()
        while wanted:
            node = wanted.pop()
            if node in self.inside and node not in found and self.crossed_as(node) is None:
                found.add(node)
                wanted += [self.same_tensor(node)] if self.same_tensor(node) is not node else node.all_input_nodes
        return sorted((n for n in found if self.same_tensor(n) is n), key=self._order.__getitem__)

    def _cross(self, needed: set[Node]) -> set[Node]:
        """Decide what crosses, and return what is read by all that the suffix makes again from it."""
        tensors = {n for n in needed if not n.meta["scalar"] and n not in self._constants}
        self.cloned, self.entangled, remade = set(), set(), set[Node]()
        written = {n for n in tensors if self.memory.class_of(n) in self._written_outside}
        for shared in sorted({self._shared[n] for n in written}, key=self._order.__getitem__):
            together = {n for n in written if self._shared[n] is shared}
            paths = [self._from_owner(n) for n in together]
            owners = {path[0] for path in paths}
            involved = {n for n in self._shared if self._shared[n] is shared}
            kept = {n for n in involved if n.op == "get_attr"}
            movable = {n for n in involved - kept if n.op != "placeholder"}
            if len(owners | kept) > 1 and movable:
                self.entangled |= movable
                continue
            tensors = tensors - together | owners - kept
            self.cloned |= owners - kept
            remade |= {n for path in paths for n in path[1:] if self.same_tensor(n) is n}
        last = {self.same_tensor(n): n for n in sorted(tensors, key=self._order.__getitem__)}
        tensors = set(last.values())
        self.cloned = {last[self.same_tensor(n)] for n in self.cloned}
        scalars = {n for n in needed - self._constants if n.meta["scalar"] and not self._can_read(n, tensors)}
        self.crossing = sorted(tensors | scalars, key=self._order.__getitem__)
        return {n for made in remade for n in made.all_input_nodes if n in self.inside and n not in self._constants}

    def _find_shared(self) -> dict[Node, Node]:
        """Per node of the prefix, and of the attributes it reads, a representative of those that may share memory there.

        What only an operator of the suffix may make one (a function that can't be seen into) is still apart at the cut.
        """
        groups = {node: {node} for node in self.graph.nodes if node in self.inside or node.op == "get_attr"}
        for node in (n for n in self.graph.nodes if n in self.inside):
            merged = set[Node]().union(groups[node], *(groups[n] for n in self.memory.effects[node].aliases))
            groups.update(dict.fromkeys(merged, merged))
        first = {id(group): min(group, key=self._order.__getitem__) for group in groups.values()}
        return {node: first[id(group)] for node, group in groups.items()}

    def _from_owner(self, node: Node) -> list[Node]:
        """The views that lead to ``node``, from the one that owns the memory on."""
        path = [node]
        does = self.memory.effects[node]
        while does.alias in (Alias.VIEW, Alias.SAME) and len(does.aliases) == 1:
            path.insert(0, does.aliases[0])
            does = self.memory.effects[path[0]]
        return path

    def _can_read(self, scalar: Node, tensors: set[Node]) -> bool:
        """Whether a number can be read again from the tensors that cross, by then perhaps written into."""
        chain, sources = _computation(scalar)
        looks_inside = any(name_of(n) in _VALUE_SCALARS for n in chain)
        changed = self._written_inside if looks_inside else self._reshaped_inside
        return all(n in tensors and self.memory.class_of(n) not in changed for n in sources)

    def _find_constants(self) -> set[Node]:
        """What depends on no input, draws nothing, and is not written into before the cut."""
        constants: set[Node] = set()
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output") or node not in self.inside or self.memory.effects[node].random:
                continue
            fixed = all(n.op == "get_attr" or n in constants for n in node.all_input_nodes)
            if fixed and self.memory.class_of(node) not in self._written_inside:
                constants.add(node)
        return constants


def _computation(scalar: Node) -> tuple[set[Node], set[Node]]:
    """The numbers that a number was computed from, itself included, and the tensors that those were read from."""
    chain, sources, stack = {scalar}, set[Node](), [scalar]
    while stack:
        for n in stack.pop().all_input_nodes:
            if not n.meta["scalar"]:
                sources.add(n)
            elif n not in chain:
                chain.add(n)
                stack.append(n)
    return chain, sources
