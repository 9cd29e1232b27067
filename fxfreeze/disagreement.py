"""Where the measured time of an iteration is farthest from the predicted one, and which of the causes is the largest.

What a depth takes beyond its prediction is the sum of six causes, each from figures that were measured:
the optimizer and the data, of which no FLOPs are counted; a backward that does not take the counted multiple of the
forward; frozen units that are faster or slower than their FLOPs, and live ones; and what freezing changed in units that
were as fast before. A frozen unit's forward while it lived is what the live forward lost with it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fxfreeze.cost import BACKWARD_RATIO
from fxfreeze.iterations import Iteration, flops_of
from fxfreeze.pace import DISTURBED
from fxfreeze.sizes import change_text, seconds_text

__all__ = ["explain"]

_CLEARLY = 2  # standard errors
_ROUNDING = 0.01  # relative; what is no further apart prints alike
_FEWEST = 5  # rounds whose quartiles tell anything


class _Cause(NamedTuple):
    """seconds: by which it moves the iteration off its prediction; evidence: the figures that say so."""

    seconds: float
    evidence: str


def explain(iterations: Sequence[Iteration], units: Sequence[str], flops: Sequence[int], rounds: int) -> str:
    """The largest disagreement of all depths, in words.

    iterations: the first at depth 0; units: their names; flops: of their forwards, for the whole batch; rounds: that were
    measured.
    """
    unfrozen, *deeper = iterations
    if not deeper:
        return "Depth 0 alone was measured, by which the prediction is scaled: there is nothing to compare."
    worst = max(deeper, key=lambda each: abs(_off(each)))
    off, measured, predicted = _off(worst), worst.measured.total, worst.predicted.total
    figures = (
        f"{seconds_text(measured)} measured, {seconds_text(predicted)} predicted ({change_text(measured / predicted - 1)}), "
        f"at depth {worst.depth} (frozen up to {units[worst.depth - 1]})"
    )
    if rounds < _FEWEST:
        are = f"{rounds} rounds are" if rounds > 1 else "one round is"
        return f"The largest disagreement: {figures}; {are} too few to tell its cause: take {_FEWEST} or more."
    if disturbed := _disturbed((unfrozen, worst)):
        return f"The largest disagreement: {figures}. {disturbed}"
    error = math.hypot(_error(worst, rounds), predicted / unfrozen.measured.total * _error(unfrozen, rounds))
    if abs(off) <= _CLEARLY * error:
        return (
            f"The largest disagreement, {figures}, is within the noise (± {seconds_text(_CLEARLY * error)}): try more "
            f"rounds."
        )
    return f"The largest disagreement: {figures}. {_told(off, [*_causes(unfrozen, worst, flops)])}"


def _disturbed(iterations: Sequence[Iteration]) -> str:
    """What the quartiles say of the machine; nothing if it was quiet."""
    scattered = next((each for each in iterations if each.quartiles[1] > DISTURBED * each.quartiles[0]), None)
    if scattered is None:
        return ""
    low, high = scattered.quartiles
    return (
        f"The machine was disturbed: at depth {scattered.depth} a quarter of the iterations took {seconds_text(high)} or "
        f"more, and a quarter {seconds_text(low)} or less. No cause can be told; measure again on a quiet machine."
    )


def _told(off: float, causes: Sequence[_Cause]) -> str:
    """The largest cause that has the disagreement's sign, and what all others come to."""
    largest = max((cause for cause in causes if cause.seconds * off > 0), key=lambda cause: abs(cause.seconds))
    rest = off - largest.seconds
    share = "Most of it" if largest.seconds / off > 0.5 else "Its largest cause"
    others = f"; other causes add {_signed(rest)}" if abs(rest) > _ROUNDING * abs(off) else ""
    return f"{share}: {largest.evidence} ({_signed(largest.seconds)}){others}."


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{seconds_text(abs(seconds))}"


def _off(iteration: Iteration) -> float:
    return iteration.measured.total - iteration.predicted.total


def _error(iteration: Iteration, rounds: int) -> float:
    """About the standard error of the middle half's mean: 0.8 times the quartiles' distance over the root, if normal."""
    low, high = iteration.quartiles
    return (high - low) / math.sqrt(rounds)


def _causes(unfrozen: Iteration, deep: Iteration, flops: Sequence[int]) -> Iterator[_Cause]:
    """Six, whose seconds add up to what ``deep`` takes beyond its prediction."""
    before, now, predicted = unfrozen.measured, deep.measured, deep.predicted
    frozen, live, whole = sum(flops[: deep.depth]), sum(flops[deep.depth :]), sum(flops)
    yield _Cause(
        now.data - predicted.data,
        f"fetching a batch takes {seconds_text(now.data)}, of which no FLOPs are counted, so the prediction lets it fall "
        f"with them, to {seconds_text(predicted.data)}",
    )
    yield _Cause(
        now.optimizer - predicted.optimizer,
        f"the optimizer's step takes {seconds_text(now.optimizer)}, of which no FLOPs are counted, so the prediction lets "
        f"it fall with them, from {seconds_text(before.optimizer)} to {seconds_text(predicted.optimizer)}",
    )
    like_forward = before.suffix * frozen / whole  # the frozen units, if their FLOPs took as long as the forward's do
    yield _Cause(
        like_forward - predicted.prefix,
        f"at depth 0 the backward takes {before.backward / before.suffix:.2f}x the forward, and the prediction counts "
        f"{BACKWARD_RATIO:g}x, so that leaving it out for the frozen units saves "
        f"{'less' if like_forward > predicted.prefix else 'more'}",
    )
    alive = before.suffix - now.suffix  # the frozen units' forward, while they lived
    yield _Cause(
        alive - like_forward,
        f"at depth 0 the forward of the units that are frozen here ran at {_rate(frozen, alive)}, that of the whole "
        f"network at {_rate(whole, before.suffix)}: FLOPs are not what these units take their time for in proportion",
    )
    yield _Cause(
        now.prefix - alive,
        f"freezing changed the forward of the frozen units from {seconds_text(max(0.0, alive))} to "
        f"{seconds_text(now.prefix)} (backend {deep.backend}, no tape), which FLOPs do not show",
    )
    yield _Cause(
        now.suffix + now.backward - predicted.suffix - predicted.backward,
        f"the units that are live here, forward and backward, run at "
        f"{_rate((1 + BACKWARD_RATIO) * live, now.suffix + now.backward)}, the whole network at depth 0 at "
        f"{_rate(flops_of(flops, 0), before.computed)}: FLOPs are not what these units take their time for in proportion",
    )


def _rate(flops: float, seconds: float) -> str:
    return f"{flops / seconds / 1e9:,.1f} GFLOP/s" if seconds > 0 else "a rate too high to measure"
