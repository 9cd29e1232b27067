"""Times of runs that took turns, corrected for a machine that was slower in some rounds than in others.

In every round plain training takes steps too, always of the same cost, so their median tells the machine's pace.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise

DISTURBED = 1.5  # times the usual seconds of a step


class Pace:
    """The machine's pace, round by round. usual: seconds of a step of plain training when nothing disturbs it.

    rounds: of the turns that were taken; planned: steps that plain had to take in all of them; seconds: of its steps.
    """

    def __init__(self, rounds: int, planned: int, seconds: Sequence[float], usual: float | None = None):
        self.rounds = rounds
        self.usual = statistics.median(seconds) if usual is None else usual
        self.by_round: list[float] = []
        for part in _parts(rounds, planned, seconds):
            last = self.by_round[-1] if self.by_round else 1.0  # a run that was stopped may lack the last rounds
            self.by_round.append(statistics.median(part) / self.usual if part and self.usual else last)

    def corrected(self, planned: int, seconds: Sequence[float]) -> float:
        """What a run's steps would have taken all together at the usual pace."""
        parts = _parts(self.rounds, planned, seconds)
        return sum(sum(part) / pace for part, pace in zip(parts, self.by_round, strict=True))

    @property
    def disturbed(self) -> int:
        """Rounds in which the machine was much slower than usual."""
        return sum(pace > DISTURBED for pace in self.by_round)


def end_of_round(rounds: int, planned: int, done: int) -> int:
    """Steps that a run of ``planned`` steps has taken once ``done`` of all rounds are over."""
    return round(planned * done / rounds)


def _parts(rounds: int, planned: int, seconds: Sequence[float]) -> list[Sequence[float]]:
    ends = [end_of_round(rounds, planned, done) for done in range(rounds + 1)]
    return [seconds[begin:end] for begin, end in pairwise(ends)]
