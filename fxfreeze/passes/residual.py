"""A convolution, the addition of a residual and an activation, computed in one pass over the output.

The sum is formed before the convolution's output leaves the registers, so that output is neither written nor read back.
"""

from typing import Any

from torch.fx import GraphModule, Node

from fxfreeze.kernels import reference
from fxfreeze.operators import Op, op_of
from fxfreeze.passes.specified import activation_after, bare, convolution, fuse, sole_user, stranger
from fxfreeze.rewrite import Outcome, Writes, place

__all__ = ["residual"]


def residual(module: GraphModule) -> list[Outcome]:
    """Give each addition to the convolution that computes one of its operands."""
    outcomes, writes = [], Writes(module)
    for node in list(module.graph.nodes):
        add = op_of(node, module)
        if add is None or add.kind != "add":
            continue
        found = _match(node, add, module, writes)
        if isinstance(found, str):
            outcomes.append(Outcome("residual", place(node), False, "left alone", found))
            continue
        conv, arguments, after = found
        chain = [conv, node] if after is None else [conv, node, after[0]]
        name = "none" if after is None else after[1]
        fuse(module, reference.conv, arguments | {"activation": name}, chain)
        outcomes.append(Outcome("residual", place(conv), True, "took in an addition"))
    return outcomes


def _match(
    node: Node, add: Op, module: GraphModule, writes: Writes
) -> tuple[Node, dict[str, Any], tuple[Node, str] | None] | str:
    """The convolution that takes in an addition, its arguments then, and the activation after it; or why none does."""
    operands = [add.input, add.arguments["other"]]
    if not all(isinstance(n, Node) and n.meta.get("value") is not None for n in operands):
        return "it adds no two tensors"
    values = [n.meta["value"] for n in operands]
    if values[0].shape != values[1].shape or values[0].dtype != values[1].dtype:
        return "its operands have two shapes or dtypes"
    if 1 in values[0].shape[2:]:
        return "its operands have one row or column, which may be broadcast at another size"
    if add.arguments["alpha"] != 1 or add.arguments["out"] is not None:
        return "it scales what it adds, or writes it elsewhere"
    after = activation_after(node, module)
    reasons = []
    first, second = sorted(operands)
    for conv, other in ((second, first), (first, second)):  # what is computed last finds the other ready
        found = _takes(conv, other, (node, node if after is None else after[0]), module, writes)
        if not isinstance(found, str):
            return conv, found, after
        reasons.append(found)
    return "; ".join(dict.fromkeys(reasons))


def _takes(
    conv: Node, other: Node, chain: tuple[Node, Node], module: GraphModule, writes: Writes
) -> dict[str, Any] | str:
    """The arguments of ``conv`` once it adds ``other``, or why it can't; chain: the addition, and what it all is done at."""
    add, last = chain
    arguments = convolution(conv, module)
    if isinstance(arguments, str):
        return arguments
    if not _depends_on_input(conv):
        return f"{place(conv)} computes the same for every batch, and is broadcast"
    if conv is other:
        return f"it adds {place(conv)} to itself"
    if not bare(arguments):
        return f"{place(conv)} has an activation or a residual already"
    if sole_user(conv) is not add:
        return stranger(conv, add)
    if (writer := writes.between([arguments["x"]], conv, last) or writes.between([other], add, last)) is not None:
        return f"{writer.name} writes into what {place(conv)} would read later"
    if any(written is not conv for written in writes.into(add)):
        return f"it adds into {place(other)}, which others may read"
    return arguments | {"residual": other}


def _depends_on_input(node: Node) -> bool:
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return True
        stack += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return False
