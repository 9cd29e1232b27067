"""What an epoch from the cache costs, and from how many epochs on storing pays.

ResNet-18 at 64 px, batch 32, 256 samples. An epoch, frozen to half its depth: ratios are to training the live half alone
on tensors in memory, which no cache can beat; the bar is 1.05. The break-even: seconds a batch to compute the frozen part
up to a depth and to read it in place; `extra_info` has the seconds to write, and after how many epochs they are won back.
"""

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxfreeze
from bench.budget import begin
from bench.clock import interleave
from bench.rows import Subject
from bench.scale import scaled
from fxfreeze.cache.worth import computed, stored
from fxfreeze.chain import Chain
from fxfreeze.fidelity import BOUNDS, relative_error

SAMPLES, BATCH, SIZE, CLASSES = scaled((192, 32, 64, 10), (8, 4, 32, 10))
EPOCHS = scaled(5, 3)
DEPTHS = scaled((1, 3, 5, 7, 9), (5,))  # of 10 units
LIVE = "live half alone, tensors in memory"
CONTENDERS = (LIVE, f"{LIVE}, again", "cached, from RAM", "cached, from disk", "frozen half computed")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(images, torch.randint(0, CLASSES, (SAMPLES,), generator=generator))


def frozen(net: nn.Module, depth: int) -> fxfreeze.FreezableModel:
    net = copy.deepcopy(net)
    units = fxfreeze.compile(net, fxfreeze.FreezeOut(1)).units
    return fxfreeze.compile(net, fxfreeze.Milestones({units[depth - 1].name: 0}))


class Epoch:
    """Trains a copy of the network for an epoch when it is called; the seconds that it took."""

    def __init__(self, net: nn.Module, batches: Callable[[fxfreeze.FreezableModel], object]) -> None:
        self.model = frozen(net, 5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.batches = batches(self.model)
        self.forward: Callable[..., Tensor] = self.model
        self.known: tuple[object, Tensor] | None = None  # what the forward is given, and the images that it stands for

    def __call__(self) -> float:
        began = time.perf_counter()
        for x, y in self.batches:
            F.cross_entropy(self.forward(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - began

    def error(self) -> float:
        """Of the logits of a batch, against the network in float64."""
        if self.known is None:
            given, _ = next(iter(self.batches))
            self.known = given, given.batch.inputs()[0] if isinstance(given, fxfreeze.Boundary) else given
        given, images = self.known
        exact = copy.deepcopy(self.model.original).double()
        with torch.no_grad():
            return relative_error(self.forward(given).double(), exact(images.double()))


class InMemory:
    """Random batches of what the live half is given, gathered from tensors."""

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        self.values, self.labels = values, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for samples in torch.randperm(SAMPLES).split(BATCH):
            yield self.values[samples], self.labels[samples]


def live_half(net: nn.Module, dataset: TensorDataset) -> Epoch:
    """The suffix, with no model around it."""
    epoch = Epoch(net, lambda model: DataLoader(dataset, batch_size=BATCH))
    images, labels = dataset.tensors
    chain, suffix = plan_of(epoch.model, images[:BATCH])
    values = [chain.handed_over(crossing(chain, batch), [batch])[0] for batch in images.split(BATCH)]
    epoch.batches = InMemory(torch.cat(values), labels)
    epoch.forward = lambda x: suffix(x)[0]
    epoch.known = values[0], images[:BATCH]
    return epoch


def plan_of(model: fxfreeze.FreezableModel, images: Tensor) -> tuple[Chain, Callable[..., tuple[Tensor, ...]]]:
    model(images)
    plan = next(iter(model._derived.surgery._plans.values()))
    return plan.chain, plan.suffix


def crossing(chain: Chain, images: Tensor) -> tuple[Tensor, ...]:
    *_, (_, values) = chain.advance(0, [images], [images])
    return values


@pytest.fixture(scope="module")
def epochs() -> Iterator[tuple[dict[str, list[float]], dict[str, float]]]:
    """Times by contender, and errors."""
    begin()
    torch.manual_seed(0)
    net, dataset = torchvision.models.resnet18(num_classes=CLASSES), data()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:

        def cached(placement: str, model: fxfreeze.FreezableModel) -> object:
            loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
            return fxfreeze.CachedLoader(loader, model, Path(folder) / placement, when="always", placement=placement)

        contenders = {
            LIVE: live_half(net, dataset),
            f"{LIVE}, again": live_half(net, dataset),
            "cached, from RAM": Epoch(net, functools.partial(cached, "ram")),
            "cached, from disk": Epoch(net, functools.partial(cached, "disk")),
            "frozen half computed": Epoch(net, lambda model: DataLoader(dataset, batch_size=BATCH, shuffle=True)),
        }
        times = interleave(contenders, EPOCHS, warmup=2)  # the first of the warm-up fills
        yield times, {name: epoch.error() for name, epoch in contenders.items()}


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_epoch(row, benchmark, epochs, contender: str) -> None:
    benchmark.group = f"an epoch of {SAMPLES}, resnet18 at {SIZE} px, batch {BATCH}, half of it frozen"
    times, errors = epochs
    row(times, contender, LIVE, subject(errors[contender]))


def subject(error: float) -> Subject:
    shape, device = (BATCH, 3, SIZE, SIZE), torch.device("cpu")
    return Subject(torch.float32, shape, error, BOUNDS[torch.float32], device=device)


@functools.cache
def break_even(depth: int) -> tuple[dict[str, list[float]], float, int, float]:
    """Seconds a batch to compute and to read, seconds a sample to write, bytes of a row, error of the self-check."""
    begin()
    torch.manual_seed(0)
    model = frozen(torchvision.models.resnet18(num_classes=CLASSES), depth)
    images = data().tensors[0][:BATCH]
    chain, _ = plan_of(model, images)
    times: dict[str, list[float]] = {"compute": [], "read": []}
    writes = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for _ in range(EPOCHS):
            seconds, rows = computed(chain, 0, [images], [images])
            write, read = stored(Path(folder), rows, None)
            times["compute"].append(seconds)
            times["read"].append(read * BATCH)
            writes.append(write)
    error = max(float("inf") if segment.error is None else segment.error for segment in chain.prefix.segments)
    return times, sorted(writes)[len(writes) // 2], sum(r[0].nbytes for r in rows), error


@pytest.mark.parametrize("what", ["compute", "read"])
@pytest.mark.parametrize("depth", DEPTHS)
def bench_break_even(row, benchmark, depth: int, what: str) -> None:
    times, write, width, error = break_even(depth)
    benchmark.group = f"break-even, resnet18 at {SIZE} px, {depth} of 10 units frozen ({width / 1024:.0f} KiB a row)"
    compute, read = (sorted(times[name])[EPOCHS // 2] / BATCH for name in ("compute", "read"))
    more = {"row_bytes": width, "write_seconds": write, "epochs_to_win_back": write / (compute - read)}
    row(times, what, "compute", subject(error), **more)
