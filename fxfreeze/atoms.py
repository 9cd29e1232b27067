"""Atoms: the smallest parts of a network that may freeze by themselves, and what belongs to each.

A block (a residual block, a dense layer, a transformer block) is an atom, and so is a weighted layer that stands loose
between blocks. A loose norm or parameter joins the atom that feeds it, loose dropout the atom that it feeds.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.fx import Node

from fxfreeze.trace import Traced

__all__ = ["Atoms"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_WEIGHTLESS = (*_NORMS, nn.ParameterList, nn.ParameterDict)  # the lists' parameters belong to those that read them
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def _weighted(module: nn.Module) -> bool:
    """Whether a module itself owns a weight: a parameter of two or more dimensions that is not a norm's."""
    return not isinstance(module, _WEIGHTLESS) and any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _count_weighted(module: nn.Module) -> int:
    return sum(map(_weighted, module.modules()))


def _has_state(module: nn.Module) -> bool:
    """Whether a module owns tensors: running statistics without a gain, as well as parameters, must freeze with a unit."""
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_transparent(module: nn.Module, parent_is: bool, whole: int) -> bool:
    """Whether a module is a way of grouping blocks rather than a block."""
    if _count_weighted(module) == whole or (parent_is and type(module) in _CONTAINERS):
        return True
    below = list(module.modules())
    lists = (m for m in below if isinstance(m, _CONTAINERS))
    holds_a_list = any(sum(_count_weighted(child) >= 2 for child in m.children()) >= 2 for m in lists)
    return holds_a_list or any(type(m) is type(module) for m in below[1:] if type(m) not in _CONTAINERS)


class Atoms:
    """Which atom every module and parameter belongs to.

    count: how many atoms; modules: qualified name -> atom, without modules that only group atoms; parameters: qualified
    name -> the atoms that own it (several when it is tied, none when no traced node uses it).
    """

    def __init__(self, net: nn.Module, traces: Sequence[Traced], seeds: Iterable[str | Sequence[str]] | None = None):
        self.net = net
        self.count = 0
        self.modules: dict[str, int] = {}
        self.parameters: dict[str, set[int]] = {}
        self._loose: dict[str, set[int]] = {}
        if seeds is None:
            self._walk(net, "", True, _count_weighted(net))
        else:
            self._seed(seeds)
        self._own_parameters()
        for trace in traces:
            self._place_loose(trace)
        if self.count == 0:
            raise ValueError(
                f"{type(net).__qualname__} has no weighted layer that its forward calls: nothing can be frozen"
            )

    # ---- from the hierarchy

    def _walk(self, module: nn.Module, name: str, transparent: bool, whole: int) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if full in self.modules:
                continue
            grouping = any(True for _ in child.children()) and _is_transparent(child, transparent, whole)
            if _count_weighted(child) and not grouping:
                self._open([full])
            else:
                self._walk(child, full, transparent, whole)

    def _seed(self, seeds: Iterable[str | Sequence[str]]) -> None:
        known = dict(self.net.named_modules())
        for group in seeds:
            names = [group] if isinstance(group, str) else list(group)
            for name in names:
                if name not in known or not name:
                    raise ValueError(
                        f"units: {name!r} is no module of the network; its modules are {', '.join(list(known)[1:])}"
                    )
                inside = (inner for inner, _ in known[name].named_modules(prefix=name))
                if (twice := next((inner for inner in inside if inner in self.modules), None)) is not None:
                    raise ValueError(f"units: {twice!r} is in two units")
            self._open(names)

    def _open(self, names: list[str]) -> None:
        for name in names:
            module = self.net.get_submodule(name)
            for inner, _ in module.named_modules(prefix=name):
                self.modules.setdefault(inner, self.count)
        self.count += 1

    def _own_parameters(self) -> None:
        canonical = {id(p): name for name, p in self.net.named_parameters()}
        self.parameters = {name: set() for name in canonical.values()}
        for name, p in self.net.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            if owner in self.modules:
                self.parameters[canonical[id(p)]].add(self.modules[owner])

    # ---- from the dataflow

    def of(self, node: Node) -> frozenset[int]:
        """The atoms that ``node`` touches: its innermost module's, and those of the parameters it uses."""
        atoms: set[int] = set()
        for name in reversed(node.meta["scope"]):
            if name in self.modules:
                atoms.add(self.modules[name])
                break
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                atoms |= self.parameters.get(str(read.target), set())
        if node.op == "call_module":
            inside = f"{node.target}."  # a grouping module kept whole touches every atom in it
            atoms.update(atom for name, atom in self.modules.items() if name.startswith(inside))
            for name, _ in self.net.get_submodule(str(node.target)).named_parameters(prefix=str(node.target)):
                atoms |= self.parameters.get(name, set())
        return frozenset(atoms)

    def _place_loose(self, trace: Traced) -> None:
        """Give loose modules and parameters that this trace uses to the atom that feeds them, or that they feed."""
        sources: dict[Node, dict[int, int]] = {}  # nearest atoms upstream, with the position of their last node
        pending: list[Node] = []
        for position, node in enumerate(trace.graph.nodes):
            upstream = {atom: at for n in node.all_input_nodes for atom, at in sources[n].items()}
            own = self.of(node)
            if not own and (loose := list(self._loose_names(node))):
                if upstream and not self._joins_consumer(node):
                    own = frozenset([max(upstream, key=lambda atom: upstream[atom])])
                    self._claim(loose, next(iter(own)))
                else:
                    pending.append(node)
            sources[node] = dict.fromkeys(own, position) if own else upstream
        for node in reversed(pending):
            if not self.of(node):
                consumer = self._consumer(node)
                if consumer is None:
                    consumer = self.count
                    self.count += 1
                self._claim(list(self._loose_names(node)), consumer)

    def _loose_names(self, node: Node) -> Iterator[tuple[str, bool]]:
        """The (name, is a parameter) of what has no atom yet and must belong to one for ``node`` to freeze."""
        for read in node.all_input_nodes:
            if read.op == "get_attr" and self.parameters.get(str(read.target)) == set():
                yield str(read.target), True
        innermost = node.meta["scope"][-1] if node.meta["scope"] else ""
        if innermost and innermost not in self.modules:
            module = self.net.get_submodule(innermost)
            grouping = _count_weighted(module) > _weighted(module)
            plain = type(module).__module__.startswith("torch.nn.") and not isinstance(module, _RANDOM)
            if not grouping and (_has_state(module) or not plain):
                yield innermost, False

    def _joins_consumer(self, node: Node) -> bool:
        """Dropout, and custom modules without parameters or buffers (noise, stochastic depth), act for what reads them."""
        innermost = node.meta["scope"][-1] if node.meta["scope"] else ""
        if not innermost or any(read.op == "get_attr" for read in node.all_input_nodes):
            return False
        return not _has_state(self.net.get_submodule(innermost))

    def _claim(self, names: list[tuple[str, bool]], atom: int) -> None:
        for name, is_parameter in names:
            if is_parameter:
                self.parameters[name].add(atom)
                continue
            module = self.net.get_submodule(name)
            for inner, _ in module.named_modules(prefix=name):
                self.modules.setdefault(inner, atom)
            for parameter, _ in module.named_parameters(prefix=name):
                if parameter in self.parameters:
                    self.parameters[parameter].add(atom)

    def _consumer(self, node: Node) -> int | None:
        """The first atom downstream of ``node``."""
        seen, queue = {node}, list(node.users)
        while queue:
            user = queue.pop(0)
            if user in seen:
                continue
            seen.add(user)
            if own := self.of(user):
                return min(own)
            queue += list(user.users)
        return None

    def first_names(self, unit_of: list[int], count: int) -> list[str]:
        """Per unit, the name of its first module in the hierarchy, or of its first parameter."""
        names = ["head"] * count
        owned = [(name, unit_of[atom]) for name, atom in self.modules.items()]
        owned += [(name, unit_of[min(atoms)]) for name, atoms in self.parameters.items() if atoms]
        for name, unit in reversed(owned):
            names[unit] = name
        return names
