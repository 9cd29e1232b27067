"""A frozen segment as a callable: no tape, its own weights, checked against the original when it is built."""

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxfreeze.backends import Backend
from fxfreeze.backends.compiled import Compiled, unrepeatable
from fxfreeze.cuda_graphs import CudaGraphs, graphs_on
from fxfreeze.fidelity import TF32_BOUND, Recorder, bound_of, cut_like, reference, relative_error
from fxfreeze.layouts import Layouts, is_transformed
from fxfreeze.passes.fused_conv import onednn_conv
from fxfreeze.randomness import RandomState, random_state_kept
from fxfreeze.rehearsal import kept_whole, rehearsed
from fxfreeze.rewrite import Outcome, PassError, run_passes
from fxfreeze.sizes import dtype_text

__all__ = ["Computation", "Segment", "build", "layouts_of"]

DECIDED = "an earlier build decided so"
TRANSFORMED = "a transform of torch.func runs the traced graph as it is"


@dataclass(frozen=True)
class Computation:
    """How a segment computes: on which device type, and under which autocast.

    autocast: the dtype, or None for off; overrides: this is not what the caller's own autocast says; quantized: in int8,
    with autocast off, as far as it can be.
    """

    device: str
    autocast: torch.dtype | None
    overrides: bool = False
    quantized: bool = False

    @classmethod
    def current(cls, device: str, precision: torch.dtype | None) -> "Computation":
        """What a forward on ``device`` uses now; ``precision`` overrides autocast for the frozen part."""
        active = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if precision is None:
            return cls(device, active)
        quantized = precision is torch.int8
        wanted = None if quantized or precision is torch.float32 else precision
        return cls(device, wanted, wanted != active, quantized)

    @property
    def dtype_name(self) -> str:
        """ "model" for what the model itself computes in."""
        return "int8" if self.quantized else dtype_text(self.autocast) if self.autocast else "model"

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What to run the rewritten segment under."""
        if not self.overrides:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)


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
    trained: bool = False  # whether it has met a training batch
    on_drop: Callable[["Segment"], None] = lambda _: None  # told when something that ran before fails
    layouts: Layouts = field(init=False)
    whole: list[nn.Module] = field(init=False)
    repeatable: bool = field(init=False)  # running it twice does what running it once does

    def __post_init__(self) -> None:
        self.whole = kept_whole(self.plain)
        self.repeatable = not self.whole and unrepeatable(self.plain) is None
        self.layouts = layouts_of(self.plain, self.whole)

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
            if self.swallows_nan and not _finite(inputs):
                return tuple(self.plain.forward(*inputs))
            if (compiled := self.compiled_for(inputs)) is not None:
                try:
                    return self._run(compiled, inputs)
                except Exception as error:  # noqa: BLE001 - whatever a compiler's code raises, the graph can do the same
                    self._drop("compiled", error, "It runs uncompiled")
            if self.rewritten is not None:
                try:
                    return self._run(self.rewritten.forward, inputs)
                except Exception as error:
                    if not self.repeatable:
                        raise
                    outputs = tuple(self.plain.forward(*inputs))  # raises where the original would
                    self._drop("rewritten", error, "The plain graph runs instead")
                    return outputs
            return tuple(self.plain.forward(*inputs))

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

    def _drop(self, what: str, error: Exception, instead: str) -> None:
        reason = f"running it failed: {type(error).__name__}: {error}"
        self.graphs = None
        if self.compiled:
            self.compiled, self.uncompiled = (), reason
        if what == "rewritten":
            self.rewritten, self.reason = None, reason
        self.on_drop(self)
        warnings.warn(f"the {what} frozen part is not used any more: {reason}. {instead}", stacklevel=2)


def build(
    span: tuple[int, int],
    plain: GraphModule,
    inputs: Sequence[Any],
    computation: Computation,
    backend: Backend,
    settled: str | None = None,
    native: Sequence[Any] | None = None,
) -> Segment:
    """Rewrite ``plain``, compile it if the backend does, and compare each with the original on samples of ``inputs``.

    span: depths of the two boundaries; native: the inputs as a segment before computed them, for the rewritten graph;
    settled: why the plain graph runs whatever a rewritten one would do (``DECIDED``, ``TRANSFORMED``). A rewritten or
    compiled graph that fails, or is past its bound, is dropped: ``reason`` or ``uncompiled`` gives the error or the figure.
    Random state is left as found.
    """
    began = time.perf_counter()
    segment = Segment(*span, plain, computation)
    with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random:
        graph = _copy(plain)
        compiles = backend.compiler is not None and settled is None
        samples, expected = reference(graph, inputs, random, segment.whole, all_samples=compiles)
        segment.layouts.learn(expected)
        given = samples if native is None else [cut_like(a, b) for a, b in zip(native, samples, strict=True)]
        segment.reason = settled or _rewrite(segment, graph, backend, given, (samples, expected), random)
        if segment.reason is None:
            segment.rewritten = graph
            if backend.compiler is not None:
                segment.uncompiled = _compile(segment, graph, backend, given, (samples, expected))
            fused = any(node.target is onednn_conv for node in graph.graph.nodes)
            segment.swallows_nan = computation.device == "cpu" and (fused or bool(segment.compiled))
            segment.graphs = graphs_on(computation.device) if segment.repeatable else None
    segment.seconds = time.perf_counter() - began
    return segment


_Checked = tuple[list[Any], tuple[Any, ...]]  # inputs as the original takes them, and what it makes of them


def _rewrite(
    segment: Segment, graph: GraphModule, backend: Backend, given: Sequence[Any], known: _Checked, random: RandomState
) -> str | None:
    """Run the backend's passes on ``graph``; why the result can't be used, or None."""
    computation = segment.computation
    try:
        with computation.context():
            if computation.overrides:  # what passes read is how this computation runs it
                with rehearsed(segment.whole):
                    Recorder(graph).run(*given)
            graph.meta["compute_dtype"] = computation.autocast
            graph.meta["laid_out"] = segment.start > 0  # what an earlier segment computed lies as it should
            segment.outcomes = run_passes(graph, backend.passes)
            random.restore()
            with rehearsed(segment.whole):
                outputs = graph.forward(*given)
        return _judge(segment, outputs, known)
    except PassError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the plain graph just ran, so training must go on with it
        return f"running it failed: {type(error).__name__}: {error}"


def _compile(
    segment: Segment, graph: GraphModule, backend: Backend, given: Sequence[Any], known: _Checked
) -> str | None:
    """Compile ``graph`` for inputs like ``given``; why that can't be used, or None."""
    assert backend.compiler is not None
    if (why := unrepeatable(graph)) is not None or segment.whole:
        return why or f"it calls {type(segment.whole[0]).__name__}, which may do more than compute"
    uncompiled = segment.error, segment.bound
    try:
        with segment.computation.context():
            compiled = Compiled.of(graph, given, backend.compiler, segment.computation.autocast)
            outputs = compiled(*given)
        why = _judge(segment, outputs, known, backend.bound)
    except Exception as error:  # noqa: BLE001 - compilers raise anything; the graph that they were given runs
        why = f"{type(error).__name__}: {error}"
    if why is None:
        segment.compiled = (compiled,)
    else:
        segment.error, segment.bound = uncompiled
    return why


def _finite(inputs: Sequence[Any]) -> bool:
    """Whether the sums of all inputs are; not asked while Dynamo traces, which can't go by values."""
    if torch.compiler.is_compiling():
        return True
    numbers = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided]
    return all(bool(t.sum(dtype=torch.float32).isfinite()) for t in numbers if not is_transformed(t))


def layouts_of(plain: GraphModule, whole: list[nn.Module]) -> Layouts:
    """Those in which the original hands over the outputs of ``plain``: found out on a copy, with a few samples."""

    def outputs(inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random:
            return reference(_copy(plain), inputs, random, whole)[1]

    return Layouts(outputs)


def _copy(plain: GraphModule) -> GraphModule:
    """The plain graph as one that passes may edit."""
    module = GraphModule(nn.Module(), Graph())
    module.root = plain.root
    for name, buffer in plain._buffers.items():
        module.register_buffer(name, buffer)
    graph = Graph()
    graph.output(graph.graph_copy(plain.graph, {}))
    module.graph = graph
    return module


def _judge(segment: Segment, outputs: Sequence[Any], known: _Checked, bound: float | None = None) -> str | None:
    """Why ``outputs`` are not the original's within ``bound``, or that of the dtype; or None."""
    samples, expected = known
    if len(outputs) != len(expected):
        return f"the passes left {len(outputs)} outputs of {len(expected)}"
    dtypes = [t.dtype for t in expected if isinstance(t, Tensor) and t.is_floating_point()]
    computed = segment.computation.autocast or max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    segment.bound = bound or bound_of(computed)
    if (
        bound is None
        and computed is torch.float32
        and segment.computation.device == "cuda"
        and torch.backends.cudnn.allow_tf32
    ):
        segment.bound = TF32_BOUND
    laid_out = segment.layouts.imposed(outputs, samples)
    errors = [relative_error(a, b) for a, b in zip(laid_out, expected, strict=True) if isinstance(b, Tensor)]
    segment.error = max(errors, default=0.0)
    if any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in expected):
        return "the original's own output is not finite, so nothing could be compared"
    if not segment.error <= segment.bound:
        return f"its relative error {segment.error:.2e} is past the bound {segment.bound:.0e}"
    return None
