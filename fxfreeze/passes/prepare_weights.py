"""Weights of convolutions and linear layers in the dtype and layout that they are used in, converted once.

Autocast casts a frozen weight again at every step (its cache holds only leaves that require grad), and a convolution
whose weight is channels_last runs channels_last throughout.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze.operators import LAYERS, Op, op_of
from fxfreeze.rewrite import Outcome, constant, forget, hold, place, views_may_copy

__all__ = ["prepare_weights"]


def prepare_weights(module: GraphModule) -> list[Outcome]:
    """Give each layer the weights it needs.

    ``module.meta``: "compute_dtype" is autocast's dtype or None; "laid_out", whether an earlier segment made the inputs.
    """
    dtype: torch.dtype | None = module.meta["compute_dtype"]
    layers = [(node, op) for node in module.graph.nodes if (op := op_of(node, module)) and op.kind in LAYERS]
    channels_last = _prefers_channels_last(layers) and views_may_copy(module)
    if channels_last and not module.meta["laid_out"]:
        _convert_inputs(module)
    outcomes = []
    for node, _ in layers:
        op = op_of(node, module)  # anew: its input may have been replaced
        assert op is not None
        weight = constant(op.arguments["weight"], module)
        bias = constant(op.arguments["bias"], module)
        if weight is None or (bias is None and op.arguments["bias"] is not None):
            outcomes.append(
                Outcome("prepare_weights", place(node), False, "left alone", "its weight is not a constant")
            )
            continue
        ready = _ready(weight, dtype, channels_last and op.kind != "linear")
        ready_bias = None if bias is None else _ready(bias, dtype, False)
        if ready is weight and ready_bias is bias and not any(_computed(op.arguments[n]) for n in ("weight", "bias")):
            continue
        _replace(module, node, op, ready, ready_bias)
        what = f"{str(ready.dtype).removeprefix('torch.')}{', channels_last' if channels_last and ready.dim() == 4 else ''}"
        outcomes.append(Outcome("prepare_weights", place(node), True, f"weight held in {what}"))
    return outcomes


def _computed(argument: Any) -> bool:
    """Whether an argument of an operator with constant weights is worked out at each forward."""
    return isinstance(argument, Node) and argument.op in ("call_function", "call_method")


def _prefers_channels_last(layers: list[tuple[Node, Op]]) -> bool:
    """Whether a network of 2-d convolutions is faster channels_last.

    On a CPU it is, through oneDNN: half of ResNet-18, MobileNetV2 or DenseNet-121 takes 0.4 to 0.7 of the time. On CUDA
    it is for the tensor cores' 16-bit types. float64 has no such kernels.
    """
    values = [node.meta["value"] for node, op in layers if op.kind == "conv" and node.meta["value"].dim() == 4]
    dtypes = {value.dtype for value in values}
    on_cuda = any(node.meta["device"] == "cuda" for node, op in layers)
    return bool(dtypes) and dtypes <= (
        {torch.bfloat16, torch.float16} if on_cuda else {torch.float32, torch.bfloat16, torch.float16}
    )


def _convert_inputs(module: GraphModule) -> None:
    """Images enter channels_last, so that no operator meets two layouts."""
    for node in [n for n in module.graph.nodes if n.op == "placeholder"]:
        value = node.meta["value"]
        if value is not None and value.dim() == 4 and value.is_floating_point():
            with module.graph.inserting_after(node):
                layout: dict[str, Any] = {"memory_format": torch.channels_last}
                converted = module.graph.call_method("to", (node,), layout)
            converted.meta.update(node.meta)
            node.replace_all_uses_with(converted, delete_user_cb=lambda user, kept=converted: user is not kept)


def _ready(tensor: Tensor, dtype: torch.dtype | None, channels_last: bool) -> Tensor:
    result = tensor.detach()
    if dtype is not None and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        result = result.to(dtype)
    if channels_last and tensor.dim() == 4:
        # Not contiguous(): a 1x1 kernel, or one with one input channel, is contiguous both ways and would keep strides
        # from which the convolution takes the other layout.
        result = result.to(memory_format=torch.channels_last)
    same = result.dtype == tensor.dtype and result.stride() == tensor.stride()
    return tensor if same else result


def _replace(module: GraphModule, node: Node, op: Op, weight: Tensor, bias: Tensor | None) -> None:
    with module.graph.inserting_before(node):
        arguments = dict(op.arguments)
        arguments["weight"] = hold(module, f"{place(node)}_ready_weight", weight)
        arguments["bias"] = None if bias is None else hold(module, f"{place(node)}_ready_bias", bias)
        source = arguments.pop("input")
        replacement = module.graph.call_function(op.function, (source,), arguments)
    replacement.meta.update(node.meta)
    node.replace_all_uses_with(replacement)
    module.graph.erase_node(node)
    forget(module, op)
