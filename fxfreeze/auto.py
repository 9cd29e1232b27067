"""``backend="auto"``: which backends to build for a frozen part, and which of those is fastest where it will run.

One that takes long to build is built only where it may win back more than that before the next freeze. What was built
takes turns on the real batch, each followed by a little of PyTorch's own code, as the live layers follow it in training:
a library's threads may cost the next operator more than they save.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

from fxfreeze.backends import openvino
from fxfreeze.computation import Computation
from fxfreeze.cuda_graphs import AFTER
from fxfreeze.fidelity import few_samples
from fxfreeze.kernels import engine
from fxfreeze.nans import swallowed_nan
from fxfreeze.operators import op_of
from fxfreeze.passes.fused_conv import onednn_supports
from fxfreeze.rewrite import constant
from fxfreeze.runtime import Segment
from fxfreeze.sizes import seconds_text
from fxfreeze.timings import Times, Timings

__all__ = ["UNKNOWN_STEPS", "choose", "first_choice", "rivals"]

UNKNOWN_STEPS = 1000  # expected ahead where no FreezeScheduler tells
_FEWEST, _MOST = 3, 15  # turns
_LONGEST = 10.0  # seconds of turns: calls of half a second are told apart by five as well
_SHORT = 0.05  # seconds to spend on finding out how long a call takes
_LEAST_GAIN = 0.01  # of the time ahead: always thought possible, and what taking turns may cost
_CLEARLY = 0.98  # of the first choice's time: what a rival must stay below to take its place


class _Prior(NamedTuple):
    """build: seconds for each operator of the graph; share: of the time that "plain" takes."""

    build: float
    share: float


# What was never measured on a machine is expected to be as it was on five networks of bench/results/backends-cpu.json, in the
# geometric mean; "triton" is a guess. They decide what is built where nothing is known yet, never what is chosen.
_PRIORS = {
    "plain": _Prior(0.002, 1.0),
    "library": _Prior(0.002, 0.92),
    "triton": _Prior(0.05, 0.6),
    "openvino": _Prior(0.03, 0.87),
    "inductor": _Prior(0.03, 0.87),
}


def first_choice(graph: GraphModule, computation: Computation) -> str:
    """What runs where nothing is to be tried: "library" where it has anything to take, which is rarely slower."""
    layers = [op for node in graph.graph.nodes if (op := op_of(node, graph)) is not None and op.kind == "conv"]
    weights = [weight for op in layers if (weight := constant(op.arguments["weight"], graph)) is not None]
    dtypes = {computation.autocast or weight.dtype for weight in weights if weight.dim() == 4}
    if computation.device == "cpu":
        able = any(onednn_supports(dtype) is None for dtype in dtypes) and swallowed_nan(graph) is None
        return "library" if able else "plain"
    return "library" if computation.device == "cuda" and dtypes - {torch.float64} else "plain"


def rivals(segment: Segment) -> list[str]:
    """What else could run a segment on this machine, the quickest to build first."""
    device = segment.computation.device
    able = {
        "plain": True,
        "triton": engine(device) == "triton",
        "openvino": device == "cpu" and openvino.here(),
        "inductor": True,
    }
    return sorted((name for name, here in able.items() if here), key=lambda name: _PRIORS[name].build)


def choose(
    first: Segment,
    build: Callable[[str], Segment],
    names: Sequence[str],
    inputs: Sequence[Any],
    steps: float,
    case: str,
    timings: Timings,
) -> Segment:
    """The fastest of ``first`` and those of ``names`` that are worth building for ``steps`` calls like ``inputs``.

    case: under which ``timings`` keeps what is measured; nothing is measured where it knows all that is worth measuring.
    """
    known = {name: times for name, times in timings.get(case).items() if name in (first.backend, *names)}
    if first.backend not in known:
        known = {}  # nothing to compare the others with
    new = [name for name in names if name not in known]
    if all(_share(name, first) * steps <= 2 * _FEWEST for name in new):  # taking turns alone would cost more
        return _recalled(first, build, steps, known, f"nothing tried, with {steps:.0f} steps ahead")
    once = known[first.backend].call if known else _least(first, inputs)
    bids = {name: _bid(name, first, once, steps, known) for name in names}
    built, skipped = [first], []
    for name in sorted(names, key=lambda name: name in known):  # those known, only if there is one to compare with them
        if not bids[name].pays:
            skipped += [] if name in known else [f"{name} {bids[name]}"]
        elif (name not in known or len(built) > 1) and _runs(segment := build(name), name):
            built.append(segment)
        elif name not in known:
            skipped.append(f"{name} can't run it: {_why(segment)}")
    if len(built) == 1:
        return _recalled(first, build, steps, known, "nothing tried", skipped)
    medians = _medians(built, inputs, budget=min(_LONGEST, _LEAST_GAIN * once * steps))
    sound = [segment for segment in built if _runs(segment, segment.backend)]  # the times of others are not their own
    skipped += [f"{segment.backend} failed: {_why(segment)}" for segment in built if segment not in sound]
    timings.add(case, {s.backend: Times(medians[s.backend], s.seconds) for s in sound})
    quickest = min(sound, key=lambda s: medians[s.backend], default=first)
    stays = first in sound and medians[quickest.backend] >= _CLEARLY * medians[first.backend]
    chosen = first if stays else quickest
    figures = _figures({segment.backend: medians[segment.backend] for segment in sound})
    chosen.notes += ("; ".join([f"auto: {figures}", *skipped]),)
    return chosen


class _Bid(NamedTuple):
    """cost: seconds of building a backend and of its turns; gain: seconds that it might win."""

    cost: float
    gain: float

    @property
    def pays(self) -> bool:
        return self.cost <= self.gain

    def __str__(self) -> str:
        return f"takes {seconds_text(self.cost)} to build and might win {seconds_text(self.gain)}"


def _bid(name: str, first: Segment, once: float, steps: float, known: Mapping[str, Times]) -> _Bid:
    """As it was measured, or else as is to be expected. once: seconds of a call by the first choice."""
    turns = 2 * _FEWEST * once
    if name in known:
        return _Bid(known[name].build + turns, (once - known[name].call) * steps)
    return _Bid(_PRIORS[name].build * len(first.plain.graph.nodes) + turns, _share(name, first) * once * steps)


def _share(name: str, first: Segment) -> float:
    """Of the time of the first choice, what a backend is expected to save."""
    return max(_LEAST_GAIN, 1 - _PRIORS[name].share / _PRIORS[first.backend].share)


def _recalled(
    first: Segment,
    build: Callable[[str], Segment],
    steps: float,
    known: Mapping[str, Times],
    idle: str,
    skipped: Sequence[str] = (),
) -> Segment:
    """The same by what was measured before. idle: what to say where nothing was."""
    chosen, note = first, idle
    if len(known) > 1:
        costs = {name: times.call * steps + times.build for name, times in known.items() if name != first.backend}
        best = min(costs, key=costs.__getitem__)
        if costs[best] < _CLEARLY * known[first.backend].call * steps and _runs(rival := build(best), best):
            chosen = rival
        figures = _figures({name: t.call for name, t in known.items()})
        note = f"{figures}, measured before; counted for {steps:.0f} steps, with the building"
    chosen.notes += ("; ".join([f"auto: {note}", *skipped]),)
    return chosen


def _why(segment: Segment) -> str | None:
    return segment.uncompiled or segment.reason


def _runs(segment: Segment, name: str) -> bool:
    return segment.reason is None and segment.runs_by == name


def _medians(built: Sequence[Segment], inputs: Sequence[Any], budget: float) -> dict[str, float]:
    """Seconds of a call by backend, and of what follows it: medians of as many turns as ``budget`` seconds allow."""
    seconds: dict[str, list[float]] = {segment.backend: [] for segment in built}
    few = few_samples(inputs) or inputs
    warm_up = 1 if built[0].graphs is None else 1 + AFTER  # of recording too
    began = time.perf_counter()
    for turn in range(-warm_up, _MOST):
        if turn >= _FEWEST and time.perf_counter() - began > budget:
            break
        for segment in built:
            took = _seconds(segment, segment, *inputs) + _seconds(segment, built[0].native, *few)
            if turn >= 0:
                seconds[segment.backend].append(took)
    return {name: statistics.median(took) for name, took in seconds.items()}


def _least(segment: Segment, inputs: Sequence[Any]) -> float:
    """Seconds of a call on a machine that may be busy: the least of some, of two where they are long."""
    taken = [_seconds(segment, segment, *inputs) for _ in range(2)]
    while len(taken) < _MOST and sum(taken) < _SHORT:
        taken.append(_seconds(segment, segment, *inputs))
    return min(taken)


def _seconds(segment: Segment, function: Callable[..., object], *inputs: Any) -> float:
    """That a call takes on the segment's device."""
    _wait(segment)
    began = time.perf_counter()
    function(*inputs)
    _wait(segment)
    return time.perf_counter() - began


def _wait(segment: Segment) -> None:
    if segment.computation.device == "cuda":
        torch.cuda.synchronize()


def _figures(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds_text(took)}" for name, took in sorted(seconds.items(), key=lambda item: item[1]))
