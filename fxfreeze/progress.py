"""What a person sees while runs train: a live bar per run on a terminal, a line now and then elsewhere; and Ctrl-C."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fxfreeze.recipes import FINETUNE, FROM_SCRATCH
from fxfreeze.train import Run

RECENT_STEPS = 20
REFRESH_SECONDS = 0.2
LINE_SECONDS = 5.0
NAME_WIDTH = max(map(len, (*FROM_SCRATCH, *FINETUNE)))


class Bars:
    """A bar per run. It is redrawn between blocks only: rich's own thread would take turns with the training."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn(f"{{task.description:<{NAME_WIDTH}}}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            auto_refresh=False,
            speed_estimate_period=3600,
        )
        self._tasks: dict[str, TaskID] = {}
        self._drawn = 0.0

    def __call__(self, name: str, run: Run) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=run.recipe.steps, figures="")
        self._progress.update(self._tasks[name], completed=run.step, figures=figures(run))
        if time.monotonic() - self._drawn > REFRESH_SECONDS or run.done:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.refresh()
        self._progress.stop()


class Lines:
    """A line per run at most each `LINE_SECONDS`, and one at its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def __call__(self, name: str, run: Run) -> None:
        now = time.monotonic()
        started = self._started.setdefault(name, now - run.record.seconds)
        if run.done or now - self._last.get(name, started) >= LINE_SECONDS:
            self._last[name] = now
            left = (now - started) * (run.recipe.steps - run.step) / max(1, len(run.record.losses))
            self._console.print(
                f"{name:<{NAME_WIDTH}} step {run.step}/{run.recipe.steps}  {figures(run)}  ETA {left:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Silence:
    """Shows nothing."""

    def __call__(self, name: str, run: Run) -> None:
        pass

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def display(console: Console, *, shown: bool) -> Bars | Lines | Silence:
    """What suits `console`."""
    if not shown:
        return Silence()
    return Bars(console) if console.is_terminal else Lines(console)


@contextmanager
def counted(console: Console, what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of how many ``what`` there have been: a bar on a terminal, a line now and then elsewhere."""
    began = last = time.monotonic()
    bar = Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(what),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        auto_refresh=False,  # rich's own thread would take turns with what is measured
        transient=True,
        disable=not (shown and console.is_terminal),
    )
    task = bar.add_task(what)

    def show(done: int, of: int) -> None:
        nonlocal last
        bar.update(task, completed=done, total=of)
        now = time.monotonic()
        if shown and now - last >= (REFRESH_SECONDS if console.is_terminal else LINE_SECONDS):
            last = now
            bar.refresh()
            if not console.is_terminal:
                eta = f"ETA {(now - began) * (of - done) / done:.0f} s"
                console.print(f"{done}/{of} {what}  {eta}", highlight=False, soft_wrap=True)

    with bar:
        yield show


def figures(run: Run) -> str:
    """Loss, frozen depth, time of an iteration, and accuracy on the validation split, as they stand now."""
    record = run.record
    loss = statistics.fmean(record.losses[-RECENT_STEPS:]) if record.losses else float("nan")
    seconds = statistics.median(record.step_seconds[-RECENT_STEPS:]) if record.step_seconds else float("nan")
    units = 1 if run.model is None else len(run.model.units)
    depth = f"  depth {run.depth:>2}/{units - 1}" if units > 1 else " " * 12
    accuracy = f"{record.evaluations[-1].accuracy:6.1%}" if record.evaluations else "     -"
    return f"loss {loss:6.3f}{depth}  {seconds * 1e3:6.1f} ms/step  val {accuracy}"


class Stop:
    """Whether the user pressed Ctrl-C: calling it says so, and runs then end after the step they are in."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


@contextmanager
def stop_on_interrupt(console: Console) -> Iterator[Stop]:
    """The first Ctrl-C in the block asks for an orderly end; the second one ends at once."""
    stop = Stop()
    before: Any = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.print(
            "Stopping after this step to score and keep what was trained; Ctrl-C again leaves at once.", highlight=False
        )

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
