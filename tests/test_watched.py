"""A watched forward computes what the ordinary one does, and opens the ranges that it says."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from tiny import Tiny, images
from torch import Tensor, nn

import fxfreeze
from fxfreeze.forward import Forward
from fxfreeze.model import FreezableModel
from fxfreeze.watched import ForwardByPart, ForwardByUnit


class Log:
    """Notes ranges, as "name" when one is entered and "/name" when it is left."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        self.events.append(name)
        yield
        self.events.append(f"/{name}")


def frozen(depth: int, net: nn.Module | None = None) -> FreezableModel:
    torch.manual_seed(0)
    model = fxfreeze.compile(net or Tiny(), fxfreeze.Milestones({}), backend="plain").train()
    model.freeze(depth)
    return model


def step(model: FreezableModel) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Output, gradients, and the random state after them."""
    torch.manual_seed(1)
    x, labels = images(8, 0)
    output = model(x)
    nn.functional.cross_entropy(output, labels).backward()
    return output.detach(), [p.grad for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", [ForwardByPart, ForwardByUnit])
def test_a_watched_iteration_is_the_ordinary_one(kind: type[Forward], depth: int) -> None:
    """Outputs, gradients, statistics and random numbers, bit for bit."""
    ordinary, watched = frozen(depth), frozen(depth)
    more = (watched._ownership,) if kind is ForwardByUnit else ()
    watched._forward = kind(watched.original, Log(), *more)
    for _ in range(2):
        (output, gradients, random), (other, others, drawn) = step(ordinary), step(watched)
        assert torch.equal(output, other)
        assert torch.equal(random, drawn)
        for a, b in zip(gradients, others, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert all(torch.equal(v, watched.state_dict()[k]) for k, v in ordinary.state_dict().items())


def test_the_frozen_part_has_one_range() -> None:
    model, log = frozen(2), Log()
    model._forward = ForwardByPart(model.original, log)
    step(model)
    assert log.events == ["prefix 0-2", "/prefix 0-2"]


@pytest.mark.parametrize("depth", [0, 2])
def test_each_live_unit_has_a_range(depth: int) -> None:
    model, log = frozen(depth), Log()
    model._forward = ForwardByUnit(model.original, log, model._ownership)
    step(model)
    entered = [f"prefix 0-{depth}"] * bool(depth) + [unit.name for unit in model.units[depth:]]
    assert log.events == [event for name in entered for event in (name, f"/{name}")]


def test_the_trace_is_made_once() -> None:
    """A second call finds it: nothing is traced while a profiler looks."""
    model = frozen(0)
    forward = ForwardByUnit(model.original, Log(), model._ownership)
    model._forward = forward
    step(model)
    traced = forward._traced
    step(model)
    assert traced is not None
    assert forward._traced is traced
