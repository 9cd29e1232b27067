"""The ways to a model's boundary in one trace: from the tensors of a call, or from what is known at a shallower depth."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxfreeze.computation import Computation
from fxfreeze.frontier import Frontier
from fxfreeze.prefix import Prefix
from fxfreeze.runtime import Segment
from fxfreeze.split import Split, between, split
from fxfreeze.trace import Traced
from fxfreeze.units import Ownership

__all__ = ["Chain", "Make", "Span"]

Span = tuple[int, int]
# Of a span's plain graph, its inputs as the original hands them over, and as they were computed.
Make = Callable[[Span, GraphModule, Sequence[Any], Sequence[Any]], Segment]


@dataclass(eq=False)
class Chain:
    """Segments between depths of one trace, each built when it first runs.

    cut: at ``depth``, the model's; computation: how segments compute; make: builds them.
    """

    net: nn.Module
    traced: Traced
    ownership: Ownership
    depth: int
    cut: Split
    computation: Computation
    make: Make
    _plain: dict[Span, GraphModule | None] = field(default_factory=dict)
    _segments: dict[Span, Segment] = field(default_factory=dict)
    _frontiers: dict[int, Frontier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefix = Prefix(self.depth, ())  # what has been built so far

    def frontier(self, depth: int) -> Frontier:
        """The boundary at a depth up to the model's."""
        if depth not in self._frontiers:
            cut = self.cut if depth == self.depth else split(self.net, self.traced, self.ownership, depth)
            self._frontiers[depth] = Frontier(depth, cut.prefix, cut.boundary)
        return self._frontiers[depth]

    def reaches(self, start: int) -> bool:
        """Whether the model's boundary can be computed from that at ``start``; 0: the call's tensors."""
        return start == self.depth or self._between(start, self.depth) is not None

    def segment(self, span: Span, values: Sequence[Any], inputs: Sequence[Any]) -> Segment:
        """Between two depths of which the first reaches the second.

        values: at the first, as computed; inputs: of the call, or of one like it.
        """
        if span not in self._segments:
            plain = self._between(*span)
            assert plain is not None
            self._segments[span] = built = self.make(span, plain, self._as_original(span[0], values, inputs), values)
            self.prefix.segments = tuple(self._segments.values())
            if span[0] == 0:
                self.frontier(span[1]).layouts = built.layouts
        return self._segments[span]

    def advance(
        self, start: int, values: Sequence[Any], inputs: Sequence[Any], *, stops: Collection[int] = ()
    ) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """(depth, values as computed there), at each of ``stops`` that can be gone on from, and last at the model's depth.

        start: the depth of ``values``, below the model's; inputs: of the call, or of one like it with as many samples.
        """
        at, current = start, tuple(values)
        for point in [*sorted(stop for stop in stops if start < stop < self.depth and self.reaches(stop)), self.depth]:
            segment = self.segment((at, point), current, inputs)
            given = self._as_original(at, current, inputs) if segment.rewritten is None else current
            current, at = segment.native(*given), point
            yield at, current

    def _as_original(self, depth: int, values: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
        return values if depth == 0 else self.frontier(depth).layouts.imposed(values, inputs)

    def handed_over(self, values: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What was computed at the model's depth, as the original hands it over; ``inputs``: of a call like this one."""
        return self.frontier(self.depth).layouts.imposed(values, inputs)

    def _between(self, start: int, end: int) -> GraphModule | None:
        if start == 0:
            return self.frontier(end).plain
        if (start, end) not in self._plain:
            self._plain[start, end] = between(self.net, self.traced, self.ownership, start, end)
        return self._plain[start, end]
