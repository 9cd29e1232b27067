"""Weights cast and laid out once: no cast at a forward, channels_last where it pays, the boundary as the suffix expects."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import casts_of, frozen, settle
from torch import Tensor, nn

from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.passes import PASSES
from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.prepare_weights import prepare_weights
from fxfreeze.prefix import describe
from fxfreeze.runtime import Segment

IMAGE = (5, 4, 10, 10)
REDUCED = (torch.bfloat16, torch.float16)


class LeNet(nn.Module):
    """Flattens by ``view``, which refuses a channels_last tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        y = self.fc(x.view(x.size(0), -1))
        return y + x.view_as(y.new_empty(x.size(0), 96))[:, :5]


class WritesThroughView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x.view(x.size(0), -1)[:, ::3].mul_(2)
        return x


class Reinterprets(nn.Module):
    """``view`` with a dtype is another thing: the same bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.where(x.float().view(torch.int32) < 0, -x, x)


class Standardised(nn.Module):
    """The weight is worked out from a parameter at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)).reshape(weight.shape[0], weight.shape[1], 3, 3)
        return F.conv2d(x, weight, self.conv.bias)


class Generated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight * x.mean())


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, bias=False), nn.Conv2d(4, 3, 1))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 4, 2))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutions, IMAGE),
    "depthwise": (depthwise, IMAGE),
    "1-d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 4, 3)), (5, 4, 12)),
    "3-d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.ConvTranspose3d(6, 4, 2)), (5, 4, 5, 5, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3, bias=False)), (5, 7, 4)),
    "padded": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), IMAGE),
    "standardised": (Standardised, IMAGE),
    "norms": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), IMAGE),
    "view": (LeNet, IMAGE),
    "view that is written": (WritesThroughView, IMAGE),
    "view of the bytes": (Reinterprets, IMAGE),
}


def stored_weights(segment: Segment) -> list[Tensor]:
    assert segment.rewritten is not None, segment.reason
    return [t for name, t in segment.rewritten.named_buffers() if "weight" in name]


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_casts_once(name: str, dtype: torch.dtype) -> None:
    """Every weight and bias is held in autocast's dtype: a forward casts the input at most."""
    make, shape = LAYERS[name]
    net = settle(make())
    x = torch.randn(shape)
    before = {key: (value.clone(), value.stride()) for key, value in net.state_dict().items()}
    with torch.no_grad(), torch.autocast("cpu", dtype, cache_enabled=False):
        segment = frozen(net, x, passes=PASSES["plain"])
        assert segment.rewritten is not None, segment.reason
        held = [*net.parameters(), *net.buffers(), *segment.rewritten.buffers()]
        assert casts_of(lambda: net(x), held) > 0
        assert casts_of(lambda: segment(x), held) == 0
        values = segment(x)[0]
        assert values.dtype == net(x).dtype == dtype
    after = net.state_dict()
    assert all(torch.equal(after[key], v) and after[key].stride() == stride for key, (v, stride) in before.items())
    with torch.no_grad():
        assert relative_error(values.double(), net.double()(x.double())) <= BOUNDS[dtype]


def test_nothing_to_prepare() -> None:
    """float64 layers stay the modules that they are."""
    net = convolutions().double()
    segment = frozen(net, torch.randn(IMAGE, dtype=torch.float64), passes=[prepare_weights])
    assert segment.outcomes == []
    assert segment.rewritten is not None
    assert [n.op for n in segment.rewritten.graph.nodes].count("call_module") == 4
    assert list(segment.rewritten.buffers(recurse=False)) == []


def affine() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))


CHANNELS_LAST: dict[str, tuple[Callable[[], nn.Module], torch.dtype, torch.dtype | None, tuple[int, ...], bool]] = {
    "float32": (convolutions, torch.float32, None, IMAGE, True),
    "float32 depthwise": (depthwise, torch.float32, None, IMAGE, True),
    "float32 scale and shift": (affine, torch.float32, None, IMAGE, True),
    "float64": (convolutions, torch.float64, None, IMAGE, False),
    "float64 scale and shift": (affine, torch.float64, None, IMAGE, False),
    "bfloat16": (convolutions, torch.bfloat16, None, IMAGE, True),
    "float16": (convolutions, torch.float16, None, IMAGE, True),
    "autocast to bfloat16": (convolutions, torch.float32, torch.bfloat16, IMAGE, True),
    "viewed": (LeNet, torch.float32, None, IMAGE, True),
    "written through a view": (WritesThroughView, torch.float32, None, IMAGE, False),
    "viewed as bytes": (Reinterprets, torch.float32, None, IMAGE, False),
    "one image alone": (lambda: nn.Conv2d(4, 6, 3), torch.bfloat16, None, (4, 8, 8), False),
    "volumes": (lambda: nn.Conv3d(4, 6, 3), torch.bfloat16, None, (5, 4, 5, 5, 5), False),
}


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last_where_it_pays(name: str) -> None:
    make, dtype, autocast, shape, expected = CHANNELS_LAST[name]
    net = settle(nn.Sequential(make())).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    segment = frozen(net, x, passes=PASSES["plain"], precision=autocast)
    assert segment.rewritten is not None, segment.reason
    kernels = [t for name, t in segment.rewritten.named_buffers() if t.dim() == 4 and "weight" in name]
    kernels = [k for k in kernels if not k.is_contiguous()]
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
    assert bool(kernels) is expected
    assert ("channels_last" in describe(segment)) is expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [convolutions, affine, depthwise])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_boundary_as_the_original_lays_it_out(
    make: Callable[[], nn.Module], layout: torch.memory_format, autocast: torch.dtype | None
) -> None:
    """Whatever layout runs inside, the suffix gets the strides and the dtype that the original gives it."""
    net = settle(nn.Sequential(make()))
    x = torch.randn(IMAGE).contiguous(memory_format=layout)
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        segment = frozen(net, x, passes=PASSES["plain"])
        expected = net(x)
        values = segment(x)[0]
    assert values.dtype == expected.dtype
    assert values.stride() == expected.stride()


@pytest.mark.parametrize(
    ("dtype", "held"), [(torch.float32, "float32, channels_last"), (torch.float64, "float64")], ids=str
)
def test_computed_weights_are_held(dtype: torch.dtype, held: str) -> None:
    """What standardises the weights runs at the build, not at each forward, without autocast too."""
    net = settle(Standardised()).to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    segment = frozen(net, x, passes=[prepare_weights])
    assert [(o.done, o.what) for o in segment.outcomes] == [(True, f"weight held in {held}")]
    assert segment.rewritten is not None
    assert [n.op for n in segment.rewritten.graph.nodes].count("call_function") == 1
    assert len(stored_weights(segment)) == 1
    with torch.no_grad():
        assert relative_error(segment(x)[0].double(), net.double()(x.double())) <= BOUNDS[dtype]


def test_weights_from_the_input_are_left_alone() -> None:
    net = Generated()
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[prepare_weights])
    assert [tuple(o) for o in segment.outcomes] == [
        ("prepare_weights", "conv2d", False, "left alone", "its weight is not a constant")
    ]
    with torch.no_grad():
        assert relative_error(segment(x)[0].double(), net.double()(x.double())) <= BOUNDS[torch.float32]


def test_only_what_is_read_is_held() -> None:
    """Folded weights are not kept beside their casts."""
    net = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(IMAGE)
    segment = frozen(net, x, passes=[fold_batchnorm, prepare_weights], precision=torch.bfloat16)
    assert segment.rewritten is not None
    buffers: dict[str, Any] = dict(segment.rewritten.named_buffers(recurse=False))
    assert len(buffers) == 4
    assert {t.dtype for t in buffers.values()} == {torch.bfloat16}


def test_float64_is_not_cast() -> None:
    """Autocast leaves float64 alone, and so do the weights."""
    net = nn.Linear(4, 6).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    segment = frozen(net, x, passes=[prepare_weights], precision=torch.bfloat16)
    assert segment.outcomes == []
    with torch.no_grad():
        assert torch.equal(segment(x)[0], net(x))
