"""What the kernels compute, as patterns of nodes, each with the activation and the pooling that alone follow it.

A matcher answers with the kernel's call, with the reason why no kernel takes the node, or with None for what is none of
its kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze import kernels
from fxfreeze.kernels import reference
from fxfreeze.kernels.layernorm import MOST_CHANNELS
from fxfreeze.operators import Op, op_of
from fxfreeze.passes.fold_batchnorm import scale_shift
from fxfreeze.passes.specified import (
    activation_after,
    activation_name,
    convolution,
    pair,
    sole_user,
    unsuited,
    weights,
    windows,
)
from fxfreeze.rewrite import Writes, constant, place

__all__ = ["PATTERNS", "Fused", "activated", "readable"]

_LARGEST_WINDOW = 64  # pixels that a pooling kernel reads without a loop
_ONE, _NONE = (1, 1), (0, 0)


@dataclass
class Fused:
    """A call of a kernel in place of ``chain``, nodes of which only the last is read elsewhere.

    arguments: the kernel's, by name, tensors as nodes or constants; windows: size, stride, padding and dilation of the
    window that makes one pixel, or None where it makes no images.
    """

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    chain: list[Node]
    windows: tuple[tuple[int, ...], ...] | None = None


Match = Fused | str | None


def dense(node: Node, module: GraphModule) -> Match:
    """A convolution by one group, whatever earlier passes attached to it."""
    op = op_of(node, module)
    if node.target is not reference.conv and (op is None or op.kind != "conv" or op.arguments["groups"] != 1):
        return None
    given = convolution(node, module)
    if isinstance(given, str):
        return given
    weight = constant(given["weight"], module)
    assert weight is not None
    size = tuple(weight.shape[2:])
    steps = {name: given.pop(name) for name in ("stride", "padding", "dilation")}
    single = size == _ONE and steps["padding"] == _NONE
    function = kernels.conv1x1 if single else kernels.conv3x3
    fused = Fused(function, given | ({"stride": steps["stride"]} if single else steps), [node], (size, *steps.values()))
    return fused if given["activation"] != "none" else activated(fused, module)


def depthwise(node: Node, module: GraphModule) -> Match:
    """A convolution of each channel by itself."""
    op = op_of(node, module)
    if op is None or op.kind != "conv" or op.arguments["groups"] == 1:
        return None
    steps = windows(op, node, module)
    if isinstance(steps, str):
        return steps
    weight = weights(op, module)["weight"]
    assert weight is not None
    if op.arguments["groups"] != weight.shape[0] or weight.shape[1] != 1:
        return f"{op.arguments['groups']} groups for {weight.shape[0]} outputs are neither one nor one each"
    size = tuple(weight.shape[2:])
    call = Fused(kernels.depthwise, {"x": op.input, **weights(op, module), **steps}, [node], (size, *steps.values()))
    return activated(call, module)


def affine(node: Node, module: GraphModule) -> Match:
    """A scale and shift that no convolution took in."""
    if node.target is not scale_shift:
        return None
    if (reason := unsuited(node)) is not None:
        return reason
    scale, shift = node.meta["affine"]
    call = Fused(kernels.pointwise, {"x": node.args[0], "scale": scale, "shift": shift}, [node])
    return _pooled(activated(call, module), module)


def activation(node: Node, module: GraphModule) -> Match:
    """An activation of an image that nothing before it could take in."""
    op = op_of(node, module)
    if op is None or op.kind != "activation":
        return None
    if (reason := unsuited(node)) is not None:
        return reason
    call = Fused(kernels.pointwise, {"x": op.input, "activation": activation_name(op)}, [node])
    return _pooled(call, module)


def pooling(node: Node, module: GraphModule) -> Match:
    """A pooling by itself."""
    found = _pool(node, module)
    if found is None or isinstance(found, str):
        return found
    arguments, geometry = found
    return Fused(kernels.pointwise, {"x": node.args[0], **arguments}, [node], geometry)


def linear(node: Node, module: GraphModule) -> Match:
    """A linear layer."""
    op = op_of(node, module)
    if op is None or op.kind != "linear":
        return None
    held = weights(op, module)
    if (reason := unsuited(node, None) or _varies(op, held)) is not None:
        return reason
    if held["weight"] is not None and held["weight"].dim() != 2:
        return "its weight is a vector"
    return activated(Fused(kernels.linear, {"x": op.input, **held}, [node]), module)


def layernorm(node: Node, module: GraphModule) -> Match:
    """A layer normalisation over the last dimension."""
    op = op_of(node, module)
    if op is None or op.kind != "layer_norm":
        return None
    held = weights(op, module)
    if (reason := unsuited(node, None) or _varies(op, held)) is not None:
        return reason
    shape = op.arguments["normalized_shape"]
    if node.all_input_nodes != [op.input] and any(n.op != "get_attr" for n in node.all_input_nodes[1:]):
        return "what it normalises over is computed at run time"
    if not isinstance(shape, int) and len(shape) != 1:
        return f"it normalises over {len(shape)} dimensions"
    if (channels := node.meta["value"].shape[-1]) > MOST_CHANNELS:
        return f"it normalises over {channels} channels, and a row of more than {MOST_CHANNELS} does not fit"
    return Fused(kernels.layernorm, {"x": op.input, **held, "eps": op.arguments["eps"]}, [node])


PATTERNS = (dense, depthwise, affine, activation, pooling, linear, layernorm)


def _varies(op: Op, held: dict[str, Tensor | None]) -> str | None:
    """Why the weights of a layer can't be prepared once."""
    missing = next((name for name in held if held[name] is None and op.arguments[name] is not None), None)
    return f"its {missing} is not a constant" if missing else None


def activated(call: Fused, module: GraphModule) -> Fused:
    """The same with the activation that alone reads it."""
    after = activation_after(call.chain[-1], module)
    if after is None:
        return call
    user, name = after
    return Fused(call.function, call.arguments | {"activation": name}, [*call.chain, user], call.windows)


def _pooled(call: Fused, module: GraphModule) -> Fused:
    """The same with the pooling that alone reads it."""
    user = sole_user(call.chain[-1])
    found = None if user is None else _pool(user, module)
    if user is None or found is None or isinstance(found, str):
        return Fused(call.function, call.arguments, call.chain, (_ONE, _ONE, _NONE, _ONE))
    arguments, geometry = found
    return Fused(call.function, call.arguments | arguments, [*call.chain, user], geometry)


def _pool(node: Node, module: GraphModule) -> tuple[dict[str, Any], tuple[tuple[int, int], ...] | None] | str | None:
    """The arguments of ``pointwise`` for a pooling, and its windows; or why the kernel has none such."""
    op = op_of(node, module)
    if op is None or op.kind not in ("avg_pool", "max_pool", "mean_pool"):
        return None
    if (reason := unsuited(node)) is not None:
        return reason
    if op.kind == "mean_pool":
        whole = pair(op.arguments["output_size"]) == _ONE
        return ({"pool": "global"}, None) if whole else f"it leaves {op.arguments['output_size']} pixels, not one"
    given = op.arguments
    stride = given["kernel_size"] if given["stride"] in (None, [], ()) else given["stride"]
    size, step, padding = (pair(v) for v in (given["kernel_size"], stride, given["padding"]))
    if size is None or step is None or padding is None:
        return "its window is computed at run time"
    if given["ceil_mode"] or given.get("divisor_override") is not None or given.get("return_indices"):
        return "it rounds its size up, divides by a number of its own or returns indices"
    if pair(given.get("dilation", 1)) != _ONE or size[0] * size[1] > _LARGEST_WINDOW:
        return f"its window of {size[0]} x {size[1]} is dilated, or more than {_LARGEST_WINDOW} pixels"
    arguments = {"pool": op.kind.removesuffix("_pool"), "kernel": size, "stride": step, "padding": padding}
    if op.kind == "avg_pool":
        arguments["count_include_pad"] = given["count_include_pad"]
    return arguments, (size, step, padding, _ONE)


def readable(found: Fused, writes: Writes) -> Fused | str:
    """The same; or why a call at the place of the last node would read or compute something else."""
    first, last = found.chain[0], found.chain[-1]
    if written := writes.into(first):
        return f"it writes into {place(written[0])}, which others may read"
    if (writer := writes.between(found.arguments.values(), first, last)) is not None:
        return f"{writer.name} writes into its input before {place(last)}"
    if first.meta["value"].dtype != last.meta["value"].dtype:
        return f"{place(last)} computes in another dtype"
    return found
