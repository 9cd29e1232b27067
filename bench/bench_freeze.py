"""The cost of one freeze event by the library backend: trace, split, passes and self-check, at 64 px and batch 8."""

import functools

import pytest
import torch

import fxfreeze
from bench.budget import begin
from bench.clock import interleave
from bench.networks import NETWORKS
from bench.rows import Subject
from bench.scale import scaled

NAMES = scaled(("resnet50", "densenet121"), ("resnet-8",))
ROUNDS = scaled(7, 2)
SHAPE = (8, 3, 64, 64)
SHARES = (0.25, 0.5, 0.75)


@functools.cache
def measured(name: str) -> tuple[dict[str, list[float]], dict[str, Subject]]:
    """Times by share, and what they are of, with the errors of the self-checks."""
    begin()
    net, images, _ = NETWORKS[name].drawn()
    model = fxfreeze.compile(net, fxfreeze.FreezeOut(10**9), backend="library")
    x = torch.randn(SHAPE, device=images.device)

    def event(share: float) -> float:
        model.freeze(max(model.depth, int(share * len(model.units))))
        model.refresh()
        before = model.prefix.build_seconds
        model(x)
        return model.prefix.build_seconds - before

    times: dict[str, list[float]] = {}
    subjects: dict[str, Subject] = {}
    for share in SHARES:  # depths only grow, so the shares are measured one after the other
        label = f"{share:.0%} frozen"
        times |= interleave({label: functools.partial(event, share)}, ROUNDS, warmup=1)
        (segment,) = model.prefix.segments
        if segment.error is None or segment.bound is None:
            raise RuntimeError(f"{name}, {label}: the frozen part was not checked: {segment.reason}")
        subjects[label] = Subject(torch.float32, SHAPE, segment.error, segment.bound)
    return times, subjects


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def bench_freeze(row, benchmark, name: str, share: float) -> None:
    benchmark.group = f"freeze event, {name} at 64 px, batch 8"
    (times, subjects), label = measured(name), f"{share:.0%} frozen"
    row(times, label, "25% frozen", subjects[label])
