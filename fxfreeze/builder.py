"""By which backend a segment runs: as the user said, as an earlier build decided, or as is fastest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfreeze.auto import choose, first_choice, rivals
from fxfreeze.backends import BACKENDS, Backend, candidates, is_here, quantizing, remark
from fxfreeze.building import DECIDED, TRANSFORMED, build
from fxfreeze.chain import Span
from fxfreeze.computation import Computation
from fxfreeze.layouts import kind_of
from fxfreeze.likeness import digest
from fxfreeze.runtime import Segment
from fxfreeze.timings import Timings, case_of

__all__ = ["Builder", "Decision", "DecisionKey", "Site"]


class Decision(NamedTuple):
    """How a segment was decided to run, kept for resuming.

    start, end: depths of its boundaries; graph: a digest of its operators, by which training's is told from eval's;
    ranges: by which int8 was calibrated, for a resumed run to round alike.
    """

    start: int
    end: int
    graph: str
    dtype: str
    backend: str
    rewritten: bool
    ranges: list[float] | None = None

    @property
    def key(self) -> "DecisionKey":
        return self.start, self.end, self.graph, self.dtype


DecisionKey = tuple[int, int, str, str]


class Site(NamedTuple):
    """What a segment is built from.

    values: inputs as the original hands them over; native: as they were computed; steps: of training that will run it, 0
    where nothing may be tried; training: whether it is a training batch; restless: a tensor that it reads, and that
    changes again and again.
    """

    span: Span
    plain: GraphModule
    values: Sequence[Any]
    native: Sequence[Any]
    computation: Computation
    steps: float
    training: bool
    restless: str | None = None

    @property
    def transformed(self) -> bool:
        """Whether a transform of torch.func made the inputs."""
        return any(kind_of(t).transformed for t in self.native if isinstance(t, Tensor))

    @property
    def key(self) -> DecisionKey:
        return *self.span, digest(self.plain), self.computation.dtype_name

    @property
    def case(self) -> str:
        device = next((t.device for t in self.native if isinstance(t, Tensor)), torch.device(self.computation.device))
        return case_of(self.plain, self.native, self.computation.autocast, device)


@dataclass
class Builder:
    """Builds segments, and keeps in ``decisions`` how each runs; warn: tells the user something once."""

    backend: str
    decisions: dict[DecisionKey, Decision]
    warn: Callable[[str], None]

    def build(self, site: Site) -> Segment:
        """The segment by the first backend that can run it; the traced graph itself if none can."""
        earlier = None if site.transformed else self.decisions.get(site.key)
        settled = DECIDED if earlier and not earlier.rewritten else None
        if site.transformed:
            settled = TRANSFORMED
        elif site.restless is not None:
            settled = (
                f"it reads {site.restless.removeprefix('root.')!r}, which no frozen unit owns, and which keeps changing"
            )
        for name in (names := self._names(site, earlier)):
            segment = self._by(site, settled, name)
            if segment.reason == settled:
                break
            following = "Backend 'plain'" if name != names[-1] else "The plain graph"
            self.warn(f"the rewritten frozen part is not used: {segment.reason}. {following} runs instead")
        if (note := remark(segment.backend, site.computation.device)) is not None:
            segment.notes += (note,)
            self.warn(note)
        if not site.transformed and site.restless is None:
            segment.on_drop = partial(self._decide, site.key)
            may_change = segment.reason is None and segment.repeatable
            segment.undecided = self.backend == "auto" and earlier is None and may_change
            if not segment.undecided:
                self._decide(site.key, segment)
        return segment

    def settle(self, segment: Segment, site: Site) -> None:
        """Make an undecided segment the fastest that is worth building for the steps to come, if there are any.

        One that compiled code runs gets some for the first training batch too.
        """
        if segment.undecided and site.steps:
            names = [name for name in rivals(segment) if name != segment.backend]
            best = choose(segment, partial(self._by, site, None), names, site.native, site.steps, site.case, Timings())
            segment.become(best.retimed())  # in turns, with few samples too
            segment.undecided = False
            self._decide(site.key, segment)
        elif segment.compiled and site.training and not segment.trained and segment.compiled_for(site.native) is None:
            segment.compiled += self._by(site, None, segment.backend).compiled
        segment.trained |= site.training

    def _names(self, site: Site, earlier: Decision | None) -> list[str]:
        """What to try, in order."""
        wanted = first_choice(site.plain, site.computation) if self.backend == "auto" else self.backend
        names = candidates(wanted, None if earlier is None else earlier.backend)
        if earlier is not None and not is_here(earlier.backend):
            self.warn(
                f"the resumed run used backend {earlier.backend!r}, which is not available here: {names[0]!r} runs instead"
            )
        elif earlier is not None and self.backend not in ("auto", earlier.backend) and earlier.backend != "plain":
            self.warn(
                f"the resumed run used backend {earlier.backend!r}, and goes on so, not by {self.backend!r}: to choose anew, "
                f"empty state['decisions']['segments'] before FreezeScheduler.load_state_dict"
            )
        return names

    def _by(self, site: Site, settled: str | None, name: str) -> Segment:
        """The segment by one backend."""
        backend = self._backend(site, name)
        segment = build(site.span, site.plain, site.values, site.computation, backend, settled, site.native)
        segment.backend = name
        if segment.uncompiled is not None and site.computation.quantized:
            self.warn(f"the frozen part does not run in int8: {segment.uncompiled}. It runs in floating point")
        elif segment.uncompiled is not None and self.backend != "auto":
            self.warn(f"backend {name!r} did not compile the frozen part: {segment.uncompiled}. It runs uncompiled")
        return segment

    def _backend(self, site: Site, name: str) -> Backend:
        """int8 is calibrated once: whatever is built later for the same graph takes the same ranges."""
        if name != "openvino" or not site.computation.quantized:
            return BACKENDS[name]
        earlier = self.decisions.get(site.key)
        return quantizing(None if earlier is None else earlier.ranges)

    def _decide(self, key: DecisionKey, segment: Segment) -> None:
        """Take note of how a segment runs, for a resumed run to do the same."""
        self.decisions[key] = Decision(*key, segment.runs_by, segment.rewritten is not None, segment.ranges)
