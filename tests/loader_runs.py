"""A small network trained with a CachedLoader and without one: what the loader's tests run and compare."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxfreeze
from fxfreeze.cache.loader import CachedLoader
from fxfreeze.cache.shelf import Source
from fxfreeze.cache.store import Store
from fxfreeze.cache.writer import StoreWriter
from fxfreeze.stored import Fill

COUNT, BATCH = 44, 8  # the last batch is a partial one
PROBES = 4  # of so many samples


class Net(nn.Module):
    """[B, 1, 8, 8] -> [B, 3]: units stem, mid, deep and the head, which draws random numbers."""

    def __init__(self, stride: int = 2, eps: float = 1e-5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=eps), nn.ReLU())
        self.mid = nn.Sequential(nn.Conv2d(4, 6, 3, stride=stride, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.mid(self.stem(x)))
        return self.fc(self.drop(x.mean((2, 3))))


UNITS = ("stem", "mid", "deep")


def make_net(**options: Any) -> Net:
    """The same one each time, whose running statistics are not what they begin as."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = Net(**options)
        for _ in range(3):
            net(torch.randn(16, 1, 8, 8))
    return net


class Samples(Dataset[Any]):
    """(image, class, index); read: the indices asked for, in order."""

    def __init__(self, count: int = COUNT, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 1, size, size, generator=generator)
        self.classes = torch.randint(0, 3, (count,), generator=generator)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if not 0 <= index < len(self.images):
            raise IndexError(f"no sample {index}")
        self.read.append(index)
        return self.images[index], self.classes[index], index

    def taken(self) -> list[int]:
        """What was read since this was last asked."""
        read, self.read = self.read, []
        return read


class Training:
    """One run, with random numbers of its own. directory: of its cache, None to train without; milestones: of freezing.

    losses: of each step; given: of each batch the depth that it came at, 0 for inputs.
    Other options are the CachedLoader's, or of the DataLoader those in ``wrapped``.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        net: nn.Module | None = None,
        data: Dataset[Any] | None = None,
        milestones: dict[str, int] | None = None,
        precision: str | None = None,
        wrapped: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.net = make_net() if net is None else net
        self.data = Samples() if data is None else data
        schedule = fxfreeze.Milestones({"stem": 0} if milestones is None else milestones)
        self.model = fxfreeze.compile(self.net, schedule, precision=precision)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = fxfreeze.FreezeScheduler(self.optimizer, self.model)
        self.order = torch.Generator()
        arguments: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "generator": self.order, **(wrapped or {})}
        self.plain: DataLoader[Any] = DataLoader(self.data, **arguments)
        self.loader: Any = self.plain
        if directory is not None:
            self.loader = CachedLoader(self.plain, self.model, directory, **{"when": "always", **options})
        self.losses: list[float] = []
        self.given: list[int] = []
        self.done = 0
        self.random = torch.Generator().manual_seed(7).get_state()
        self._within = False

    @property
    def notes(self) -> str:
        return "\n".join(self.loader.notes)

    def epochs(self, count: int, before: Callable[[int], None] | None = None) -> "Training":
        """before: called with the number of each batch, counted from the first, once the loader has given it."""
        for _ in range(count):
            self.order.manual_seed(self.done)
            if self.loader is not self.plain:
                self.loader.set_epoch(self.done)
            with self.own_random():
                for batch in self.loader:
                    if before is not None:
                        before(len(self.losses))
                    self.step(batch)
            self.done += 1
        return self

    def step(self, batch: Any) -> None:
        images, classes, _ = batch
        self.given.append(0 if isinstance(images, Tensor) else images.depth)
        with self.own_random():
            loss = F.cross_entropy(self.model(images), classes)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Within it torch's random numbers are this run's, drawn by whom they may."""
        if self._within:
            yield
            return
        others = torch.get_rng_state()
        torch.set_rng_state(self.random)
        self._within = True
        try:
            yield
        finally:
            self._within = False
            self.random = torch.get_rng_state()
            torch.set_rng_state(others)

    def rows_received(self) -> dict[int, list[Tensor]]:
        """From now on, by sample, what the live part is given of it."""
        received: dict[int, list[Tensor]] = {}
        boundary, collate = self.model._forward.boundary, self.step

        def watched(call: Any, plan: Any) -> Any:
            values = boundary(call, plan)
            assert values is not None
            for index, row in zip(self._indices, values[0], strict=True):
                received.setdefault(index, []).append(row.clone())
            return values

        def step(batch: Any) -> None:
            self._indices = batch[2].tolist()
            collate(batch)

        self.model._forward.boundary = watched
        self.step = step
        return received

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.random,
            "done": self.done,
            "losses": self.losses,
        }

    def load(self, state: dict[str, Any]) -> "Training":
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.random, self.done, self.losses = state["random"], state["done"], list(state["losses"])
        return self


def difference(a: Training, b: Training) -> str:
    """Where two runs first differ by a bit; empty if nowhere."""
    if len(a.losses) != len(b.losses):
        return f"{len(a.losses)} steps and {len(b.losses)}"
    for step, (x, y) in enumerate(zip(a.losses, b.losses, strict=True)):
        if x != y:
            return f"the loss of step {step} is {x!r} and {y!r}"
    others = b.model.state_dict()
    return ", ".join(name for name, t in a.model.state_dict().items() if not torch.equal(t, others[name]))


class _Notebook:
    """Takes what a prefix computes at a model's depth."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.depth = 0

    def received(self, tensors: Sequence[Tensor], chain: Any) -> Fill | None:
        self.depth = chain.depth
        return self

    def take(self, places: Tensor | None, rows: Sequence[Tensor]) -> None:
        assert places is None or len(places) == len(rows[0])
        self.rows.append(rows[0].clone())


def fresh_rows(net: nn.Module, depth: int, images: Tensor) -> Tensor:
    """What a newly frozen copy of a network computes for each image, in batches as large as training's."""
    model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.Milestones({UNITS[depth - 1]: 0})).train()
    notebook = _Notebook()
    model._forward.attach(notebook)
    for batch in images.split(BATCH):
        model(batch)
    rows = torch.cat(notebook.rows)
    exact = images
    for name in UNITS[:depth]:
        exact = copy.deepcopy(net).get_submodule(name).eval()(exact)
    if depth == len(UNITS):
        exact = exact.mean((2, 3))
    assert torch.linalg.vector_norm(rows - exact) <= 1e-5 * torch.linalg.vector_norm(exact)
    return rows


def folders(directory: Path) -> list[str]:
    """The stores there, by name."""
    return sorted(path.name for path in directory.iterdir())


def wrong_rows(folder: Path, net: nn.Module, data: Samples) -> list[int]:
    """The samples of a store whose row is not what a fresh prefix computes, or whose class or index is another's."""
    source = Source(Store(folder))
    held = source.store.holds(range(len(data))).nonzero().flatten()
    rows = source.read(held)
    right = fresh_rows(net, source.depth, data.images)[held]
    assert len(rows.boundary) == 1
    same = [torch.equal(a, b) for a, b in zip(rows.boundary[0], right, strict=True)]
    same_rest = (rows.rest["rest.0"] == data.classes[held]) & (rows.rest["rest.1"] == held)
    return [int(i) for i, a, b in zip(held, same, same_rest.tolist(), strict=True) if not (a and b)]


def shards_of(rows: int, width: int = 4 * 64 * 4 + 24 + 16) -> None:
    """Stores written from now on have shards of about so many rows of the stem's size."""
    StoreWriter.__init__.__kwdefaults__["shard_bytes"] = rows * width
