"""Awkward networks that branch, draw random numbers, switch modes, or can't be traced.

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
    """Turns autocast off for what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.inner(x)


def full_precision() -> nn.Module:
    """A network that autocast has no part in."""
    parts = ConvNorm(3, 8), ConvNorm(8, 8), TwoUsers(), ConvNorm(8, 8), Head(8)
    return nn.Sequential(*map(FullPrecision, parts))


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
