"""Lowering to kernels: each pattern, what stays as it is and why, the weights, and where images are written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import dispatched
from passing import calls, done, passed, reasons
from torch import Tensor, nn

from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.passes import PASSES
from fxfreeze.rewrite import Outcome

TRITON = PASSES["triton"]


def layers() -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(8, 12, 1),
        "conv3": nn.Conv2d(8, 12, 3, 2, 1),
        "same": nn.Conv2d(8, 8, 5, padding="same", dilation=2),
        "depthwise": nn.Conv2d(8, 8, 3, 2, 1, groups=8),
        "norm": nn.BatchNorm2d(8),
        "linear": nn.Linear(6, 5),
        "layernorm": nn.LayerNorm(6),
        "relu": nn.ReLU(inplace=True),
    }


MATCHES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "1x1": (lambda net, x: net.conv1(x), ["conv1x1"]),
    "1x1 and relu": (lambda net, x: net.relu(net.conv1(x)), ["conv1x1"]),
    "3x3 and hard swish": (lambda net, x: F.hardswish(net.conv3(x)), ["conv3x3"]),
    "same padding": (lambda net, x: F.relu6(net.same(x)), ["conv3x3"]),
    "depthwise and silu": (lambda net, x: F.silu(net.depthwise(x)), ["depthwise"]),
    "norm and relu": (lambda net, x: net.norm(x).relu(), ["pointwise"]),
    "norm, relu and an average": (lambda net, x: F.avg_pool2d(net.norm(x).relu(), 2), ["pointwise"]),
    "norm, relu and a maximum": (lambda net, x: F.max_pool2d(net.norm(x).relu(), 3, 2, 1), ["pointwise"]),
    "norm, relu and the mean": (lambda net, x: F.adaptive_avg_pool2d(net.norm(x).relu(), 1), ["pointwise"]),
    "an activation": (lambda net, x: F.gelu(x), ["pointwise"]),
    "a pooling": (lambda net, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), ["pointwise"]),
    "linear and gelu": (lambda net, x: F.gelu(net.linear(x)), ["linear"]),
    "layer norm": (lambda net, x: net.layernorm(x), ["layernorm"]),
    "a block": (lambda net, x: net.relu(net.same(net.norm(x).relu()) + x), ["conv3x3"]),
    "two blocks": (
        lambda net, x: net.conv1(net.norm(net.relu(net.same(x) + x)).relu()),
        ["conv3x3", "conv1x1"],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MATCHES)
def test_lowered(name: str, dtype: torch.dtype) -> None:
    run, kernels = MATCHES[name]
    segment = passed(TRITON, run, dtype=dtype, **layers())
    left = calls(segment)
    assert [outcome.what for outcome in done(segment, "lower")] == kernels
    assert set(left) <= {"placeholder", "get_attr", "output", "as_image", "as_rows", *kernels}


@pytest.mark.parametrize("name", MATCHES)
def test_images_of_other_sizes_and_layouts(name: str) -> None:
    segment = passed(TRITON, MATCHES[name][0], **layers())
    for x in (torch.randn(5, 8, 7, 6), torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)):
        plain = segment.plain(x)[0].detach()
        assert relative_error(segment(x)[0], plain) <= BOUNDS[torch.float32]
        assert segment(x)[0].is_contiguous() == plain.is_contiguous()


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "groups": (lambda net, x: F.conv2d(x, net.conv1.weight[:8, :4], groups=2), "2 groups for 8 outputs are neither"),
    "a weight from the input": (lambda net, x: F.conv2d(x, x[:2, :8, :1, :1]), "is not a constant"),
    "uneven padding": (
        lambda net, x: F.conv2d(x, net.conv1.weight.expand(12, 8, 2, 2), padding="same"),
        "pads one side more",
    ),
    "a stride from the shape": (
        lambda net, x: F.conv2d(x, net.conv1.weight, stride=x.shape[2] // 3),
        "is computed at run time",
    ),
    "rounded up": (lambda net, x: F.avg_pool2d(x, 4, ceil_mode=True), "rounds its size up"),
    "a dilated maximum": (lambda net, x: F.max_pool2d(x, 2, dilation=2), "is dilated"),
    "a huge window": (lambda net, x: F.avg_pool2d(x.repeat(1, 1, 2, 2), 12), "more than 64 pixels"),
    "four pixels": (lambda net, x: F.adaptive_avg_pool2d(x, 2), "it leaves 2 pixels, not one"),
    "an activation of rows": (lambda net, x: F.relu(x.flatten(1)), "has 2 dimensions, not 4"),
    "a norm over a shape": (lambda net, x: F.layer_norm(x, x.shape[-1:]), "is computed at run time"),
    "a weight that is a vector": (lambda net, x: F.linear(x, net.linear.weight[0]), "its weight is a vector"),
    "a norm over two dimensions": (lambda net, x: F.layer_norm(x, (6, 6)), "it normalises over 2 dimensions"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MISSES)
def test_left_alone(name: str) -> None:
    run, why = MISSES[name]
    segment = passed(TRITON, run, **layers())
    assert not done(segment, "lower")
    assert why in "; ".join(reasons(segment, "lower"))


def test_no_kernel_for_float64() -> None:
    segment = passed(TRITON, lambda net, x: net.norm(net.conv1(x)[:, :8]).relu(), dtype=torch.float64, **layers())
    assert not done(segment, "lower")
    assert reasons(segment, "lower")


def test_a_write_between_keeps_what_it_was() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        y = x.sin()
        z = net.conv1(y)
        y.mul_(2)
        return z.relu() + net.conv1(y)

    segment = passed(TRITON, run, **layers())
    assert "mul_ writes into its input before" in "; ".join(reasons(segment, "lower"))


def test_an_activation_in_place_that_others_see() -> None:
    """Its result is unused; whoever reads its input later sees it all the same."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = x - 0.5
        F.relu(y, inplace=True)
        return net.conv1(y)

    segment = passed(TRITON, run, **layers())
    assert "it writes into sub, which others may read" in reasons(segment, "lower")
    assert calls(segment)["conv1x1"] == 1


@pytest.mark.parametrize(
    "view", [lambda y: y.flatten(1), lambda y: y.reshape(-1), lambda y: y.contiguous(), nn.Flatten()]
)
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_a_write_through_what_may_copy(backend: str, view: Callable[[Tensor], Tensor]) -> None:
    """Rows of a packed image are a view of it, and a copy of one that is channels_last: the write would be lost."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.conv3(x)
        view(y).sub_(0.5)
        return y + 0.0

    passed(PASSES[backend], run, **layers())


def test_a_write_into_what_a_kernel_made_meanwhile() -> None:
    """Between two nodes that become one kernel, something writes into what an earlier kernel now makes. As built, the write
    changes nothing, so that no self-check can see it."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.same(x)
        z = net.conv1(y)
        y.clamp_(-1000, 1000)
        return z.relu(), y

    segment = passed(TRITON, run, **layers())
    assert any("clamp_ writes into" in reason for reason in reasons(segment, "lower"))
    x = 1e6 * torch.randn(3, 8, 6, 6)
    for ours, theirs in zip(segment(x), segment.plain(x), strict=True):
        assert relative_error(ours, theirs.detach()) <= BOUNDS[torch.float32]


def test_strides_of_its_own() -> None:
    segment = passed(TRITON, lambda net, x: net.conv1(x).as_strided((3, 12, 36), (432, 36, 1)), **layers())
    assert not done(segment, "lower")


def test_where_the_layout_matters_nothing_is_lowered() -> None:
    segment = passed(TRITON, lambda net, x: net.conv1(x).view(torch.int32).float(), **layers())
    assert (
        Outcome("lower", "all", False, "left alone", "random numbers or views follow the layout in memory")
        in segment.outcomes
    )


def test_images_are_written_into_their_buffer() -> None:
    """A dense layer's new channels; only what no kernel makes is copied there."""

    def run(net: Any, x: Tensor) -> Tensor:
        first = F.max_pool2d(x, 2)
        second = net.same(net.norm(first).relu())
        third = net.same(second)
        return net.norm32(torch.cat([first, second, third, third.tanh()], 1))

    segment = passed(TRITON, run, **layers(), norm32=nn.BatchNorm2d(32))
    left = calls(segment)
    assert (left["cat"], left["allocate"], left["allocate_for"]) == (0, 0, 1)
    assert (left["room"], left["placed"]) == (3, 1)


def test_weights_are_cast_and_packed_once() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        segment = passed(TRITON, lambda net, x: net.relu(net.conv1(x)), **layers())
        x = torch.randn(3, 8, 6, 6)
        counts = dispatched(lambda: segment(x))
    assert counts["_to_copy"] <= 2 + 4  # x in, the output out; the rest is the reference's own arithmetic
    assert segment.rewritten is not None
    held = next(b for name, b in segment.rewritten._buffers.items() if name.endswith("weight") and b is not None)
    assert held.dtype == torch.bfloat16
    assert held.stride(1) == 1


def test_an_activation_that_others_read_too_stays_where_it_is() -> None:
    segment = passed(TRITON, lambda net, x: (y := net.conv1(x), y.relu(), y)[1:], **layers())
    assert [outcome.what for outcome in done(segment, "lower")] == ["conv1x1", "pointwise"]
