"""The graph of a frozen part before and after the passes, as text."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxfreeze.model import compile
from fxfreeze.prefix import describe
from fxfreeze.rewrite import called
from fxfreeze.runtime import Segment
from fxfreeze.schedule import Schedule

__all__ = ["frozen_part", "graph_text"]


def frozen_part(net: nn.Module, schedule: Schedule, inputs: tuple[Any, ...], depth: int | None, backend: str) -> str:
    """What ``backend`` makes of the first ``depth`` units of ``net`` (None: of all that ever freeze), and why not more.

    inputs: of one call; ``net`` is frozen by it. Raises ValueError for a depth that the network does not have.
    """
    model = compile(net, schedule, example_inputs=inputs, backend=backend).eval()
    most = len(model.units) - 1
    wanted = most if depth is None else depth
    if not 1 <= wanted <= most:
        raise ValueError(f"depth {wanted} is not within 1 to {most}, the units that ever freeze")
    model.freeze(max(wanted, model.depth))
    with torch.no_grad():
        model(*inputs)
    return "\n".join(line for segment in model.prefix.segments for line in _segment(segment))


def _segment(segment: Segment) -> Iterator[str]:
    yield f"before the passes, units {segment.start + 1} to {segment.end}:"
    yield from graph_text(segment.plain)
    if segment.rewritten is not None:
        yield f"after the passes of backend {segment.backend!r}:"
        yield from graph_text(segment.rewritten)
    yield describe(segment)


def graph_text(module: GraphModule) -> Iterator[str]:
    """A line for each node: what it computes, from what, and the shape of the result where it is known."""
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            yield f"  {node.name} = {called(node, module)}({', '.join(_arguments(node))}){_shape(node)}"


def _arguments(node: Node) -> Iterator[str]:
    """What tells one call from another: the nodes that it reads and plain settings, not the weights held for it."""
    yield from (str(a) for a in node.args if not _held(a))
    yield from (f"{k}={v}" for k, v in node.kwargs.items() if v is not None and v != "none" and not _held(v))


def _held(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"


def _shape(node: Node) -> str:
    value = node.meta.get("value")
    return "" if value is None else f"  # {' x '.join(map(str, value.shape))}"
