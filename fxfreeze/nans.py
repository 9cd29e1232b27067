"""Where a graph may make a NaN of finite numbers, which a compiled ReLU or pool after it would make a number of."""

import math
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

__all__ = ["swallowed_nan"]

# By the names of functions, methods and modules, in lower case and without the underscores around them.
_OF_A_RANGE = frozenset(
    "log log2 log10 log1p sqrt rsqrt reciprocal acos arccos asin arcsin acosh arccosh atanh arctanh logit erfinv lgamma "
    "digamma polygamma xlogy fmod remainder mod".split()
)
_DIVIDING = frozenset("div divide true_divide truediv itruediv floor_divide floordiv ifloordiv".split())
_POWERS = frozenset("pow ipow float_power".split())
_SWALLOWING = frozenset(
    "relu relu6 hardtanh threshold clamp clip clamp_min clamp_max maximum minimum max min amax amin max_pool1d max_pool2d "
    "max_pool3d maxpool1d maxpool2d maxpool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d".split()
)


def swallowed_nan(graph: GraphModule) -> str | None:
    """What would make a number of a NaN, and what may make that of finite numbers, other than by overflow; None if nothing."""
    made_by: dict[Node, Node] = {}  # of what may hold a NaN
    fixed: set[Node] = set()
    for node in graph.graph.nodes:
        name = _name(node, graph)
        if _is_fixed(node, name, fixed):
            fixed.add(node)
            continue
        maker = next((made_by[n] for n in node.all_input_nodes if n in made_by), None)
        if maker is not None and name in _SWALLOWING:
            return f"{node.name} would make a number of a NaN, which {maker.name} may make of finite numbers"
        if maker is not None or _makes(node, name):
            made_by[node] = maker or node
    return None


def _makes(node: Node, name: str) -> bool:
    if name in _OF_A_RANGE or _given_infinity(node):
        return True
    if name == "scaled_dot_product_attention":  # of a row that is masked as a whole
        return node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None) is not None
    if name not in _DIVIDING | _POWERS:
        return False
    by = next((value for value in (*node.args[1:], *node.kwargs.values()) if not isinstance(value, str)), None)
    if not isinstance(by, (int, float)):
        return True
    return by == 0 if name in _DIVIDING else by < 0 or by != int(by)


def _is_fixed(node: Node, name: str, fixed: set[Node]) -> bool:
    """Whether it is of weights and shapes alone, which were as they are when the graph was checked."""
    if node.op == "get_attr" or name in ("size", "dim", "numel", "nelement"):
        return True
    if name == "getattr" and node.args[1] in ("shape", "ndim"):
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


def _name(node: Node, graph: GraphModule) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).strip("_") if node.op.startswith("call") else ""
