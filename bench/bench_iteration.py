"""One training iteration with the first 25, 50 and 75% of the units frozen, against plain training.

freezeout: frozen units in eval mode without gradients, no surgery; requires_grad only: what a user gets who only freezes the
parameters, and compiles; fxfreeze + cache: the frozen outputs as rows in memory; by hand: what an expert would write for
half depth. ``by hand, again`` is the same code a second time: a difference inside its ratio is a tie. torch.compile
takes half a minute or more for each, so it stands beside one network at half depth.
"""

import functools
from collections.abc import Iterator

import pytest

from bench import steps
from bench.budget import begin
from bench.by_hand_steps import NETWORKS as BY_HAND
from bench.by_hand_steps import by_hand
from bench.iterations import Entry, Measured, measure
from bench.networks import NETWORKS
from bench.scale import DEVICE, SMALL, scaled
from bench.tables_iterations import WAYS

SHARES = (0.25, 0.5, 0.75)
EVERY_DEPTH = ("resnet18", "resnet-8", *(["densenet121"] if DEVICE.type == "cuda" else []))  # the others at half depth
LEFT_OUT = ("densenet-bc-12-100", "wrn-40-4") if DEVICE.type == "cpu" else ()  # for their time
COMPILED = ("resnet50",) if DEVICE.type == "cuda" else ("resnet18",)
BACKEND = "auto" if DEVICE.type == "cuda" else "library"
ROUNDS = scaled(5, 2)
CONTENDERS = (*WAYS, "by hand, again")


def names(network: str, share: float) -> Iterator[str]:
    """The contenders that there are for it."""
    if network in LEFT_OUT or (share != 0.5 and network not in EVERY_DEPTH):
        return
    for name in CONTENDERS:
        if "compiled" in name and (SMALL or share != 0.5 or network not in COMPILED):
            continue
        if name.startswith("by hand") and (share != 0.5 or network not in BY_HAND):
            continue
        yield name


@functools.cache
def measured(network: str, share: float) -> Measured:
    begin()
    net, x, y = NETWORKS[network].drawn()
    depth = max(1, int(share * len(steps.units_of(net))))
    whole, half = steps.exact_plain(net, x), steps.exact_frozen(net, depth, x)
    work = steps.marked(net, depth, x, y).work()  # of the frozen ones, fused operators included
    entries: dict[str, Entry] = {}
    for name in names(network, share):
        if name in ("plain", "plain, compiled"):
            step = steps.plain(net, x, y)
            entries[name] = Entry(step, whole, steps.plain(net, x, y).work(), name != "plain")
        elif name == "requires_grad only, compiled":
            step = steps.only_requires_grad(net, depth, x, y)
            entries[name] = Entry(step, whole, steps.only_requires_grad(net, depth, x, y).work(), True)
        elif name == "freezeout":
            entries[name] = Entry(steps.marked(net, depth, x, y), half, work)
        elif name == "fxfreeze":
            entries[name] = Entry(steps.surgery(net, depth, x, y, BACKEND), half, work)
        elif name == "fxfreeze + cache":
            step = steps.cached(net, depth, x, y)
            entries[name] = Entry(step, half, steps.cached(net, depth, x, y).work())
        else:
            entries[name] = Entry(by_hand(network, net, x, y), half, work)
    return measure(entries, ROUNDS)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NETWORKS)
def bench_iteration(row, benchmark, name: str, share: float, contender: str) -> None:
    if contender not in names(name, share):
        pytest.skip("half depth, compiled or by hand: of some networks only")
    found, network = measured(name, share), NETWORKS[name]
    benchmark.group = f"iteration, {name} at {network.size} px, batch {network.batch}, {share:.0%} frozen"
    baseline = "by hand" if contender == "by hand, again" else "plain"
    row(found.times, contender, baseline, found.subject(contender, network.shape), **found.memory(contender))
