"""Small networks under some passes: what the passes said, what operators are left, and that the numbers hold."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from frozen import plain_graph, settle
from torch import Tensor, nn

from fxfreeze.backends import Backend
from fxfreeze.building import build
from fxfreeze.computation import Computation
from fxfreeze.rewrite import Outcome, Pass, called
from fxfreeze.runtime import Segment


class Net(nn.Module):
    """Layers by name, and a forward given as a function of the network and its inputs."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def passed(
    passes: Sequence[Pass],
    run: Callable[..., Any],
    *inputs: Tensor,
    training: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    **layers: nn.Module,
) -> Segment:
    """The network's segment after ``passes``; it must compute what the network does, and have been rewritten.

    training: layers that stay in train mode; dtype: that of the network and its inputs.
    """
    net = settle(Net(run, **layers))
    inputs = inputs or (torch.randn(3, 8, 6, 6),)
    if dtype is not None:
        net, inputs = net.to(dtype), tuple(x.to(dtype) for x in inputs)
    graph = plain_graph(net, *inputs)
    for name in training:
        net.get_submodule(name).train()
    segment = build((0, 1), graph, inputs, Computation.current("cpu", None), Backend(tuple(passes)))
    assert segment.reason is None
    assert segment.error is not None
    assert segment.bound is not None
    assert segment.error <= segment.bound
    return segment


def reasons(segment: Segment, name: str) -> list[str]:
    """Why ``name`` left each place alone that it did not rewrite."""
    return [outcome.why for outcome in segment.outcomes if outcome.name == name and not outcome.done]


def done(segment: Segment, name: str) -> list[Outcome]:
    """What ``name`` rewrote."""
    return [outcome for outcome in segment.outcomes if outcome.name == name and outcome.done]


def calls(segment: Segment) -> Counter[str]:
    """How often each function, method or type of module is called by the rewritten graph."""
    assert segment.rewritten is not None
    return Counter(
        called(node, segment.rewritten) if node.op.startswith("call") else node.op
        for node in segment.rewritten.graph.nodes
    )
