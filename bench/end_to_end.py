"""The runs of one network on one data set: a search over candidates seed by seed, and its leader tried on fresh seeds.

What came to its end can be kept as JSON and taken up again; a seed that was stopped midway is begun anew.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.candidates import Candidate, parted, recipes
from bench.time_to_accuracy import Confirmation, Figures, Seed, leader, standings, verdict
from fxfreeze.batches import Batches, Split
from fxfreeze.cached import rehearse
from fxfreeze.compare import Arena, Trial, Watch, compare
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import CACHED, SHORTS, Recipe, Settings, units_of
from fxfreeze.task import Task
from fxfreeze.verdict import accuracy, caution, gap

FRESH = 1000  # the first seed of a confirmation, counted from the first of the search


@dataclass(frozen=True)
class Design:
    """What is compared. shares: of plain's steps, at which shorter plain trainings stand; seeds: of the search, and again
    of a confirmation."""

    candidates: Sequence[Candidate]
    forms: Sequence[str]
    shares: Sequence[float]
    seeds: int
    block: int = 20


@dataclass
class Search:
    """One network's runs so far. seeds: those that came to their end."""

    task: Task
    settings: Settings
    design: Design
    seeds: dict[int, Seed] = field(default_factory=dict)
    confirmation: Confirmation | None = None

    def check(self) -> None:
        """Raises ChoiceError, before anything trains, for a network that can't freeze or be cached."""
        units_of(self._build(self.settings.seed), self.task.train.images[:2])
        if CACHED in self.design.forms:
            batches = Batches(self.task.train, self.settings.batch_size, self.settings.seed)
            rehearse(self._build(self.settings.seed), batches)

    def missing(self) -> list[int]:
        first = self.settings.seed
        return [seed for seed in range(first, first + self.design.seeds) if seed not in self.seeds]

    def run_seed(self, seed: int, watch: Watch, stop: Callable[[], bool]) -> bool:
        """Trains every contender of a seed, in turns; whether all came to their ends."""
        trial = self._compare(seed, self._recipes(), (), watch, stop)
        if trial.finished:
            self.seeds[seed] = {name: Figures.of(row) for name, row in trial.rows.items()}
        return trial.finished

    def unconfirmed(self) -> str | None:
        """The leader's name once all seeds are done, if fresh seeds have not judged it."""
        if self.missing() or self.design.seeds < 2:
            return None
        first = leader(standings(list(self.seeds.values())))
        if first is None or (self.confirmation is not None and self.confirmation.name == first.name):
            return None
        return first.name

    def confirm(self, name: str, watch: Watch, stop: Callable[[], bool]) -> bool:
        """Trains the leader, plain, and plain cut to the leader's time on fresh seeds; whether all came to their ends."""
        row = parted(name)[0]
        short = next(short for short, theirs in SHORTS.items() if theirs == row)
        chosen = {recipe.name: recipe for recipe in self._recipes()}
        pair = [chosen["plain"], replace(chosen[name], name=row)]
        trials: list[Trial] = []
        for seed in range(self.settings.seed + FRESH, self.settings.seed + FRESH + self.design.seeds):
            trials.append(self._compare(seed, pair, (short,), watch, stop))
            if not trials[-1].finished:
                return False
        ahead, margin = gap(trials, (row, short))
        seeds = [trial.seed for trial in trials]
        self.confirmation = Confirmation(name, seeds, ahead > margin, accuracy(trials), caution(trials))
        return True

    def verdict(self) -> str:
        return verdict(list(self.seeds.values()), self.confirmation)

    def state(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict(),
            "standings": [dataclasses.asdict(each) for each in standings(list(self.seeds.values()))]
            if self.seeds
            else [],
            "seeds": {
                str(seed): {name: dataclasses.asdict(figures) for name, figures in rows.items()}
                for seed, rows in self.seeds.items()
            },
            "confirmation": None if self.confirmation is None else dataclasses.asdict(self.confirmation),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state()` gave."""
        self.seeds = {
            int(seed): {name: Figures(**figures) for name, figures in rows.items()}
            for seed, rows in state["seeds"].items()
        }
        self.confirmation = None if state["confirmation"] is None else Confirmation(**state["confirmation"])

    def _recipes(self) -> list[Recipe]:
        return recipes(self.design.candidates, self.design.forms, self.design.shares, self.task.steps(self.settings))

    def _compare(
        self, seed: int, chosen: Sequence[Recipe], shorts: Sequence[str], watch: Watch, stop: Callable[[], bool]
    ) -> Trial:
        settings = replace(self.settings, seed=seed)
        arena = Arena(self.task.train, self.task.val, self.task.test, settings, self.design.block)
        return compare(self._build(seed), arena, chosen, shorts=shorts, watch=watch, stop=stop)

    def _build(self, seed: int) -> nn.Module:
        net = self.task.build(seed)
        return net.to(memory_format=torch.channels_last) if self.task.device.type == "cuda" else net


def shrunk(task: Task, counts: Sequence[int]) -> Task:
    """The task on so many random samples of train, val and test, the same ones always; laid out as the device likes it."""
    splits = {}
    for name, count in zip(("train", "val", "test"), counts, strict=True):
        images, labels = getattr(task, name)
        if count > len(labels):
            raise ChoiceError(f"--samples asks for {count} of {name}; {task.data} has {len(labels)}")
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count].to(labels.device)
        layout = torch.channels_last if task.device.type == "cuda" else torch.contiguous_format
        splits[name] = Split(images[chosen].contiguous(memory_format=layout), labels[chosen])
    return replace(task, **splits)


Work = Callable[[Watch, Callable[[], bool]], bool]


def work(searches: Sequence[Search]) -> Iterator[tuple[Search, str, Work]]:
    """What is left to run, seed after seed of all networks, then the leaders' confirmations: (search, title, run)."""
    for seed in sorted({seed for search in searches for seed in search.missing()}):
        for search in searches:
            if seed in search.missing():
                yield search, f"seed {seed}", partial(search.run_seed, seed)
    for search in searches:
        if (name := search.unconfirmed()) is not None:
            yield search, f"{name} on fresh seeds", partial(search.confirm, name)
