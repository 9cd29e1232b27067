"""What operator a node is, whichever way it was written, and how passes are run.

A pass is a function ``GraphModule -> list[Outcome]`` that edits the graph in place; ``run_passes`` is handed the list.
"""

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxfreeze.effects import Memory

__all__ = [
    "Op",
    "Outcome",
    "Pass",
    "PassError",
    "constant",
    "forget",
    "hold",
    "op_of",
    "other_user",
    "place",
    "run_passes",
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


@dataclass(frozen=True)
class Op:
    """An operator with its arguments by the names of the functional form; weights are tensors or nodes.

    kind: "conv", "conv_transpose", "linear" or "batch_norm"; function: the functional form.
    """

    kind: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def input(self) -> Any:
        return self.arguments["input"]


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


_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_MODULES: dict[type[nn.Module], tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    nn.Conv1d: ("conv", F.conv1d, _CONV),
    nn.Conv2d: ("conv", F.conv2d, _CONV),
    nn.Conv3d: ("conv", F.conv3d, _CONV),
    nn.ConvTranspose1d: ("conv_transpose", F.conv_transpose1d, _TRANSPOSED),
    nn.ConvTranspose2d: ("conv_transpose", F.conv_transpose2d, _TRANSPOSED),
    nn.ConvTranspose3d: ("conv_transpose", F.conv_transpose3d, _TRANSPOSED),
    nn.Linear: ("linear", F.linear, ("weight", "bias")),
}
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    **{
        f: ("conv", ("input", *_CONV), {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
        for f in (F.conv1d, F.conv2d, F.conv3d)
    },
    **{
        f: (
            "conv_transpose",
            ("input", *_TRANSPOSED),
            {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1},
        )
        for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
    F.linear: ("linear", ("input", "weight", "bias"), {"bias": None}),
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def op_of(node: Any, module: GraphModule) -> Op | None:
    """The convolution, linear layer or batch norm that ``node`` is, written as a module or a function; None: neither."""
    if not isinstance(node, Node):
        return None
    if node.op == "call_module":
        return _module_op(node, module.get_submodule(str(node.target)))
    if node.op != "call_function":
        return None
    if node.target in _FUNCTIONS:
        kind, names, defaults = _FUNCTIONS[node.target]
        arguments = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
        return Op(kind, node.target, arguments)  # type: ignore[arg-type]
    if node.target is F.batch_norm:
        bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return Op("batch_norm", F.batch_norm, dict(bound.arguments))
    return None


def _module_op(node: Node, layer: nn.Module) -> Op | None:
    altered = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if altered or len(node.args) != 1 or node.kwargs:
        return None
    if type(layer) in _BATCH_NORMS:
        arguments = {name: getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")}
        no_statistics = layer.running_mean is None and layer.running_var is None
        return Op(
            "batch_norm",
            F.batch_norm,
            {"input": node.args[0], "training": layer.training or no_statistics, **arguments},
        )
    if type(layer) not in _MODULES:
        return None
    kind, function, names = _MODULES[type(layer)]
    arguments = {"input": node.args[0], **{name: getattr(layer, name) for name in names}}
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        function = padded_convolution
        arguments |= {"padding": 0, "pad": layer._reversed_padding_repeated_twice, "mode": layer.padding_mode}
    return Op(kind, function, arguments)


def padded_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, pad: list[int], mode: str, **options: Any
) -> Tensor:
    """A convolution whose padding repeats, reflects or wraps the input, as ``nn.Conv*d(padding_mode=mode)`` does."""
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolution(F.pad(input, pad, mode=mode), weight, bias, **options)


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
    stack = [value for name, value in op.arguments.items() if name != "input" and isinstance(value, Node)]
    erased: set[Node] = set()
    while stack:
        node = stack.pop()
        if not node.users and node not in erased:
            stack += node.all_input_nodes
            module.graph.erase_node(node)
            erased.add(node)
    names = {str(node.target) for node in erased if node.op == "get_attr"}
    if names:
        names -= {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in names & module._buffers.keys():
        del module._buffers[name]
