"""What to run for a forward at the current depth: trace, split and build when first asked for, and remember.

Everything here is derived from the network and may be dropped at any time.
"""

import contextlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from fxfreeze.attributes import Read, Settings, changed
from fxfreeze.builder import Builder, Decision, DecisionKey, Site
from fxfreeze.chain import Chain, Span
from fxfreeze.computation import Computation
from fxfreeze.effects import Memory
from fxfreeze.inputs import BAKED, TraceRefusal, flatten_inputs
from fxfreeze.layouts import has_storage, kind_of
from fxfreeze.likeness import same_constants, signature
from fxfreeze.observers import unobserved
from fxfreeze.prefix import Prefix
from fxfreeze.readings import Readings
from fxfreeze.runtime import Segment
from fxfreeze.split import split
from fxfreeze.trace import Traced, trace
from fxfreeze.units import Ownership

__all__ = ["Plan", "Surgery", "plan_key"]


_MOST_PLANS = 256  # kept at one time; numbers that change at every call make as many plans as there are calls
_MOST_CHANGES = 3  # of a tensor from outside, until what reads it runs as it is
_MANY_PLANS = 16  # made at one depth: worth telling the user


class Plan(NamedTuple):
    """What a forward runs: the way to the boundary, the suffix from there, and the structure of the original's output.

    reads: attributes of the modules that must still have the values that the trace met; settings: of the frozen layers that
    the rewriting met; bound: to the traced shapes.
    """

    chain: Chain
    suffix: Callable[..., Any]
    outputs: pytree.TreeSpec
    reads: list[Read]
    settings: Settings
    bound: bool

    def stale(self) -> Read | None:
        """The first attribute that has changed."""
        return changed(self.reads) or self.settings.changed()


def plan_key(leaves: list[Any], spec: pytree.TreeSpec) -> tuple[Any, ...]:
    """What of a call's arguments decides its graph: structure, constants, the kinds of tensors, and which of them share
    memory."""
    return (
        spec,
        _sharing([leaf for leaf in leaves if isinstance(leaf, Tensor)]),
        tuple(
            kind_of(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf if isinstance(leaf, BAKED) else None)
            for leaf in leaves
        ),
    )


def _sharing(tensors: list[Tensor]) -> tuple[int, ...]:
    """For each tensor, the number of the first that lies in the same storage."""
    if len(tensors) < 2:
        return ()
    storages = [t.untyped_storage()._cdata if has_storage(t) else id(t) for t in tensors]
    return tuple(map(storages.index, storages))


def _refuse_shared_writes(net: nn.Module, traced: Traced, tensors: list[Tensor]) -> None:
    """Inputs are distinct memory to a graph: refuse to write into one that shares its memory with another."""
    first = _sharing(tensors)
    if len(set(first)) == len(first):
        return
    memory = Memory(traced.graph, net.get_submodule)
    written = {memory.class_of(n) for does in memory.effects.values() for n in does.writes}
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for i, node in enumerate(inputs):
        if first.count(first[i]) > 1 and memory.class_of(node) in written:
            raise TraceRefusal(
                f"forward writes into input {node.name!r}, which shares its memory with another input: clone one of them"
            )


Given = Callable[[Chain], Sequence[Tensor]]


@dataclass
class Surgery:
    """Plans for one network at one depth.

    decisions: what earlier builds, or those of a resumed run, decided; warned: what the user has been told already;
    ahead: how many training steps will run what is built now, 0 where nothing may be tried; readings: what segments read
    from outside of frozen units; changes: how often each of these has changed.
    """

    net: nn.Module
    ownership: Ownership
    depth: int
    precision: torch.dtype | None
    backend: str
    decisions: dict[DecisionKey, Decision]
    ahead: Callable[[], float]
    readings: Readings
    changes: Counter[str]
    warned: set[str] = field(default_factory=set)
    seconds: float = 0.0
    prefix: Prefix = field(init=False)
    builder: Builder = field(init=False)
    _made: int = 0
    _building: bool = False
    _plans: dict[Any, Plan] = field(default_factory=dict)
    _bound: set[Any] = field(default_factory=set)
    _segments: dict[tuple[str, Computation], list[Segment]] = field(default_factory=dict)
    _refused: dict[Any, TraceRefusal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefix = Prefix(self.depth, (), self.seconds)
        self.builder = Builder(self.backend, self.decisions, self._warn)

    def plan(
        self, key: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Given | None
    ) -> Plan:
        """The plan for a call; raises TraceRefusal when it can't be traced, so that the original must run.

        given: of its chain, what the segment is built from at once, so that what refuses it does so here; None to wait.
        """
        shapes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor)) if key in self._bound else None
        found = self._plans.get((key, shapes))
        stale = found.stale() if found is not None else None
        if found is not None and stale is None:
            self._shows(found.chain.prefix)
            return found
        if key in self._refused:
            raise self._refused[key]
        with self._clock():
            # Under torch.compile, Dynamo would trace the surgery itself. Where it was never imported, nothing is compiled.
            make = torch.compiler.disable(self._make) if "torch._dynamo" in sys.modules else self._make  # type: ignore[no-untyped-call]
            plan: Plan = make(key, args, kwargs, given)
            self._count(f"self.{stale.name} of a {stale.owner.__qualname__} has changed" if stale else None)
        return plan

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Count the time within as building, once."""
        if self._building:
            yield
            return
        self._building, began = True, time.perf_counter()
        try:
            yield
        finally:
            self._building = False
            self.seconds += time.perf_counter() - began
            self._shows(self.prefix)

    def refuse(self, key: Any, refusal: TraceRefusal) -> None:
        """Take note that such calls are the original's: one of them ran there."""
        if len(self._refused) >= _MOST_PLANS:
            self._refused.clear()
        self._refused[key] = refusal.with_traceback(None)
        self._warn(f"this call runs the original, frozen units included: {refusal}")

    def _shows(self, prefix: Prefix) -> None:
        """Make ``prefix`` the one that the model shows: what ran last."""
        self.prefix = prefix
        prefix.build_seconds = self.seconds

    @unobserved()
    def _make(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Given | None) -> Plan:
        inputs, tensors = flatten_inputs(self.net, args, kwargs)
        traced = trace(self.net, inputs, tensors)
        _refuse_shared_writes(self.net, traced, tensors)
        cut = split(self.net, traced, self.ownership, self.depth)
        device = next((t.device.type for t in tensors), "cpu")
        computation = Computation.current(device, self.precision)
        callers = Computation.current(device, None).autocast  # decides the dtypes that the suffix expects
        notes = (*(f"kept live: {why}" for why in cut.kept_live), *self._tell_of_leaves(cut.prefix, traced.leaves))

        def make(span: Span, plain: GraphModule, values: Sequence[Any], native: Sequence[Any]) -> Segment:
            with self._clock():
                return self._segment(span, plain, values, native, computation, callers, notes)

        chain = Chain(self.net, traced, self.ownership, self.depth, cut, computation, make)
        if given is not None:
            chain.segment((0, self.depth), values := given(chain), values)
        self.prefix = chain.prefix
        if traced.shape_bound:
            self._bound.add(key)
        shapes = tuple(t.shape for t in tensors) if traced.shape_bound else None
        settings = Settings(_layers(cut.prefix))
        plan = Plan(chain, cut.suffix.forward, traced.outputs, traced.reads, settings, traced.shape_bound)
        self._remember((key, shapes), plan)
        return plan

    def _remember(self, key: Any, plan: Plan) -> None:
        forgotten = self._plans.pop(key, None)
        if forgotten is None and len(self._plans) >= _MOST_PLANS:
            forgotten = self._plans.pop(next(iter(self._plans)))
        self._plans[key] = plan
        if forgotten is not None:  # a segment holds weights of its own
            used = {id(segment) for plan in self._plans.values() for segment in plan.chain.prefix.segments}
            for built in self._segments.values():
                built[:] = [segment for segment in built if id(segment) in used]

    def _count(self, cause: str | None) -> None:
        """Count the plans made, and tell the user when each call seems to need one of its own."""
        self._made += 1
        if self._made == _MANY_PLANS:
            self._warn(
                f"the network has been traced {self._made} times at depth {self.depth}, the last time because "
                f"{cause or 'of arguments not met before'}. A call is traced for the numbers that it holds, and for the shapes "
                f"that forward looks at: make what changes from call to call a tensor, as an input or a buffer"
            )

    @unobserved()
    def _segment(
        self,
        span: Span,
        plain: GraphModule,
        values: Sequence[Any],
        native: Sequence[Any],
        computation: Computation,
        callers: torch.dtype | None,
        notes: tuple[str, ...],
    ) -> Segment:
        """The built segment, shared by all traces that have the same one (training and eval, say)."""
        given = [kind_of(t) for t in native if isinstance(t, Tensor)]
        like = (f"{span} {signature(plain)} {Settings(_layers(plain))} {callers} {given}", computation)
        built = self._segments.setdefault(like, [])
        segment = next((s for s in built if same_constants(s.plain, plain)), None)
        restless = next((name for name in self.readings.names(plain) if self.changes[name] >= _MOST_CHANGES), None)
        site = Site(span, plain, values, native, computation, self._steps(), self._training, restless)
        if segment is None:
            segment = self.builder.build(site)
            segment.notes += notes
            built.append(segment)
        if segment.repeatable and restless is None:  # else it runs as it is, or writes into what it reads
            self.readings.note(plain)
        self.builder.settle(segment, site)
        return segment

    def _steps(self) -> float:
        """How many steps are worth trying backends for: none on a batch that is not training's, nor while CUDA captures."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return self.ahead() if self._training and not capturing else 0

    @property
    def _training(self) -> bool:
        return self.net.training and torch.is_grad_enabled()

    def _tell_of_leaves(self, prefix: GraphModule, leaves: dict[str, str]) -> list[str]:
        """Warn of frozen modules that run as they are, and return a line for each."""
        called = {str(node.target).removeprefix("root.") for node in prefix.graph.nodes if node.op == "call_module"}
        whole = sorted(called & leaves.keys())
        for name in whole:
            self._warn(f"frozen module {name!r} runs as it is, not rewritten: {leaves[name]}")
        return [f"kept whole: {name}: {leaves[name]}" for name in whole]

    def _warn(self, message: str) -> None:
        """Tell the user something, once in a model's life."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)


def _layers(graph: GraphModule) -> Iterator[nn.Module]:
    """Torch's own that ``graph`` calls, each with those within: what passes know."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            called = graph.get_submodule(str(node.target))
            if type(called).__module__.startswith("torch.nn."):
                yield from (m for m in called.modules() if type(m).__module__.startswith("torch.nn."))
