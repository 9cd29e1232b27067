"""How passes are run, and what they share: a node's constants, users and place, and who writes into memory.

A pass is a function ``GraphModule -> list[Outcome]`` that edits the graph in place; ``run_passes`` is handed the list.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze.effects import Memory, name_of
from fxfreeze.operators import Op

__all__ = [
    "Outcome",
    "Pass",
    "PassError",
    "Writes",
    "called",
    "constant",
    "emit",
    "forget",
    "forget_unread",
    "hold",
    "other_user",
    "place",
    "run_passes",
    "views_may_copy",
]


class Outcome(NamedTuple):
    """What a pass did at one place. done: the graph was rewritten there; what: how ("folded"); why: the reason, or ""."""

    name: str
    place: str
    done: bool
    what: str
    why: str = ""


Pass = Callable[[GraphModule], list[Outcome]]


class PassError(RuntimeError):
    """A pass raised, or left a graph that is none; the message names the pass."""


def run_passes(module: GraphModule, passes: Iterable[Pass]) -> list[Outcome]:
    """Run each pass, verify the graph after each, and recompile at the end.

    Raises PassError for a defective pass; ``module`` is then of no use.
    """
    outcomes: list[Outcome] = []
    for rewrite in passes:
        try:
            outcomes += rewrite(module)
            module.graph.lint()
        except Exception as error:  # whatever is wrong with a pass, its caller must hear which it was
            raise PassError(f"pass {rewrite.__name__} failed: {type(error).__name__}: {error}") from error
    module.recompile()
    return outcomes


def place(node: Node) -> str:
    """Where a node comes from, as a person would name it: the module that called it, or the node's own name."""
    scope = node.meta.get("scope") or ()
    return str(scope[-1]) if scope else node.name


# What a tensor of the same shape, dtype and device answers alike.
_LIKENESS = frozenset("shape size ndim dim numel dtype device is_floating_point is_cuda".split())


def other_user(node: Node, known: Node) -> Node | None:
    """A user of ``node`` besides ``known`` that its elements matter to; those that look at its shape or dtype don't count."""
    return next((user for user in node.users if user is not known and not _looks_at_likeness(user)), None)


def _looks_at_likeness(user: Node) -> bool:
    name = user.args[1] if user.target is getattr else user.target if user.op == "call_method" else None
    return isinstance(name, str) and name in _LIKENESS


def constant(value: Any, module: GraphModule) -> Tensor | None:
    """The tensor that an argument always is: itself, an attribute, or what is computed from attributes alone."""
    if isinstance(value, Node):
        if value.op in ("call_function", "call_method") and _changes(value, module):
            return None
        with torch.no_grad():
            value = _evaluate(value, module, {})
    return value.detach() if isinstance(value, Tensor) else None


def _evaluate(node: Node, module: GraphModule, known: dict[Node, Any]) -> Any:
    """What ``node`` computes from attributes; None when it depends on an input."""
    if node in known:
        return known[node]
    result = None
    if node.op == "get_attr":
        result = operator.attrgetter(str(node.target))(module)
    elif node.op in ("call_function", "call_method") and node.all_input_nodes:
        inputs = {n: _evaluate(n, module, known) for n in node.all_input_nodes}
        if all(value is not None for value in inputs.values()):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
            function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            result = function(*args[node.op == "call_method" :], **kwargs)
    known[node] = result
    return result


def _changes(node: Node, module: GraphModule) -> bool:
    """Whether what ``node`` is computed from is drawn at random, or written into after it was made."""
    memory = Memory(module.graph, module.get_submodule)
    written = {memory.class_of(n) for does in memory.effects.values() for n in does.writes}
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if memory.effects[current].random or memory.class_of(current) in written:
            return True
        stack += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return False


class Writes:
    """The writes of a graph as a pass found it; what it made since writes nothing, and lies where what it replaced lay."""

    def __init__(self, module: GraphModule):
        self._memory = Memory(module.graph, module.get_submodule)
        self._writers = [
            (node, {self._memory.class_of(n) for n in does.writes})
            for node, does in self._memory.effects.items()
            if does.writes
        ]

    def into(self, node: Node) -> tuple[Node, ...]:
        """What ``node`` writes into."""
        return self._memory.effects[node].writes if node in self._memory.effects else ()

    def between(self, sources: Iterable[Any], first: Node, last: Node) -> Node | None:
        """Who writes into one of ``sources`` after ``first`` and before ``last``, and so keeps a read from moving there."""
        return next((node for node in self._into(sources) if first < node < last), None)

    def after(self, value: Node) -> Node | None:
        """Who writes into ``value`` once it is made."""
        return next((node for node in self._into([value]) if value < node), None)

    def _found(self, node: Node) -> Node:
        """The node that the pass found where this one is now."""
        while node not in self._memory.effects and "replaces" in node.meta:
            node = node.meta["replaces"]
        return node

    def _into(self, sources: Iterable[Any]) -> Iterator[Node]:
        known = [self._found(n) for n in sources if isinstance(n, Node)]
        classes = {self._memory.class_of(n) for n in known if n in self._memory.effects}
        return (node for node, written in self._writers if written & classes and not node._erased)


def emit(
    module: GraphModule, at: Node, function: Callable[..., Any], arguments: dict[str, Any], like: Node, name: str = ""
) -> Node:
    """Call ``function`` before ``at``, its tensor arguments held under ``name``, as what computes ``like``."""
    with module.graph.inserting_before(at):
        ready = {k: hold(module, f"{name}_{k}", v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        node = module.graph.call_function(function, (), ready)
    node.meta.update(like.meta, replaces=like)
    return node


def hold(module: GraphModule, name: str, tensor: Tensor) -> Node:
    """Store a derived tensor on the module and read it at the graph's insertion point."""
    base = name.replace(".", "_")
    unique = base
    while hasattr(module, unique):
        unique = f"{base}_{sum(buffer.startswith(base) for buffer in module._buffers)}"
    module.register_buffer(unique, tensor)
    return module.graph.get_attr(unique)


def forget(module: GraphModule, op: Op) -> None:
    """Erase what computed the constants of an operator that is gone, as far as nothing else reads it."""
    forget_unread(
        module, *[value for name, value in op.arguments.items() if name != "input" and isinstance(value, Node)]
    )


def forget_unread(module: GraphModule, *nodes: Node) -> None:
    """Erase ``nodes``, and what they were computed from, as far as nothing reads it."""
    stack = [*nodes]
    erased: set[Node] = set()
    while stack:
        node = stack.pop()
        if not node.users and node not in erased and node.op != "placeholder":
            stack += node.all_input_nodes
            module.graph.erase_node(node)
            erased.add(node)
    names = {str(node.target) for node in erased if node.op == "get_attr"}
    if names:
        names -= {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in names & module._buffers.keys():
        del module._buffers[name]


# Views where the layout allows one, and copies elsewhere.
_VIEWS = frozenset("view view_as reshape reshape_as flatten ravel unflatten contiguous Flatten Unflatten".split())


def views_may_copy(module: GraphModule) -> bool:
    """Make each ``view`` a ``reshape``, for a view refuses what is laid out otherwise; False where the layout matters.

    That is where something writes through a view, where one reads the same bytes as another dtype, and where random
    numbers are drawn, in the order in which they lie in memory.
    """
    nodes = [n for n in module.graph.nodes if called(n, module) in _VIEWS]
    views = [n for n in nodes if n.op == "call_method" and n.target in ("view", "view_as")]
    if any(isinstance(argument, torch.dtype) for n in views for argument in n.args):
        return False
    if any(called(n, module).startswith("as_strided") for n in module.graph.nodes):
        return False
    memory = Memory(module.graph, module.get_submodule)
    written = {memory.class_of(w) for does in memory.effects.values() for w in does.writes}
    if any(memory.class_of(n) in written for n in nodes) or any(does.random for does in memory.effects.values()):
        return False
    for n in views:
        n.target = {"view": "reshape", "view_as": "reshape_as"}[n.target]
    return True


def called(node: Node, module: GraphModule) -> str:
    """The name of what a node calls: a function's, a method's, or a module's class."""
    return type(module.get_submodule(str(node.target))).__name__ if node.op == "call_module" else name_of(node)
