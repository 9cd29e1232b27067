"""Nodes in the form of the kernels' specification, ``fxfreeze.kernels.reference``: what the passes attach things to.

Between passes a fused convolution is a call of ``reference.conv``, which runs anywhere; the last pass lowers it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze import kernels
from fxfreeze.effects import declared
from fxfreeze.kernels import reference
from fxfreeze.operators import LAYERS, Op, op_of, padded_convolution
from fxfreeze.rewrite import constant, emit, forget, forget_unread, place

__all__ = [
    "activation_after",
    "activation_name",
    "bare",
    "convolution",
    "fuse",
    "pair",
    "sole_user",
    "stranger",
    "unsuited",
    "weights",
    "windows",
]

_NOTHING = {"scale": None, "shift": None, "prologue": "none", "residual": None, "activation": "none"}
for _op in (kernels.conv1x1, kernels.conv3x3, kernels.depthwise, kernels.pointwise, kernels.linear, kernels.layernorm):
    declared(_op)
declared(reference.conv)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convolution(node: Any, module: GraphModule) -> dict[str, Any] | str:
    """The arguments of ``reference.conv`` that ``node`` computes with, or why no kernel computes it."""
    if not isinstance(node, Node):
        return f"{node} is no convolution"
    if node.target is reference.conv:
        return dict(node.kwargs)
    op = op_of(node, module)
    if op is None or op.kind != "conv":
        return f"{place(node)} is no convolution"
    if op.arguments["groups"] != 1:
        return f"{place(node)} has {op.arguments['groups']} groups"
    given = windows(op, node, module)
    return given if isinstance(given, str) else {"x": op.input, **weights(op, module), **_NOTHING, **given}


def windows(op: Op, node: Node, module: GraphModule) -> dict[str, Any] | str:
    """Stride, padding and dilation of a convolution of images as pairs, or why no kernel computes it."""
    if op.function is padded_convolution:
        return f"{place(node)} pads with {op.arguments['mode']}, not with zeros"
    if (reason := unsuited(node)) is not None:
        return reason
    weight = constant(op.arguments["weight"], module)
    if weight is None or (op.arguments["bias"] is not None and constant(op.arguments["bias"], module) is None):
        return f"the weight of {place(node)} is not a constant"
    padding = op.arguments["padding"]
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(pair(op.arguments["dilation"]) or (), weight.shape[2:], strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            return f"{place(node)} pads one side more than the other"
        padding = [span // 2 for span in spans] if padding == "same" else 0
    found = {
        k: pair(v)
        for k, v in (("stride", op.arguments["stride"]), ("padding", padding), ("dilation", op.arguments["dilation"]))
    }
    unknown = next((name for name, value in found.items() if value is None), None)
    return found if unknown is None else f"the {unknown} of {place(node)} is computed at run time"


def pair(value: Any) -> tuple[int, int] | None:
    """One integer for both dimensions, or two; None for what is not known before it runs."""
    both = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    both = both * 2 if len(both) == 1 else both
    if len(both) != 2 or not all(type(v) is int for v in both):
        return None
    return both[0], both[1]


def unsuited(node: Node, dims: int | None = 4) -> str | None:
    """Why the value of ``node`` is none that a kernel makes; dims: how many it should have, None for any."""
    value = node.meta.get("value")
    if value is None:
        return f"{place(node)} is no tensor"
    if dims is not None and value.dim() != dims:
        return f"{place(node)} has {value.dim()} dimensions, not {dims}"
    if value.dtype not in _DTYPES:
        return f"{place(node)} is {str(value.dtype).removeprefix('torch.')}"
    return None


def weights(op: Op, module: GraphModule) -> dict[str, Tensor | None]:
    """Weight and bias of a layer whose weights are constants."""
    return {name: constant(op.arguments[name], module) for name in ("weight", "bias")}


def bare(conv: dict[str, Any]) -> bool:
    """Whether a convolution has no residual and no activation yet."""
    return conv["residual"] is None and conv["activation"] == "none"


def sole_user(node: Node) -> Node | None:
    """The one user of ``node``."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def stranger(node: Node, known: Node | None = None) -> str:
    """The reason that ``node`` can't be taken in where it is used: somebody else uses it too."""
    other = next((user.name for user in node.users if user is not known), "none")
    return f"the output of {place(node)} has another user: {other}"


def activation_after(node: Node, module: GraphModule) -> tuple[Node, str] | None:
    """The activation that alone uses ``node``, and its name."""
    user = sole_user(node)
    op = op_of(user, module)
    if user is None or op is None or op.kind != "activation":
        return None
    return user, activation_name(op)


def activation_name(op: Op) -> str:
    """An activation's name among ``fxfreeze.kernels.ACTIVATIONS``."""
    tanh = op.arguments.get("approximate") == "tanh"
    return f"{op.arguments['name']}_tanh" if tanh else str(op.arguments["name"])


def fuse(module: GraphModule, function: Callable[..., Any], arguments: dict[str, Any], chain: Sequence[Node]) -> Node:
    """One call in place of ``chain``, nodes in the order of the graph of which only the last has users outside it."""
    last = chain[-1]
    node = emit(module, last, function, arguments, last, place(chain[0]))
    last.replace_all_uses_with(node)
    for gone in reversed(chain):
        op, held = op_of(gone, module), [n for n in gone.all_input_nodes if n.op == "get_attr"]
        module.graph.erase_node(gone)
        if op is not None and op.kind in LAYERS:
            forget(module, op)
        forget_unread(module, *[n for n in held if not n._erased])
    return node
