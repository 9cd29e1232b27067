"""A model's forward, watched: the frozen part apart from the live one, and the live one unit by unit.

Ordinary training runs none of this: a model is given one of these in place of its own ``Forward``.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from fxfreeze.counting import owners, whole_graph
from fxfreeze.derived import Derived
from fxfreeze.forward import Forward
from fxfreeze.inputs import flatten_inputs
from fxfreeze.ranges import Watch
from fxfreeze.surgery import Plan
from fxfreeze.trace import Traced, trace
from fxfreeze.units import Ownership

__all__ = ["ForwardByPart", "ForwardByUnit", "prefix_name"]


def prefix_name(depth: int) -> str:
    """The range of a frozen part."""
    return f"prefix 0-{depth}"


class ForwardByPart(Forward):
    """Runs as ever, the frozen part within a range of its own."""

    def __init__(self, net: nn.Module, watch: Watch) -> None:
        super().__init__(net)
        self.watch = watch

    def boundary(self, call: Any, plan: Plan) -> tuple[Any, ...] | None:
        with self.watch.range(prefix_name(plan.chain.depth)):
            return super().boundary(call, plan)


class ForwardByUnit(ForwardByPart):
    """The same, and what is live runs node by node from the traced graph, each unit within a range of its own.

    The graph is run even where nothing is frozen: hooks on modules would miss operators that stand between them.
    """

    def __init__(self, net: nn.Module, watch: Watch, ownership: Ownership) -> None:
        super().__init__(net, watch)
        self.ownership = ownership
        self._traced: Traced | None = None

    def __call__(self, derived: Derived, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if derived.depth:
            return super().__call__(derived, args, kwargs)
        inputs, tensors = flatten_inputs(self.net, args, kwargs)
        self._traced = self._traced or trace(self.net, inputs, tensors)
        return self._by_unit(whole_graph(self.net, self._traced), self._traced, tensors, self._traced.outputs)

    def live(self, plan: Plan, boundary: tuple[Any, ...]) -> Any:
        return self._by_unit(plan.chain.cut.suffix, plan.chain.traced, boundary, plan.outputs)

    def _by_unit(self, graph: GraphModule, traced: Traced, values: Sequence[Any], outputs: pytree.TreeSpec) -> Any:
        names = [unit.name for unit in self.ownership.units]
        unit_of = {node: names[owner] for node, owner in owners(traced, self.ownership).items()}
        with contextlib.ExitStack() as unit:
            return pytree.tree_unflatten(_ByUnit(graph, unit_of, self.watch, unit).run(*values), outputs)


class _ByUnit(Interpreter):
    """Enters a unit's range at its first node, and leaves it at another's.

    unit_of: names of units by names of nodes; open: holds the range that it is in.
    """

    def __init__(
        self, graph: GraphModule, unit_of: Mapping[str, str], watch: Watch, open: contextlib.ExitStack
    ) -> None:
        super().__init__(graph)
        self._unit_of, self._watch, self._open = unit_of, watch, open
        self._unit: str | None = None

    def run_node(self, n: Node) -> Any:
        unit = self._unit_of.get(n.name) if n.op.startswith("call") else None
        if unit is not None and unit != self._unit:
            self._open.close()
            self._open.enter_context(self._watch.range(unit))
            self._unit = unit
        return super().run_node(n)
