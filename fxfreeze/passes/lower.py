"""Each pattern that a kernel computes becomes one call of it; what has no kernel stays as it is.

Weights are cast and packed once. An image whose only reader copies it into a buffer is written there to begin with.
Kernels read contiguous channels in one dtype, so what other operators make is converted where it enters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze import kernels
from fxfreeze.effects import Alias, declared
from fxfreeze.passes.buffers import allocate, allocate_for, joined, placed, room
from fxfreeze.passes.patterns import PATTERNS, Fused, readable
from fxfreeze.passes.specified import fuse
from fxfreeze.rewrite import Outcome, Writes, constant, place, views_may_copy

__all__ = ["as_image", "as_rows", "lower"]

_MAKE_IMAGES = (joined, placed, kernels.conv1x1, kernels.conv3x3, kernels.depthwise, kernels.pointwise)


def as_image(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, C, H, W) in ``dtype`` with contiguous channels; x itself if it is so."""
    x = x.to(dtype)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., C) in ``dtype``, packed; x itself if it is so."""
    return x.to(dtype).contiguous()


declared(as_image, Alias.MAYBE)
declared(as_rows, Alias.MAYBE)


def lower(module: GraphModule) -> list[Outcome]:
    """Call a kernel wherever one computes what stands there."""
    if not views_may_copy(module):
        return [Outcome("lower", "all", False, "left alone", "random numbers or views follow the layout in memory")]
    outcomes, writes = [], Writes(module)
    for node in list(module.graph.nodes):
        found = (
            None if node._erased else next((f for match in PATTERNS if (f := match(node, module)) is not None), None)
        )
        if isinstance(found, Fused):
            found = readable(found, writes)
        if isinstance(found, Fused):
            outcomes.append(Outcome("lower", place(node), True, found.function.__name__))
            _emit(found, module)
        elif found is not None:
            outcomes.append(Outcome("lower", place(node), False, "left alone", found))
    return outcomes


def _emit(found: Fused, module: GraphModule) -> None:
    """Put the call of the kernel in place of its chain, and of the copy into a buffer that alone reads it."""
    last = found.chain[-1]
    dtype = last.meta["value"].dtype
    convert = as_rows if found.function in (kernels.linear, kernels.layernorm) else as_image
    arguments: dict[str, Any] = {name: None if value == "none" else value for name, value in found.arguments.items()}
    for name in ("x", "residual"):
        if isinstance(arguments.get(name), Node):
            arguments[name] = _converted(arguments[name], dtype, convert, last, module)
    if "weight" in arguments and found.function is not kernels.layernorm:
        weight = constant(arguments["weight"], module)
        assert weight is not None
        arguments["weight"] = weight.to(dtype).contiguous() if convert is as_rows else kernels.pack(weight.to(dtype))
    home = _home(found)
    if home is not None:
        arguments["out"] = _room(home, last, arguments["x"], found, module)
    fuse(module, found.function, arguments, found.chain if home is None else [*found.chain, home])


def _converted(x: Node, dtype: torch.dtype, convert: Callable[..., Tensor], at: Node, module: GraphModule) -> Node:
    """``x`` as a kernel reads it."""
    value = x.meta.get("value")
    if x.target in _MAKE_IMAGES and convert is as_image and value is not None and value.dtype == dtype:
        return x
    with module.graph.inserting_before(at):
        node = module.graph.call_function(convert, (x, dtype))
    node.meta.update(x.meta)
    return node


def _home(found: Fused) -> Node | None:
    """The copy into a buffer that alone reads what ``found`` computes, if the kernel can write there."""
    last = found.chain[-1]
    readers = [user for user in last.users if user.target is not allocate]
    if len(readers) != 1 or readers[0].target is not placed:
        return None
    buffer = readers[0].args[0]
    own = (
        isinstance(buffer, Node) and buffer.args[0] is last
    )  # the buffer is made for the first of its images, once that is there
    return None if own and found.windows is None else readers[0]


def _room(home: Node, last: Node, x: Node, found: Fused, module: GraphModule) -> Node:
    """The place that ``home`` copies ``last`` to; its buffer is made before the kernel runs."""
    buffer, start, _ = home.args
    assert isinstance(buffer, Node)
    with module.graph.inserting_before(home):
        if buffer.target is allocate and buffer.args[0] is last:
            made = module.graph.call_function(allocate_for, (x, buffer.args[1], *(found.windows or ())))
            made.meta.update(buffer.meta)
            buffer.replace_all_uses_with(made)
            module.graph.erase_node(buffer)
            buffer = made
        node = module.graph.call_function(room, (buffer, start, last.meta["value"].shape[1]))
    node.meta.update(last.meta)
    return node
