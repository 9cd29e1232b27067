"""Where a graph may make a NaN of finite numbers, which fused or compiled operators after it would make a number of."""

import math
import operator
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

__all__ = ["swallowed_nan"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By the names of functions, methods and modules, in lower case, without underscores, and without the 2d of a conv2d. Those
# of which a NaN comes out where one goes in, by any backend, and that make none of finite numbers but by overflow.
_THROUGH = _words(
    "conv convtranspose linear bilinear embedding batchnorm syncbatchnorm layernorm groupnorm instancenorm rmsnorm "
    "localresponsenorm add iadd sub isub subtract mul imul multiply neg square matmul mm bmm addmm baddbmm einsum cat concat "
    "concatenate stack mean sum avgpool adaptiveavgpool sigmoid logsigmoid tanh silu mish gelu softplus softmax logsoftmax "
    "exp expm1 sin cos erf dropout alphadropout featurealphadropout identity view viewas reshape reshapeas flatten unflatten "
    "permute transpose swapaxes t movedim contiguous clone detach to float double half bfloat16 type typeas squeeze "
    "unsqueeze expand expandas repeat tile chunk split tensorsplit unbind getitem getattr narrow select indexselect roll "
    "flip unfold fold pixelshuffle pixelunshuffle channelshuffle pad zeropad reflectionpad replicationpad constantpad "
    "interpolate upsample meshgrid"
)
# Those that may make a number of it, and make none either.
_SAFE = _THROUGH | _words(
    "relu relu6 hardtanh hardsigmoid hardswish leakyrelu prelu rrelu elu selu celu threshold hardshrink softshrink "
    "tanhshrink glu clamp clip clampmin clampmax maximum minimum max min amax amin aminmax maxpool adaptivemaxpool abs "
    "sign floor ceil round trunc where maskedfill tril triu eq ne lt le gt ge logicaland logicalor logicalnot argmax "
    "argmin isnan isinf isfinite zeroslike oneslike fulllike emptylike newzeros newones newfull newempty zeros ones full "
    "empty arange setitem copy zero fill cumsum normalize cosinesimilarity "
    "scaleddotproductattention multiheadattention multiheadattentionforward"
)
_ATTENTION = _words("scaleddotproductattention multiheadattention multiheadattentionforward")
_DIVIDING = _words("div divide truedivide truediv itruediv floordivide floordiv ifloordiv")
_POWERS = _words("pow ipow floatpower")


def swallowed_nan(graph: GraphModule) -> str | None:
    """What might make a number of a NaN, and what may make that of finite numbers, other than by overflow; None if nothing.

    Operators of PyTorch's that are not known are taken for such as do; modules and functions of others, for such as make none.
    """
    made_by: dict[Node, Node] = {}  # of what may hold a NaN
    fixed: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        name = _name(node, graph)
        if _is_fixed(node, name, fixed, graph):
            fixed.add(node)
            continue
        maker = next((made_by[n] for n in node.all_input_nodes if n in made_by), None)
        if maker is not None and name not in _THROUGH:
            return f"{node.name} might make a number of a NaN, which {maker.name} may make of finite numbers"
        if maker is not None or _makes(node, name, fixed, graph):
            made_by[node] = maker or node
            if _writes(node):  # and others may look at that memory
                made_by |= dict.fromkeys(_before(node), maker or node)
    return None


def _makes(node: Node, name: str, fixed: set[Node], graph: GraphModule) -> bool:
    if node.op == "get_attr" or _given_infinity(node):
        return True
    if name in _DIVIDING | _POWERS:
        by = next((value for value in (*node.args[1:], *node.kwargs.values()) if not isinstance(value, str)), None)
        if isinstance(by, (int, float)):
            return by == 0 if name in _DIVIDING else by < 0 or by != int(by)
        return (
            name in _POWERS or by not in fixed
        )  # what was divided by when the graph was checked is divided by ever after
    if name in _ATTENTION:  # a row that is masked as a whole
        masks = [value for key, value in node.kwargs.items() if "mask" in key]
        return any(mask is not None for mask in masks) or (len(node.args) > 3 and node.args[3] is not None)
    if name.endswith("norm") or name in ("normalize", "cosinesimilarity"):
        eps = getattr(graph.get_submodule(str(node.target)), "eps", None) if node.op == "call_module" else None
        return 0 in (eps, node.kwargs.get("eps")) or 0.0 in [value for value in node.args if isinstance(value, float)]
    return name not in _SAFE and _is_torchs(node)


def _is_fixed(node: Node, name: str, fixed: set[Node], graph: GraphModule) -> bool:
    """Whether it is of weights and shapes alone, which were as they are when the graph was checked."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph)
        return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
    if name in ("size", "dim", "numel", "nelement") or (name == "getattr" and node.args[1] in ("shape", "ndim")):
        return True
    return bool(node.all_input_nodes) and fixed.issuperset(node.all_input_nodes)


def _given_infinity(node: Node) -> bool:
    """Such as what masks a row before a softmax."""
    found = []

    def look(value: Any) -> Any:
        found.append(isinstance(value, float) and not math.isfinite(value))
        return value

    map_aggregate((node.args, node.kwargs), look)
    return any(found)


def _writes(node: Node) -> bool:
    """Whether it may write into its input."""
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place
        or name == "setitem"
        or (name in vars(operator) and name.startswith("i"))
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
    )


def _is_torchs(node: Node) -> bool:
    """Whether it is a function or a method of PyTorch's own."""
    home = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_method" or (
        node.op == "call_function" and home in ("torch", "_operator", "builtins", "math")
    )


def _before(node: Node) -> list[Node]:
    nodes = list(node.graph.nodes)
    return nodes[: nodes.index(node)]


def _name(node: Node, graph: GraphModule) -> str:
    if node.op == "call_module":
        name = type(graph.get_submodule(str(node.target))).__name__
    else:
        name = str(getattr(node.target, "__name__", node.target))
    return re.sub(r"[123]d$", "", name.lower().replace("_", ""))
