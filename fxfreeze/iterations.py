"""What an iteration takes, part by part: as it was measured, and as FLOPs alone predict it."""

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from fxfreeze.cost import BACKWARD_RATIO

__all__ = ["Iteration", "Parts", "flops_of", "midmean", "predict"]


@dataclass(frozen=True)
class Parts:
    """Seconds of an iteration: fetching its batch, the frozen prefix, the live suffix's forward with the loss, the
    backward, the optimizer's step."""

    data: float
    prefix: float
    suffix: float
    backward: float
    optimizer: float

    @property
    def computed(self) -> float:
        """Of what FLOPs are counted of: forward and backward."""
        return self.prefix + self.suffix + self.backward

    @property
    def total(self) -> float:
        return self.data + self.computed + self.optimizer


def midmean(taken: Sequence[Parts]) -> Parts:
    """Part by part, the mean over the middle half of ``taken``, by total: robust as a median, and the parts add up."""
    ordered = sorted(taken, key=lambda parts: parts.total)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return Parts(*map(statistics.fmean, zip(*map(astuple, middle), strict=True)))


@dataclass(frozen=True)
class Iteration:
    """An iteration at one depth.

    backend: what ran the prefix, None where there is none; measured: see ``midmean``; quartiles: the first and
    the third of the whole iteration's seconds; predicted: see ``predict``.
    """

    depth: int
    backend: str | None
    measured: Parts
    quartiles: tuple[float, float]
    predicted: Parts


def flops_of(unit_flops: Sequence[int], depth: int) -> float:
    """FLOPs of an iteration: forward of all units, backward of the live ones at ``BACKWARD_RATIO`` to their forward."""
    return sum(unit_flops) + BACKWARD_RATIO * sum(unit_flops[depth:])


def predict(unfrozen: Parts, unit_flops: Sequence[int], depth: int) -> Parts:
    """The parts at ``depth`` if all that was measured at depth 0 fell as the FLOPs fall.

    unfrozen: measured at depth 0, whose total this gives back; unit_flops: of a forward, by unit, not all 0. FLOPs take
    as long wherever they are, and data and optimizer, of which none are counted, fall like all the rest.
    """
    whole = flops_of(unit_flops, 0)
    share = flops_of(unit_flops, depth) / whole
    each = unfrozen.computed / whole  # seconds a FLOP, forward and backward alike
    frozen, live = sum(unit_flops[:depth]), sum(unit_flops[depth:])
    return Parts(
        data=share * unfrozen.data,
        prefix=frozen * each,
        suffix=live * each,
        backward=BACKWARD_RATIO * live * each,
        optimizer=share * unfrozen.optimizer,
    )
