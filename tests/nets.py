"""Awkward networks: each trips a tracer, a splitter or a pass that is less than careful in one way.

All are small and have at least four units, so that training crosses three freeze points; images are (N, 3, 8, 8).
`CASES` names each with the calls that training makes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

IMAGES = 6  # more than the self-check looks at


class Call(NamedTuple):
    """Arguments of one forward."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


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
    return Call((torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64),))


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
    net.blocks[1][0].weight = net.blocks[0][0].weight  # type: ignore[index]
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
    return Call((*images(generator, step).args, vector))


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
    return Call((), {"x": call.args[0], "mask": mask, "scale": 0.5})


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
            x = F.max_pool2d(x + 0.1 * torch.randn_like(x), 3, 1, 1)
        else:
            x = F.avg_pool2d(x, 3, 1, 1)
        return self.conv(x)


class TrainingBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), BranchBlock(), BranchBlock(), ConvNorm(8, 8)
        self.aux, self.head = Head(8), Head(8)

    def forward(self, x: Tensor) -> Any:
        middle = self.a(self.stem(x))
        logits = self.head(self.c(self.b(middle)))
        return (logits, self.aux(middle)) if self.training else logits


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


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + self.out(y.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class PositionEmbedding(nn.Module):
    """Parameters that the root reads: a class token and positions; dropout between them and the first block."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.layers = nn.ModuleList(Encoder(width) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down1, self.down2 = ConvNorm(3, 6), ConvNorm(6, 8, 2), ConvNorm(8, 12, 2)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.merge1 = ConvNorm(16, 8)
        self.up2 = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU())
        self.merge2, self.out = ConvNorm(12, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.stem(x)
        half = self.down1(full)
        x = self.merge1(torch.cat([self.up1(self.down2(half)), half], 1))
        return self.out(self.merge2(torch.cat([self.up2(x), full], 1)))


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


class ListLoop(nn.Module):
    """Modules in lists and dictionaries, features gathered in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8)
        self.parts = nn.ModuleDict(
            {
                "convs": nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(4)),
                "norms": nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4)),
            }
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.full((8, 1, 1), 0.5)) for _ in range(4))
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        x = self.stem(x)
        for conv, norm, scale in zip(self.parts["convs"], self.parts["norms"], self.scales, strict=True):  # type: ignore[call-overload]
            x = F.relu(norm(conv(x))) * scale + x
            features.append(x)
        return self.head(torch.cat(features, 1))


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
    net.blocks[1][0].register_forward_pre_hook(_shift)  # type: ignore[index, union-attr]
    return net


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


class Recurrent(nn.Module):
    """Integer tokens, recurrent layers with their dropout, attention: modules that return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.a, self.b = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2), nn.GRU(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, (h, _) = self.a(self.embed(tokens))
        x, _ = self.b(x + h[-1][:, None])
        y, _ = self.attend(x, x, x, need_weights=False)
        return self.fc(self.norm(x + y).mean(1))


def tokens(generator: Generator, step: int) -> Call:
    return Call((torch.randint(0, 11, (IMAGES, 7), generator=generator),))


class Volumes(nn.Module):
    """1-d and 3-d convolutions, and batch norm on (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv3d(3, 6, 3, 1, 1), nn.BatchNorm3d(6), nn.ReLU())
        self.b = nn.Sequential(nn.Conv1d(6, 8, 3, 2, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.c = nn.Sequential(nn.ConvTranspose1d(8, 4, 2, 2, groups=2), nn.BatchNorm1d(4), nn.ReLU())
        self.d = nn.Sequential(nn.Linear(128, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.d(self.c(self.b(self.a(x.view(*x.shape[:2], 2, 4, 8)).mean(2).flatten(2))).flatten(1)))


class Case(NamedTuple):
    """A network and the calls that training makes. opaque: a part is kept whole, and freezing it warns."""

    make: Callable[[], nn.Module]
    calls: Callable[[Generator, int], Call] = images
    opaque: bool = False
    examples: bool = False


CASES = {
    "tied_weights": Case(tied_weights),
    "two_inputs": Case(TwoInputs, image_and_vector),
    "keywords": Case(Keywords, sometimes_masked),
    "functional_dropout": Case(lambda: Chain(DropoutBlock(), DropoutBlock(), DropoutBlock())),
    "training_branches": Case(TrainingBranches),
    "two_users": Case(lambda: Chain(TwoUsers(), TwoUsers(), TwoUsers())),
    "conv_used_twice": Case(lambda: Chain(Twice(), Twice(), TwoUsers())),
    "norm_after_concat": Case(lambda: Chain(ConcatNorm(), ConcatNorm(), ConcatNorm())),
    "position_embedding": Case(PositionEmbedding, examples=True),
    "unet": Case(UNet),
    "in_place": Case(InPlace),
    "view_writes": Case(ViewWrites),
    "list_loop": Case(ListLoop),
    "data_branch": Case(lambda: Chain(ConvNorm(8, 8), DataBranch(), ConvNorm(8, 8)), opaque=True),
    "hooked": Case(hooked, opaque=True),
    "other_norms": Case(other_norms),
    "own_statistics": Case(lambda: Chain(OwnStatistics(), OwnStatistics(), OwnStatistics())),
    "no_grad": Case(NoGrad),
    "full_precision": Case(lambda: Chain(ConvNorm(8, 8), FullPrecision(), FullPrecision())),
    "recurrent": Case(Recurrent, tokens),
    "volumes": Case(Volumes, examples=True),
}
