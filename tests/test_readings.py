"""Tensors that a frozen part reads and that no frozen unit owns: compiled code does not keep what they were."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxfreeze
from fxfreeze import FreezableModel, FreezeOut
from fxfreeze.backends import BACKENDS, Backend
from fxfreeze.fidelity import BOUNDS, relative_error

SCALE = torch.full((1, 3, 1, 1), 2.0)


class Scaling(nn.Conv2d):
    """A frozen unit with a tensor that it never registered."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Net(nn.Module):
    """``where``: what the scale of the images is to the network."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.first = Scaling(3, 8, 3) if where == "a unit's attribute" else nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(64, 2)
        if where == "a buffer":
            self.register_buffer("scale", SCALE.clone())
        elif where == "an attribute":
            self.scale = SCALE.clone()
        elif where == "a unit's attribute":
            self.first.scale = SCALE.clone()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "a unit's attribute":
            return self.head(self.second(self.first(x).relu()).flatten(1))  # type: ignore[no-any-return]
        scale = SCALE if self.where == "a global" else self.scale
        return self.head(self.second(self.first(x * scale).relu()).flatten(1))  # type: ignore[no-any-return, operator]


@pytest.fixture(autouse=True)
def _scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SCALE", torch.full((1, 3, 1, 1), 2.0))


@pytest.fixture(params=["plain", "baking"])
def model_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FreezableModel]:
    """Compiles a network for a backend that looks at each call, or for one that keeps copies of what it was given."""

    def bake(module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Callable[..., Any]:
        return copy.deepcopy(module).forward

    if request.param == "baking":
        monkeypatch.setitem(BACKENDS, "inductor", Backend(BACKENDS["plain"].passes, bake))
    backend = {"plain": "plain", "baking": "inductor"}[request.param]

    def made(where: str) -> FreezableModel:
        model = fxfreeze.compile(Net(where), FreezeOut(10**6), backend=backend).eval()
        model.freeze(2)
        return model

    return made


def holder(model: FreezableModel, where: str) -> Any:
    return model.original.first if where == "a unit's attribute" else model.original


def assert_right(model: FreezableModel) -> Tensor:
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected: Tensor = model.original(x)
        assert relative_error(model(x), expected) <= BOUNDS[torch.float32]
    return expected


@pytest.mark.parametrize(
    ("where", "how"),
    [
        *(
            (where, how)
            for where in ("a buffer", "an attribute", "a unit's attribute")
            for how in ("in place", "replaced")
        ),
        ("a global", "in place"),
    ],
)
def test_a_change_is_seen(where: str, how: str, model_of: Callable[[str], FreezableModel]) -> None:
    model = model_of(where)
    assert_right(model)
    if how == "in place":
        (SCALE if where == "a global" else holder(model, where).scale).fill_(7.0)
    else:
        holder(model, where).scale = torch.full((1, 3, 1, 1), 7.0)
    assert_right(model)


def test_nothing_is_built_anew_without_a_change(model_of: Callable[[str], FreezableModel]) -> None:
    model = model_of("a buffer")
    assert_right(model)
    segment = model.prefix.segments[0]
    assert_right(model)
    model.original.register_buffer("other", torch.zeros(3))
    assert_right(model)
    assert model.prefix.segments[0] is segment


def test_what_keeps_changing_is_read_at_each_call(model_of: Callable[[str], FreezableModel]) -> None:
    """And is not rewritten again and again."""
    model = model_of("a buffer")
    segments = []
    for step in range(8):
        model.original.scale.fill_(float(step))  # type: ignore[operator, union-attr]
        assert_right(model)
        segments.append(model.prefix.segments[0])
    assert len({id(segment) for segment in segments}) == 4
    why = "it reads 'scale', which no frozen unit owns, and which keeps changing"
    assert [segment.reason for segment in segments] == [None] * 3 + [why] * 5
    assert why in str(model.prefix)
