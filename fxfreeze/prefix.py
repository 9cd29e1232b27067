"""What runs for the frozen part, as it is shown: a paragraph a segment."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from fxfreeze.rewrite import Outcome
from fxfreeze.runtime import Segment
from fxfreeze.sizes import dtype_text, seconds_text

__all__ = ["Prefix", "describe"]

_REASONS = 12  # places with a reason that are printed for each thing a pass did


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
        frozen = f"prefix: {self.depth} frozen unit{'s' if self.depth > 1 else ''}"
        if not self.segments:
            return f"{frozen}, built at the next forward"
        return "\n".join([f"{frozen}, {self.build_seconds:.2f} s of building", *map(describe, self.segments)])

    __repr__ = __str__


def describe(segment: Segment) -> str:
    """One paragraph: what runs, how exact it is, what each pass did and why it left the rest."""
    operators = _calls(segment.rewritten or segment.plain)
    dtype = "int8" if segment.ranges is not None else _float_dtype(segment)
    check = "not checked" if segment.error is None else f"error {segment.error:.1e} (bound {segment.bound:.0e})"
    state = f"unrewritten: {segment.reason}" if segment.reason else "rewritten"
    if segment.compiled:
        state = f"compiled for {' and for '.join(map(str, segment.compiled))}"
    head = (
        f"segment {segment.start}-{segment.end}: backend {segment.backend}, {operators} operator{'s' * (operators != 1)} "
        f"({_calls(segment.plain)} traced), {dtype}, {state}, {check}, built in {seconds_text(segment.seconds)}, "
        f"{_took(segment)}"
    )
    uncompiled = [] if segment.uncompiled is None else [f"  not compiled: {segment.uncompiled}"]
    launched = [f"  {segment.graphs}"] if segment.graphs is not None and str(segment.graphs) else []
    notes = [f"  {note}" for note in segment.notes]
    return "\n".join([head, *_lines(segment.outcomes), *uncompiled, *launched, *notes])


def _took(segment: Segment) -> str:
    if (median := segment.times.median) is None:
        return "no call timed yet"
    seconds, samples = median
    return f"{seconds_text(seconds)} a call" + ("" if samples is None else f" of {samples} samples")


def _float_dtype(segment: Segment) -> str:
    autocast = segment.computation.autocast
    return "the model's dtype" if autocast is None else dtype_text(autocast)


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
