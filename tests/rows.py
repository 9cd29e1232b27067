"""Trials made up by hand, for the tests of what is said about them."""

from collections.abc import Sequence
from typing import Any

import torch

from fxfreeze import machine
from fxfreeze.cached import CacheRecord
from fxfreeze.compare import Row, Trial
from fxfreeze.recipes import FROM_SCRATCH, INT8, Settings
from fxfreeze.report import Prediction, Report
from fxfreeze.train import Evaluation, Record

SAMPLES = 1000


def make_row(
    name: str,
    *,
    seconds: float,
    right: int = 900,
    steps: int = 100,
    planned: int = 100,
    build: float = 0.0,
    loss: float = 1.0,
) -> Row:
    """A row that had the first `right` of the samples right."""
    freezing = name in ("freezeout", "fxfreeze", INT8, "fxfreeze+cache", "by-hand")
    units = ("stem", "block", "head") if freezing else ()
    depths = [min(2, 3 * i // steps) if freezing else 0 for i in range(steps)]
    served = depths if name == "fxfreeze+cache" else [0] * steps
    record = Record(seconds, 1.0, [loss] * steps, depths, served, [seconds / steps] * steps)
    record.evaluations = [Evaluation(i, seconds * i / steps, loss, 0.5 + 0.004 * i) for i in (steps // 2, steps)]
    return Row(
        name=name,
        about=f"about {name}",
        planned=planned,
        steps=steps,
        seconds=seconds,
        raw_seconds=seconds,
        build_seconds=build,
        evaluation_seconds=1.0,
        flops=seconds * 1e6,
        record=record,
        units=units,
        rates=[(i, [0.1 * (depths[i] <= u) for u in range(len(units) or 1)]) for i in range(0, steps, 10)],
        test=right / SAMPLES,
        correct=torch.arange(SAMPLES) < right,
        cache=make_cache() if name == "fxfreeze+cache" else None,
    )


def make_cache() -> CacheRecord:
    """One epoch computed, one read from disk but for a tenth, two from RAM."""
    traffic = [
        make_traffic(forward=1000),
        make_traffic(forward=100, disk=900, seconds=0.5, cold=True),
        make_traffic(ram=1000, seconds=0.125),
        make_traffic(ram=1000, seconds=0.125),
    ]
    return CacheRecord(["depth 1 is <stored>", "depth 2 is not stored: too little is left"], traffic)


def make_traffic(seconds: float = 0.0, *, cold: bool = False, **samples: int) -> dict[str, Any]:
    """A stored sample has a million bytes."""
    read = 1_000_000 * sum(count for origin, count in samples.items() if origin != "forward")
    bandwidth = read / seconds if seconds else None
    return {"samples": samples, "bytes": read, "seconds": seconds, "cold": cold, "bandwidth": bandwidth}


def make_trial(
    seed: int = 0, *, ours: int = 900, short: int = 900, plain: float = 20.0, finished: bool = True
) -> Trial:
    """All rows of a comparison from scratch but those of the cache."""
    rows = [
        make_row("plain", seconds=plain, right=950),
        make_row("freezeout", seconds=10.0, right=ours, steps=200, planned=200),
        make_row("fxfreeze", seconds=8.0, right=ours, steps=200, planned=200, build=0.16),
        make_row("plain-short", seconds=8.0, right=short, steps=round(800 / plain), planned=round(800 / plain)),
    ]
    return Trial(seed, {row.name: row for row in rows}, finished, drift=1.25, identical=1.01)


def make_int8_trial(seed: int = 0, *, right: int = 890) -> Trial:
    """With a row more, whose frozen part is int8. right: samples that it had right; fxfreeze had 900."""
    trial = make_trial(seed)
    trial.rows[INT8] = make_row(INT8, seconds=6.0, right=right, steps=200, planned=200, build=0.6)
    return trial


def make_cached_trial(
    seed: int = 0, *, ours: int = 900, short: int = 900, cached_short: int = 900, plain: float = 20.0
) -> Trial:
    """All rows. short, cached_short: samples that each rival had right."""
    trial = make_trial(seed, ours=ours, short=short, plain=plain)
    steps = round(400 / plain)
    rows = [
        make_row("fxfreeze+cache", seconds=4.0, right=ours, steps=200, planned=200, build=0.1),
        make_row("plain-short+cache", seconds=4.0, right=cached_short, steps=steps, planned=steps),
    ]
    trial.rows |= {row.name: row for row in rows}
    trial.rows = {name: trial.rows[name] for name in FROM_SCRATCH}
    return trial


def make_report(trials: Sequence[Trial]) -> Report:
    return Report(
        command="fxfreeze compare --rows '<i>x'",
        subject={"network": "net<1>", "data": "digits", "kind": "trained from scratch"},
        settings=Settings(),
        trials=trials,
        prediction=Prediction(0.4, 0.6),
        environment=machine.environment(torch.device("cpu")),
    )
