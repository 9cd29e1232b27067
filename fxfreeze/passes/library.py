"""Give convolutions, each with the addition and the activation after it, to the library of the device.

That is oneDNN on a CPU and cuDNN on CUDA. Where the library has no such call, the operators stay apart.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxfreeze.kernels import reference
from fxfreeze.operators import op_of
from fxfreeze.passes.fused_conv import Steps, cudnn_conv, onednn_conv, onednn_supports, reordered, unfused_conv
from fxfreeze.passes.patterns import Fused, activated, readable
from fxfreeze.passes.specified import fuse, weights, windows
from fxfreeze.rewrite import Outcome, Writes, constant, place, views_may_copy

__all__ = ["library"]


def library(module: GraphModule) -> list[Outcome]:
    """Call a library wherever it has one call for what stands there."""
    outcomes, writes, free = [], Writes(module), views_may_copy(module)
    for node in list(module.graph.nodes):
        found = None if node._erased else _match(node, module)
        if isinstance(found, Fused) and node.target is not reference.conv:  # that is none of PyTorch's operators
            found = readable(found, writes) if free else "random numbers or views follow the layout in memory"
        if isinstance(found, Fused):
            reason = _assign(found, free)
            outcomes.append(Outcome("library", place(node), reason is None, found.function.__name__, reason or ""))
            if reason is None or node.target is reference.conv:
                fuse(module, found.function, found.arguments, found.chain)
        elif found is not None:
            outcomes.append(Outcome("library", place(node), False, "left alone", found))
    return outcomes


def _match(node: Node, module: GraphModule) -> Fused | str | None:
    """A convolution, and the activation that alone reads it, as a call of ``unfused_conv``."""
    if node.target is reference.conv:
        given: dict[str, Any] = dict(node.kwargs)
        steps = Steps(given["stride"], given["padding"], given["dilation"], 1)
        held = {name: constant(given[name], module) for name in ("weight", "bias")}
        rest = {name: given[name] for name in ("residual", "activation")}
        return Fused(unfused_conv, {"x": given["x"], **held, **rest, "steps": steps}, [node])
    op = op_of(node, module)
    if op is None or op.kind != "conv":
        return None
    found = windows(op, node, module)
    if isinstance(found, str):
        return found
    steps = Steps(**found, groups=op.arguments["groups"])
    arguments = {"x": op.input, **weights(op, module), "residual": None, "activation": "none", "steps": steps}
    return activated(Fused(unfused_conv, arguments, [node]), module)


def _assign(call: Fused, free: bool) -> str | None:
    """Make it a call of the device's library, with the weights that this wants; or say why it has none."""
    last, given = call.chain[-1], call.arguments
    dtype, device = last.meta["value"].dtype, last.meta["device"]
    weight = given["weight"].to(dtype)
    given |= {"weight": weight, "bias": None if given["bias"] is None else given["bias"].to(dtype)}
    if not free:
        return "random numbers or views follow the layout in memory"
    given["weight"] = weight = weight.contiguous(memory_format=torch.channels_last)
    if device == "cuda":
        if given["activation"] != "relu":
            return f"cuDNN fuses a ReLU, and {place(last)} is none"
        call.function = cudnn_conv
        return None
    reason = onednn_supports(dtype) if device == "cpu" else f"there is no library for {device}"
    if reason is None:
        call.function = onednn_conv
        given["weight"] = reordered(weight, given["steps"], given["x"].meta["value"].shape)
    return reason
