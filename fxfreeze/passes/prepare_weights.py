"""Weights of convolutions and linear layers in the dtype and layout that they are used in, converted once.

Autocast casts a frozen weight again at every step (its cache holds only leaves that require grad), and a convolution
whose weight is channels_last runs channels_last throughout.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze.passes.fold_batchnorm import scale_shift
from fxfreeze.rewrite import Op, Outcome, constant, hold, op_of, place

__all__ = ["prepare_weights"]

_LAYERS = ("conv", "conv_transpose", "linear")


def prepare_weights(module: GraphModule) -> list[Outcome]:
    """Give each layer the weights it needs; ``module.meta["compute_dtype"]`` is autocast's dtype or None."""
    dtype: torch.dtype | None = module.meta["compute_dtype"]
    layers = [(node, op) for node in module.graph.nodes if (op := op_of(node, module)) and op.kind in _LAYERS]
    channels_last = _prefers_channels_last(module, layers)
    outcomes = []
    for node, op in layers:
        weight = constant(op.arguments["weight"], module)
        bias = constant(op.arguments["bias"], module)
        if weight is None or (bias is None and op.arguments["bias"] is not None):
            outcomes.append(Outcome("prepare_weights", place(node), False, "its weight is computed from the input"))
            continue
        ready = _ready(weight, dtype, channels_last and op.kind != "linear")
        ready_bias = None if bias is None else _ready(bias, dtype, False)
        if ready is weight and ready_bias is bias:
            continue
        _replace(module, node, op, ready, ready_bias)
        what = f"{str(ready.dtype).removeprefix('torch.')}{', channels_last' if channels_last and ready.dim() == 4 else ''}"
        outcomes.append(Outcome("prepare_weights", place(node), True, f"weight held in {what}"))
    return outcomes


def _prefers_channels_last(module: GraphModule, layers: list[tuple[Node, Op]]) -> bool:
    """Whether a network of 2-d convolutions is faster channels_last.

    In 16 bit, with depthwise convolutions and with scale-shifts it is (oneDNN on CPU: MobileNetV2 1.8x, DenseNet-121
    1.2x); plain float32 convolutions are a tie or slightly slower.
    """
    convolutions = [op for _, op in layers if op.kind == "conv" and op.function is torch.nn.functional.conv2d]
    if not convolutions or not any(node.meta["value"].dim() == 4 for node, op in layers if op.kind == "conv"):
        return False
    dtypes = {node.meta["value"].dtype for node, op in layers if op.kind == "conv"}
    if torch.float64 in dtypes:
        return False
    depthwise = any(op.arguments["groups"] > 1 for op in convolutions)
    affine = any(node.target is scale_shift for node in module.graph.nodes)
    return depthwise or affine or bool(dtypes & {torch.bfloat16, torch.float16})


def _ready(tensor: Tensor, dtype: torch.dtype | None, channels_last: bool) -> Tensor:
    result = tensor.detach()
    if dtype is not None and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        result = result.to(dtype)
    if channels_last and tensor.dim() == 4:
        result = result.contiguous(memory_format=torch.channels_last)
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
    _forget_unread(module)


def _forget_unread(module: GraphModule) -> None:
    """Drop weights that an earlier pass held and nothing reads any more."""
    for read in [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]:
        module.graph.erase_node(read)
    read_still = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in [name for name in module._buffers if name not in read_still]:
        del module._buffers[name]
