"""Pooling before a 1x1 convolution: what moves, what stays and why, and the numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passing import done, passed, reasons
from torch import Tensor, nn

from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.pool_first import pool_first


def transition(net: Any, x: Tensor) -> Tensor:
    return net.pool(net.conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveAvgPool2d((1, 3)),
    ],
)
def test_moves(pool: nn.Module, bias: bool) -> None:
    segment = passed([pool_first], transition, conv=nn.Conv2d(8, 4, 1, bias=bias), pool=pool)
    assert len(done(segment, "pool_first")) == 1
    assert segment.rewritten is not None
    last, before = [n for n in segment.rewritten.graph.nodes if n.op.startswith("call")][::-1]
    assert last.target == "root.conv"
    assert before is last.args[0]


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, divisor_override=3)])
def test_weights_that_are_not_one_move_without_a_bias(pool: nn.Module) -> None:
    assert done(passed([pool_first], transition, conv=nn.Conv2d(8, 4, 1, bias=False), pool=pool), "pool_first")


def test_a_folded_norm_is_a_bias() -> None:
    segment = passed(
        [fold_batchnorm, pool_first],
        lambda net, x: F.avg_pool2d(net.norm(net.conv(x)), 2),
        conv=nn.Conv2d(8, 4, 1, bias=False),
        norm=nn.BatchNorm2d(4),
    )
    assert done(segment, "pool_first")


CASES: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], str]] = {
    "no convolution": (lambda net, x: F.avg_pool2d(x, 2), {}, "inputs is no convolution"),
    "a maximum before it": (lambda net, x: F.avg_pool2d(F.max_pool2d(x, 2), 2), {}, "is no convolution"),
    "a 3x3": (transition, {"conv": nn.Conv2d(8, 4, 3), "pool": nn.AvgPool2d(2)}, "is no 1x1 convolution of stride 1"),
    "a stride": (
        transition,
        {"conv": nn.Conv2d(8, 4, 1, 2), "pool": nn.AvgPool2d(2)},
        "is no 1x1 convolution of stride 1",
    ),
    "groups": (transition, {"conv": nn.Conv2d(8, 4, 1, groups=2), "pool": nn.AvgPool2d(2)}, "has 2 groups"),
    "as many pixels": (transition, {"conv": nn.Conv2d(8, 4, 1), "pool": nn.AvgPool2d(3, 1, 1)}, "as many pixels"),
    "an activation between": (
        lambda net, x: F.avg_pool2d(net.conv(x).relu(), 2),
        {"conv": nn.Conv2d(8, 4, 1)},
        "relu is no convolution",
    ),
    "a window from the shape": (
        lambda net, x: (y := net.conv(x), F.avg_pool2d(y, y.shape[-1] // 2))[1],
        {"conv": nn.Conv2d(8, 4, 1)},
        "its window is computed at run time",
    ),
    "two users": (
        lambda net, x: (y := net.conv(x), F.avg_pool2d(y, 2), y.sin())[1:],
        {"conv": nn.Conv2d(8, 4, 1)},
        "the output of conv has another user: sin",
    ),
    "padding averaged with a bias": (
        transition,
        {"conv": nn.Conv2d(8, 4, 1), "pool": nn.AvgPool2d(3, 2, 1)},
        "it averages padding, which the bias would reach",
    ),
    "a divisor with a bias": (
        transition,
        {"conv": nn.Conv2d(8, 4, 1), "pool": nn.AvgPool2d(2, divisor_override=3)},
        "it divides by another number than it adds",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_left_alone(name: str) -> None:
    run, layers, why = CASES[name]
    segment = passed([pool_first], run, **layers)
    assert not done(segment, "pool_first")
    assert why in "; ".join(reasons(segment, "pool_first"))


def test_another_dtype_is_no_obstacle() -> None:
    layers = {"conv": nn.Conv2d(8, 4, 1), "pool": nn.AvgPool2d(2)}
    assert done(passed([pool_first], transition, dtype=torch.bfloat16, **layers), "pool_first")
