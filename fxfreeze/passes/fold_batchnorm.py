"""Fold a frozen batch norm into the convolution or linear layer before it, or make it one scale and shift.

With running statistics a batch norm is an affine map per channel, and so is what it does to a layer's weight and bias:
``w' = w * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``, computed in float64.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze.effects import declared
from fxfreeze.operators import LAYERS, Op, op_of
from fxfreeze.rewrite import Outcome, constant, forget, hold, other_user, place

__all__ = ["fold_batchnorm", "scale_shift"]


def fold_batchnorm(module: GraphModule) -> list[Outcome]:
    """Rewrite every batch norm of ``module`` that normalises with constant statistics."""
    outcomes = []
    for node in list(module.graph.nodes):
        norm = op_of(node, module)
        if norm is None or norm.kind != "batch_norm":
            continue
        if (reason := _varies(norm, module)) is not None:
            outcomes.append(Outcome("fold_batchnorm", place(node), False, "left alone", reason))
            continue
        scale, shift = _affine(norm, module)
        layer_node = norm.input
        layer = op_of(layer_node, module)
        reason = _check(layer_node, layer, node, module)
        if reason is None:
            assert layer is not None
            _fold(layer_node, layer, node, scale, shift, module)
            forget(module, layer)
            outcomes.append(Outcome("fold_batchnorm", place(node), True, "folded"))
        else:
            _to_scale_shift(node, norm, scale, shift, module)
            outcomes.append(Outcome("fold_batchnorm", place(node), True, "made a scale and shift", reason))
        forget(module, norm)
    return outcomes


def _varies(norm: Op, module: GraphModule) -> str | None:
    """Why a batch norm is not the same affine map for every batch."""
    if norm.arguments["training"] is not False:
        return "it normalises with the batch's own statistics"
    names = ("running_mean", "running_var", "weight", "bias")
    if any(norm.arguments[n] is not None and constant(norm.arguments[n], module) is None for n in names):
        return "its statistics or weights are not constants"
    return None


def _affine(norm: Op, module: GraphModule) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,) float64."""
    mean, var, weight, bias = (
        None if norm.arguments[name] is None else _double(norm.arguments[name], module)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean is not None
    assert var is not None
    scale = (var + norm.arguments["eps"]).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift


def _double(value: Any, module: GraphModule) -> Tensor:
    tensor = constant(value, module)
    assert tensor is not None
    return tensor.detach().double()


def _check(layer_node: Any, layer: Op | None, node: Node, module: GraphModule) -> str | None:
    """Why the layer before a batch norm can't take it in."""
    if layer is None or layer.kind not in LAYERS:
        return f"its input {layer_node} is no convolution or linear layer"
    if (user := other_user(layer_node, node)) is not None:
        return f"the output of {place(layer_node)} has another user: {user.name}"
    weight = constant(layer.arguments["weight"], module)
    bias = layer.arguments["bias"]
    if weight is None or (bias is not None and constant(bias, module) is None):
        return f"the weight of {place(layer_node)} is not a constant"
    expected = 2 if layer.kind == "linear" else weight.dim()
    rank = layer_node.meta["value"].dim()
    if rank != expected:
        return f"the output of {place(layer_node)} has {rank} dimensions, and dimension 1 is not its channels"
    if layer_node.meta.get("unit") != node.meta.get("unit"):
        return (
            f"{place(layer_node)} belongs to another unit, and what a unit computes must not depend on where it is cut"
        )
    return None


def _fold(layer_node: Node, layer: Op, node: Node, scale: Tensor, shift: Tensor, module: GraphModule) -> None:
    weight = constant(layer.arguments["weight"], module)
    assert weight is not None
    bias = layer.arguments["bias"]
    folded = weight.detach().double() * _along_outputs(scale, layer, weight)
    folded_bias = shift if bias is None else _double(bias, module) * scale + shift
    with module.graph.inserting_before(layer_node):
        name = place(layer_node)
        arguments = dict(layer.arguments)
        arguments["weight"] = hold(module, f"{name}_weight", folded.to(weight.dtype))
        arguments["bias"] = hold(module, f"{name}_bias", folded_bias.to(weight.dtype))
        source = arguments.pop("input")
        replacement = module.graph.call_function(layer.function, (source,), arguments)
    replacement.meta.update(layer_node.meta, value=node.meta["value"])
    for gone in (node, layer_node):
        gone.replace_all_uses_with(replacement)
        module.graph.erase_node(gone)


def _along_outputs(scale: Tensor, layer: Op, weight: Tensor) -> Tensor:
    """``scale`` (C,) shaped to multiply ``weight`` along its output channels."""
    if layer.kind != "conv_transpose":
        return scale.view(-1, *[1] * (weight.dim() - 1))
    # (C_in, C_out / groups, ...): rows of one group share that group's outputs
    groups = layer.arguments["groups"]
    per_row = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return per_row.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))


def _to_scale_shift(node: Node, norm: Op, scale: Tensor, shift: Tensor, module: GraphModule) -> None:
    value = node.meta["value"]
    shape = (1, -1, *[1] * (value.dim() - 2))
    with module.graph.inserting_before(node):
        held = [
            hold(module, f"{place(node)}_{name}", t.view(shape).to(value.dtype))
            for name, t in (("scale", scale), ("shift", shift))
        ]
        replacement = module.graph.call_function(scale_shift, (norm.input, *held))
    replacement.meta.update(node.meta, affine=(scale.float(), shift.float()))  # a kernel computes in fp32
    node.replace_all_uses_with(replacement)
    module.graph.erase_node(node)


@declared
def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, channels along dimension 1; x (N, C, ...), scale and shift (1, C, 1, ...) of x's dtype."""
    if x.dim() > 2 and x.is_contiguous():
        # Two vectorised passes: with two operands broadcast along rows, addcmul takes its scalar path (3x slower).
        return (x * scale).add_(shift)
    return torch.addcmul(shift, x, scale)
