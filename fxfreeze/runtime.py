"""A frozen segment as a callable: no tape, its own weights, checked against the original when it is built."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from fxfreeze.inputs import TraceRefusal
from fxfreeze.layouts import Layouts
from fxfreeze.randomness import RandomState, random_state_kept
from fxfreeze.rehearsal import kept_whole, rehearsed
from fxfreeze.rewrite import Outcome, Pass, PassError, run_passes
from fxfreeze.sizes import dtype_text

__all__ = ["BOUNDS", "Computation", "Prefix", "Segment", "bound_of", "build", "layouts_of", "relative_error"]

# The largest relative error, by norm, that a rewritten segment may show against the original.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_BOUND = 5e-3  # float32 where cuDNN may round inputs to 10 bits
DECIDED = "an earlier build decided so"
TRANSFORMED = "a transform of torch.func runs the traced graph as it is"
_SAMPLES = 4
_REASONS = 12  # places with a reason that are printed for each thing a pass did


@dataclass(frozen=True)
class Computation:
    """How a segment computes: on which device type, and under which autocast.

    autocast: the dtype, or None for off; overrides: this is not what the caller's own autocast says.
    """

    device: str
    autocast: torch.dtype | None
    overrides: bool = False

    @classmethod
    def current(cls, device: str, precision: torch.dtype | None) -> "Computation":
        """What a forward on ``device`` uses now; ``precision`` overrides autocast for the frozen part."""
        active = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if precision is None:
            return cls(device, active)
        wanted = None if precision is torch.float32 else precision
        return cls(device, wanted, overrides=wanted != active)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What to run the rewritten segment under."""
        if not self.overrides:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)


@dataclass
class Segment:
    """The graph between the boundaries at two depths, frozen.

    start, end: depths; plain: the traced graph on the original's modules; rewritten: after the passes, or None when
    ``reason`` says why the plain graph runs; error: relative error of the self-check, bound: what it may be; whole:
    modules that it calls and that may do more than compute.
    """

    start: int
    end: int
    plain: GraphModule
    computation: Computation
    rewritten: GraphModule | None = None
    reason: str | None = None
    error: float | None = None
    bound: float | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    backend: str = "plain"
    layouts: Layouts = field(init=False)
    whole: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.whole = kept_whole(self.plain)
        self.layouts = layouts_of(self.plain, self.whole)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Boundary in, boundary out, as the original hands it over; no tape; an output is a new tensor or an input."""
        with torch.no_grad():
            outputs = self.native(*inputs)
            return outputs if self.rewritten is None else self.layouts.imposed(outputs, inputs)

    def native(self, *inputs: Any) -> tuple[Any, ...]:
        """The same in the dtypes and layouts that it computes in, which a next segment goes on from."""
        with torch.no_grad():
            if self.rewritten is None:
                return tuple(self.plain.forward(*inputs))
            with self.computation.context():
                return tuple(self.rewritten.forward(*inputs))

    def describe(self) -> str:
        """One paragraph: what runs, how exact it is, what each pass did and why it left the rest."""
        graph = (self.rewritten or self.plain).graph
        operators = sum(node.op.startswith("call") for node in graph.nodes)
        dtype = "the model's dtype" if self.computation.autocast is None else dtype_text(self.computation.autocast)
        check = "not checked" if self.error is None else f"error {self.error:.1e} (bound {self.bound:.0e})"
        state = f"unrewritten: {self.reason}" if self.reason else "rewritten"
        head = (
            f"segment {self.start}-{self.end}: backend {self.backend}, {operators} operators ({_calls(self.plain)} traced), "
            f"{dtype}, {state}, {check}, built in {self.seconds * 1e3:.0f} ms"
        )
        return "\n".join([head, *_lines(self.outcomes), *(f"  {note}" for note in self.notes)])


@dataclass
class Prefix:
    """What runs for the frozen part: segments between depths. Printing it says all about it.

    build_seconds: time spent so far on traces, splits, passes and self-checks.
    """

    depth: int
    segments: tuple[Segment, ...]
    build_seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether it calls modules of the user's that may do more than compute."""
        return any(segment.whole for segment in self.segments)

    def __str__(self) -> str:
        if not self.depth:
            return "prefix: nothing is frozen"
        if not self.segments:
            return f"prefix: {self.depth} frozen units, built at the next forward"
        return "\n".join(
            [
                f"prefix: {self.depth} frozen units, {self.build_seconds:.2f} s of building",
                *(s.describe() for s in self.segments),
            ]
        )

    __repr__ = __str__


def build(
    span: tuple[int, int],
    plain: GraphModule,
    inputs: Sequence[Any],
    computation: Computation,
    passes: Sequence[Pass],
    settled: str | None = None,
    native: Sequence[Any] | None = None,
) -> Segment:
    """Rewrite ``plain`` and compare it with the original on a few samples of ``inputs``.

    span: depths of the two boundaries; native: the inputs as a segment before computed them, for the rewritten graph;
    settled: why the plain graph runs whatever a rewritten one would do (``DECIDED``, ``TRANSFORMED``). A rewritten graph
    that fails, or is past its bound, is dropped: ``reason`` gives the error or the figure. Random state is left as found.
    """
    began = time.perf_counter()
    segment = Segment(*span, plain, computation)
    with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random:
        graph = _copy(plain)
        samples, expected = _reference(graph, inputs, random, segment.whole)
        segment.layouts.learn(expected)
        given = samples if native is None else [_cut_like(a, b) for a, b in zip(native, samples, strict=True)]
        if settled is not None:
            segment.reason = settled
        else:
            try:
                with computation.context():
                    if computation.overrides:  # what passes read is how this computation runs it
                        with rehearsed(segment.whole):
                            _Recorder(graph).run(*given)
                    graph.meta["compute_dtype"] = computation.autocast
                    graph.meta["laid_out"] = span[0] > 0  # what an earlier segment computed lies as it should
                    segment.outcomes = run_passes(graph, passes)
                    random.restore()
                    with rehearsed(segment.whole):
                        outputs = graph.forward(*given)
                if len(outputs) != len(expected):
                    raise PassError(f"the passes left {len(outputs)} outputs of {len(expected)}")
                _judge(segment, graph, segment.layouts.imposed(outputs, samples), expected)
            except PassError as error:
                segment.reason = str(error)
            except Exception as error:  # noqa: BLE001 - the plain graph just ran, so training must go on with it
                segment.reason = f"running it failed: {type(error).__name__}: {error}"
    segment.seconds = time.perf_counter() - began
    return segment


def layouts_of(plain: GraphModule, whole: list[nn.Module]) -> Layouts:
    """Those in which the original hands over the outputs of ``plain``: found out on a copy, with a few samples."""

    def outputs(inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random:
            return _reference(_copy(plain), inputs, random, whole)[1]

    return Layouts(outputs)


def _reference(
    graph: GraphModule, inputs: Sequence[Any], random: RandomState, whole: list[nn.Module]
) -> tuple[list[Any], tuple[Any, ...]]:
    """A few samples of the batch, and what the original makes of them; the whole batch where it can't be sliced."""
    few = _first_samples(inputs)
    if few is not None:
        try:
            with rehearsed(whole):
                return few, tuple(_Recorder(graph).run(*few))
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            random.restore()  # a network that ties samples together (pairs, frames) needs the batch it was given
    try:
        with rehearsed(whole):
            return list(inputs), tuple(_Recorder(graph).run(*inputs))
    except Exception as error:
        raise TraceRefusal(f"the frozen part as it was traced can't run it: {type(error).__name__}: {error}") from error


def _cut_like(value: Any, sample: Any) -> Any:
    """As many of the samples."""
    return value[: len(sample)] if isinstance(value, Tensor) and value.shape != sample.shape else value


def _first_samples(inputs: Sequence[Any]) -> list[Any] | None:
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    sizes = {t.shape[0] if t.dim() and t.layout == torch.strided else None for t in tensors}
    if len(sizes) != 1 or None in sizes or next(iter(sizes)) <= _SAMPLES:  # type: ignore[operator]
        return None
    return [t[:_SAMPLES] if isinstance(t, Tensor) else t for t in inputs]


class _Recorder(Interpreter):
    """Runs a graph and notes on each node what its value is like, for the passes to read."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        n.meta["value"] = value.detach().to("meta") if isinstance(value, Tensor) else None
        n.meta["device"] = value.device.type if isinstance(value, Tensor) else None
        return value


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


def _judge(segment: Segment, graph: GraphModule, outputs: Sequence[Any], reference: Sequence[Any]) -> None:
    """Keep the rewritten graph if its outputs are the original's within the bound."""
    dtypes = [t.dtype for t in reference if isinstance(t, Tensor) and t.is_floating_point()]
    computed = segment.computation.autocast or max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    segment.bound = bound_of(computed)
    if computed is torch.float32 and segment.computation.device == "cuda" and torch.backends.cudnn.allow_tf32:
        segment.bound = TF32_BOUND
    errors = [relative_error(a, b) for a, b in zip(outputs, reference, strict=True) if isinstance(b, Tensor)]
    segment.error = max(errors, default=0.0)
    if any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in reference):
        segment.reason = "the original's own output is not finite, so nothing could be compared"
    elif not segment.error <= segment.bound:
        segment.reason = f"its relative error {segment.error:.2e} is past the bound {segment.bound:.0e}"
    else:
        segment.rewritten = graph


def bound_of(dtype: torch.dtype) -> float:
    """The largest relative error, by norm, of values that were computed in ``dtype``."""
    return BOUNDS.get(dtype, BOUNDS[torch.bfloat16])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` by the 2-norm in float64; inf for another shape or dtype, 0 for two zeros."""
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else float("inf")
    distance = torch.linalg.vector_norm(value.double() - reference.double())
    return float(distance / torch.linalg.vector_norm(reference.double())) if distance else 0.0


def _calls(module: GraphModule) -> int:
    return sum(node.op.startswith("call") for node in module.graph.nodes)


def _lines(outcomes: list[Outcome]) -> Iterator[str]:
    """A line for each thing that a pass did, and one for each place and reason."""
    if not outcomes:
        yield "  no pass found anything to rewrite"
    kinds: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault((outcome.name, outcome.what), []).append(outcome)
    for (name, what), group in kinds.items():
        few = ", ".join(o.place for o in group[:3]) + (", ..." if len(group) > 3 else "")
        yield f"  {name}: {len(group)} {what} ({few})"
        reasons = [o for o in group if o.why]
        yield from (f"    {o.place}: {o.why}" for o in reasons[:_REASONS])
        if len(reasons) > _REASONS:
            yield f"    and {len(reasons) - _REASONS} more, in the segment's outcomes"
