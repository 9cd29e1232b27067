"""Training with and without a CachedLoader, alike in everything else."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fxfreeze
from fxfreeze import zoo

SAMPLES, BATCH, CLASSES, SIZE = 44, 8, 3, 8
FREEZES = ((0.1, 1), (0.4, 2), (0.62, 4))  # of the steps: how many units


class Images(Dataset):
    """Random images, each read counted. more: what a sample has beside image and label."""

    def __init__(self, samples: int = SAMPLES, channels: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(samples, channels, SIZE, SIZE, generator=generator)
        self.labels = torch.randint(0, CLASSES, (samples,), generator=generator)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return self.images[index], int(self.labels[index])


def network(name: str = "resnet-8") -> nn.Module:
    torch.manual_seed(0)
    return zoo.load(name, num_classes=CLASSES, in_channels=3, image_size=SIZE)


def loader_of(dataset: Any, **options: Any) -> DataLoader:
    options = {"batch_size": BATCH, "shuffle": True, "generator": torch.Generator().manual_seed(5)} | options
    return DataLoader(dataset, **options)


def milestones(net: nn.Module, steps: int, freezes: tuple[tuple[float, int], ...] = FREEZES) -> fxfreeze.Milestones:
    units = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(1), example_inputs=None).units
    return fxfreeze.Milestones({units[min(n, len(units) - 1) - 1].name: round(share * steps) for share, n in freezes})


@dataclass
class Training:
    """A network under a schedule, and what became of it. cached: the loader, wrapped, or not."""

    net: nn.Module
    model: Any
    loader: Any
    inputs: Callable[[Any], Tensor] = lambda batch: batch[0]
    labels: Callable[[Any], Tensor] = lambda batch: batch[1]
    losses: list[float] = field(default_factory=list)
    depths: list[int | None] = field(default_factory=list)  # of each batch, None for images

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = fxfreeze.FreezeScheduler(self.optimizer, self.model)
        self.random = torch.Generator().manual_seed(3).get_state()

    def epoch(self, batches: Iterator[Any] | None = None, steps: int | None = None) -> None:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.random)
        for number, batch in enumerate(self.loader if batches is None else batches):
            if number == steps:
                break
            x = self.inputs(batch)
            self.depths.append(x.depth if isinstance(x, fxfreeze.Boundary) else None)
            loss = F.cross_entropy(self.model(x), self.labels(batch))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        self.random = torch.get_rng_state()
        torch.set_rng_state(outer)

    def weights(self) -> list[Tensor]:
        return [*self.net.state_dict().values()]


def training(
    folder: Path | None,
    *,
    net: nn.Module | None = None,
    dataset: Any = None,
    epochs: int = 6,
    freezes: tuple[tuple[float, int], ...] = FREEZES,
    options: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    **more: Any,
) -> Training:
    """folder: of the cache; None trains without."""
    net = network() if net is None else copy.deepcopy(net)
    loader: Any = loader_of(Images() if dataset is None else dataset, **(options or {}))
    schedule = milestones(net, epochs * len(loader), freezes)
    model = fxfreeze.compile(net, schedule, backend="plain")
    if folder is not None:
        loader = fxfreeze.CachedLoader(loader, model, folder, **{"when": "always", **(cache or {})})
    return Training(net, model, loader, **more)


def assert_alike(cached: Training, plain: Training) -> None:
    """Bit for bit."""
    assert cached.losses == plain.losses
    for ours, theirs in zip(cached.weights(), plain.weights(), strict=True):
        assert torch.equal(ours, theirs)
