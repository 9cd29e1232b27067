"""Whole trainings, freeze events included, by backend: is "auto" as fast as the best fixed one?

ResNet-18, random images, FreezeOut over all steps. The trainings go side by side, a step of each in turn; the error is that of
the last self-checks. Not among them: "inductor" and "openvino", which build for seconds at each of the nine freezes.
"""

import copy
import functools
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxfreeze
from bench.budget import begin
from bench.networks import NETWORKS
from bench.rows import Subject
from bench.scale import SMALL, scaled
from fxfreeze.fidelity import BOUNDS

NETWORK = scaled("resnet18", "resnet-8")
STEPS, REPEATS = scaled((120, 1), (12, 2))
BACKENDS = ("plain", "library") if SMALL else ("plain", "library", "auto")


class Training:
    """A model, its optimizer and its schedule; seconds: of all steps so far."""

    def __init__(self, net: torch.nn.Module, backend: str) -> None:
        self.model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(STEPS), backend=backend).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.scheduler = fxfreeze.FreezeScheduler(self.optimizer, self.model)
        self.seconds = 0.0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        began = time.perf_counter()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.seconds += time.perf_counter() - began


@functools.cache
def measured() -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """(seconds of each whole training, what else is worth knowing) by contender."""
    begin()
    net, x, y = NETWORKS[NETWORK].drawn()
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    facts: dict[str, dict[str, Any]] = {}
    for _ in range(REPEATS):
        runs = {name: Training(net, name) for name in BACKENDS}
        for step in range(STEPS):
            for name in BACKENDS if step % 2 else reversed(BACKENDS):
                runs[name].step(x, y)
        for name, run in runs.items():
            times[name].append(run.seconds)
            share = run.model.prefix.build_seconds / run.seconds
            by = [decision["backend"] for decision in run.model._decisions()["segments"]]
            error = max(float("inf") if s.error is None else s.error for s in run.model.prefix.segments)
            facts[name] = {"share_of_freeze_events": share, "chosen": by, "error": error}
    return times, facts


@pytest.mark.parametrize("contender", BACKENDS)
def bench_training(row, benchmark, contender: str) -> None:
    times, facts = measured()
    fixed = [name for name in times if name != "auto"]
    network, more = NETWORKS[NETWORK], dict(facts[contender])
    benchmark.group = f"training, {NETWORK} at {network.size} px, batch {network.batch}, {STEPS} steps"
    subject = Subject(torch.float32, network.shape, more.pop("error"), BOUNDS[torch.float32])
    row(times, contender, min(fixed, key=lambda name: sum(times[name])), subject, **more)
