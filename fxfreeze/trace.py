"""Module -> fx graph, in the modes its modules are in, or a refusal that says why and where.

What sets this tracer apart from ``torch.fx.symbolic_trace``: a submodule that can't be traced becomes a leaf on the
spot; the shape of a value is known to Python (``len``, ``int``, ``bool``, iteration) when example inputs are given;
in-place operators and item assignment are recorded; buffers are read, never baked; nothing is written onto the user's
modules, and neither random state nor module state is left changed.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import Proxy

from fxfreeze.inputs import Inputs, TraceRefusal
from fxfreeze.kept import ModuleState
from fxfreeze.proxies import TracedProxy, is_scalar
from fxfreeze.randomness import RandomState, random_state_kept
from fxfreeze.shapes import Shapes

__all__ = ["Traced", "trace"]

_lock = threading.Lock()  # a trace patches nn.Module for its duration


@dataclass
class Traced:
    """One trace. Targets of ``call_module`` and ``get_attr`` are the original's qualified names.

    ``node.meta["scope"]`` holds the qualified names of the modules entered, outermost first.

    constants: tensors met on the way that belong to no module, by ``get_attr`` target; outputs: the structure that the
    output node's flat tuple stands for; shape_bound: valid only for the shapes it was traced with; leaves: modules kept
    whole, with the reason.
    """

    graph: Graph
    inputs: Inputs
    constants: dict[str, Tensor]
    outputs: pytree.TreeSpec
    shape_bound: bool
    leaves: dict[str, str] = field(default_factory=dict)


def trace(net: nn.Module, inputs: Inputs, examples: list[Tensor] | None = None) -> Traced:
    """Trace ``net.forward`` with its modules in the modes they are in.

    examples: one tensor per name in ``inputs.names``; without them, control flow that looks at shapes can't be followed.
    Raises TraceRefusal when the network's own forward (not a submodule's) can't be traced.
    """
    with _lock, random_state_kept() as before:
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
    trace_asserts = True

    def __init__(self, net: nn.Module, inputs: Inputs, examples: list[Tensor] | None, watch_random: bool = False):
        super().__init__(autowrap_functions=())
        self.net = net
        self.inputs = inputs
        self.watch_random = watch_random
        self.shape_bound = False
        self.constants: dict[str, Tensor] = {}
        self.leaves: dict[str, str] = {}
        self.names: dict[int, str] = {}
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        self.reads: dict[str, Proxy] = {}
        self.path: tuple[str, ...] = ()
        self.shapes = (
            None if examples is None else Shapes(net, dict(zip(inputs.names, examples, strict=True)), self.constants)
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
            graph = self.trace(self.net)
        except Exception as error:
            raise self._refusal(error) from error
        finally:
            changed = before.restore()
        if changed:
            raise TraceRefusal(
                f"{type(self.net).__qualname__}.forward assigns self.{changed}, which a traced graph can't do: return the "
                f"value instead, or move the assignment into a submodule"
            )
        graph.lint()
        return Traced(graph, self.inputs, self.constants, spec[-1], self.shape_bound, self.leaves)

    def _refusal(self, error: Exception) -> TraceRefusal:
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        own = [f for f in frames if f.function == "forward" and "torch/" not in f.filename and f.filename != __file__]
        where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        remedy = "" if self.shapes is not None else ". Passing example_inputs lets control flow look at shapes"
        return TraceRefusal(
            f"{type(self.net).__qualname__}.forward can't be traced{where}: {error}{remedy}. What can't be traced may stand "
            f"in a submodule, which is then kept whole"
        )

    def _evaluating(self) -> bool:
        """Whether modules run for their shapes, inside the trace but not part of it."""
        return self.shapes is not None and self.shapes.running

    # ---- modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if reason := _leaf_reason(m):
            self.leaves[module_qualified_name] = reason
            return True
        return m.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(m, nn.Sequential)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._evaluating():
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        outer, self.path = self.path, (*self.path, name)
        try:
            if name in self.leaves or self.is_leaf_module(m, name):
                return self.create_proxy("call_module", name, args, kwargs)
            return self._trace_into(m, name, forward, args, kwargs)
        finally:
            self.path = outer

    def _trace_into(
        self, m: nn.Module, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's own operators, or, where tracing it fails, one call of the whole module."""
        mark = next(reversed(self.graph.nodes), None)
        reads, state = dict(self.reads), ModuleState([("", m)])
        chance = RandomState() if self.watch_random else None
        reason = None
        result = None
        try:
            result = forward(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises makes it a leaf
            reason = f"tracing it failed: {error}"
        if changed := state.restore():
            reason = reason or f"its forward assigns self.{changed}"
        if chance is not None and not chance.unchanged():
            chance.restore()
            reason = reason or "its forward draws random numbers that Python sees"
        if reason is None:
            return result
        for node in reversed(list(self.graph.nodes)):
            if node is mark:
                break
            self.graph.erase_node(node)
            if self.shapes is not None:
                self.shapes.forget(node)
        self.reads = reads
        self.leaves = {leaf: why for leaf, why in self.leaves.items() if not leaf.startswith(f"{name}.")}
        self.leaves[name] = reason
        return self.create_proxy("call_module", name, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise TraceRefusal(
                f"a {type(mod).__qualname__} is called that is no submodule of the network: register it as an attribute"
            ) from None

    # ---- values

    def proxy(self, node: Node) -> Proxy:
        return TracedProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node: Node = self.graph.create_node(*args, **kwargs)
        node.meta["scope"] = self.path
        node.meta["scalar"] = is_scalar(node)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self._evaluating() or not isinstance(attr_val, Tensor):
            return attr_val
        name = self.names.get(id(attr_val))
        return attr_val if name is None else self._read(name)

    def _read(self, name: str) -> Proxy:
        if name not in self.reads:
            self.reads[name] = self.create_proxy("get_attr", name, (), {})
        return self.reads[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            return self._tensor(a)
        return super().create_arg(a)

    def _tensor(self, tensor: Tensor) -> Node:
        name = self.names.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if name is not None:
            return self._read(name).node
        if tensor.requires_grad:
            raise TraceRefusal("a tensor was computed from parameters without the tracer seeing it")
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = tensor
        held = self.create_proxy("get_attr", name, (), {})
        # A fresh copy each time: forward may write into what it believes to have just made.
        return self.create_proxy("call_function", torch.clone, (held,), {}).node

    # ---- what Python may ask of a value (see TracedProxy)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.evaluate(obj.node))

    def evaluate(self, node: Node) -> Any:
        """The value of ``node`` for inputs shaped like the examples; the trace is then valid for these shapes only."""
        if self.shapes is None:
            raise TraceRefusal(f"Python looks at the value of {node.name}")
        self.shape_bound = True
        return self.shapes.evaluate(node)


def _leaf_reason(m: nn.Module) -> str | None:
    """Why a module must be called as a whole."""
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return "it has hooks"
    if "parametrizations" in m._modules:
        return "it has a parametrization"
    if isinstance(m, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    return None
