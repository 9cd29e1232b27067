"""The scale, shift and activation before a convolution, applied to the blocks of its input as they are loaded.

A batch norm before a convolution can't be folded into the layer before it where that layer's output has other readers,
as in a DenseNet or a pre-activation ResNet. In the convolution's own loop it costs no memory traffic.
"""

from typing import Any

from torch.fx import GraphModule, Node

from fxfreeze.kernels import reference
from fxfreeze.passes.fold_batchnorm import scale_shift
from fxfreeze.passes.specified import activation_after, convolution, fuse, stranger
from fxfreeze.rewrite import Outcome, Writes, forget_unread, place

__all__ = ["affine_prologue"]


def affine_prologue(module: GraphModule) -> list[Outcome]:
    """Give each scale and shift, with the activation after it, to the convolutions that read it."""
    outcomes, writes = [], Writes(module)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not scale_shift:
            continue
        last, name = activation_after(node, module) or (node, "none")
        found = _readers(node, last, module, writes)
        if isinstance(found, str):
            outcomes.append(Outcome("affine_prologue", place(node), False, "left alone", found))
            continue
        scale, shift = node.meta["affine"]
        for conv, arguments in found:
            before = {"x": node.args[0], "scale": scale, "shift": shift, "prologue": name}
            fuse(module, reference.conv, arguments | before, [conv])
        outcomes.append(Outcome("affine_prologue", place(node), True, "made a prologue"))
        forget_unread(module, last)
    return outcomes


def _readers(node: Node, last: Node, module: GraphModule, writes: Writes) -> list[tuple[Node, dict[str, Any]]] | str:
    """The convolutions that alone read ``last``, with their arguments, or why they can't read what ``node`` reads."""
    found = []
    for user in last.users:
        arguments = convolution(user, module)
        if isinstance(arguments, str):
            return f"{stranger(last)}: {arguments}" if len(last.users) > 1 else arguments
        if arguments["x"] is not last or arguments["residual"] is last:
            return f"{place(user)} adds it as a residual"
        if arguments["prologue"] != "none" or arguments["scale"] is not None:
            return f"{place(user)} has a prologue already"
        if (writer := writes.between(node.args[:1], node, user)) is not None:
            return f"{writer.name} writes into its input before {place(user)} reads it"
        found.append((user, arguments))
    return found or "nothing reads it"
