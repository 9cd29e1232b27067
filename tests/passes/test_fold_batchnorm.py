"""Folding batch norm: what folds, what becomes a scale and shift and why, what is left alone and why, the numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from frozen import frozen, norms_run, settle
from torch import Tensor, nn

from fxfreeze.passes.fold_batchnorm import fold_batchnorm, scale_shift
from fxfreeze.rewrite import Outcome
from fxfreeze.runtime import BOUNDS, Segment, relative_error


class FunctionalNorm(nn.Module):
    """A batch norm called as a function over buffers, with an activation, as timm's norm-act modules do."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training, momentum=0.1
        )
        return F.relu(y)


class Functional(nn.Module):
    """``function`` called on parameters, then a batch norm as a function."""

    def __init__(self, function: Callable[..., Tensor], shape: tuple[int, ...], channels: int, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.weight, self.bias = nn.Parameter(torch.randn(shape) * 0.3), nn.Parameter(torch.randn(channels))
        self.norm = FunctionalNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.function(x, self.weight, self.bias, **self.options))


class StandardisedConv(nn.Conv2d):
    """Weights standardised by a batch norm in training mode, as timm's StdConv2d does."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def norm(channels: int, dims: int = 2, **options: Any) -> nn.Module:
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels, **options)


IMAGE, SIGNAL, VOLUME = (5, 4, 9, 8), (5, 4, 12), (5, 4, 5, 6, 7)
FOLDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), norm(6, 1)), SIGNAL),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), norm(6)), IMAGE),
    "conv2d without bias": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 1), bias=False), norm(6)), IMAGE),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), norm(6, 3)), VOLUME),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), norm(6)), IMAGE),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), norm(8)), IMAGE),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, padding="same"), norm(6)), IMAGE),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, 2), norm(6, 1)), SIGNAL),
    "transposed 2d": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), norm(6)), IMAGE),
    "transposed 3d": (lambda: nn.Sequential(nn.ConvTranspose3d(4, 6, 2, bias=False), norm(6, 3)), VOLUME),
    "transposed in groups": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), norm(6)), IMAGE),
    "transposed depthwise": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 8, 3, groups=4, dilation=2), norm(8, 1)), SIGNAL),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), norm(6, 1)), (5, 4)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), norm(6, 1)), (5, 4)),
    "padded by reflection": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), norm(6)), IMAGE),
    "padded in a circle": (lambda: nn.Sequential(nn.Conv1d(4, 6, 4, padding=2, padding_mode="circular"), norm(6, 1)), SIGNAL),
    "padded by repetition": (
        lambda: nn.Sequential(nn.Conv3d(4, 6, 3, padding=(1, 0, 2), padding_mode="replicate"), norm(6, 3)),
        VOLUME,
    ),
    "padded to the same size": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), norm(6)),
        IMAGE,
    ),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), norm(6, affine=False, eps=0.1)), IMAGE),
    "cumulative average": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), norm(6, momentum=None)), IMAGE),
    "synchronised": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), IMAGE),
    "norm as a function": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), FunctionalNorm(6)), IMAGE),
    "conv1d as a function": (lambda: Functional(F.conv1d, (6, 4, 3), 6, stride=2), SIGNAL),
    "conv2d as a function": (lambda: Functional(F.conv2d, (6, 2, 3, 3), 6, padding=1, groups=2), IMAGE),
    "conv3d as a function": (lambda: Functional(F.conv3d, (6, 4, 2, 2, 2), 6), VOLUME),
    "transposed as a function": (lambda: Functional(F.conv_transpose2d, (4, 3, 3, 3), 6, groups=2, stride=2), IMAGE),
    "linear as a function": (lambda: Functional(F.linear, (6, 4), 6), (5, 4)),
    "standardised weights": (lambda: nn.Sequential(StandardisedConv(4, 6, 3), norm(6)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str, dtype: torch.dtype) -> None:
    """One convolution or linear layer is left, as exact as the dtype allows, and the original is untouched."""
    make, shape = FOLDS[name]
    net = settle(make()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert segment.rewritten is not None, segment.reason
    assert [outcome.done for outcome in segment.outcomes] == [True] * len(segment.outcomes)
    assert segment.outcomes[-1].what.startswith("folded into ")
    assert norms_run(lambda: segment(x)) == 0
    with torch.no_grad():
        exact = net.double()(x.double())
    assert relative_error(segment(x)[0].double(), exact) <= BOUNDS[dtype]
    after = net.to(dtype).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("transposed", [False, True])
def test_computed_in_float64(transposed: bool) -> None:
    """The stored weight is the exact one, rounded once."""
    layer = nn.ConvTranspose2d(4, 6, 3) if transposed else nn.Conv2d(4, 6, 3)
    net = settle(nn.Sequential(layer, nn.BatchNorm2d(6, eps=1e-3)))
    bn = net[1]
    segment = frozen(net, torch.randn(IMAGE), passes=[fold_batchnorm])
    assert segment.rewritten is not None
    scale = bn.weight.double() / (bn.running_var.double() + 1e-3).sqrt()
    weight = layer.weight.double() * scale.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
    bias = (layer.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    stored = dict(segment.rewritten.named_buffers())
    # One unit in the last place of float32 at most: sqrt and division round as rsqrt does not.
    torch.testing.assert_close(stored["_0_weight"], weight.float(), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(stored["_0_bias"], bias.float(), rtol=1.2e-7, atol=1e-9)
