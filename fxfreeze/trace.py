"""Module -> fx graph, in the modes its modules are in, or a refusal that says why and where.

What sets this tracer apart from ``torch.fx.symbolic_trace``: a submodule that can't be traced becomes a leaf on the
spot; the shape of a value is known to Python (``len``, ``int``, ``bool``, iteration) when example inputs are given;
in-place operators and item assignment are recorded, and so is ``torch.no_grad()``; buffers are read, never baked;
nothing is written onto the user's modules, and neither random state nor module state is left changed.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.fx.proxy import Proxy

from fxfreeze.attributes import AttributeReads, Read
from fxfreeze.constants import Constants, Recorded
from fxfreeze.effects import Alias, effects
from fxfreeze.inputs import Inputs, TraceRefusal
from fxfreeze.kept import ModuleState, holders
from fxfreeze.proxies import TracedProxy, is_scalar, taken_for_tensors
from fxfreeze.randomness import RandomState, random_state_kept
from fxfreeze.regions import Region, without_grad
from fxfreeze.shapes import Shapes

__all__ = ["Traced", "trace"]

_lock = threading.Lock()  # a trace patches nn.Module for its duration
_WRITTEN = "a tensor made from no input is written into after a traced operator has read it"


@dataclass
class Traced:
    """One trace. Targets of ``call_module`` and ``get_attr`` are the original's qualified names.

    ``node.meta["scope"]`` holds the qualified names of the modules entered, outermost first.

    constants: tensors met on the way that belong to no module, by ``get_attr`` target; outputs: the structure that the
    output node's flat tuple stands for; shape_bound: valid only for the shapes it was traced with; leaves: modules kept
    whole, with the reason; reads: attributes of modules whose values the graph holds.
    """

    graph: Graph
    inputs: Inputs
    constants: dict[str, Tensor]
    outputs: pytree.TreeSpec
    shape_bound: bool
    leaves: dict[str, str] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)


def trace(net: nn.Module, inputs: Inputs, examples: list[Tensor] | None = None) -> Traced:
    """Trace ``net.forward`` with its modules in the modes they are in.

    examples: one tensor per name in ``inputs.names``; without them, control flow that looks at shapes can't be followed.
    Raises TraceRefusal when the network's own forward (not a submodule's) can't be traced.
    """
    with _lock, random_state_kept(net.modules()) as before:
        traced = _Tracer(net, inputs, examples).run()
        if not before.unchanged():  # rare, so the check of every module waits until here
            before.restore()
            traced = _Tracer(net, inputs, examples, watch_random=True).run()
            if not before.unchanged():
                raise TraceRefusal(
                    f"{type(net).__qualname__}.forward draws random numbers that Python sees (a random branch, or a random "
                    f"tensor made from no input), which a trace would fix for ever: move them into a submodule"
                )
        return traced


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, net: nn.Module, inputs: Inputs, examples: list[Tensor] | None, watch_random: bool = False):
        super().__init__(autowrap_functions=())
        self.net = net
        self.inputs = inputs
        self.watch_random = watch_random
        self.outside = Region()
        self.shape_bound = False
        self.constants = Constants(self)
        self.attributes = AttributeReads(net, self.evaluating)
        self.leaves: dict[str, str] = {}
        self.sharing: dict[str, str] = {}  # modules that hold what another one assigns
        self.members = set(net.modules())
        self.thread = threading.get_ident()
        self.names: dict[int, str] = {}
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        self.reads: dict[str, Proxy] = {}
        self.path: tuple[str, ...] = ()
        self.shapes = (
            None
            if examples is None
            else Shapes(net, dict(zip(inputs.names, examples, strict=True)), self.constants.tensors)
        )

    def run(self) -> Traced:
        spec: list[pytree.TreeSpec] = []

        def create_args_for_root(*_: Any, **__: Any) -> tuple[Callable[..., Any], list[Any]]:
            proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs.names]

            def forward(root: nn.Module, *tensors: Any) -> tuple[Any, ...]:
                args, kwargs = self.inputs.unflatten(list(tensors))
                flat, out = pytree.tree_flatten(root.forward(*args, **kwargs))
                spec.append(out)
                return tuple(flat)

            return forward, [self.net, *proxies]

        self.create_args_for_root = create_args_for_root  # type: ignore[method-assign]
        before = ModuleState(self.net.named_modules())
        try:
            gradients = torch.set_grad_enabled(self.outside.gradients)
            with self.attributes.recorded(), Recorded(self), taken_for_tensors(), gradients:
                graph = self.trace(self.net)
        except Exception as error:
            raise self._refusal(error) from error
        finally:
            changed = before.restore()
        if self.constants.written_by_python():
            raise TraceRefusal(f"{type(self.net).__qualname__}.forward can't be traced: {_WRITTEN}")
        if changed:
            raise TraceRefusal(
                f"{type(self.net).__qualname__}.forward assigns self.{changed}, which a traced graph can't do: return the "
                f"value instead, or move the assignment into a submodule"
            )
        graph.lint()
        reads = list(self.attributes.found.values())
        return Traced(graph, self.inputs, self.constants.tensors, spec[-1], self.shape_bound, self.leaves, reads)

    def _refusal(self, error: Exception) -> TraceRefusal:
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        own = [f for f in frames if f.function == "forward" and "torch/" not in f.filename and f.filename != __file__]
        where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        remedy = "" if self.shapes is not None else ". Passing example_inputs lets control flow look at shapes"
        return TraceRefusal(
            f"{type(self.net).__qualname__}.forward can't be traced{where}: {_said(error)}{remedy}. What can't be traced may "
            f"stand in a submodule, which is then kept whole"
        )

    def evaluating(self) -> bool:
        """Whether modules run that are no part of the trace: for their shapes, or in another thread."""
        return threading.get_ident() != self.thread or (self.shapes is not None and self.shapes.running)

    # ---- modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if reason := _leaf_reason(m):
            self.leaves[module_qualified_name] = reason
            return True
        return m.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(m, nn.Sequential)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.evaluating():
            return forward(*args, **kwargs)
        if self._is_made_by_forward(m):
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        outer, self.path = self.path, (*self.path, name)
        try:
            if name in self.leaves or self.is_leaf_module(m, name):
                return self.create_proxy("call_module", name, args, kwargs)
            return self._trace_into(m, name, forward, args, kwargs)
        finally:
            self.path = outer

    def _is_made_by_forward(self, m: nn.Module) -> bool:
        """A loss, say, or a slice of a container: no submodule, and with no tensor that isn't the network's."""
        return m not in self.members and all(id(tensor) in self.names for tensor in (*m.parameters(), *m.buffers()))

    def _trace_into(
        self, m: nn.Module, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's own operators, or, where tracing it fails, one call of the whole module."""
        mark = next(reversed(self.graph.nodes), None)
        reads, constants, state = dict(self.reads), self.constants.copy(), ModuleState([("", m)])
        attributes, bound = dict(self.attributes.found), self.shape_bound
        chance = RandomState(m.modules()) if self.watch_random else None
        reason = None
        result = None
        try:
            result = forward(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises makes it a leaf
            reason = f"tracing it failed: {_said(error)}"
        if changed := state.restore():
            reason = reason or f"its forward assigns self.{changed}"
            for holder in (holder for value in state.touched for holder in self._holders.get(id(value), ())):
                self.sharing.setdefault(holder, f"{name} assigns self.{changed}")
        for holder, what in self.sharing.items():  # it may read there what only running this module puts there
            if not f"{holder}.".startswith(f"{name}."):
                raise TraceRefusal(f"{what}, which {holder or 'the network itself'} holds too")
        if chance is not None and not chance.unchanged():
            chance.restore()
            reason = reason or "its forward draws random numbers that Python sees"
        if self.constants.written_by_python():
            reason = reason or _WRITTEN
        if reason is None:
            return result
        for node in reversed(list(self.graph.nodes)):
            if node is mark:
                break
            self.graph.erase_node(node)
            if self.shapes is not None:
                self.shapes.forget(node)
        self.reads, self.constants, self.attributes.found, self.shape_bound = reads, constants, attributes, bound
        self.leaves = {leaf: why for leaf, why in self.leaves.items() if not leaf.startswith(f"{name}.")}
        self.leaves[name] = reason
        self.sharing.clear()
        return self.create_proxy("call_module", name, args, kwargs)

    @functools.cached_property
    def _holders(self) -> dict[int, list[str]]:
        return holders(self.net.named_modules())

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise TraceRefusal(
                f"a {type(mod).__qualname__} is called that is no submodule of the network: register it as an attribute"
            ) from None

    # ---- values

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        region = Region()
        if not kind.startswith("call") or vars(region) == vars(self.outside):
            return super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if region.autocast != self.outside.autocast:
            raise TraceRefusal("its forward switches autocast: do so around the call of the network")
        if region.gradients:
            raise TraceRefusal("its forward turns gradients on")
        return self._without_grad(kind, target, self.create_arg((args, kwargs)), *rest, **options)

    def _without_grad(self, kind: str, target: Any, arguments: Any, *rest: Any, **options: Any) -> Any:
        """An operator under ``torch.no_grad``: gradients stop at its inputs, and at a module's own weights.

        Stopping them there, not at its output, lets it write into a value that has a gradient without changing that.
        """

        def stopped(node: Node) -> Node:
            if node.meta["scalar"] or node.target is without_grad:
                return node
            return self.create_node("call_function", without_grad, (node,), {})

        args, kwargs = map_arg(arguments, stopped)
        result = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        does = effects(result.node, self.net.get_submodule)
        if does.writes and does.alias is Alias.SAME:  # the tensor that was written into, with the gradient it has
            written = does.writes[0]
            return self.proxy(written.args[0] if written.target is without_grad else written)  # type: ignore[arg-type]
        return super().create_proxy("call_function", without_grad, (result,), {}) if kind == "call_module" else result

    def proxy(self, node: Node) -> Proxy:
        return TracedProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node: Node = self.graph.create_node(*args, **kwargs)
        node.meta["scope"] = self.path
        node.meta["scalar"] = is_scalar(node)
        self.constants.note(node)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self.evaluating() or not isinstance(attr_val, Tensor):
            return attr_val
        name = self.names.get(id(attr_val))
        return attr_val if name is None else self._read(name)

    def _read(self, name: str) -> Proxy:
        if name not in self.reads:
            self.reads[name] = self.create_proxy("get_attr", name, (), {})
        return self.reads[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Node):
            return a
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            return self._tensor(a)
        return super().create_arg(a)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the graph reads ``tensor`` from a module, or has written into it: Python must not compute with it."""
        known = id(tensor) in self.names or tensor in self.tensor_attrs
        return not isinstance(tensor, TracedProxy) and (known or self.constants.written_in_trace(tensor))

    def proxy_of(self, tensor: Tensor) -> Proxy:
        """What stands for a constant in the trace."""
        return self.proxy(self._tensor(tensor))

    def _tensor(self, tensor: Tensor) -> Node:
        name = self.names.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if name is not None:
            return self._read(name).node
        if tensor.requires_grad:
            raise TraceRefusal("a tensor was computed from parameters without the tracer seeing it")
        return self.constants.node(tensor)

    # ---- what Python may ask of a value (see TracedProxy)

    def evaluate(self, node: Node) -> Any:
        """The value of ``node`` for inputs shaped like the examples; the trace is then valid for these shapes only."""
        if self.shapes is None:
            raise TraceRefusal(f"Python looks at the value of {node.name}")
        self.shape_bound = True
        with torch._C.DisableTorchFunction():  # nothing there is for the graph
            return self.shapes.evaluate(node)


def _said(error: Exception) -> str:
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"Python looks at a value that depends on the data ({error})"
    return str(error)


def _leaf_reason(m: nn.Module) -> str | None:
    """Why a module must be called as a whole."""
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return "it has hooks"
    if "parametrizations" in m._modules:
        return "it has a parametrization"
    if isinstance(m, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    return None
