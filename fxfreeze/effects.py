"""What a node writes, what its output may share memory with, and whether it draws random numbers.

A traced graph lists operators in program order; this file adds the order that memory imposes: a reader after a write
depends on the write, a write depends on the readers before it. Facts about operators come from their ATen schemas;
what has no schema and is not known here is taken to write into and to alias all its inputs.
"""

import builtins
import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Graph, Node

from fxfreeze.proxies import IN_PLACE
from fxfreeze.regions import without_grad

__all__ = "Alias Effects Memory declared effects name_of reshapes silenced".split()


class Alias(Enum):
    """How an output relates to an input's memory."""

    NEVER = "a tensor of its own"
    VIEW = "always a view"
    SAME = "the input itself, or an element of it"
    MAYBE = "can't be told"


@dataclass(frozen=True)
class Effects:
    """writes, aliases: input nodes; alias: how the output shares memory with ``aliases``; random: draws numbers."""

    writes: tuple[Node, ...] = ()
    aliases: tuple[Node, ...] = ()
    alias: Alias = Alias.NEVER
    random: bool = False
    opaque: bool = False


# Return their input, or a view of it, when there is nothing to do.
_MAYBE_VIEW = frozenset(
    (
        "reshape reshape_as flatten ravel contiguous to type type_as float double half bfloat16 int long short "
        "bool cpu cuda cfloat cdouble pad interpolate upsample pixel_shuffle pixel_unshuffle channel_shuffle "
        "broadcast_to broadcast_tensors meshgrid cartesian_prod unsafe_chunk unsafe_split sum_to_size byte char short "
        "conj_physical resolve_conj resolve_neg dropout dropout1d dropout2d dropout3d alpha_dropout "
        "feature_alpha_dropout feature_dropout stochastic_depth atleast_1d atleast_2d atleast_3d "
        "nan_to_num block_diag einsum matrix_power requires_grad_"
    ).split()
)
_RANDOM_NAMES = frozenset("dropout1d dropout2d dropout3d stochastic_depth gumbel_softmax fractional_max_pool2d".split())
_TRAINING_ONLY = frozenset(
    (
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout "
        "stochastic_depth rrelu"
    ).split()
)
_ALIASING_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten, nn.Upsample, nn.PixelShuffle)
_RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_VIEW_ATTRIBUTES = frozenset("T mT H mH real imag data".split())
# Change the shape of the tensor that they return; so may a write into ``out=``.
_RESHAPING = frozenset(
    "unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ resize_ resize_as_ set_ as_strided_".split()
)
_IN_PLACE = frozenset(getattr(operator, name) for name in IN_PLACE)
_DECLARED: dict[Any, Alias] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def declared(function: _Function, alias: Alias = Alias.NEVER) -> _Function:
    """Take it from here that ``function`` writes nothing that its callers could read otherwise, and draws nothing.

    alias: how its output shares memory with its first argument.
    """
    _DECLARED[function] = alias
    return function


def name_of(node: Node) -> str:
    """The operator's name, whether it was written as a function or as a method ("flatten", "relu_", "iadd")."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def reshapes(node: Node) -> bool:
    """Whether a write into a tensor may change its shape or strides."""
    return name_of(node) in _RESHAPING or node.kwargs.get("out") is not None


def effects(node: Node, modules: Callable[[str], nn.Module]) -> Effects:
    """What ``node`` does to memory and to the random state; ``modules`` finds a module by qualified name."""
    inputs = tuple(n for n in node.all_input_nodes if not n.meta.get("scalar", False))
    if node.op == "call_module":
        return _module_effects(node, modules(str(node.target)), inputs)
    if node.op not in ("call_function", "call_method") or node.meta.get("scalar", False):
        return Effects()
    name, first = name_of(node), inputs[:1]
    if node.op == "call_function" and (alias := _DECLARED.get(node.target)) is not None:
        return Effects(aliases=() if alias is Alias.NEVER else first, alias=alias)
    if known := _python_effects(node, inputs):
        return known
    random = _is_random(node, name)
    if name.startswith("_foreach_"):  # in place on every tensor of the first list, or copies
        writes = _nodes(node.args[0]) if name.endswith("_") else ()
        return Effects(writes=writes, aliases=writes, alias=Alias.MAYBE if writes else Alias.NEVER, random=random)
    if name.endswith("_") and not name.endswith("__"):
        return Effects(writes=first, aliases=first, alias=Alias.SAME, random=random)
    if out := _nodes(node.kwargs.get("out")):
        return Effects(writes=out, aliases=out, alias=Alias.SAME if len(out) == 1 else Alias.MAYBE, random=random)
    if _argument(node, "inplace", False) is True:
        return Effects(writes=first, aliases=first, alias=Alias.SAME, random=random)
    if name in _MAYBE_VIEW:
        return Effects(aliases=inputs, alias=Alias.MAYBE, random=random)
    return _schema_effects(name, node, inputs, random)


def _module_effects(node: Node, module: nn.Module, inputs: tuple[Node, ...]) -> Effects:
    known = (
        type(module).__module__.startswith("torch.nn.") and not module._forward_hooks and not module._forward_pre_hooks
    )
    if not known or "parametrizations" in module._modules:
        return Effects(writes=inputs, aliases=inputs, alias=Alias.MAYBE, random=True, opaque=True)
    random = module.training and _draws(module)
    if getattr(module, "inplace", False) is True:
        return Effects(writes=inputs[:1], aliases=inputs[:1], alias=Alias.SAME, random=random)
    if isinstance(module, _ALIASING_MODULES):
        return Effects(aliases=inputs[:1], alias=Alias.MAYBE, random=random)
    return Effects(random=random)


def _draws(module: nn.Module) -> bool:
    return any(isinstance(m, _RANDOM_MODULES) or bool(getattr(m, "dropout", 0)) for m in module.modules())


def _python_effects(node: Node, inputs: tuple[Node, ...]) -> Effects | None:
    """Effects of functions of ``operator``, ``math`` and ``builtins``; None for any other function."""
    first, target = inputs[:1], node.target
    if isinstance(target, str):  # x.__setitem__(...) is operator.setitem(x, ...); other methods are none of these
        target = getattr(operator, target.strip("_"), target) if target.startswith("__") else target
    if target is without_grad:
        return Effects(aliases=inputs, alias=Alias.VIEW)
    if target is operator.setitem:
        return Effects(writes=first)
    if target is operator.getitem:
        return Effects(aliases=first, alias=Alias.MAYBE if _copies(node.args[1]) else Alias.VIEW)
    if target is getattr:
        return Effects(aliases=first, alias=Alias.VIEW if node.args[1] in _VIEW_ATTRIBUTES else Alias.MAYBE)
    if target in _IN_PLACE:
        return Effects(writes=first, aliases=first, alias=Alias.SAME)
    module = getattr(target, "__module__", None)
    if target is operator.pos:
        return Effects(aliases=first, alias=Alias.MAYBE)
    if module in ("_operator", math.__name__):
        return Effects()
    if module == builtins.__name__ or isinstance(target, type):
        return Effects(aliases=inputs, alias=Alias.MAYBE)
    return None


def _copies(index: Any) -> bool:
    """Whether an index may hold a tensor or a list, which makes indexing a copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, list) or (isinstance(i, Node) and not i.meta.get("scalar", False)) for i in parts)


def _nodes(value: Any) -> tuple[Node, ...]:
    """The nodes in an argument that is one, or a tuple or list of them."""
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(n for n in parts if isinstance(n, Node))


def _written_statistics(node: Node, name: str) -> tuple[Node, ...]:
    """The running statistics that a functional normalisation in training mode updates."""
    training = {"batch_norm": ("training", False), "instance_norm": ("use_input_stats", True)}.get(name)
    if training is None or _argument(node, *training) is False:
        return ()
    statistics = (_argument(node, "running_mean", None), _argument(node, "running_var", None))
    return tuple(n for n in statistics if isinstance(n, Node))


def _schema_effects(name: str, node: Node, inputs: tuple[Node, ...], random: bool) -> Effects:
    owner = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    known = hasattr(torch.Tensor, name) if node.op == "call_method" else owner in ("torch", "fxfreeze")
    kind = _schema_alias(name)
    if not known:
        return Effects(writes=inputs, aliases=inputs, alias=Alias.MAYBE, random=True, opaque=True)
    if kind is None:
        return Effects(aliases=inputs, alias=Alias.MAYBE, random=random)
    writes = _written_statistics(node, name)
    return Effects(writes=writes, aliases=inputs[:1] if kind is not Alias.NEVER else (), alias=kind, random=random)


@functools.cache
def _overloads(name: str) -> tuple[Any, ...]:
    packet = getattr(torch.ops.aten, name, None)
    return () if packet is None else tuple(getattr(packet, overload) for overload in packet.overloads())


@functools.cache
def _schema_alias(name: str) -> Alias | None:
    """VIEW or NEVER by the schemas of ``aten::name``; None when there is no such operator."""
    overloads = _overloads(name)
    if not overloads:
        return None
    aliased = any(r.alias_info is not None and not r.alias_info.is_write for o in overloads for r in o._schema.returns)
    return Alias.VIEW if aliased else Alias.NEVER


def _is_random(node: Node, name: str) -> bool:
    if name in _TRAINING_ONLY:
        return _argument(node, "train" if node.target is torch.dropout else "training", True) is not False
    if name == "scaled_dot_product_attention":
        return bool(_argument(node, "dropout_p", 0.0) != 0)
    tag = torch.Tag.nondeterministic_seeded
    return name in _RANDOM_NAMES or any(tag in overload.tags for overload in _overloads(name))


def silenced(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which a functional dropout does nothing (its eval mode); None for any other operator."""
    if node.op != "call_function" or name_of(node) not in _TRAINING_ONLY:
        return None
    name = "train" if node.target is torch.dropout else "training"
    position = _position(node.target, name)
    if position is not None and position < len(node.args):
        return (*node.args[:position], False, *node.args[position + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: False}


def _argument(node: Node, name: str, default: Any) -> Any:
    """The value of one argument of a function node, by name; ``default`` where it can't be found."""
    if name in node.kwargs:
        return node.kwargs[name]
    position = _position(node.target, name) if callable(node.target) else None
    return node.args[position] if position is not None and position < len(node.args) else default


@functools.cache
def _position(function: Any, name: str) -> int | None:
    if function is torch.dropout:
        return {"train": 2}.get(name)
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index(name) if name in parameters else None


@dataclass
class Memory:
    """The order and sharing that memory imposes on a graph's nodes.

    depends: per node, the nodes that must have run before it (its inputs included); of: per node, its class of nodes that
    may share memory, by representative; effects: per node.
    """

    graph: Graph
    modules: Callable[[str], nn.Module]
    depends: dict[Node, set[Node]] = field(default_factory=dict)
    effects: dict[Node, Effects] = field(default_factory=dict)
    _parent: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reads = [node for node in self.graph.nodes if node.op == "get_attr"]
        self._parent = {node: node for node in self.graph.nodes}
        readers: dict[Node, set[Node]] = {node: set() for node in self.graph.nodes}
        writers: dict[Node, set[Node]] = {node: set() for node in self.graph.nodes}
        for node in self.graph.nodes:
            does = self.effects[node] = self._with_buffers(node, effects(node, self.modules))
            depends = self.depends[node] = set(node.all_input_nodes)
            written = {self.class_of(n) for n in does.writes}
            for c in {self.class_of(n) for n in node.all_input_nodes} | written:
                depends |= writers[c]
                if c in written:
                    depends |= readers[c]
                else:
                    readers[c].add(node)
            for c in written:
                writers[c], readers[c] = {node}, set()
            for n in does.aliases:
                self._union(n, node, readers, writers)

    def _with_buffers(self, node: Node, does: Effects) -> Effects:
        """Add to what a module writes the buffers of its own that the graph reads elsewhere (running statistics)."""
        if not self._reads or node.op != "call_module":
            return does
        if not (does.opaque or self.modules(str(node.target)).training):
            return does
        inside = f"{node.target}."
        buffers = {name for name, _ in self.modules(str(node.target)).named_buffers()}
        read = [n for n in self._reads if str(n.target).startswith(inside)]
        written = tuple(n for n in read if str(n.target).removeprefix(inside) in buffers)
        return dataclasses.replace(does, writes=does.writes + written) if written else does

    def class_of(self, node: Node) -> Node:
        """The representative of the nodes that may share memory with ``node``."""
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _union(self, a: Node, b: Node, *tables: dict[Node, set[Node]]) -> None:
        a, b = self.class_of(a), self.class_of(b)
        if a is not b:
            self._parent[b] = a
            for table in tables:
                table[a] |= table.pop(b)
