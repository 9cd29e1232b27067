"""A network and a data set that train in milliseconds, for the tests of everything that trains."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxfreeze.batches import Batches, Split
from fxfreeze.compare import Arena
from fxfreeze.recipes import Recipe, Settings, from_scratch
from fxfreeze.train import Run

SETTINGS = Settings(epochs=2, batch_size=8, lr=0.05, steps_scale=1.5, seed=3)


class Tiny(nn.Module):
    """[B, 1, 6, 6] -> [B, num_classes]: five units, batch norms, and dropout that draws in units that freeze."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block1 = self._block(0.2)
        self.block2 = self._block(0.2)
        self.block3 = self._block(0.0)
        self.fc = nn.Linear(4, num_classes)

    @staticmethod
    def _block(rate: float) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(rate))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Mixing(Tiny):
    """A norm without running statistics mixes the samples of a batch, in eval too: nothing beyond it can be cached."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(num_classes)
        self.block1[1] = nn.BatchNorm2d(4, track_running_stats=False)


class Flat(nn.Module):
    """One unit: nothing in it can freeze."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def images(count: int, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Float images [count, 1, 6, 6] whose brightness tells the class, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 1, 6, 6, generator=generator)
    return noise + labels.reshape(-1, 1, 1, 1), labels


def data() -> tuple[tuple[Tensor, Tensor], ...]:
    """What `--data tiny:data` loads."""
    return images(84, 0), images(24, 1), images(40, 2)


def arena(settings: Settings = SETTINGS, *, block: int = 4, dtype: torch.dtype = torch.float32) -> Arena:
    train, val, test = (Split(pixels.to(dtype), labels) for pixels, labels in data())
    return Arena(train, val, test, settings, block)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny().to(dtype)


def lineup(settings: Settings = SETTINGS) -> dict[str, Recipe]:
    """plain takes 20 steps, the others 30."""
    return from_scratch(settings, 20)


def make_run(name: str, settings: Settings = SETTINGS, dtype: torch.dtype = torch.float32) -> Run:
    field = arena(settings, dtype=dtype)
    return Run(net(dtype), lineup(settings)[name], settings, Batches(field.train, settings.batch_size, settings.seed))


def never() -> bool:
    return False


class Branchy(Tiny):
    """Looks at the data, so it can't be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def after(calls: int) -> Callable[[], bool]:
    """False for so many calls, then True."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


class Log:
    """Notes the step that each run stands at when it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(self, name: str, run: Run) -> None:
        self.seen.append((name, run.step))
