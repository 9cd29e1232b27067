"""Contenders trained on the same seed and data in interleaved blocks of steps, so that machine noise hits all alike.

Plain training cut short comes last, since its length follows from the time that a freezing row took; short blocks of plain
between its blocks tell how fast the machine is by then.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxfreeze.batches import Batches, Split
from fxfreeze.cached import CacheRecord
from fxfreeze.model import compile
from fxfreeze.pace import Pace, end_of_round
from fxfreeze.recipes import SHORTS, Recipe, Settings, plain, plain_short
from fxfreeze.schedule import FreezeOut
from fxfreeze.train import Record, Run, logits_of

WARM_UP_STEPS = 3
LEAST_EVALUATIONS = 10
PROBE_SHARE = 4  # plain-short trains this many steps for each one of the plain run that measures the drift


class Watch(Protocol):
    """Told how far a run is, between blocks and never within one: watching must not cost the watched."""

    def __call__(self, name: str, run: Run) -> None: ...


@dataclass(frozen=True)
class Arena:
    """What all contenders share: the splits, the settings (seed included), and the steps of a block of plain."""

    train: Split
    val: Split
    test: Split
    settings: Settings
    block: int = 20

    def batches(self) -> Batches:
        return Batches(self.train, self.settings.batch_size, self.settings.seed)


@dataclass
class Row:
    """What one contender did.

    seconds: training alone, freeze events (`build_seconds`) included, evaluation not, corrected by round for the machine's
    pace (where plain is among the rows); raw_seconds: as measured. flops: of its steps, forward and backward, convolutions
    and matrix products. rates: (step, each unit's learning rate), sampled. test: accuracy at the end; correct: [N] bool,
    by sample.
    """

    name: str
    about: str
    planned: int
    steps: int
    seconds: float
    raw_seconds: float
    build_seconds: float
    evaluation_seconds: float
    flops: float
    record: Record
    units: tuple[str, ...]
    rates: list[tuple[int, list[float]]]
    test: float
    correct: Tensor = field(repr=False)
    cache: CacheRecord | None = None


@dataclass
class Trial:
    """One seed. finished: every row that was asked for came to its end.

    drift: seconds of a plain step while those cut short ran, per second of one before; 1 without them. identical: their
    time per step over plain's, both corrected: equal code, so its distance from 1 is the noise of this
    measurement. disturbed: the share of all rounds in which the machine was much slower than usual.
    """

    seed: int
    rows: dict[str, Row]
    finished: bool
    drift: float = 1.0
    identical: float | None = None
    disturbed: float = 0.0


def compare(
    net: nn.Module,
    arena: Arena,
    recipes: Sequence[Recipe],
    *,
    shorts: Sequence[str],
    watch: Watch,
    stop: Callable[[], bool],
) -> Trial:
    """Trains a copy of `net` by each recipe, then `shorts` (which need plain, and the rows whose time they take).

    After `stop()` what was trained so far is scored and returned; rows that never took a step are left out.
    """
    warm_up(net, arena)
    runs = {recipe.name: _run(net, recipe, arena) for recipe in recipes}
    rounds = interleave(list(runs.values()), arena, watch, stop)
    base = runs["plain"] if "plain" in runs and runs["plain"].step else None
    pace = None if base is None else Pace(rounds, base.recipe.steps, base.record.step_seconds)
    seconds = {name: _seconds(run, pace) for name, run in runs.items()}
    trial = Trial(arena.settings.seed, {}, finished=all(run.done for run in runs.values()) and not shorts)
    if pace is not None:
        paces = [pace]
        for name in shorts:
            if not stop():
                step = seconds["plain"] / runs["plain"].step
                run = _run(net, plain_short(name, max(1, round(seconds[SHORTS[name]] / step))), arena)
                later = alternate(run, _run(net, plain(run.recipe.steps), arena), arena, pace.usual, watch, stop)
                if later is not None and run.step:
                    runs[name], seconds[name] = run, _seconds(run, later)
                    paces.append(later)
        trial.finished = all(run.done for run in runs.values()) and all(name in runs for name in shorts)
        trial.disturbed = sum(each.disturbed for each in paces) / sum(each.rounds for each in paces)
        if len(paces) > 1:
            trial.drift = statistics.median(value for each in paces[1:] for value in each.by_round)
            steps = sum(runs[name].step for name in shorts if name in runs)
            spent = sum(seconds[name] for name in shorts if name in runs)
            trial.identical = spent / steps / (seconds["plain"] / runs["plain"].step)
    runs = {name: run for name, run in runs.items() if run.step}
    depths = {depth for run in runs.values() for depth in (*run.record.depths, *run.record.served)}
    flops = step_flops(net, arena.train, arena.settings.batch_size, depths)
    trial.rows = {name: _row(run, arena, flops, seconds[name]) for name, run in runs.items()}
    return trial


def interleave(runs: Sequence[Run], arena: Arena, watch: Watch, stop: Callable[[], bool]) -> int:
    """Trains all runs to their ends in rounds: `arena.block` steps of the shortest, as large a share of the others.

    Returns the number of rounds.
    """
    rounds = math.ceil(min(run.recipe.steps for run in runs) / arena.block)
    for done in range(1, rounds + 1):
        turn = (done - 1) % len(runs)  # each run is first in turn, and so is after each other one
        for run in [*runs[turn:], *runs[:turn]]:
            advance(run, end_of_round(rounds, run.recipe.steps, done), arena, watch, stop)
    return rounds


def alternate(run: Run, probe: Run, arena: Arena, usual: float, watch: Watch, stop: Callable[[], bool]) -> Pace | None:
    """Trains `run` to its end with short blocks of `probe` before its blocks; the pace that these tell, if any ran.

    usual: seconds of a step of plain training before.
    """
    rounds, part = math.ceil(run.recipe.steps / arena.block), max(1, arena.block // PROBE_SHARE)
    for done in range(1, rounds + 1):
        probe.train(part, stop)
        advance(run, end_of_round(rounds, run.recipe.steps, done), arena, watch, stop)
    return Pace(rounds, rounds * part, probe.record.step_seconds, usual) if probe.step else None


def advance(run: Run, target: int, arena: Arena, watch: Watch, stop: Callable[[], bool]) -> None:
    """Trains `run` to step `target`, scoring the validation split as often as plain has epochs, and at the end."""
    target = min(target, run.recipe.steps)
    stride = math.ceil(run.recipe.steps / max(arena.settings.epochs, LEAST_EVALUATIONS))
    while run.step < target and not stop():
        start = run.step
        run.train(min(target, (start // stride + 1) * stride) - start, stop)
        if run.step > start and (run.step % stride == 0 or run.done):
            run.validate(arena.val)
        watch(run.recipe.name, run)


def warm_up(net: nn.Module, arena: Arena) -> None:
    """Starts threads and fills the allocators before anything is timed."""
    run = _run(net, plain(WARM_UP_STEPS), arena)
    run.train(WARM_UP_STEPS)
    run.evaluate(arena.val)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step by depth: forward and backward of everything; of those, the frozen part's forward."""

    step: dict[int, int]
    frozen: dict[int, int]

    def of(self, record: Record) -> float:
        """All steps of a run; what was read from a cache was not computed."""
        pairs = zip(record.depths, record.served, strict=True)
        return float(sum(self.step[depth] - self.frozen[served] for depth, served in pairs))


def step_flops(net: nn.Module, split: Split, batch_size: int, depths: Iterable[int]) -> StepFlops:
    """FLOPs of convolutions and matrix products.

    Counted by torch's counter on a copy, with two samples: the count is linear in the batch.
    """
    images, labels = split.images[:2], split.labels[:2]
    model = compile(
        copy.deepcopy(net).to(images.device), FreezeOut(1), example_inputs=(images,), backend="plain"
    ).train()
    whole, frozen = {}, {0: 0}
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        for depth in sorted(depths):
            model.freeze(depth)
            with FlopCounterMode(display=False) as counter:
                loss = F.cross_entropy(logits_of(model.original(images)), labels)
                loss.backward()  # type: ignore[no-untyped-call]
            whole[depth] = counter.get_total_flops() * batch_size // 2
            if depth:
                model(images)
                with FlopCounterMode(display=False) as counter:
                    model.prefix.segments[0](images)
                frozen[depth] = counter.get_total_flops() * batch_size // 2
    return StepFlops(whole, frozen)


def _run(net: nn.Module, recipe: Recipe, arena: Arena) -> Run:
    return Run(copy.deepcopy(net), recipe, arena.settings, arena.batches())


def _seconds(run: Run, pace: Pace | None) -> float:
    """All seconds of a run, those of its steps corrected."""
    if pace is None:
        return run.record.seconds
    steps = run.record.step_seconds
    return run.record.seconds - sum(steps) + pace.corrected(run.recipe.steps, steps)


def _row(run: Run, arena: Arena, flops: StepFlops, seconds: float) -> Row:
    recipe, record = run.recipe, run.record
    if not record.evaluations or record.evaluations[-1].step != run.step:  # stopped within an epoch
        run.validate(arena.val)
    score = run.evaluate(arena.test)
    sampled = range(0, recipe.steps, max(1, recipe.steps // 200))
    return Row(
        name=recipe.name,
        about=recipe.about,
        planned=recipe.steps,
        steps=run.step,
        seconds=seconds,
        raw_seconds=record.seconds,
        build_seconds=run.build_seconds,
        evaluation_seconds=record.evaluation_seconds,
        flops=flops.of(record),
        record=record,
        units=() if run.model is None else tuple(unit.name for unit in run.model.units),
        rates=[(step, run.rates(step)) for step in sampled],
        test=score.accuracy,
        correct=score.correct,
        cache=run.cache,
    )
