"""Scale, shift and activation before convolutions: who takes them in, who does not and why, and the numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passing import calls, done, passed, reasons
from torch import Tensor, nn

from fxfreeze.passes.affine_prologue import affine_prologue
from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.remove_identity import remove_identity

PASSES = (fold_batchnorm, remove_identity, affine_prologue)


def layers(**options: Any) -> dict[str, nn.Module]:
    return {
        "norm": nn.BatchNorm2d(8),
        "conv": nn.Conv2d(8, 4, 3, padding=1, **options),
        "shortcut": nn.Conv2d(8, 4, 1, 2),
        "drop": nn.Dropout(0.5),
    }


MATCHES: dict[str, Callable[..., Any]] = {
    "norm": lambda net, x: net.conv(net.norm(x)),
    "norm and relu": lambda net, x: net.conv(F.relu(net.norm(x))),
    "in place": lambda net, x: net.conv(F.relu_(net.norm(x))),
    "silu and dropout": lambda net, x: net.conv(net.drop(F.silu(net.norm(x)))),
    "two convolutions": lambda net, x: (y := net.norm(x).relu(), net.conv(y), net.shortcut(y))[1:],
    "a block of a pre-activation ResNet": lambda net, x: net.conv(F.relu(net.norm(x))) + x[:, :4],
}


@pytest.mark.parametrize("name", MATCHES)
def test_taken_in(name: str) -> None:
    segment = passed(PASSES, MATCHES[name], **layers())
    assert len(done(segment, "affine_prologue")) == 1
    left = calls(segment)
    assert left["conv"] == (2 if "two" in name else 1)
    assert set(left) <= {"placeholder", "get_attr", "conv", "output", "add", "getitem"}
    assert segment.rewritten is not None
    read = {str(n.target) for n in segment.rewritten.graph.nodes if n.op == "get_attr"}
    assert set(segment.rewritten._buffers) == read  # what the norm was computed from is gone


MISSES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "two users": (
        lambda net, x: (y := net.norm(x), net.conv(y), y.sin())[1:],
        {},
        "has another user",
    ),
    "no convolution": (lambda net, x: net.norm(x).relu().sin(), {}, "sin is no convolution"),
    "groups": (lambda net, x: net.conv(net.norm(x)), {"groups": 2}, "conv has 2 groups"),
    "padding that wraps": (
        lambda net, x: net.conv(net.norm(x)),
        {"padding_mode": "circular"},
        "conv pads with circular",
    ),
    "the input written meanwhile": (
        lambda net, x: (z := x.sin(), y := net.norm(z), z.mul_(2), net.conv(y) + z[:, :4])[-1],
        {},
        "mul_ writes into its input before conv reads it",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_left_alone(name: str) -> None:
    run, options, why = MISSES[name]
    segment = passed(PASSES, run, **layers(**options))
    assert not done(segment, "affine_prologue")
    assert why in "; ".join(reasons(segment, "affine_prologue"))


def test_a_norm_with_batch_statistics_is_none() -> None:
    given = layers() | {"norm": nn.BatchNorm2d(8, track_running_stats=False)}
    segment = passed(PASSES, MATCHES["norm and relu"], training=["norm"], **given)
    assert not done(segment, "affine_prologue")
    assert calls(segment)["BatchNorm2d"] == 1


def test_a_dtype_without_a_kernel() -> None:
    segment = passed(PASSES, MATCHES["norm"], dtype=torch.float64, **layers())
    assert reasons(segment, "affine_prologue") == ["conv is float64"]


def test_signals_are_no_images() -> None:
    given: dict[str, nn.Module] = {"norm": nn.BatchNorm1d(8), "conv": nn.Conv1d(8, 4, 3)}
    segment = passed(PASSES, MATCHES["norm and relu"], torch.randn(3, 8, 9), **given)
    assert reasons(segment, "affine_prologue") == ["conv has 3 dimensions, not 4"]


def test_padding_is_zero_after_the_prologue() -> None:
    """A shift moves zeros: a convolution that padded before it would see the shift at the borders."""
    given = layers()
    x = torch.zeros(2, 8, 5, 5)
    segment = passed(PASSES, MATCHES["norm"], x, **given)
    plain: Tensor = segment.plain(x)[0]
    assert torch.allclose(segment(x)[0], plain, atol=1e-5)
    assert not torch.allclose(plain[:, :, 0], plain[:, :, 2], atol=1e-2)
