"""Is freezing worth its time? Candidates against the frontier of plain training cut to as much time.

The choice among candidates looks at validation accuracy alone. The best of many by the same seeds is flattered by luck, so
it is called the leader here, and only fresh seeds and the test split make a winner of it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from bench.candidates import PUBLISHED, SHORTER, parted
from fxfreeze.compare import Row
from fxfreeze.verdict import Average, average, half_width


@dataclass(frozen=True)
class Figures:
    """What one run did. seconds: of training alone, freeze events included, corrected for the machine's pace."""

    steps: int
    seconds: float
    raw_seconds: float
    build_seconds: float
    flops: float
    validation: float
    test: float
    diverged: int | None

    @classmethod
    def of(cls, row: Row) -> "Figures":
        return cls(
            steps=row.steps,
            seconds=row.seconds,
            raw_seconds=row.raw_seconds,
            build_seconds=row.build_seconds,
            flops=row.flops,
            validation=row.record.evaluations[-1].accuracy,
            test=row.test,
            diverged=row.record.diverged,
        )


Seed = Mapping[str, Figures]  # the runs of one seed, by name


@dataclass(frozen=True)
class Standing:
    """A run over all seeds, against plain training for as much time.

    share: its time over plain's; margin: validation accuracy less that of plain cut to that share, seed by seed;
    half_width: of the margin's 95% interval over seeds; None where it can't be told. needed: the share of its time in which
    plain reaches the same validation accuracy; None if in no length that was trained.
    """

    name: str
    share: Average
    flops: Average
    validation: Average
    test: Average
    margin: Average | None
    half_width: float | None
    needed: float | None

    @property
    def leads(self) -> bool:
        return self.margin is not None and self.half_width is not None and self.margin.mean > self.half_width


def frontier(seed: Seed, split: Literal["validation", "test"] = "validation") -> list[tuple[float, float]]:
    """(share of plain's steps, accuracy) of each length of plain; steps of equal code take equal time."""
    lengths = [figures for name, figures in seed.items() if name == "plain" or name.startswith(SHORTER)]
    return sorted((figures.steps / seed["plain"].steps, getattr(figures, split)) for figures in lengths)


def accuracy_at(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """The frontier at `share`, on the line between the two lengths around it; None beyond the shortest and the longest."""
    for (a, low), (b, high) in pairwise(points):
        if a <= share <= b:
            return low + (high - low) * (share - a) / (b - a)
    return None


def share_at(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The least share at which the frontier reaches `accuracy`, the shortest length at the least; None if it never does."""
    if points[0][1] >= accuracy:
        return points[0][0]
    for (a, low), (b, high) in pairwise(points):
        if low < accuracy <= high:
            return a + (b - a) * (accuracy - low) / (high - low)
    return None


def standings(seeds: Sequence[Seed]) -> list[Standing]:
    """Every run that all seeds have, in order."""
    frontiers = [frontier(seed) for seed in seeds]
    common = [
        (share, statistics.fmean(points[i][1] for points in frontiers)) for i, (share, _) in enumerate(frontiers[0])
    ]
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    return [_standing(name, seeds, frontiers, common) for name in names]


def _standing(
    name: str,
    seeds: Sequence[Seed],
    frontiers: Sequence[list[tuple[float, float]]],
    common: Sequence[tuple[float, float]],
) -> Standing:
    rows = [seed[name] for seed in seeds]
    share = average([row.seconds / seed["plain"].seconds for row, seed in zip(rows, seeds, strict=True)])
    rivals = [accuracy_at(points, share.mean) for points in frontiers]
    candidate = bool(parted(name)[1])
    margins = [
        row.validation - rival for row, rival in zip(rows, rivals, strict=True) if candidate and rival is not None
    ]
    validation = average([row.validation for row in rows])
    return Standing(
        name=name,
        share=share,
        flops=average([row.flops / seed["plain"].flops for row, seed in zip(rows, seeds, strict=True)]),
        validation=validation,
        test=average([row.test for row in rows]),
        margin=average(margins) if margins else None,
        half_width=half_width(margins) if len(margins) > 1 else None,
        needed=share_at(common, validation.mean) if candidate else None,
    )


def contenders(found: Sequence[Standing]) -> list[Standing]:
    """Those that may win: the published recipe is there to be compared with."""
    return [each for each in found if parted(each.name)[1] and parted(each.name)[0] != PUBLISHED]


def leader(found: Sequence[Standing]) -> Standing | None:
    """Of those that are ahead by more than their seeds' spread, the one that is furthest; None if none is."""
    ahead = [each for each in contenders(found) if each.leads]
    return max(ahead, key=lambda each: each.margin.mean if each.margin else -math.inf, default=None)


@dataclass(frozen=True)
class Confirmation:
    """A leader against plain cut to its time, by the test split on fresh seeds. won: by more than the noise."""

    name: str
    seeds: list[int]
    won: bool
    verdict: str
    caution: str


def verdict(seeds: Sequence[Seed], confirmation: Confirmation | None) -> str:
    """Who wins, or that none does, in one to three sentences that claim no more than the runs can tell."""
    if not seeds:
        return "No seed came to its end: nothing is concluded."
    if len(seeds) == 1:
        return "None wins by one seed, which can't tell luck from gain; try --seeds 3."
    found = contenders(standings(seeds))
    first = leader(found)
    if first is None:
        return f"None wins: {_nearest(found)}."
    best = f"the best of {len(found)} on these seeds, at {_points(first)} of validation accuracy over plain cut to its time"
    if confirmation is None or confirmation.name != first.name:
        return f"{first.name} is {best}; luck flatters the best of several, and the fresh seeds that tell were not run."
    heard = f"{confirmation.verdict} {confirmation.caution}"
    if confirmation.won:
        return f"{first.name} wins. It was {best}; then on fresh seeds: {heard}"
    return f"None wins. {first.name} was {best}; but on fresh seeds: {heard}"


def _nearest(found: Sequence[Standing]) -> str:
    told = [each for each in found if each.margin is not None]
    if not told:
        return "no candidate took a time that plain training was cut to (--shares)"
    best = max(told, key=lambda each: each.margin.mean if each.margin else -math.inf)
    return (
        f"no candidate beats plain training cut to its time by more than the seeds' spread; the nearest, {best.name}, "
        f"stands at {_points(best)} of validation accuracy"
    )


def _points(standing: Standing) -> str:
    assert standing.margin is not None
    assert standing.half_width is not None
    return f"{100 * standing.margin.mean:+.1f} ± {100 * standing.half_width:.1f} points"
