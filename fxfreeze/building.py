"""A segment made: its graph rewritten, compiled where the backend does, and each checked against the original."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfreeze.audit import Audit
from fxfreeze.backends import Backend
from fxfreeze.backends.compiled import Compiled, unrepeatable
from fxfreeze.computation import Computation
from fxfreeze.cuda_graphs import graphs_on
from fxfreeze.fidelity import INT8_BOUND, Recorder, bound_of, cut_like, largest_error, reference
from fxfreeze.nans import swallowed_nan
from fxfreeze.passes.fused_conv import onednn_conv
from fxfreeze.randomness import RandomState, random_state_kept
from fxfreeze.rehearsal import rehearsed
from fxfreeze.rewrite import PassError, run_passes
from fxfreeze.runtime import Segment, editable

__all__ = ["DECIDED", "TRANSFORMED", "build"]

DECIDED = "an earlier build decided so"
TRANSFORMED = "a transform of torch.func, or fake tensors, run the traced graph as it is"


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
        graph = editable(plain)
        compiles = backend.compiler is not None and settled is None
        samples, expected = reference(graph, inputs, random, segment.whole, all_samples=compiles)
        segment.layouts.learn(expected)
        given = samples if native is None else [cut_like(a, b) for a, b in zip(native, samples, strict=True)]
        segment.reason = settled or _rewrite(segment, graph, backend, given, (samples, expected), random)
        if segment.reason is None:
            segment.rewritten = graph
            if backend.compiler is not None:
                segment.uncompiled = _compile(segment, graph, backend, given, (samples, expected))
            segment.swallows_nan = computation.device == "cpu" and (_fused(graph) or bool(segment.compiled))
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
            if _fused(graph) and (why := swallowed_nan(segment.plain)) is not None:
                return why
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
    if segment.computation.device == "cpu" and (why := swallowed_nan(segment.plain)) is not None:
        return why
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
        segment.audit = Audit(2 * INT8_BOUND) if compiled.ranges is not None else None
    else:
        segment.error, segment.bound = uncompiled
    return why


def _fused(graph: GraphModule) -> bool:
    """Whether activations are computed with oneDNN's convolutions."""
    return any(node.target is onednn_conv for node in graph.graph.nodes)


def _judge(segment: Segment, outputs: Sequence[Any], known: _Checked, bound: float | None = None) -> str | None:
    """Why ``outputs`` are not the original's within ``bound``, or that of the dtype; or None."""
    samples, expected = known
    if len(outputs) != len(expected):
        return f"the passes left {len(outputs)} outputs of {len(expected)}"
    dtypes = [t.dtype for t in expected if isinstance(t, Tensor) and t.is_floating_point()]
    computed = segment.computation.autocast or max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    segment.bound = bound or bound_of(computed, segment.computation.device)
    laid_out = segment.layouts.imposed(outputs, samples)
    segment.error = largest_error(laid_out, expected)
    if any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in expected):
        return "the original's own output is not finite, so nothing could be compared"
    if not segment.error <= segment.bound:
        return f"its relative error {segment.error:.2e} is past the bound {segment.bound:.0e}"
    return None
