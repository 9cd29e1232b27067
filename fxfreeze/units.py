"""What freezes: the ordered units of a network, from its module hierarchy and its dataflow.

An *atom* is a block (or a loose layer with what belongs to it). Atoms are found in the hierarchy, ordered by the
dataflow of the train and the eval trace together, merged where the flow runs both ways, and become the units.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.fx import Node

from fxfreeze.atoms import Atoms
from fxfreeze.effects import Memory
from fxfreeze.trace import Traced

__all__ = ["Ownership", "Unit", "find_units"]


class Unit(NamedTuple):
    """What freezes as one.

    name: the qualified name of its first module; modules: qualified names of every module that the unit puts in eval,
    containers included once their last part freezes; parameters: qualified names of every parameter.
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Ownership:
    """The units, and which of them a node of any trace of the network belongs to.

    modules, parameters: qualified name -> index of the unit (containers of several units are in no entry).
    """

    units: tuple[Unit, ...]
    modules: dict[str, int]
    parameters: dict[str, int]

    def of(self, node: Node) -> int:
        """The index of the last unit that must be frozen before ``node`` may be in the prefix; -1: none."""
        owners = [self.parameters.get(str(n.target), -1) for n in node.all_input_nodes if n.op == "get_attr"]
        for name in reversed(node.meta["scope"]):
            if name in self.modules:
                owners.append(self.modules[name])
                break
        if node.op == "call_module" and node.target not in self.modules:
            inside = f"{node.target}."  # a grouping module kept whole belongs to the last unit in it
            owners += [unit for name, unit in self.modules.items() if name.startswith(inside)]
            owners += [unit for name, unit in self.parameters.items() if name.startswith(inside)]
        return max(owners, default=-1)


def find_units(
    net: nn.Module, traces: Sequence[Traced], seeds: Iterable[str | Sequence[str]] | None = None
) -> Ownership:
    """The units of ``net``, input side first, the head last.

    traces: of the train and the eval mode; seeds: names of modules (or groups of names) that start a unit each, in place
    of the automatic blocks. Raises ValueError for seeds that name nothing, or overlap. Warns when parts that share
    parameters or modules had to be merged into one unit that holds most of the parameters.
    """
    atoms = Atoms(net, traces, seeds)
    edges, first = _edges(net, traces, atoms)
    groups = _components(atoms.count, edges)
    order, head = _order(groups, edges, first)
    unit_of = [0] * atoms.count
    for index, group in enumerate(order):
        for atom in group:
            unit_of[atom] = index
    ownership = _assemble(net, atoms, unit_of, len(order))
    _warn_of_merges(net, ownership, [g for g in groups if len(g) > 1 and g not in head])
    return ownership


def _edges(net: nn.Module, traces: Sequence[Traced], atoms: Atoms) -> tuple[list[set[int]], list[float]]:
    """Successors of each atom by dataflow and memory, two-way where one node touches two; and when each first ran."""
    after: list[set[int]] = [set() for _ in range(atoms.count)]
    first = [float("inf")] * atoms.count
    for trace in traces:
        memory = Memory(trace.graph, net.get_submodule)
        sources: dict[Node, frozenset[int]] = {}
        for position, node in enumerate(trace.graph.nodes):
            own = atoms.of(node)
            feeding = frozenset[int]().union(*(sources[n] for n in memory.depends[node]))
            for atom in own:
                first[atom] = min(first[atom], position)
                after[atom] |= own - {atom}
                for source in feeding - {atom}:
                    after[source].add(atom)
            sources[node] = own or feeding
    return after, first


def _components(count: int, after: list[set[int]]) -> list[list[int]]:
    """Strongly connected components (Tarjan 1972), without recursion."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    components: list[list[int]] = []
    for root in range(count):
        work = [] if root in index else [(root, iter(sorted(after[root])))]
        while work:
            node, successors = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
            for successor in successors:
                if successor not in index:
                    work.append((successor, iter(sorted(after[successor]))))
                    break
                if successor in stack:
                    low[node] = min(low[node], index[successor])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    components.append(sorted(stack[cut:]))
                    del stack[cut:]
    return components


def _order(
    groups: list[list[int]], after: list[set[int]], first: list[float]
) -> tuple[list[list[int]], list[list[int]]]:
    """Groups in topological order, earliest use first; those that feed no other become the head, last."""
    group_of = {atom: i for i, group in enumerate(groups) for atom in group}
    successors = [{group_of[b] for a in group for b in after[a]} - {i} for i, group in enumerate(groups)]
    starts = [min(first[atom] for atom in group) for group in groups]
    sinks = [i for i, s in enumerate(successors) if not s]
    waiting = {i: sum(i in s for s in successors) for i in range(len(groups)) if i not in sinks}
    order: list[list[int]] = []
    while waiting:
        ready = min((i for i, count in waiting.items() if count == 0), key=lambda i: (starts[i], i))
        del waiting[ready]
        order.append(groups[ready])
        for successor in successors[ready] & waiting.keys():
            waiting[successor] -= 1
    head = sorted(atom for i in sinks for atom in groups[i])
    return [*order, head], [groups[i] for i in sinks]


def _assemble(net: nn.Module, atoms: Atoms, unit_of: list[int], count: int) -> Ownership:
    modules = {name: unit_of[atom] for name, atom in atoms.modules.items()}
    parameters = {name: unit_of[min(owners)] if owners else count - 1 for name, owners in atoms.parameters.items()}
    names: list[list[str]] = [[] for _ in range(count)]
    last = dict(modules)  # a container goes with the last unit in it
    for name, unit in modules.items():
        while "." in name:
            name = name.rpartition(".")[0]
            last[name] = max(last.get(name, 0), unit)
    latest = 0
    for name, _ in net.named_modules():
        latest = modules.get(name, latest)  # an activation or pool has no owner: it goes with the layer before it
        if name:
            names[last.get(name, latest)].append(name)
    params: list[list[str]] = [[] for _ in range(count)]
    for name, _ in net.named_parameters():
        params[parameters[name]].append(name)
    first = atoms.first_names(unit_of, count)
    units = tuple(Unit(first[i], tuple(names[i]), tuple(params[i])) for i in range(count))
    return Ownership(units, modules, parameters)


def _warn_of_merges(net: nn.Module, ownership: Ownership, merged: list[list[int]]) -> None:
    if not merged:
        return
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    for unit in ownership.units[:-1]:
        share = sum(sizes[name] for name in unit.parameters) / max(1, sum(sizes.values()))
        if share > 0.5:
            warnings.warn(
                f"unit {unit.name!r} holds {share:.0%} of the parameters: its parts share parameters or modules, or feed each "
                f"other, so they can only freeze together",
                stacklevel=3,
            )
