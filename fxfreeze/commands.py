"""The verbs of the command line: each prepares everything that can be refused, then runs, then reports."""

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fxfreeze import checkpoint, cost, machine, page, report
from fxfreeze.batches import Batches
from fxfreeze.compare import Arena, Trial, Watch, advance
from fxfreeze.contest import Contest, Finetune, FromScratch, check_cache, choose, run_trial, scheduled
from fxfreeze.drawn import frozen_part
from fxfreeze.imports import ChoiceError
from fxfreeze.progress import RECENT_STEPS, display, figures, stop_on_interrupt
from fxfreeze.recipes import Settings, from_scratch
from fxfreeze.task import Task
from fxfreeze.train import Run
from fxfreeze.verdict import caution, verdict

TABLE_WIDTH = 140
_TRACED = 8  # images that the frozen part is traced and checked with
DIVERGED = 1  # the exit status of a training whose loss is not finite at its end
INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


def run_compare(
    task: Task,
    settings: Settings,
    *,
    rows: Collection[str] | None,
    seeds: int,
    block: int,
    finetune: bool,
    out: Path,
    command: str,
    progress: bool,
) -> int:
    """Compares, prints the table and the verdict, and writes the report into `out`; the exit status."""
    contest: Contest = Finetune(task, settings) if finetune else FromScratch(task, settings)
    chosen = choose(contest, rows)
    check_cache(contest, settings, chosen)
    prediction = _predict(contest, settings.seed)
    trials: list[Trial] = []
    console, aside = wide_console(), Console(stderr=True)
    with claimed(out), stop_on_interrupt(aside) as stop:
        with display(aside, shown=progress) as watch:
            for seed in range(settings.seed, settings.seed + seeds):
                named = _with_seed(watch, seed) if seeds > 1 else watch
                each = dataclasses.replace(settings, seed=seed)
                trial = None if stop() else run_trial(contest, each, chosen, block, named, stop)
                trials += [] if trial is None else [trial]
        if not trials:
            aside.print("Stopped before any contender took a step: there is nothing to report.", highlight=False)
            return INTERRUPTED
        result = report.Report(
            command=command,
            subject={"network": task.model, "data": task.data, "kind": contest.kind},
            settings=settings,
            trials=trials,
            prediction=prediction,
            environment=machine.environment(task.device),
        )
        console.print(report.table(result))
        marked = [f"- {note}" for note in report.notes(result)]
        for line in (*marked, "", verdict(trials), caution(trials)):
            console.print(line, highlight=False, soft_wrap=True)
        with refusing(f"the report can't be written to {out}"):
            path = page.write(result, out)
    console.print(f"Report: {path}", highlight=False, soft_wrap=True)
    if stop():
        return INTERRUPTED
    return DIVERGED if any(row.record.diverged for trial in trials for row in trial.rows.values()) else 0


def run_train(
    task: Task,
    settings: Settings,
    *,
    row: str,
    block: int,
    save: Path | None,
    state: dict[str, Any] | None,
    progress: bool,
) -> int:
    """Trains one row from the start or from `state`, saving at the end of each epoch, at the end and at Ctrl-C."""
    recipe = from_scratch(settings, task.steps(settings))[row]
    run = Run(task.build(settings.seed), recipe, settings, Batches(task.train, settings.batch_size, settings.seed))
    if state is not None:
        run.load_state_dict(state)
    about = describe(task, settings, row)
    arena = Arena(task.train, task.val, task.test, settings, block)
    console, aside = Console(), Console(stderr=True)
    with stop_on_interrupt(aside) as stop, display(aside, shown=progress) as watch:
        saved = run.step // run.batches.steps_per_epoch
        while not run.done and not stop():
            advance(run, run.step + block, arena, watch, stop)
            if save is not None and (run.done or stop() or run.step // run.batches.steps_per_epoch > saved):
                saved = run.step // run.batches.steps_per_epoch
                with refusing(f"the checkpoint can't be written to {save}"):
                    checkpoint.save(save, run=run.state_dict(), about=about)
    if not run.done:
        kept = f"go on with: fxfreeze train --resume {save} --save {save}" if save is not None else "nothing was saved"
        console.print(f"Stopped after step {run.step} of {recipe.steps}; {kept}.", highlight=False, soft_wrap=True)
        return INTERRUPTED
    if not run.record.losses:
        console.print(f"This run has taken all of its {recipe.steps} steps: nothing is left to train.", highlight=False)
        return 0
    taken, seconds = len(run.record.losses), run.record.seconds
    recent = f"{row}, last {min(RECENT_STEPS, taken)} steps: {figures(run)}"
    whole = (
        f"{taken} steps in {seconds:.1f} s, {seconds / taken * 1e3:.1f} ms/step in the mean (freeze events "
        f"{run.build_seconds / seconds:.1%}); test accuracy {run.evaluate(task.test).accuracy:.1%}"
    )
    for line in (recent, whole):
        console.print(line, highlight=False, soft_wrap=True)
    if run.record.diverged:
        since = run.step - taken + run.record.diverged
        aside.print(
            f"{row} diverged: its loss is not a finite number since step {since}; try a lower --lr.",
            highlight=False,
            soft_wrap=True,
        )
        return DIVERGED
    return 0


def run_graph(task: Task, settings: Settings, *, depth: int | None, backend: str) -> int:
    """Prints the graph of the frozen part before and after the passes."""
    schedule = scheduled(FromScratch(task, settings))
    try:
        text = frozen_part(task.build(settings.seed), schedule, (task.train.images[:_TRACED],), depth, backend)
    except ValueError as error:
        raise ChoiceError(str(error)) from error
    print(text)
    return 0


def run_plan(task: Task, settings: Settings, *, out: Path) -> int:
    """Prints what the schedule would save on this network, and draws it into `out`."""
    contest = FromScratch(task, settings)
    planned = cost.plan(task.build(settings.seed), scheduled(contest), (task.train.images[: settings.batch_size],))
    console = wide_console()
    console.print(planned.table())
    if settings.steps_scale != 1:
        steps, cost_share = task.steps(settings), settings.steps_scale * (1 - planned.saving(cached=False))
        console.print(
            f"At --steps-scale {settings.steps_scale:g} the whole costs {cost_share:.2f}x of the {steps:,} steps of plain "
            f"training that compare sets against it.",
            highlight=False,
            soft_wrap=True,
        )
    with claimed(out):
        path = out / "plan.svg"
        planned.plot(path)
    console.print(f"Picture: {path}", highlight=False, soft_wrap=True)
    return 0


def describe(task: Task, settings: Settings, row: str) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    return {"model": task.model, "data": task.data, "row": row, **dataclasses.asdict(settings)}


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Makes `directory` before the work that ends in it; takes it away again if nothing came to be in it."""
    with refusing(f"--out {directory} can't be a folder to write to"):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not any(directory.iterdir()):
            directory.rmdir()


def wide_console() -> Console:
    """Standard output, as wide as a table needs where no terminal sets the width."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise ChoiceError(f"{what}: {error.strerror or error}") from error


def _predict(contest: Contest, seed: int) -> report.Prediction:
    planned = cost.plan(contest.task.build(seed), scheduled(contest), (contest.task.train.images[:2],))
    return report.Prediction(planned.saving(cached=False), planned.saving(cached=True))


def _with_seed(watch: Watch, seed: int) -> Watch:
    return lambda name, run: watch(f"{name} #{seed}", run)
