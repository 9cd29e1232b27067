"""Average before a 1x1 convolution, not after: both are linear, over different dimensions, so they commute.

The convolution then has as many pixels as the pool leaves: a quarter of the FLOPs in a DenseNet's transition.
"""

from torch.fx import GraphModule, Node

from fxfreeze.operators import Op, op_of
from fxfreeze.passes.specified import bare, convolution, sole_user, stranger
from fxfreeze.rewrite import Outcome, place

__all__ = ["pool_first"]

_POOLS = ("avg_pool", "mean_pool")


def pool_first(module: GraphModule) -> list[Outcome]:
    """Swap each average pool with the 1x1 convolution before it."""
    outcomes = []
    for node in list(module.graph.nodes):
        pool = op_of(node, module)
        if pool is None or pool.kind not in _POOLS:
            continue
        conv = convolution(pool.input, module)
        if node.all_input_nodes != [pool.input]:
            conv = "its window is computed at run time"
        reason = conv if isinstance(conv, str) else _check(node, pool, conv)
        if not isinstance(conv, str) and reason is None:
            _swap(node, pool.input, conv["x"], module)
        outcomes.append(
            Outcome("pool_first", place(node), not reason, "left alone" if reason else "moved", reason or "")
        )
    return outcomes


def _check(node: Node, pool: Op, conv: dict[str, object]) -> str | None:
    layer, weight = pool.input, conv["weight"]
    shape = weight.meta["value"].shape if isinstance(weight, Node) else weight.shape  # type: ignore[attr-defined]
    if tuple(shape[2:]) != (1, 1) or conv["stride"] != (1, 1) or conv["padding"] != (0, 0):
        return f"{place(layer)} is no 1x1 convolution of stride 1 without padding"
    if sole_user(layer) is not node:
        return stranger(layer, node)
    if not bare(conv):
        return f"{place(layer)} has an activation or a residual"
    if node.meta["value"].shape[2:] == layer.meta["value"].shape[2:]:
        return "it leaves as many pixels as there were"
    if pool.kind == "avg_pool" and conv["bias"] is not None:
        if pool.arguments["divisor_override"] is not None:
            return "it divides by another number than it adds, which the bias would show"
        if pool.arguments["count_include_pad"] and pool.arguments["padding"] not in (0, (0, 0), [0, 0]):
            return "it averages padding, which the bias would reach"
    return None


def _swap(pool: Node, conv: Node, x: Node, module: GraphModule) -> None:
    with module.graph.inserting_before(conv):
        first = module.graph.node_copy(pool, lambda n: x if n is conv else n)
    n, _, h, w = pool.meta["value"].shape
    first.meta["value"] = x.meta["value"].new_empty((n, x.meta["value"].shape[1], h, w))
    conv.replace_input_with(x, first)
    conv.meta["value"] = pool.meta["value"]
    pool.replace_all_uses_with(conv)
    module.graph.erase_node(pool)
