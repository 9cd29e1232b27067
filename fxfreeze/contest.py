"""From a task to a comparison: who competes, and from which weights all of them start."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from torch import nn

from fxfreeze import recipes
from fxfreeze.backends import check_int8
from fxfreeze.batches import Batches
from fxfreeze.cached import rehearse, require_packages
from fxfreeze.compare import Arena, Trial, Watch, advance, compare
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import CACHED, INT8, SHORTS, Recipe, Settings, renew_head, units_of
from fxfreeze.schedule import Schedule
from fxfreeze.task import Task
from fxfreeze.train import Run


class Contest(Protocol):
    """kind: what is compared, in two words; task: what the contenders train on; recipes: theirs, by name, in order."""

    kind: str
    task: Task
    recipes: dict[str, Recipe]

    def start(self, seed: int, watch: Watch, stop: Callable[[], bool]) -> nn.Module | None:
        """The network that every contender of `seed` starts from; None if stopped before it was ready."""
        ...


class FromScratch:
    """All start from the same untrained network."""

    kind = "trained from scratch"

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task = task
        self.recipes = recipes.from_scratch(settings, task.steps(settings))
        units_of(task.build(settings.seed), task.train.images[:2])  # refuses what can't freeze before anything trains

    def start(self, seed: int, watch: Watch, stop: Callable[[], bool]) -> nn.Module | None:
        return self.task.build(seed)


class Finetune:
    """All start from a network trained on the first half of the classes, with a new head for the others."""

    kind = "fine-tuned to the other half of the classes"

    def __init__(self, task: Task, settings: Settings) -> None:
        if task.num_classes < 4:
            raise ChoiceError(
                f"--finetune splits the classes in half; {task.data} has {task.num_classes}, expected 4 or more"
            )
        middle = task.num_classes // 2
        self.settings = settings
        self.source = task.of_classes(range(middle))
        self.task = task.of_classes(range(middle, task.num_classes))
        units = units_of(self.task.build(settings.seed), self.task.train.images[:2])
        self.recipes = recipes.finetune(settings, self.task.steps(settings), units)

    def start(self, seed: int, watch: Watch, stop: Callable[[], bool]) -> nn.Module | None:
        settings = replace(self.settings, seed=seed)
        pretrained = self.source.build(seed)
        steps = self.source.steps(settings)
        run = Run(pretrained, recipes.plain(steps), settings, Batches(self.source.train, settings.batch_size, seed))
        arena = Arena(self.source.train, self.source.val, self.source.test, settings)
        while not run.done and not stop():
            advance(run, run.step + arena.block, arena, lambda _, each: watch("pretrain", each), stop)
        if not run.done:
            return None
        head = units_of(pretrained, self.source.train.images[:2])[-1]
        return renew_head(lambda: self.task.build(seed), pretrained, head)


def choose(contest: Contest, rows: Collection[str] | None) -> list[str]:
    """The rows to run, in the contest's order; None: all. Raises ChoiceError for a row that can't be."""
    known = [*contest.recipes, *SHORTS]
    rows = known if rows is None else rows
    if unknown := [row for row in rows if row not in known]:
        raise ChoiceError(f"--rows has {unknown[0]!r}; expected some of {','.join(known)}")
    for short, row in SHORTS.items():
        if short in rows and not {"plain", row} <= set(rows):
            raise ChoiceError(f"--rows has {short}, whose length follows from plain and {row}: name them too")
    if not rows:
        raise ChoiceError(f"--rows is empty; expected some of {','.join(known)}")
    if CACHED in rows:
        require_packages()
    if INT8 in rows:
        check_int8("auto")
    return [row for row in known if row in rows]


def check_cache(contest: Contest, settings: Settings, rows: Collection[str]) -> None:
    """Raises ChoiceError if the cached row is among `rows`, and this network or data can't be cached."""
    if CACHED in rows:
        rehearse(contest.task.build(settings.seed), Batches(contest.task.train, settings.batch_size, settings.seed))


def run_trial(
    contest: Contest, settings: Settings, rows: Collection[str], block: int, watch: Watch, stop: Callable[[], bool]
) -> Trial | None:
    """One seed of the contest, that of `settings`; None if stopped before any contender took a step."""
    net = contest.start(settings.seed, watch, stop)
    if net is None:
        return None
    arena = Arena(contest.task.train, contest.task.val, contest.task.test, settings, block)
    chosen = [recipe for name, recipe in contest.recipes.items() if name in rows]
    trial = compare(net, arena, chosen, shorts=[name for name in SHORTS if name in rows], watch=watch, stop=stop)
    return trial if trial.rows else None


def scheduled(contest: Contest) -> Schedule:
    """The schedule that the fxfreeze row follows."""
    schedule = contest.recipes["fxfreeze"].schedule
    assert schedule is not None
    return schedule
