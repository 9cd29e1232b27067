"""The values that flow through a trace: proxies that know what Python may ask of them.

``torch.fx`` stops at ``len``, ``int``, iteration, item assignment and ``isinstance(x, Tensor)``, and takes ``x += y``
for ``x = x + y``. These proxies answer on fake tensors of the example inputs' shapes (the tracer's ``evaluate``) and
record the mutations.
"""

import builtins
import contextlib
import dis
import math
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx import Node
from torch.fx.proxy import Proxy, assert_fn

from fxfreeze.inputs import TraceRefusal

__all__ = ["IN_PLACE", "SCALAR_NAMES", "TracedProxy", "is_scalar", "taken_for_tensors"]

IN_PLACE = "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
# Attributes and methods of a tensor that give something else than a tensor.
SCALAR_NAMES = frozenset(
    (
        "shape dtype device ndim layout is_cuda is_cpu is_mps is_xpu is_sparse is_quantized is_nested is_complex "
        "is_floating_point is_contiguous requires_grad itemsize nbytes size dim ndimension numel nelement stride "
        "storage_offset element_size get_device item tolist data_ptr"
    ).split()
)
_SCALAR_FUNCTIONS = frozenset(
    [getattr(operator, name) for name in operator.__all__]
    + [getattr(math, name) for name in dir(math) if not name.startswith("_")]
    + [len, min, max, int, float, bool, sum, round, torch.Size, torch.sym_int, torch.sym_float]
)


def is_scalar(node: Node) -> bool:
    """Whether the value of ``node`` is a size, flag or number that Python computed from shapes, not a tensor."""
    if node.op == "call_method":
        return node.target in SCALAR_NAMES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in SCALAR_NAMES
    inputs = node.all_input_nodes
    return node.target in _SCALAR_FUNCTIONS and bool(inputs) and all(n.meta.get("scalar", False) for n in inputs)


class TracedProxy(Proxy):
    """A value in a trace; ``tracer`` is fxfreeze's own."""

    tracer: Any

    def _is_scalar(self) -> bool:
        return bool(self.node.meta["scalar"])

    def __getattr__(self, k: str) -> "TracedProxy":  # type: ignore[override]
        if k.startswith("_"):
            raise AttributeError(f"private attribute {k} of a traced value")
        return _TracedAttribute(self, k)

    def __setattr__(self, k: str, v: Any) -> None:
        if k in ("data", "grad", "requires_grad"):
            raise TraceRefusal(f"{k} of a traced value is assigned")
        super().__setattr__(k, v)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedProxy":
        raise TraceRefusal("a traced value is deepcopied: clone it")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __bool__(self) -> bool:
        if _is_asserted(self.node, sys._getframe(1)):
            self.tracer.create_proxy("call_function", assert_fn, (self,), {})
            return True
        return bool(self.tracer.evaluate(self.node))

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        count = _unpack_count(frame)
        return iter([operator.getitem(self, i) for i in range(len(self) if count is None else count)])

    def __len__(self) -> int:
        return len(self.tracer.evaluate(self.node))

    def __int__(self) -> int:
        return int(self.tracer.evaluate(self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.evaluate(self.node))

    def __float__(self) -> float:
        return float(self.tracer.evaluate(self.node))


def _unpack_count(frame: FrameType) -> int | None:
    """How many names ``a, b = value`` in the calling frame unpacks into; None when it is another kind of iteration."""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.arg if instruction.opname == "UNPACK_SEQUENCE" else None
    return None


_COMPARISONS = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}


def _is_asserted(node: Node, frame: FrameType) -> bool:
    """Whether the calling frame asks for the truth of ``node`` only to assert it."""
    following = (i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti)
    instruction = next(following)
    if instruction.opname == "COMPARE_OP":  # asks by itself from 3.13 on; a list compares its elements by ==
        if _COMPARISONS.get(instruction.argval) != getattr(node.target, "__name__", None):
            return False
        instruction = next(following)
    if instruction.opname == "TO_BOOL":
        instruction = next(following)
    if "JUMP" not in instruction.opname or not instruction.opname.endswith("IF_TRUE"):
        return False
    after = next(i for i in following if i.opname != "NOT_TAKEN")
    return after.opname == "LOAD_ASSERTION_ERROR" or after.argval is AssertionError


def _record_in_place(name: str) -> Callable[[TracedProxy, Any], TracedProxy]:
    target = getattr(operator, name)

    def record(self: TracedProxy, other: Any) -> TracedProxy:
        if self._is_scalar():  # numbers are immutable: n += 1 makes a new one
            target_of_number = getattr(operator, name[1:] + ("_" if name in ("iand", "ior") else ""))
            return self.tracer.create_proxy("call_function", target_of_number, (self, other), {})  # type: ignore[no-any-return]
        return self.tracer.create_proxy("call_function", target, (self, other), {})  # type: ignore[no-any-return]

    return record


for _name in IN_PLACE:
    setattr(TracedProxy, f"__{_name}__", _record_in_place(_name))


class _TracedAttribute(TracedProxy):
    """``value.name``: becomes a method call when called, and a ``getattr`` node when used."""

    def __init__(self, root: TracedProxy, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self._node: Node | None = None

    def _is_scalar(self) -> bool:
        return self.attr in SCALAR_NAMES

    @property
    def node(self) -> Node:  # type: ignore[override]
        if self._node is None or self._node._erased:  # erased with a module whose tracing failed
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


_SCALAR_TYPES = (int, float, bool, tuple, torch.Size, torch.dtype, torch.device)
_isinstance = builtins.isinstance
_apply = Function.__dict__["apply"]


@contextlib.contextmanager
def taken_for_tensors() -> Iterator[None]:
    """Within, ``isinstance(value, Tensor)`` holds for a traced value that is no size; custom functions refuse them.

    The built-in is replaced because the honest ways, ``__class__`` and ``__instancecheck__``, also tell C++ that a proxy
    is a tensor: it then reads the proxy's memory as one, and the process dies (``torch.tensor(x)``, ``Function.apply``).
    """

    def isinstance_or_traced(obj: Any, kind: Any) -> bool:
        if _isinstance(obj, kind):
            return True
        if not issubclass(type(obj), TracedProxy):
            return False
        if not obj._is_scalar():
            return issubclass(Tensor, kind)
        return any(issubclass(t, kind) for t in _SCALAR_TYPES) and _isinstance(obj.tracer.evaluate(obj.node), kind)

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if any(issubclass(type(a), Proxy) for a in (*args, *kwargs.values())):
            raise TraceRefusal(f"{cls.__qualname__} is an autograd.Function, whose backward a trace can't see")
        return _apply.__get__(None, cls)(*args, **kwargs)

    builtins.isinstance = isinstance_or_traced
    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = _isinstance
        Function.apply = _apply  # type: ignore[method-assign]
