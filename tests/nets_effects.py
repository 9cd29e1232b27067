"""Awkward networks, by what they do besides compute: write into memory, draw random numbers, branch, switch modes.

As in `nets.py`, all have at least four units.
"""

from typing import Any

import torch
import torch.nn.functional as F
from nets import Chain, ConvNorm, Head, TwoUsers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DropoutBlock(nn.Module):
    """Functional dropout, and stochastic depth as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.norm(self.conv(x))), 0.3, self.training)
        y = F.dropout2d(y, p=0.2, training=self.training)
        if self.training:
            y = y * y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.8).div_(0.8)
        return x + y


class BranchBlock(nn.Module):
    """Another operator, and noise, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
            return self.conv(F.max_pool2d(x, 3, 1, 1))
        return self.conv(F.avg_pool2d(x, 3, 1, 1))


class TrainingBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), BranchBlock(), BranchBlock(), ConvNorm(8, 8)
        self.aux, self.head = Head(8), Head(8)

    def forward(self, x: Tensor) -> Any:
        middle = self.a(self.stem(x))
        logits = self.head(self.c(self.b(middle)))
        return (logits, self.aux(middle)) if self.training else logits


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


class DataBranch(nn.Module):
    """Looks at the data: it can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y.relu() if y.mean() > 0 else y.tanh()


def _halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def _shift(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.1,)


def hooked() -> nn.Module:
    """Hooks on a block, and on a convolution inside one that is traced through."""
    net = Chain(ConvNorm(8, 8), ConvNorm(8, 8), TwoUsers())
    net.blocks[0].register_forward_hook(_halve)
    net.blocks[1][0].register_forward_pre_hook(_shift)
    return net


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


class NoGrad(nn.Module):
    """A region without gradients in the middle of forward, in a block and at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), NoGradBlock(), NoGradBlock(), ConvNorm(8, 8)
        self.gate, self.head = nn.Linear(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        y = self.b(x)
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(y.mean((2, 3))))
        return self.head(self.c(y * gate[:, :, None, None] + x))


class NoGradBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            size = y.abs().amax((1, 2, 3), keepdim=True)
        return F.relu(y / size)


class FullPrecision(nn.Module):
    """Turns autocast off for what it wants exact."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.norm(F.conv2d(x.to(self.conv.weight.dtype), self.conv.weight, self.conv.bias, 1, 1))
        return F.relu(y)


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


class Mixes(nn.Module):
    """Mixes samples, by a random permutation in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = 0.5 * x + 0.5 * x[torch.randperm(x.shape[0])]
        return self.conv(x - x.mean(0, keepdim=True)) + x.flip(0)


class Stateful(nn.Module):
    """Leaves its output on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return self.conv(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.conv(x))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv, x, use_reentrant=False)


def kept_whole() -> nn.Module:
    """Blocks that can't be traced, each for a reason of its own."""
    net = Chain(Stateful(), OwnBackward(), Checkpointed(), ConvNorm(8, 8))
    conv = net.blocks[3][0]
    nn.utils.parametrizations.spectral_norm(conv)
    return net
