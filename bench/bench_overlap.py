"""The frozen prefix of the next batch in a thread of its own, while the live half trains on this one: does it pay?

It depends on nothing that a step changes, so it may run ahead. Half of the units are frozen, by backend "library": "in turn" as
an ordinary loop runs it; "overlapped" with the prefix one batch ahead, in a second thread, each with all of torch's threads
or with half of them. A row is the time of ten steps.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clock import Contender, interleave
from bench.networks import NETWORKS
from bench.rows import Subject
from bench.scale import scaled
from bench.steps import frozen, units_of
from fxfreeze.fidelity import BOUNDS

MEASURED = scaled(("resnet18", "densenet121"), ("resnet-8",))
STEPS, ROUNDS = scaled((10, 7), (2, 2))


class Split:
    """A network cut in two, with half of its units frozen, and an optimizer of the rest."""

    def __init__(self, name: str) -> None:
        net, self.x, self.y = NETWORKS[name].drawn()
        self.model = frozen(net, len(units_of(net)) // 2, "library")
        self.model(self.x)
        (self.prefix,) = self.model.prefix.segments
        (plan,) = self.model._derived.surgery._plans.values()
        self._suffix = plan.suffix
        live = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(live, lr=1e-3, momentum=0.9)

    def learn(self, boundary: tuple[Tensor, ...]) -> None:
        (scores,) = self._suffix(*boundary)
        F.cross_entropy(scores, self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _in_turn(split: Split) -> Contender:
    def steps() -> None:
        for _ in range(STEPS):
            split.learn(split.prefix(split.x))

    return steps


def _overlapped(split: Split, threads: int) -> Contender:
    """``threads`` of torch's for each of the two. The first prefix has nothing beside it, and none is left at the end."""
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    def steps() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        ahead = pool.submit(split.prefix, split.x)
        for step in range(STEPS):
            boundary = ahead.result()
            if step < STEPS - 1:
                ahead = pool.submit(split.prefix, split.x)
            split.learn(boundary)
        torch.set_num_threads(before)

    return steps


@functools.cache
def measured(name: str) -> tuple[dict[str, list[float]], float]:
    """Seconds by contender, and the error of the prefix that all of them run."""
    split = Split(name)
    every = torch.get_num_threads()
    contenders = {
        "in turn": _in_turn(split),
        "in turn, again": _in_turn(split),
        "overlapped, all threads": _overlapped(split, every),
        "overlapped, half each": _overlapped(split, max(1, every // 2)),
    }
    times = interleave(contenders, ROUNDS, warmup=1)
    return times, float("inf") if split.prefix.error is None else split.prefix.error


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("contender", ["in turn", "in turn, again", "overlapped, all threads", "overlapped, half each"])
def bench_overlap(row, benchmark, name: str, contender: str) -> None:
    times, error = measured(name)
    network = NETWORKS[name]
    benchmark.group = f"overlap, {name} at {network.size} px, batch {network.batch}, half frozen, {STEPS} steps"
    row(times, contender, "in turn", Subject(torch.float32, network.shape, error, BOUNDS[torch.float32]))
