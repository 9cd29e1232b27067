"""What to run for a forward at the current depth: trace, split and build when first asked for, and remember.

Everything here is derived from the network and may be dropped at any time.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from fxfreeze.inputs import TraceRefusal, flatten_inputs
from fxfreeze.passes import PASSES
from fxfreeze.runtime import Computation, Prefix, Segment, build
from fxfreeze.split import Split, split
from fxfreeze.trace import trace
from fxfreeze.units import Ownership

__all__ = ["Decision", "Plan", "Surgery", "plan_key"]


class Plan(NamedTuple):
    """What a forward runs: the prefix, the suffix on its outputs, and the structure of the original's output."""

    prefix: Prefix
    suffix: Callable[..., Any]
    outputs: pytree.TreeSpec


class Decision(NamedTuple):
    """How a segment was decided to run, kept for resuming: depths of its boundaries, dtype, backend, rewritten or not."""

    start: int
    end: int
    dtype: str
    backend: str
    rewritten: bool

    @property
    def key(self) -> tuple[int, int, str]:
        return self.start, self.end, self.dtype


def plan_key(leaves: list[Any], spec: pytree.TreeSpec) -> tuple[Any, ...]:
    """What of a call's arguments decides its graph: structure, constants, and the tensors' dtype, device and layout."""
    return spec, tuple(
        (leaf.dtype, leaf.device, leaf.dim() == 4 and not leaf.is_contiguous())
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )


@dataclass
class Surgery:
    """Plans for one network at one depth. decisions: what earlier builds, or those of a resumed run, decided."""

    net: nn.Module
    ownership: Ownership
    depth: int
    precision: torch.dtype | None
    decisions: dict[tuple[int, int, str], Decision]
    seconds: float = 0.0
    prefix: Prefix = field(init=False)
    _plans: dict[Any, Plan] = field(default_factory=dict)
    _bound: set[Any] = field(default_factory=set)
    _segments: dict[tuple[str, Computation], Segment] = field(default_factory=dict)
    _refused: dict[Any, str] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.prefix = Prefix(self.depth, (), self.seconds)

    def plan(self, key: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """The plan for a call; None when it can't be traced, so that the original must run."""
        shapes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor)) if key in self._bound else None
        found = self._plans.get((key, shapes))
        if found is not None:
            return found
        if key in self._refused:
            return None
        began = time.perf_counter()
        try:
            return self._make(key, args, kwargs)
        except TraceRefusal as refusal:
            self._refused[key] = str(refusal)
            warnings.warn(f"this call runs the original, frozen units included: {refusal}", stacklevel=4)
            return None
        finally:
            self.seconds += time.perf_counter() - began
            self.prefix.build_seconds = self.seconds

    def _make(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        inputs, tensors = flatten_inputs(self.net, args, kwargs)
        traced = trace(self.net, inputs, tensors)
        cut = split(self.net, traced, self.ownership, self.depth)
        self._warn_of_leaves(cut.prefix, traced.leaves)
        segment = self._segment(cut, tensors)
        self.prefix = Prefix(self.depth, (segment,))
        if traced.shape_bound:
            self._bound.add(key)
        shapes = tuple(t.shape for t in tensors) if traced.shape_bound else None
        plan = self._plans[key, shapes] = Plan(self.prefix, cut.suffix.forward, traced.outputs)
        return plan

    def _segment(self, cut: Split, tensors: list[Tensor]) -> Segment:
        """The built prefix, shared by all traces that have the same one (training and eval, say)."""
        device = next((t.device.type for t in tensors), "cpu")
        computation = Computation.current(device, self.precision)
        dtypes = ",".join(str(t.dtype) for t in tensors)
        layouts = ",".join(str(t.stride()[-1:]) for t in tensors)
        signature = (f"{_signature(cut.prefix)} {dtypes} {layouts} {[t.device for t in tensors]}", computation)
        if signature not in self._segments:
            dtype = str(computation.autocast or "model").removeprefix("torch.")
            earlier = self.decisions.get((0, self.depth, dtype))
            if earlier is not None and earlier.backend != "plain":
                warnings.warn(
                    f"the resumed run used backend {earlier.backend!r}, which is not available: plain runs instead",
                    stacklevel=5,
                )
            segment = build(
                (0, self.depth), cut.prefix, tensors, computation, PASSES, earlier is None or earlier.rewritten
            )
            segment.notes = cut.kept_live
            decision = Decision(0, self.depth, dtype, segment.backend, segment.rewritten is not None)
            self.decisions[decision.key] = decision
            self._segments[signature] = segment
        return self._segments[signature]

    def _warn_of_leaves(self, prefix: GraphModule, leaves: dict[str, str]) -> None:
        called = {str(node.target).removeprefix("root.") for node in prefix.graph.nodes if node.op == "call_module"}
        for name in sorted(called & leaves.keys() - self._warned):
            self._warned.add(name)
            warnings.warn(f"frozen module {name!r} runs as it is, not rewritten: {leaves[name]}", stacklevel=6)


def _signature(module: GraphModule) -> str:
    """The text of a graph, equal for equal graphs over the same modules."""
    return "\n".join(f"{n.name} {n.op} {n.target!r} {n.args!r} {n.kwargs!r}" for n in module.graph.nodes)
