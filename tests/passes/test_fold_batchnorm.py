"""Folding batch norm: what folds, what becomes a scale and shift and why, what is left alone and why, the numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import frozen, norms_run, settle
from torch import Tensor, nn

from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.passes.fold_batchnorm import fold_batchnorm, scale_shift
from fxfreeze.prefix import describe
from fxfreeze.rewrite import Outcome
from fxfreeze.runtime import Segment


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


class Branch(nn.Module):
    """``run`` is the forward, on the children given."""

    def __init__(self, run: Callable[..., Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def shape_in_between() -> nn.Module:
    """Sizes of the convolution's output are read before the norm, and used after it."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        torch._assert(y.ndim == 4, "images")
        n, c = y.shape[:2]
        return net.norm(y).reshape(n, c, -1).to(y.dtype)

    return Branch(run, conv=nn.Conv2d(4, 6, 3), norm=norm(6))


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
    "shape in between": (shape_in_between, IMAGE),
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
    folded = [outcome for outcome in segment.outcomes if outcome.done]
    assert [outcome.what for outcome in folded] == ["folded"]
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
    stored = {name[-4:]: buffer for name, buffer in segment.rewritten.named_buffers()}
    assert torch.equal(stored["ight"], weight.float())
    assert torch.equal(stored["bias"], bias.float())


def two_users() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.norm(y) + torch.tanh(y)

    return Branch(run, conv=nn.Conv2d(4, 6, 3), norm=norm(6))


def concatenation() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.norm(torch.cat([x, net.conv(x)], 1))

    return Branch(run, conv=nn.Conv2d(4, 6, 1), norm=norm(10))


def weight_from_input() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.norm(F.conv2d(x, net.conv.weight * x.mean(), net.conv.bias))

    return Branch(run, conv=nn.Conv2d(4, 6, 3), norm=norm(6))


def noisy_weight() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        weight = net.conv.weight
        return net.norm(F.conv2d(x, weight + torch.randn_like(weight)))

    return Branch(run, conv=nn.Conv2d(4, 6, 3), norm=norm(6))


def rewritten_weight() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        weight = net.conv.weight.clone()
        weight[0].mul_(2)
        return net.norm(F.conv2d(x, weight, net.conv.bias))

    return Branch(run, conv=nn.Conv2d(4, 6, 3), norm=norm(6))


NO_LAYER = "is no convolution or linear layer"
SCALE_SHIFTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "on the input": (lambda: nn.Sequential(norm(4), nn.Conv2d(4, 6, 3)), IMAGE, f"its input input_1 {NO_LAYER}"),
    "on (N, C)": (lambda: nn.Sequential(nn.Tanh(), norm(4, 1)), (5, 4), f"its input _0 {NO_LAYER}"),
    "on volumes": (lambda: nn.Sequential(nn.Tanh(), norm(4, 3)), VOLUME, f"its input _0 {NO_LAYER}"),
    "after a norm": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), norm(6), norm(6)), IMAGE, f"its input _1 {NO_LAYER}"),
    "after a concatenation": (concatenation, IMAGE, f"its input cat {NO_LAYER}"),
    "two users": (two_users, IMAGE, "the output of conv has another user: tanh"),
    "weight from the input": (weight_from_input, IMAGE, "the weight of conv2d is not a constant"),
    "random weight": (noisy_weight, IMAGE, "the weight of conv2d is not a constant"),
    "weight written into": (rewritten_weight, IMAGE, "the weight of conv2d is not a constant"),
    "linear over a sequence": (
        lambda: nn.Sequential(nn.Linear(12, 6), norm(4, 1)),
        SIGNAL,
        "the output of 0 has 3 dimensions, and dimension 1 is not its channels",
    ),
    "one image alone": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), norm(8, 1)),
        (4, 8, 8),
        "the output of 0 has 3 dimensions, and dimension 1 is not its channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCALE_SHIFTS)
def test_becomes_a_scale_and_shift(name: str, dtype: torch.dtype) -> None:
    make, shape, reason = SCALE_SHIFTS[name]
    net = settle(make()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert segment.rewritten is not None, segment.reason
    assert {(o.done, o.what) for o in segment.outcomes} == {(True, "made a scale and shift")}
    assert segment.outcomes[0].why == reason
    assert f": {reason}" in describe(segment)
    assert norms_run(lambda: segment(x)) == 0
    with torch.random.fork_rng():
        values = segment(x)[0]
    with torch.no_grad():
        exact = net.double()(x.double()) if name != "random weight" else net(x).double()
    assert relative_error(values.double(), exact) <= BOUNDS[dtype]


class Conditional(nn.Module):
    """The affine weights of the norm come from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.film, self.norm = nn.Conv2d(4, 6, 3), nn.Linear(4, 6), norm(6)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.film(x.mean((2, 3))).mean(0)
        return F.batch_norm(self.conv(x), self.norm.running_mean, self.norm.running_var, gain, None)


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no running statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), norm(6, track_running_stats=False)),
        "it normalises with the batch's own statistics",
    ),
    "weights from the input": (Conditional, "its statistics or weights are not constants"),
    "norm of the weights": (
        lambda: nn.Sequential(StandardisedConv(4, 6, 3)),
        "it normalises with the batch's own statistics",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    net = settle(make())
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert segment.rewritten is not None
    assert [(o.done, o.what, o.why) for o in segment.outcomes] == [(False, "left alone", reason)]
    assert f": {reason}" in describe(segment)
    assert norms_run(lambda: segment(x)) == 1
    with torch.no_grad():
        assert torch.equal(segment(x)[0], net(x))


def test_standardised_weights_fold_once() -> None:
    """The weights' own norm in training mode is computed at the build, not turned into eval, and not run again."""
    net = settle(nn.Sequential(StandardisedConv(4, 6, 3), norm(6)))
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert [o.what for o in segment.outcomes] == ["left alone", "folded"]
    assert segment.rewritten is not None
    assert [n.op for n in segment.rewritten.graph.nodes].count("call_function") == 1


def test_after_a_norm_that_is_left_alone() -> None:
    """A batch norm is no layer that could take another in."""
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6, track_running_stats=False), norm(6)))
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert [(o.what, o.why) for o in segment.outcomes] == [
        ("left alone", "it normalises with the batch's own statistics"),
        ("made a scale and shift", f"its input _1 {NO_LAYER}"),
    ]
    with torch.no_grad():
        x = x[:4]  # what the batch norm left alone normalises with
        assert relative_error(segment(x)[0].double(), net.double()(x.double())) <= BOUNDS[torch.float32]


def test_a_convolution_called_twice() -> None:
    """Each call site folds its own norm into its own copy of the weights."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.a(net.conv(x)) * net.b(net.conv(x + 1))

    net = settle(Branch(run, conv=nn.Conv2d(4, 6, 3), a=norm(6), b=norm(6)))
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert [(o.place, o.what) for o in segment.outcomes] == [("a", "folded"), ("b", "folded")]
    assert segment.rewritten is not None
    weights = [t for name, t in segment.rewritten.named_buffers() if "weight" in name]
    assert len(weights) == 2
    assert not torch.equal(*weights)
    with torch.no_grad():
        assert relative_error(segment(x)[0].double(), net.double()(x.double())) <= BOUNDS[torch.float32]


def test_a_norm_called_twice() -> None:
    """One norm folds into two layers, and its statistics stay where they were."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.a(x)) - net.norm(net.b(x))

    net = settle(Branch(run, a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 6, 3), norm=norm(6)))
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert [o.what for o in segment.outcomes] == ["folded", "folded"]
    with torch.no_grad():
        assert relative_error(segment(x)[0].double(), net.double()(x.double())) <= BOUNDS[torch.float32]


def test_timm_norm_act() -> None:
    """timm's BatchNormAct2d folds, its activation stays."""
    layers = pytest.importorskip("timm.layers")
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 3), layers.BatchNormAct2d(6)))
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert [o.what for o in segment.outcomes] == ["folded"]
    values = segment(x)[0]
    assert bool((values >= 0).all())
    with torch.no_grad():
        assert relative_error(values.double(), net.double()(x.double())) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_variances(variance: float, dtype: torch.dtype) -> None:
    """Channels that never varied, or varied without bounds, beside ordinary ones."""
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6))).to(dtype)
    net[1].running_var[::2] = variance
    x = torch.randn(IMAGE, dtype=dtype)
    segment = frozen(net, x, passes=[fold_batchnorm])
    assert segment.rewritten is not None, segment.reason
    with torch.no_grad():
        exact = net.double()(x.double())
    for channels in (slice(0, None, 2), slice(1, None, 2)):
        assert relative_error(segment(x)[0][:, channels].double(), exact[:, channels]) <= BOUNDS[dtype]


def test_a_scale_beyond_float16() -> None:
    """What can't be stored in the dtype is found out, and the original runs."""
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6, eps=1e-7))).half()
    with torch.no_grad():
        net[0].weight.mul_(1e-2)
        net[1].running_mean.copy_(net[0].bias)
    net[1].running_var.zero_()
    net[1].weight.data.fill_(1e4)
    x = torch.randn(IMAGE).half() * 1e-3
    segment: Segment = frozen(net, x, passes=[fold_batchnorm])
    assert segment.rewritten is None
    assert segment.reason is not None
    assert "relative error" in segment.reason
    with torch.no_grad():
        assert torch.equal(segment(x)[0], net(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), IMAGE], ids=str)
def test_scale_shift(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Both of its ways give x * scale + shift in a tensor of its own, of x's layout."""
    x = torch.randn(shape, dtype=torch.float64)
    x = x.contiguous(memory_format=layout) if len(shape) == 4 else x
    before = x.clone()
    scale, shift = (torch.randn(1, 4, *[1] * (len(shape) - 2), dtype=torch.float64) for _ in range(2))
    y = scale_shift(x, scale, shift)
    assert relative_error(y, x * scale + shift) <= BOUNDS[torch.float64]
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()
    assert y.stride() == x.stride()


def test_outcomes_are_named() -> None:
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6)))
    outcomes = frozen(net, torch.randn(IMAGE), passes=[fold_batchnorm]).outcomes
    assert outcomes == [Outcome("fold_batchnorm", "1", True, "folded", "")]
