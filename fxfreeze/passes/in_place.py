"""Activations in the memory of what they read, where nothing else reads it: half the traffic, and no allocation."""

from collections import Counter

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxfreeze.effects import Memory
from fxfreeze.operators import op_of
from fxfreeze.passes.fold_batchnorm import scale_shift
from fxfreeze.passes.fused_conv import cudnn_conv, onednn_conv, unfused_conv
from fxfreeze.rewrite import Outcome, place

__all__ = ["in_place"]

_MAKE_NEW = (scale_shift, onednn_conv, cudnn_conv, unfused_conv)
_ABLE = (F.relu, F.relu6, F.silu, F.hardswish)


def in_place(module: GraphModule) -> list[Outcome]:
    """Let each activation overwrite what a pass made for it alone."""
    outcomes = []
    memory = Memory(module.graph, module.get_submodule)
    shared = Counter(memory.class_of(node) for node in memory.effects)
    for node in list(module.graph.nodes):
        op = op_of(node, module)
        if op is None or op.kind != "activation" or op.function not in _ABLE or op.arguments.get("inplace"):
            continue
        x = op.input
        if isinstance(x, Node) and x.target in _MAKE_NEW and [*x.users] == [node] and shared[memory.class_of(x)] == 1:
            with module.graph.inserting_before(node):
                replacement = module.graph.call_function(op.function, (x,), {"inplace": True})
            replacement.meta.update(node.meta)
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
            outcomes.append(Outcome("in_place", place(replacement), True, "done in place"))
    return outcomes
