"""What the figures of a comparison say: rows over seeds, and one or two plain sentences."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fxfreeze.compare import Row, Trial
from fxfreeze.recipes import INT8, SHORTS

# Student's t for a two-sided 95% interval, by degrees of freedom; beyond these the last serves, on the careful side.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

BELIEVED = 1.25  # times its own time, or less, that the same code may take once more

# Each freezing row and the rival that has as much time, the one that matters most first.
PAIRS = tuple((row, short) for short, row in reversed(SHORTS.items()))


@dataclass(frozen=True)
class Average:
    """Mean over seeds, and their sample standard deviation (None for one seed)."""

    mean: float
    spread: float | None

    def show(self, form: str) -> str:
        """As text, mean and spread in the same format; a common unit is said once."""
        mean = f"{self.mean:{form}}"
        return mean if self.spread is None else f"{mean.removesuffix('%')} ± {self.spread:{form}}"


@dataclass(frozen=True)
class Summary:
    """A row over all seeds. relative_*: as a share of plain's, seed by seed; build_share: freeze events in its time."""

    name: str
    about: str
    planned: Average
    steps: Average
    seconds: Average
    relative_seconds: Average | None
    relative_flops: Average | None
    step_seconds: Average
    build_share: Average
    validation: Average
    best_validation: Average
    test: Average


def average(values: Sequence[float]) -> Average:
    return Average(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def summarise(trials: Sequence[Trial]) -> list[Summary]:
    """One summary for each row, over the finished trials if there are any."""
    trials = finished(trials) or trials
    names = [name for name in trials[0].rows if all(name in trial.rows for trial in trials)]
    return [
        _summary([trial.rows[name] for trial in trials], [trial.rows.get("plain") for trial in trials])
        for name in names
    ]


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Those whose rows can be compared: each came to its end."""
    return [trial for trial in trials if trial.finished]


def verdict(trials: Sequence[Trial]) -> str:
    """One or two sentences on cost and accuracy that claim no more than the runs can tell."""
    whole = finished(trials)
    if not whole:
        return "Stopped before the end: the rows stand at different points of their training, so nothing is concluded."
    if said := untold(whole):
        return said
    sentences = [sentence for sentence in (cost(whole), accuracy(whole)) if sentence]
    if not sentences:
        ours, rival = PAIRS[0]
        return f"These rows leave nothing to conclude: {ours} and {rival} are the pair to compare."
    if len(whole) < len(trials):
        sentences.append(
            f"Stopped before the end: of {len(trials)} seeds, the {len(whole)} that came to it are counted."
        )
    return " ".join(sentences)


def untold(trials: Sequence[Trial]) -> str:
    """That the machine was too busy for any time to be believed; nothing where it was not."""
    ratios = [trial.identical for trial in trials if trial.identical is not None]
    if not ratios or 1 / BELIEVED <= statistics.geometric_mean(ratios) <= BELIEVED:
        return ""
    return (
        f"Nothing is concluded: plain's steps took {average(ratios).show('.2f')}x their own time once more, so the machine was "
        f"too busy to tell times, nor what is equal time. Run it again on a quiet one."
    )


def cost(trials: Sequence[Trial]) -> str:
    """What freezing's time was, next to the same without the cache, without surgery, and to plain training."""
    rows = trials[0].rows
    pair = _pair(trials)
    ours = next((row for row, _ in PAIRS if row in rows), None) if pair is None else pair[0]
    if ours is None:
        return ""
    rivals = {
        name: words
        for name, words in {
            "fxfreeze": "fxfreeze without the cache",
            "freezeout": "the same schedule without surgery",
            "by-hand": "the same backbone frozen by hand",
            "plain": "plain training",
        }.items()
        if name in rows and name != ours and not (name == "freezeout" and "by-hand" in rows)
    }
    if not any(_may_have_read(trial.rows[ours]) for trial in trials):
        rivals.pop("fxfreeze", None)  # the cache did nothing
    shares = [
        f"{ratio(trials, ours, name).show('.2f')}x {'that' if i else 'the time'} of {words}"
        for i, (name, words) in enumerate(rivals.items())
    ]
    return f"{ours} took {_listed(shares)}." if shares else ""


def _may_have_read(row: Row) -> bool:
    """Whether any of its samples came from what was stored, as far as is known."""
    return row.cache is None or any(epoch["samples"].keys() - {"forward"} for epoch in row.cache.epochs)


def _listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def ratio(trials: Sequence[Trial], name: str, rival: str) -> Average:
    """Time of one row over another's, seed by seed."""
    return average([trial.rows[name].seconds / trial.rows[rival].seconds for trial in trials])


def accuracy(trials: Sequence[Trial]) -> str:
    """Whether the freeze was worth more than the steps of plain training that its time would have bought."""
    pair = _pair(trials)
    if pair is None:
        return ""
    ahead, margin = gap(trials, pair)
    ours, theirs = (average([trial.rows[name].test for trial in trials]).show(".1%") for name in pair)
    lengths = [trial.rows[pair[1]].planned / trial.rows["plain"].planned for trial in trials]
    # Where freezing cost more than plain training, as much time buys plain more steps, not fewer.
    rival = "simply training for fewer steps" if statistics.fmean(lengths) < 1 else "plain training for as long"
    where = "here" if len(trials) > 1 else "in this one run"
    if abs(ahead) <= margin:
        return f"Freezing gained nothing {where}: {rival} tied, {theirs} test accuracy against {ours} at equal time."
    if ahead < 0:
        return f"Freezing lost {where}: {rival} was better, {theirs} test accuracy against {ours} at equal time."
    return f"Freezing won {where}: {ours} test accuracy against {theirs} for {rival} at equal time."


def caution(trials: Sequence[Trial]) -> str:
    """How far the verdict carries: what a gap must exceed to be told from noise, and what was not measured."""
    whole = finished(trials)
    pair = _pair(whole)
    if pair is None:
        return ""
    points = f"{100 * gap(whole, pair)[1]:.1f} points"
    if len(whole) == 1:
        return (
            f"One seed: gaps up to {points} are the test set's noise, and luck between seeds is unknown; try --seeds 5."
        )
    if len(whole) < 3:
        return f"{len(whole)} seeds can't tell luck from gain (gaps up to {points} could be either); try --seeds 5."
    return f"{len(whole)} seeds: mean gaps up to {points} are within the seeds' spread and the test set's noise."


def quantized(trials: Sequence[Trial]) -> str:
    """What int8 cost and gained beside the same run without it; nothing where one of the two is missing."""
    if not trials or not all(trial.rows.keys() >= {INT8, "fxfreeze"} for trial in trials):
        return ""
    ahead, margin = gap(trials, (INT8, "fxfreeze"))
    ours, theirs = (average([trial.rows[name].test for trial in trials]).show(".1%") for name in (INT8, "fxfreeze"))
    return (
        f"{INT8} took {ratio(trials, INT8, 'fxfreeze').show('.2f')}x the time of fxfreeze, and has {ours} test accuracy "
        f"against {theirs} ({100 * ahead:+.1f} ± {100 * margin:.1f} points). It is scored in floating point, as the network is "
        f"given back."
    )


def gap(trials: Sequence[Trial], pair: tuple[str, str]) -> tuple[float, float]:
    """(mean test accuracy of the pair's first less the second's, half width of its 95% interval).

    The wider of two intervals: over seeds, from the paired differences; over the test set, from the samples on which
    exactly one of the two is right (McNemar), since those b + c are all that the difference (b - c) / n rests on.
    """
    pairs = [tuple(trial.rows[name] for name in pair) for trial in trials]
    gaps = [ours.test - theirs.test for ours, theirs in pairs]
    differ = sum(int((ours.correct != theirs.correct).sum()) for ours, theirs in pairs)
    margin = 1.96 * math.sqrt(max(1, differ)) / sum(len(ours.correct) for ours, _ in pairs)
    if len(gaps) > 1:
        margin = max(margin, half_width(gaps))
    return statistics.fmean(gaps), margin


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of their mean; two values at least."""
    return T_95[min(len(values) - 1, max(T_95))] * statistics.stdev(values) / math.sqrt(len(values))


def _pair(trials: Sequence[Trial]) -> tuple[str, str] | None:
    """The freezing row and its rival that all trials have."""
    return next((pair for pair in PAIRS if trials and all(trial.rows.keys() >= set(pair) for trial in trials)), None)


def _summary(rows: Sequence[Row], plains: Sequence[Row | None]) -> Summary:
    pairs = [(row, base) for row, base in zip(rows, plains, strict=True) if base is not None]
    return Summary(
        name=rows[0].name,
        about=rows[0].about,
        planned=average([row.planned for row in rows]),
        steps=average([row.steps for row in rows]),
        seconds=average([row.seconds for row in rows]),
        relative_seconds=average([row.seconds / base.seconds for row, base in pairs]) if pairs else None,
        relative_flops=average([row.flops / base.flops for row, base in pairs]) if pairs else None,
        step_seconds=average([row.seconds / row.steps for row in rows]),
        build_share=average([row.build_seconds / row.raw_seconds for row in rows]),
        validation=average([row.record.evaluations[-1].accuracy for row in rows]),
        best_validation=average([max(e.accuracy for e in row.record.evaluations) for row in rows]),
        test=average([row.test for row in rows]),
    )
