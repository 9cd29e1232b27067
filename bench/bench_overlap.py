"""The frozen prefix of the next batch in a thread of its own, while the live half trains on this one: does it pay?

It depends on nothing that a step changes, so it may run ahead. ResNet-18 and DenseNet-121 at 64 px, half of the units frozen by
backend "library": "in turn" as an ordinary loop runs it; "overlapped" with the prefix one batch ahead, in a second thread,
each with all of torch's threads or with half of them. A row is the time of ten steps.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxfreeze
from bench.conftest import Contender, interleave

NETWORKS = {"resnet18": 32, "densenet121": 16}  # batch sizes
STEPS, ROUNDS = 10, 7


class Split:
    """A network cut in two, with half of its units frozen, and an optimizer of the rest."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        net: nn.Module = getattr(torchvision.models, name)()
        self.x, self.y = torch.randn(NETWORKS[name], 3, 64, 64), torch.randint(0, 1000, (NETWORKS[name],))
        self.model = fxfreeze.compile(net, fxfreeze.FreezeOut(10**9), backend="library").train()
        self.model.freeze(len(self.model.units) // 2)
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
def measured(name: str) -> dict[str, list[float]]:
    split = Split(name)
    every = torch.get_num_threads()
    contenders = {
        "in turn": _in_turn(split),
        "in turn, again": _in_turn(split),
        "overlapped, all threads": _overlapped(split, every),
        "overlapped, half each": _overlapped(split, max(1, every // 2)),
    }
    return interleave(contenders, ROUNDS, warmup=1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("contender", ["in turn", "in turn, again", "overlapped, all threads", "overlapped, half each"])
def bench_overlap(row, benchmark, name: str, contender: str) -> None:
    benchmark.group = f"overlap, {name} at 64 px, batch {NETWORKS[name]}, half frozen"
    row(measured(name), contender, "in turn")
