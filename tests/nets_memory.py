"""Awkward networks that write: in place, through views, into their inputs and their buffers.

As in `nets.py`, all have at least four units.
"""

import torch
import torch.nn.functional as F
from nets import ConvNorm, Head
from torch import Tensor, nn


class InPlaceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y.add_(x)
        y *= 0.9
        F.relu(y, inplace=True)
        return self.mix(y)


class InPlace(nn.Module):
    """In-place operators whose results go unused, within blocks and between them, and names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), InPlaceBlock(), InPlaceBlock(), ConvNorm(8, 8)
        self.relu, self.head = nn.ReLU(inplace=True), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        skip, before = x, x + 1
        x.mul_(0.9)
        y = self.b(x)
        y += skip
        self.relu(y)
        z = self.c(y) + skip
        z.neg_()
        return self.head(z + before)


class ViewBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.view(y.shape[0], 8, -1)[:, :, ::2].add_(0.2)
        y[:, 1] = x[:, 2]
        return y


class ViewWrites(nn.Module):
    """Writes through views: the base, and other views of it, change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), ViewBlock(), ViewBlock(), ConvNorm(8, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        left, flat = x[:, :4], x.flatten(1)
        left.mul_(0.5)
        x[:, 0] = 1.0
        y = self.b(x + flat.view_as(x))
        flat[:, 3:9] *= 2.0
        y[:, 4:].add_(left)
        return self.head(self.c(y + x))


class EarlyReader(nn.Module):
    """An auxiliary head reads a tensor before it is written into: what is after the write can't freeze before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), nn.Conv2d(8, 8, 3, 1, 1), ConvNorm(8, 8), ConvNorm(8, 8)
        self.aux, self.head = Head(8), Head(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(self.stem(x))
        aux = self.aux(y)
        y.mul_(0.5)
        return self.head(self.c(self.b(y))), aux


class InputWrites(nn.Module):
    """Writes into what it is called with, early and late."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), ConvNorm(8, 8), ConvNorm(8, 8), ConvNorm(8, 8)
        self.head = Head(8)

    def forward(self, x: Tensor, late: Tensor) -> Tensor:
        x -= 0.5
        y = self.b(self.a(self.stem(x)))
        late.mul_(2).clamp_(-3, 3)
        return self.head(self.c(y)) + late[:, :1]


class Splits(nn.Module):
    """Two views of one tensor cross to different units, and are written into before they are used there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.b, self.c, self.d, self.head = ConvNorm(4, 4), ConvNorm(4, 4), ConvNorm(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.stem(x))
        left, right = y[:, :4], y[:, 4:]
        before = left + 1
        right.add_(1.0)
        left.mul_(2)
        right = self.c(right)
        left = self.b(left)
        return self.head(self.d(torch.cat([left + before, right], 1)))


class IndexWrites(nn.Module):
    """Writes at indices that are tensors, through ``copy_``, and into a tensor made on the spot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[y < 0] = 0.0
        made = torch.zeros_like(y)
        made.copy_(y)
        made[:, ::2] += 1
        made.index_add_(1, torch.tensor([1, 2]), y[:, :2])
        return made + y


class OwnStatistics(nn.Module):
    """A norm of the user's own, whose buffers it writes in training."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return F.relu(x - self.mean[:, None, None])


class RootBuffer(nn.Module):
    """The root, which stays in training to the end, writes a running mean of what a unit gives, and reads it later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), ConvNorm(8, 8), ConvNorm(8, 8), ConvNorm(8, 8)
        self.head = Head(8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.stem(x))
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return self.head(self.c(self.b(y)) + self.mean[:, None, None])
