"""A frozen segment as a callable: no tape, its own weights; what fails in it is dropped for what it was made from."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxfreeze.audit import Audit
from fxfreeze.backends.compiled import Compiled, unrepeatable
from fxfreeze.call_times import CallTimes
from fxfreeze.computation import Computation
from fxfreeze.cuda_graphs import CudaGraphs
from fxfreeze.fidelity import reference
from fxfreeze.layouts import Layouts, is_transformed
from fxfreeze.observers import has_tangents, observed
from fxfreeze.randomness import random_state_kept
from fxfreeze.rehearsal import kept_whole
from fxfreeze.rewrite import Outcome

__all__ = ["Segment", "editable", "layouts_of"]


@dataclass
class Segment:
    """The graph between the boundaries at two depths, frozen.

    start, end: depths; plain: the traced graph on the original's modules; rewritten: after the passes, or None when
    ``reason`` says why the plain graph runs; compiled: the same for some shapes; uncompiled: why a backend that compiles
    did not; error: relative error of the self-check, bound: what it may be; whole: modules that it calls and that may do
    more than compute.
    """

    start: int
    end: int
    plain: GraphModule
    computation: Computation
    rewritten: GraphModule | None = None
    reason: str | None = None
    compiled: tuple[Compiled, ...] = ()
    uncompiled: str | None = None
    error: float | None = None
    bound: float | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    backend: str = "plain"
    undecided: bool = False  # whether other backends may still be tried
    swallows_nan: bool = False  # ReLUs of oneDNN and of compiled code make a number of it
    graphs: CudaGraphs | None = None  # what launches the kernels, where they can be recorded
    audit: Audit | None = None  # of compiled code that was made for one batch's values
    trained: bool = False  # whether it has met a training batch
    on_drop: Callable[["Segment"], None] = lambda _: None  # told when something that ran before fails
    times: CallTimes = field(init=False)
    layouts: Layouts = field(init=False)
    whole: list[nn.Module] = field(init=False)
    repeatable: bool = field(init=False)  # running it twice does what running it once does

    def __post_init__(self) -> None:
        self.whole = kept_whole(self.plain)
        self.repeatable = not self.whole and unrepeatable(self.plain) is None
        self.layouts = layouts_of(self.plain, self.whole)
        self.times = CallTimes(self.computation.device)

    @property
    def ranges(self) -> list[float] | None:
        """By which int8 was calibrated."""
        return next((compiled.ranges for compiled in self.compiled), None)

    @property
    def runs_by(self) -> str:
        """The backend whose code runs: "plain" where another did not compile what its passes left, which are plain's."""
        return self.backend if self.uncompiled is None else "plain"

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Boundary in, boundary out, as the original hands it over; no tape; an output is a new tensor or an input."""
        with torch.no_grad():
            outputs = self.native(*inputs)
            return outputs if self.rewritten is None else self.layouts.imposed(outputs, inputs)

    def native(self, *inputs: Any) -> tuple[Any, ...]:
        """The same in the dtypes and layouts that it computes in, which a next segment goes on from."""
        with torch.no_grad():
            outputs, compiled = self.times.call(self._native, inputs)
            return self._audited(outputs, inputs) if compiled else outputs

    def retimed(self) -> "Segment":
        """Itself, once what calls took so far, which were not training's or of what ran before, is forgotten."""
        self.times = CallTimes(self.computation.device)
        return self

    def _native(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], bool]:
        """The outputs, and whether they are of compiled code."""
        if has_tangents() or (self.swallows_nan and not _finite(inputs)):
            return tuple(self.plain.forward(*inputs)), False
        if (compiled := self.compiled_for(inputs)) is not None:
            try:
                return self._run(compiled, inputs), True
            except Exception as error:  # noqa: BLE001 - whatever a compiler's code raises, the graph can do the same
                self._drop("compiled", _failure(error), "It runs uncompiled")
        if self.rewritten is not None:
            try:
                return self._run(self.rewritten.forward, inputs), False
            except Exception as error:
                if not self.repeatable:
                    raise
                outputs = tuple(self.plain.forward(*inputs))  # raises where the original would
                self._drop("rewritten", _failure(error), "The plain graph runs instead")
                return outputs, False
        return tuple(self.plain.forward(*inputs)), False

    def _audited(self, outputs: tuple[Any, ...], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """``outputs`` of compiled code, or what they should have been where they are found wrong."""
        if self.audit is None or not self.audit.due():
            return outputs
        assert self.rewritten is not None
        expected = self._run(self.rewritten.forward, inputs)
        if (found := self.audit.finds(outputs, expected)) is None:
            return outputs
        self._drop("compiled", found, "It runs uncompiled")
        return expected

    def _run(self, function: Callable[..., Sequence[Any]], inputs: Sequence[Any]) -> tuple[Any, ...]:
        with self.computation.context():
            return tuple(function(*inputs)) if self.graphs is None else self.graphs(function, inputs)

    def compiled_for(self, inputs: Sequence[Any]) -> Compiled | None:
        """The compiled code that takes such inputs."""
        return next((compiled for compiled in self.compiled if compiled.takes(inputs)), None)

    def become(self, other: "Segment") -> None:
        """Run as ``other`` does, which is of the same graph."""
        if other is not self:
            kept = {name: getattr(self, name) for name in ("layouts", "on_drop")}
            self.__dict__ |= other.__dict__ | kept | {"notes": tuple(dict.fromkeys(self.notes + other.notes))}

    def _drop(self, what: str, reason: str, instead: str) -> None:
        self.graphs = self.audit = None
        self.retimed()
        if self.compiled:
            self.compiled, self.uncompiled = (), reason
        if what == "rewritten":
            self.rewritten, self.reason = None, reason
        self.on_drop(self)
        warnings.warn(f"the {what} frozen part is not used any more: {reason}. {instead}", stacklevel=2)


def _failure(error: Exception) -> str:
    return f"running it failed: {type(error).__name__}: {error}"


def _finite(inputs: Sequence[Any]) -> bool:
    """Whether the sums of all inputs are, as far as can be told: not by what follows operators, which may have no values, but
    Dynamo is told that they are."""
    if torch.compiler.is_compiling():
        return True
    if observed():
        return False
    tensors = [t for t in inputs if isinstance(t, Tensor) and t.layout == torch.strided and not is_transformed(t)]
    numbers = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return all(bool(t.sum(dtype=torch.float32).isfinite()) for t in numbers if t.is_floating_point())


def layouts_of(plain: GraphModule, whole: list[nn.Module]) -> Layouts:
    """Those in which the original hands over the outputs of ``plain``: found out on a copy, with a few samples."""

    def outputs(inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random:
            return reference(editable(plain), inputs, random, whole)[1]

    return Layouts(outputs)


def editable(plain: GraphModule) -> GraphModule:
    """The plain graph as one that passes may edit."""
    module = GraphModule(nn.Module(), Graph())
    module.root = plain.root
    for name, buffer in plain._buffers.items():
        module.register_buffer(name, buffer)
    graph = Graph()
    graph.output(graph.graph_copy(plain.graph, {}))
    module.graph = graph
    return module
