"""What a comparison reports: its table and the notes beside it, for the terminal, the page and the JSON alike."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fxfreeze.cached import CacheRecord
from fxfreeze.compare import Row, Trial
from fxfreeze.pace import DISTURBED
from fxfreeze.pictures import COLOURS
from fxfreeze.recipes import CACHED, INT8, SHORTS, Settings
from fxfreeze.sizes import bytes_text
from fxfreeze.verdict import Average, Summary, caution, finished, quantized, ratio, summarise, verdict

COLUMNS = (
    "row",
    "steps",
    "time, s",
    "time / plain",
    "ms / step",
    "FLOPs / plain",
    "freeze events",
    "validation",
    "test",
)
NONE = "-"
ORIGINS = {
    "forward": "from the data set",
    "disk": "from stores on disk",
    "ram": "from stores in RAM",
    "device": "from stores in the device's memory",
}
OURS = tuple(SHORTS.values())


@dataclass(frozen=True)
class Prediction:
    """Saving that the cost model predicts for the freezing rows, as a share of plain training's FLOPs per step."""

    uncached: float
    cached: float


@dataclass(frozen=True)
class Report:
    """A comparison, finished or stopped. subject: what was trained, by name; trials: one per seed, at least one."""

    command: str
    subject: dict[str, str]
    settings: Settings
    trials: Sequence[Trial]
    prediction: Prediction
    environment: dict[str, str]

    @property
    def shown(self) -> Sequence[Trial]:
        return finished(self.trials) or self.trials


def table(report: Report) -> Table:
    """The rows, for the terminal."""
    shown = Table(header_style="bold")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "row" else "right", no_wrap=column == "row")
    for summary in summarise(report.trials):
        shown.add_row(*cells(summary), style="bold" if summary.name in OURS else None)
    return shown


def notes(report: Report) -> list[str]:
    """What a reader needs to weigh the table, a sentence or three each."""
    lines = [
        "Time is training alone, freeze events included and evaluation left out, corrected in each round of turns for the "
        "machine's pace, which plain's own steps in it tell. FLOPs are those of convolutions and "
        "matrix products, forward and backward. Test accuracy was read once, at the end; no choice looked at it.",
    ]
    shares = [
        f"{build_share([trial.rows[name] for trial in report.shown]):.1%} of {name}'s{of}"
        for name, of in (("fxfreeze", " training time"), (INT8, " (quantizing included)"))
        if all(name in trial.rows for trial in report.shown)
    ]
    if shares:
        lines.append(f"Freeze events (trace, split, rewrite, self-check): {', '.join(shares)}.")
    if said := quantized(finished(report.trials)):
        lines.append(said)
    disturbed = statistics.fmean(trial.disturbed for trial in report.shown)
    if disturbed:
        lines.append(
            f"The machine was disturbed: in {disturbed:.0%} of the rounds plain's steps took more than {DISTURBED}x their "
            f"usual time. Times are corrected for it, but figures to quote need a quiet machine."
        )
    lines += _notes_on_short([trial for trial in report.shown if trial.identical is not None])
    lines += _notes_on_cache(report.shown[0])
    for trial in report.trials:
        lines += [
            f"{row.name} diverged (seed {trial.seed}): its loss is not a finite number since step {row.record.diverged}; try a "
            "lower --lr."
            for row in trial.rows.values()
            if row.record.diverged
        ]
        if not trial.finished:
            steps = ", ".join(f"{row.name} {row.steps}/{row.planned}" for row in trial.rows.values())
            lines.append(f"Stopped during seed {trial.seed}, after these steps: {steps}.")
    return lines


def as_json(report: Report) -> str:
    """All figures of the report, the series behind the pictures included."""
    content = {
        "verdict": verdict(report.trials),
        "caution": caution(report.trials),
        "notes": notes(report),
        "command": report.command,
        "subject": report.subject,
        "settings": dataclasses.asdict(report.settings),
        "environment": report.environment,
        "predicted_saving": dataclasses.asdict(report.prediction),
        "rows": [dataclasses.asdict(summary) for summary in summarise(report.trials)],
        "trials": [
            {**vars(trial), "rows": {name: _row_content(row) for name, row in trial.rows.items()}}
            for trial in report.trials
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def savings(report: Report) -> Iterator[tuple[str, float, str]]:
    """(label, share of a plain step, colour): without a cache, then with one; predicted, counted, measured of each."""
    summaries = {summary.name: summary for summary in summarise(report.trials)}
    theirs = "by-hand" if "by-hand" in summaries else "freezeout"
    for row, predicted, rows in (
        ("fxfreeze", report.prediction.uncached, (theirs, "fxfreeze")),
        (CACHED, report.prediction.cached, (CACHED,)),
    ):
        kind = "with a cache" if row == CACHED else "no cache"
        yield f"FLOPs predicted, {kind}", predicted, "#c8c8c0"
        base, counted = summaries.get("plain"), summaries.get(row)
        if base is not None and counted is not None and counted.relative_flops is not None:
            share = counted.relative_flops.mean * base.steps.mean / counted.steps.mean
            yield f"FLOPs counted, {kind}", 1 - share, "#8c8c84"
        for name in rows:
            if base is not None and name in summaries:
                yield (
                    f"time measured, {name}",
                    1 - summaries[name].step_seconds.mean / base.step_seconds.mean,
                    COLOURS[name],
                )


def cells(summary: Summary) -> list[str]:
    steps = f"{summary.steps.mean:.0f}"
    if summary.steps.mean < summary.planned.mean:
        steps += f" of {summary.planned.mean:.0f}"
    surgery = summary.build_share.mean > 0
    return [
        summary.name,
        steps,
        summary.seconds.show(".1f"),
        _relative(summary, summary.relative_seconds),
        f"{summary.step_seconds.mean * 1e3:.1f}",
        _relative(summary, summary.relative_flops),
        f"{summary.build_share.mean:.1%}" if surgery else NONE,
        summary.validation.show(".1%"),
        summary.test.show(".1%"),
    ]


def _relative(summary: Summary, share: Average | None) -> str:
    if share is None:
        return NONE
    return "1" if summary.name == "plain" else share.show(".2f")


def build_share(rows: Sequence[Row]) -> float:
    """Share of the rows' training time that went into freeze events."""
    return sum(row.build_seconds for row in rows) / sum(row.raw_seconds for row in rows)


def _notes_on_short(trials: Sequence[Trial]) -> Iterator[str]:
    if not trials:
        return
    for short, row in SHORTS.items():
        if all(short in trial.rows for trial in trials):
            seconds = ratio(trials, short, "plain").mean
            flops = statistics.fmean(trial.rows[short].flops / trial.rows["plain"].flops for trial in trials)
            longer = (
                f" Freezing cost more than plain training here, so {short} is longer than plain." if flops > 1 else ""
            )
            yield (
                f"{short} is as long as the time of {row} allows: {seconds:.2f}x of plain's time, {flops:.2f}x of its "
                f"FLOPs.{longer}"
            )
    drift = ", ".join(f"{trial.drift:.3f}x" for trial in trials)
    identical = ", ".join(f"{trial.identical:.3f}x" for trial in trials)
    yield (
        f"Plain training cut short ran last, when a step of plain took {drift} its earlier time, as blocks between showed. "
        f"So corrected, its steps took {identical} the time of plain's, which are the same code: that is the noise."
    )


def _notes_on_cache(trial: Trial) -> Iterator[str]:
    """Where the samples of the cached row came from."""
    for row in trial.rows.values():
        if row.cache is not None:
            samples: dict[str, int] = {}
            for epoch in row.cache.epochs:
                for origin, count in epoch["samples"].items():
                    samples[origin] = samples.get(origin, 0) + count
            total = sum(samples.values())
            if not total:
                continue
            shares = [
                f"{samples[origin] / total:.0%} {words}" for origin, words in ORIGINS.items() if origin in samples
            ]
            shares[0] = shares[0].replace("% ", "% of its samples came ")
            rates = [
                f"{bytes_text(rate)}/s {words}"
                for cold, words in ((True, "the first time"), (False, "later"))
                if (rate := _rate(row.cache, cold))
            ]
            read = f" Stores were read at {' and '.join(rates)}." if rates else ""
            yield f"{row.name} (seed {trial.seed}): {', '.join(shares)}.{read}"


def _rate(cache: CacheRecord, cold: bool) -> float | None:
    """Bytes per second of the epochs that read a store for the first time, or of the others; None if there are none."""
    epochs = [epoch for epoch in cache.epochs if epoch["cold"] is cold and epoch["seconds"]]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return sum(epoch["bytes"] for epoch in epochs) / seconds if seconds else None


def _row_content(row: Row) -> dict[str, Any]:
    content = {**vars(row), "correct": int(row.correct.sum()), "record": dataclasses.asdict(row.record)}
    content["cache"] = None if row.cache is None else dataclasses.asdict(row.cache)
    record = content["record"]
    record["step_seconds"] = [round(seconds, 6) for seconds in row.record.step_seconds]
    record["losses"] = [_finite(loss) for loss in row.record.losses]
    for evaluation in record["evaluations"]:
        evaluation["loss"] = _finite(evaluation["loss"])
    return content


def _finite(value: float) -> float | None:
    """JSON has no word for what a diverged loss becomes."""
    return value if math.isfinite(value) else None
