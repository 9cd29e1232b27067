"""When two traced graphs compute the same: by their text, over the same modules, and their constants."""

import hashlib

import torch
from torch.fx import GraphModule, Node

__all__ = ["digest", "same_constants", "signature"]


def signature(module: GraphModule) -> str:
    """The text of a graph, equal for equal graphs over the same modules with the same hooks."""
    return "\n".join(
        f"{n.name} {n.op} {n.target!r} {n.args!r} {n.kwargs!r} {_hooks(n, module)}" for n in module.graph.nodes
    )


def _hooks(node: Node, module: GraphModule) -> list[int]:
    called = module.get_submodule(str(node.target)).modules() if node.op == "call_module" else ()
    return [*{key for m in called for hooks in (m._forward_hooks, m._forward_pre_hooks) for key in hooks}]


def digest(module: GraphModule) -> str:
    """The same for the same operators in the same order, in any process."""
    return hashlib.sha256(" ".join(f"{n.op}:{n.name}" for n in module.graph.nodes).encode()).hexdigest()[:16]


def same_constants(a: GraphModule, b: GraphModule) -> bool:
    """Whether two graphs of one text hold equal constants: forward may make them from the shapes that it sees."""
    return all(
        x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)
        for x, y in zip(a._buffers.values(), b._buffers.values(), strict=True)
        if x is not None and y is not None
    )
