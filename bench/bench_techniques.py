"""What each technique adds to an iteration with half of the units frozen, one after the other.

eager: frozen units in eval, at a learning rate of zero; no tape: without gradients, as the published FreezeOut; fold: cut
out, batch norms folded, weights laid out once; library: activations and sums within the convolutions; auto: the backend
that was fastest; cache: the frozen outputs as rows in memory. All compute the same logits.
"""

import functools

import pytest

from bench import steps
from bench.budget import begin
from bench.iterations import Entry, Measured, measure
from bench.networks import NETWORKS
from bench.scale import scaled

NAMES = scaled(("resnet18", "densenet121"), ("resnet-8",))
TECHNIQUES = (
    "plain",
    "eager",
    "eager, again",
    "no tape",
    "fold",
    "library",
    *scaled(("auto",), ()),
    "cache",
)
ROUNDS = scaled(5, 2)
BACKENDS = {"fold": "plain", "library": "library", "auto": "auto"}


@functools.cache
def measured(network: str) -> Measured:
    begin()
    net, x, y = NETWORKS[network].drawn()
    depth = len(steps.units_of(net)) // 2
    whole, half = steps.exact_plain(net, x), steps.exact_frozen(net, depth, x)
    work = steps.marked(net, depth, x, y).work()
    entries: dict[str, Entry] = {}
    for name in TECHNIQUES:
        if name == "plain":
            entries[name] = Entry(steps.plain(net, x, y), whole, steps.plain(net, x, y).work())
        elif name.startswith("eager"):
            step = steps.at_rate_zero(net, depth, x, y)
            entries[name] = Entry(step, half, steps.at_rate_zero(net, depth, x, y).work())
        elif name == "no tape":
            entries[name] = Entry(steps.marked(net, depth, x, y), half, work)
        elif name == "cache":
            step = steps.cached(net, depth, x, y)
            entries[name] = Entry(step, half, steps.cached(net, depth, x, y).work())
        else:
            entries[name] = Entry(steps.surgery(net, depth, x, y, BACKENDS[name]), half, work)
    return measure(entries, ROUNDS)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", NAMES)
def bench_technique(row, benchmark, name: str, technique: str) -> None:
    found, network = measured(name), NETWORKS[name]
    benchmark.group = f"techniques, {name} at {network.size} px, batch {network.batch}, half of the units frozen"
    subject = found.subject(technique, network.shape)
    row(found.times, technique, "eager", subject, **found.memory(technique))
