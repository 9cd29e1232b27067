"""Activations that overwrite what they read, and when they must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passing import done, passed
from torch import Tensor, nn

from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.in_place import in_place

PASSES = (fold_batchnorm, in_place)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": F.relu,
    "torch": torch.relu,
    "method": lambda x: x.relu(),
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def norm() -> dict[str, nn.Module]:
    return {"norm": nn.BatchNorm2d(8), "module": nn.ReLU()}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_a_pass_made(name: str) -> None:
    activation = ACTIVATIONS[name]
    segment = passed(PASSES, lambda net, x: activation(net.norm(x)), **norm())
    assert len(done(segment, "in_place")) == 1
    x = torch.randn(3, 8, 6, 6)
    before = x.clone()
    segment(x)
    assert torch.equal(x, before)


def test_modules() -> None:
    segment = passed(PASSES, lambda net, x: net.module(net.norm(x)), **norm())
    assert len(done(segment, "in_place")) == 1


LEFT: dict[str, Callable[[Any, Tensor], Any]] = {
    "the input": lambda net, x: F.relu(x) + x,
    "what is read again": lambda net, x: F.relu(y := net.norm(x)) + y,
    "what is handed over": lambda net, x: (F.relu(y := net.norm(x)), y),
    "what a view reads": lambda net, x: (v := (y := net.norm(x)).flatten(1), F.relu(y).flatten(1) + v),
    "a view": lambda net, x: F.relu(net.norm(x).flatten(1)),
    "in place already": lambda net, x: F.relu_(net.norm(x)),
    "none such": lambda net, x: F.gelu(net.norm(x)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    segment = passed(PASSES, LEFT[name], **norm())
    assert not done(segment, "in_place")
