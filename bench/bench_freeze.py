"""The cost of one freeze event by the library backend: trace, split, passes and self-check, at 64 px and batch 8."""

import functools

import pytest
import torch
import torchvision

import fxfreeze
from bench.conftest import interleave

NETWORKS = ("resnet50", "densenet121")
SHARES = (0.25, 0.5, 0.75)


@functools.cache
def measured(name: str) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = fxfreeze.compile(getattr(torchvision.models, name)(), fxfreeze.FreezeOut(10**9), backend="library")
    x = torch.randn(8, 3, 64, 64)

    def event(share: float) -> float:
        model.freeze(max(model.depth, int(share * len(model.units))))
        model.refresh()
        before = model.prefix.build_seconds
        model(x)
        return model.prefix.build_seconds - before

    times: dict[str, list[float]] = {}
    for share in SHARES:  # depths only grow, so the shares are measured one after the other
        times |= interleave({f"{share:.0%} frozen": functools.partial(event, share)}, rounds=7, warmup=1)
    return times


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NETWORKS)
def bench_freeze(row, benchmark, name: str, share: float) -> None:
    benchmark.group = f"freeze event, {name} at 64 px, batch 8"
    row(measured(name), f"{share:.0%} frozen", "25% frozen")
