"""Remove what a frozen network no longer does: dropout in eval mode, ``nn.Identity``; each returns its input itself."""

from torch.fx import GraphModule, Node

from fxfreeze.operators import op_of
from fxfreeze.rewrite import Outcome, place

__all__ = ["remove_identity"]


def remove_identity(module: GraphModule) -> list[Outcome]:
    """Let the users of each identity read its input."""
    outcomes = []
    for node in list(module.graph.nodes):
        op = op_of(node, module)
        if op is not None and op.kind == "identity" and isinstance(op.input, Node):
            node.replace_all_uses_with(op.input)
            module.graph.erase_node(node)
            outcomes.append(Outcome("remove_identity", place(node), True, "removed"))
    return outcomes
