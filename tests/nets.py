"""Awkward networks: the parts they are made of, sharing, several inputs, norms that fold otherwise or not at all.

All are small and have at least four units, so that training crosses three freeze points; images are (N, 3, 8, 8).
`cases.py` names each with the calls that training makes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

IMAGES = 16  # more than the self-check looks at; batch norm over fewer magnifies rounding


class Call(NamedTuple):
    """Arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Case(NamedTuple):
    """A network and the calls that training makes.

    opaque: parts are kept whole, and freezing them warns; examples: it can't be traced without example inputs.
    """

    make: Callable[[], nn.Module]
    calls: Callable[[Generator, int], Call]
    opaque: bool = False
    examples: bool = False


def settle(net: nn.Module, seed: int = 0) -> nn.Module:
    """Move ``net`` away from its start, which hides errors: nothing is constant (zero biases and heads, gammas of 0 or 1),
    and running statistics are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for p in net.parameters():
            if bool((p == p.flatten()[0]).all()):
                p.add_(0.2 * normal(p)) if p.flatten()[0] else p.copy_(0.2 * normal(p))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(3)
    return net


def images(generator: Generator, step: int) -> Call:
    return Call((torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64),), {})


class ConvNorm(nn.Sequential):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Chain(nn.Module):
    """A stem, the blocks under test, a plain block and a head."""

    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = ConvNorm(3, channels)
        self.blocks = nn.ModuleList(blocks)
        self.last = ConvNorm(channels, channels, 2)
        self.head = Head(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def tied_weights() -> nn.Module:
    net = Chain(ConvNorm(8, 8), ConvNorm(8, 8), ConvNorm(8, 8))
    net.blocks[1][0].weight = net.blocks[0][0].weight
    return net


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = ConvNorm(3, 8)
        self.vector = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sigmoid())
        self.both = ConvNorm(8, 8)
        self.last = ConvNorm(8, 8, 2)
        self.head = Head(8)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        gate = self.vector(vector)
        return self.head(self.last(self.both(self.image(image) * gate[:, :, None, None])))


def image_and_vector(generator: Generator, step: int) -> Call:
    vector = torch.randn(IMAGES, 4, generator=generator, dtype=torch.float64)
    return Call((*images(generator, step).args, vector), {})


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8)
        self.a, self.b, self.c = ConvNorm(8, 8), ConvNorm(8, 8), ConvNorm(8, 8, 2)
        self.head = Head(8)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.a(self.stem(x if mask is None else x * mask)) * scale
        x = self.b(x) if mask is None else self.b(x) * mask
        return {"logits": self.head(self.c(x)), "pooled": x.mean((2, 3))}


def sometimes_masked(generator: Generator, step: int) -> Call:
    call = images(generator, step)
    if step % 3 == 0:
        return Call(call.args, {"mask": None})
    mask = (torch.rand(IMAGES, 1, 8, 8, generator=generator) > 0.3).double()
    return Call((), {"x": call.args[0], "mask": mask, "scale": 0.5 / (step % 3)})


class TwoUsers(nn.Module):
    """The convolution's output is read by its batch norm and by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.norm(y)) + y


class Twice(nn.Module):
    """A convolution called twice with a batch norm each, and a batch norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.conv(x)))
        y = torch.relu(self.norms[1](self.conv(y)))
        return self.norms[2](self.other(y)) + self.norms[2](y)


class ConcatNorm(nn.Module):
    """Batch norm after a concatenation: no convolution can take it in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 3, 1, 1), nn.Conv2d(8, 4, 1)
        self.norm, self.mix = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.norm(torch.cat([x, self.a(x), self.b(x)], 1)))).relu_()


class OtherNorms(nn.Module):
    """Norms that fold otherwise, or not at all."""

    def __init__(self, norm: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, groups=groups), norm

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.1)


def other_norms() -> nn.Module:
    return Chain(
        OtherNorms(nn.BatchNorm2d(8, affine=False), groups=2),
        OtherNorms(nn.BatchNorm2d(8, momentum=None, eps=1e-2)),
        OtherNorms(nn.BatchNorm2d(8, track_running_stats=False), groups=8),
        OtherNorms(nn.GroupNorm(2, 8)),
        OtherNorms(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    )


class Shuffle(nn.Module):
    """Chunks, a batch norm over what two grouped halves make, and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 3, 1, 1, groups=2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        left, right = torch.split(F.relu(self.norm(torch.cat((self.a(left), self.b(right)), dim=1))), [4, 4], 1)
        return torch.stack([left, right], 2).flatten(1, 2)


class ComputedWeights(nn.Module):
    """Convolves with weights computed from several parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.gain, self.offset = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * self.gain.view(-1, 1, 1, 1).exp()
        weight = F.batch_norm(weight.view(1, 8, -1), None, None, training=True).view_as(weight)
        y = F.conv2d(x, weight, self.conv.bias + self.offset, padding=1)
        norm = self.norm
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.1, 1e-3)
        return F.relu(y)
