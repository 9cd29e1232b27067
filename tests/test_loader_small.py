"""Cached training where batches are small, samples alike, or of types that PyTorch can hardly index."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxfreeze
from fxfreeze import CachedLoader, FreezeScheduler, Milestones

COUNT = 21  # of samples: the last batch of four has one


class Head(nn.Linear):
    def forward(self, y: Tensor, x: Tensor | None) -> Tensor:  # type: ignore[override]
        y = super().forward(y)
        return y if x is None else y + x[:, :3].float()


class Net(nn.Module):
    """Categories are numbered from ``first``; crosses: whether the live part takes the input too."""

    def __init__(self, first: int | None, *, crosses: bool = False) -> None:
        super().__init__()
        self.first, self.crosses = first, crosses
        self.rows = nn.Embedding(9, 33)
        self.a = nn.Sequential(nn.Linear(33, 67), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(67, 65), nn.ReLU())
        self.head = Head(65, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = self.rows(x - self.first)
        y = self.b(self.a(x.float()))
        return self.head(y, x if self.crosses else None)


def samples(kind: str) -> tuple[int | None, Tensor]:
    """(the first category, if they are categories; the samples): the last one is the odd one."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(COUNT, 33, generator=random)
    match kind:
        case "categories from 1":
            chosen = torch.randint(2, 10, (COUNT,), generator=random)
            chosen[-1] = 1
            return 1, chosen
        case "categories from 0":
            chosen = torch.randint(1, 9, (COUNT,), generator=random)
            chosen[-1] = 0
            return 0, chosen
        case "flags":
            return None, numbers > 0
        case "zero":
            numbers[-1] = 0
            return None, numbers
        case "uint16":
            return None, torch.randint(9, (COUNT, 33), generator=random).to(torch.uint16)
        case "all alike":
            return None, numbers[:1].expand(COUNT, -1).clone()
        case _:
            return None, numbers


KINDS = ("categories from 1", "categories from 0", "flags", "zero", "uint16", "all alike", "numbers")


def losses(
    kind: str, milestone: int, cache: Path | None, labels: torch.dtype = torch.int64, *, shuffle: bool = False
) -> list[tuple[float, float]]:
    first, x = samples(kind)
    torch.manual_seed(0)
    model = fxfreeze.compile(Net(first, crosses=kind == "uint16"), Milestones({"b": milestone}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = FreezeScheduler(optimizer, model)
    data = TensorDataset(x, (torch.arange(COUNT) % 3).to(labels))
    loader = DataLoader(data, batch_size=4, shuffle=shuffle, generator=torch.Generator().manual_seed(0))
    batches = loader if cache is None else CachedLoader(loader, model, cache, when="always")
    found = []
    for _ in range(4):
        for inputs, targets in batches:
            loss = F.cross_entropy(model(inputs), targets.long())
            loss.backward()
            assert model.head.weight.grad is not None
            found.append((loss.item(), model.head.weight.grad.sum().item()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("milestone", [0, 3, 5], ids=["from the start", "within an epoch", "at a batch of one"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_last_batch_of_one(kind: str, milestone: int, tmp_path: Path) -> None:
    assert losses(kind, milestone, tmp_path) == losses(kind, milestone, None)


@pytest.mark.parametrize("labels", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_labels_of_a_partly_stored_batch(labels: torch.dtype, tmp_path: Path) -> None:
    """Some of its samples come from the store, the others from the data set."""
    stored = losses("numbers", 3, tmp_path, labels, shuffle=True)
    assert stored == losses("numbers", 3, None, labels, shuffle=True)


def test_inputs_of_a_partly_stored_batch_that_cross(tmp_path: Path) -> None:
    assert losses("uint16", 3, tmp_path, shuffle=True) == losses("uint16", 3, None, shuffle=True)


def test_a_sample_made_up_that_the_forward_does_not_know_decides_nothing(tmp_path: Path) -> None:
    """A resumed run meets the last sample first, of the lowest category."""
    first, x = samples("categories from 1")
    model = fxfreeze.compile(Net(first), Milestones({"b": 0}))
    model._forward.batch_size = 4  # as a scheduler's state sets it
    model(x[-1:])
    loader = CachedLoader(DataLoader(TensorDataset(x), batch_size=4), model, tmp_path, when="always")
    for _ in range(2):
        for (inputs,) in loader:
            model(inputs)
    assert loader.traffic[-1].samples == {"ram": COUNT}


def test_samples_that_are_all_alike_are_not_stored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whether the frozen part mixes samples can't be told by them."""
    losses("all alike", 0, tmp_path)
    told = capfd.readouterr().err
    assert "is not stored: a batch of 4 equal samples can't tell whether samples are mixed" in told
    assert not [*tmp_path.glob("*/*.safetensors")]
