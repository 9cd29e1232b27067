"""Residual additions in a convolution's epilogue: what is taken in, what is left alone and why, and the numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passing import calls, done, passed, reasons
from torch import nn

from fxfreeze.passes import PASSES
from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.residual import residual


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1, **options)


MATCHES: dict[str, Callable[..., Any]] = {
    "sum": lambda net, x: net.conv(x) + x,
    "sum the other way": lambda net, x: x + net.conv(x),
    "in place": lambda net, x: net.conv(x).add_(x),
    "torch.add": lambda net, x: torch.add(x, net.conv(x)),
    "then relu": lambda net, x: F.relu(net.conv(x) + x),
    "then relu in place": lambda net, x: (net.conv(x) + x).relu_(),
    "then silu": lambda net, x: F.silu(net.conv(x) + x),
    "then gelu by tanh": lambda net, x: F.gelu(net.conv(x) + x, approximate="tanh"),
    "of two convolutions": lambda net, x: net.conv(x) + net.second(x),
}


@pytest.mark.parametrize("name", MATCHES)
def test_taken_in(name: str) -> None:
    segment = passed([residual], MATCHES[name], conv=conv(), second=conv())
    assert len(done(segment, "residual")) == 1
    left = calls(segment)
    assert left["conv"] == 1
    assert set(left) <= {"placeholder", "get_attr", "conv", "output", "Conv2d"}


def test_a_block_of_a_resnet() -> None:
    """As torchvision writes it: norms folded, activations and the addition in place."""
    relu = nn.ReLU(inplace=True)

    def block(net: Any, x: torch.Tensor) -> torch.Tensor:
        out = net.norm2(net.conv2(net.relu(net.norm1(net.conv1(x)))))
        out += x
        return net.relu(out)  # type: ignore[no-any-return]

    layers = {
        "conv1": conv(bias=False),
        "conv2": conv(bias=False),
        "norm1": nn.BatchNorm2d(8),
        "norm2": nn.BatchNorm2d(8),
    }
    segment = passed([fold_batchnorm, residual], block, relu=relu, **layers)
    assert calls(segment)["ReLU"] == 1  # of the first convolution, whose epilogue is the last pass's affair
    assert calls(segment)["conv"] == 1


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "no convolution": (lambda net, x: x.sin() + x, "sin is no convolution"),
    "a number": (lambda net, x: net.conv(x) + 1, "it adds no two tensors"),
    "broadcast": (lambda net, x: net.conv(x) + x[:, :, :1, :1], "its operands have two shapes or dtypes"),
    "scaled": (lambda net, x: torch.add(net.conv(x), x, alpha=2), "it scales what it adds"),
    "two users": (
        lambda net, x: (y := net.conv(x), y + x, y.sin())[1:],
        "the output of conv has another user: sin",
    ),
    "to itself": (lambda net, x: (y := net.conv(x)) + y, "it adds conv to itself"),
    "groups": (lambda net, x: net.grouped(x) + x, "grouped has 2 groups"),
    "another padding": (lambda net, x: net.reflected(x) + x, "reflected pads with reflect"),
    "one pixel": (
        lambda net, x: net.conv(x[:, :, :1, :1]) + x.mean((2, 3), keepdim=True),
        "its operands have one row or column",
    ),
    "the input written meanwhile": (
        lambda net, x: (z := x.sin(), y := net.conv(z), z.mul_(2), y + z)[-1],
        "mul_ writes into what conv would read later",
    ),
    "the input written before the activation": (
        lambda net, x: (z := x.sin(), w := x.cos(), y := net.conv(z) + w, z.mul_(2), y.relu() * z)[-1],
        "mul_ writes into what conv would read later",
    ),
    "the residual written before the activation": (
        lambda net, x: (z := x.sin(), y := net.conv(x) + z, z.mul_(2), y.relu() * z)[-1],
        "mul_ writes into what conv would read later",
    ),
    "into another tensor": (
        lambda net, x: (z := x.sin(), z.add_(net.conv(x)), z.cos())[-1],
        "it adds into sin, which others may read",
    ),
}


def test_a_residual_that_is_broadcast() -> None:
    """Built on one sample, a position embedding looks like an addition of equals."""
    one, position = torch.randn(1, 8, 6, 6), nn.Module()
    position.at = nn.Parameter(torch.randn(1, 8, 6, 6))
    segment = passed(
        PASSES["triton"], lambda net, x: net.conv(x) + net.position.at, one, conv=conv(), position=position
    )
    assert len(done(segment, "residual")) == 1
    x = torch.randn(5, 8, 6, 6)
    assert torch.allclose(segment(x)[0], segment.plain(x)[0], atol=1e-5)


@pytest.mark.parametrize("name", MISSES)
def test_left_alone(name: str) -> None:
    run, why = MISSES[name]
    layers = {"conv": conv(), "grouped": conv(groups=2), "reflected": conv(padding_mode="reflect")}
    segment = passed([residual], run, **layers)
    assert not done(segment, "residual")
    assert why in "; ".join(reasons(segment, "residual"))


def test_a_dtype_without_a_kernel() -> None:
    segment = passed([residual], MATCHES["sum"], dtype=torch.float64, conv=conv())
    assert (
        reasons(segment, "residual") == ["conv is float64; add is no convolution"]
        or "conv is float64" in reasons(segment, "residual")[0]
    )


def test_a_norm_with_batch_statistics_stands_between() -> None:
    segment = passed(
        [fold_batchnorm, residual],
        lambda net, x: net.norm(net.conv(x)) + x,
        training=["norm"],
        conv=conv(),
        norm=nn.BatchNorm2d(8, track_running_stats=False),
    )
    assert "norm is no convolution" in reasons(segment, "residual")[0]
