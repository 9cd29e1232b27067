"""NaNs that the frozen part makes of finite numbers stay visible by every backend, and where they may come from."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import plain_graph
from torch import Tensor, nn

import fxfreeze
from fxfreeze import Milestones
from fxfreeze.auto import first_choice
from fxfreeze.backends import is_here
from fxfreeze.computation import Computation
from fxfreeze.nans import swallowed_nan

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.given = forward
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("lowest", torch.tensor(-math.inf))
        self.conv, self.relu, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.given(self, x).mean((2, 3)))


def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5


def written(y: Tensor, net: "Net") -> Tensor:
    y.log_()
    return net.relu(y)


def aliased(y: Tensor, net: "Net") -> Tensor:
    y.flatten(1).log_()
    return net.relu(y)


def given_out(y: Tensor, net: "Net") -> Tensor:
    z = torch.empty_like(y)
    torch.log(y, out=z)
    return net.relu(z)


def masked(x: Tensor, net: "Net") -> Tensor:
    x = x.clone()
    x[x > 9] = -math.inf
    return net.relu(net.conv(x.softmax(-1)))


MADE: dict[str, Forward] = {
    "log": lambda net, x: net.relu(net.conv(x.log())),
    "function": lambda net, x: F.relu(net.conv(torch.sqrt(x))),
    "quotient": lambda net, x: net.conv(x / x).relu(),
    "inverse": lambda net, x: net.conv(1 / x).relu(),
    "in place": lambda net, x: net.relu(net.conv(x.clone().div_(x.mean()))),
    "power": lambda net, x: net.relu(net.conv(x**0.5)),
    "negative power": lambda net, x: net.relu(net.conv(x**-2)),
    "pool": lambda net, x: net.pool(net.conv(x.log())),
    "clamped": lambda net, x: net.conv(x.log()).clamp(min=0),
    "masked": lambda net, x: net.relu(net.conv(x.masked_fill(x > 9, -math.inf).softmax(-1))),
    "where": lambda net, x: net.relu(net.conv(torch.where(x > 9, float("nan"), x))),
    "attention": lambda net, x: net.relu(net.conv(F.scaled_dot_product_attention(x, x, x, x > 0))),
    "attention by name": lambda net, x: net.relu(net.conv(F.scaled_dot_product_attention(x, x, x, attn_mask=x > 0))),
    "written in place": lambda net, x: written(net.conv(x), net),
    "written elsewhere": lambda net, x: aliased(net.conv(x), net),
    "given out": lambda net, x: given_out(net.conv(x), net),
    "set": lambda net, x: masked(x, net),
    "buffer": lambda net, x: net.relu(net.conv(torch.where(x > 9, net.lowest, x).softmax(-1))),
    "special": lambda net, x: net.relu(net.conv(torch.special.log1p(x))),
    "of one more": lambda net, x: net.relu(net.conv(torch.addcdiv(x, x, x))),
    "remainder": lambda net, x: net.relu(net.conv(x % x.mean())),
    "linear algebra": lambda net, x: net.relu(net.conv(torch.linalg.inv_ex(x).inverse)),
    "no epsilon": lambda net, x: net.relu(net.conv(F.layer_norm(x, (8,), eps=0))),
    "no epsilon by place": lambda net, x: net.relu(net.conv(F.group_norm(x, 3, None, None, 0.0))),
    "hardsigmoid": lambda net, x: F.hardsigmoid(net.conv(x.log())),
    "on the way": lambda net, x: net.relu(net.conv(x.log() + 1).transpose(2, 3)),
}
NOT_MADE: dict[str, Forward] = {
    "layers": lambda net, x: net.pool(net.relu(net.conv(x))),
    "constant": lambda net, x: net.relu(net.conv(x / 2) / 3.0),
    "square": lambda net, x: net.relu(net.conv(x**2)),
    "floor": lambda net, x: net.relu(net.conv(torch.div(x, 2, rounding_mode="floor"))),
    "softmax": lambda net, x: net.relu(net.conv(x.softmax(-1))),
    "attention": lambda net, x: net.relu(net.conv(F.scaled_dot_product_attention(x, x, x))),
    "of sizes": lambda net, x: net.relu(net.conv(x.view(x.size(0), 3, x.shape[2], x.size(2) * x.size(3) // x.size(2)))),
    "of weights": lambda net, x: F.conv2d(x, net.conv.weight / net.conv.weight.norm()).relu(),
    "by sizes": lambda net, x: net.relu(net.conv(x / x.shape[2])),
    "by weights": lambda net, x: net.relu(net.conv(x / net.scale)),
    "with epsilon": lambda net, x: net.relu(net.conv(F.layer_norm(x, (8,)))),
    "excited": lambda net, x: net.relu(net.conv(x) * F.hardsigmoid(net.conv(x).mean((2, 3), keepdim=True))),
    "after": lambda net, x: net.relu(net.conv(x)).add(1).log(),
    "beside": lambda net, x: net.relu(net.conv(x)) + net.conv(x.log()),
    "no relu": lambda net, x: F.silu(net.conv(x.log())),
}


@pytest.mark.parametrize("name", MADE)
def test_where_one_may_be_made(name: str) -> None:
    found = swallowed_nan(plain_graph(Net(MADE[name]), images()))
    assert found is not None
    assert "may make of finite numbers" in found


@pytest.mark.parametrize("name", NOT_MADE)
def test_where_none_is_made(name: str) -> None:
    assert swallowed_nan(plain_graph(Net(NOT_MADE[name]), images())) is None


def test_auto_begins_with_plain() -> None:
    computation = Computation("cpu", None)
    assert first_choice(plain_graph(Net(MADE["log"]), images()), computation) == "plain"
    assert first_choice(plain_graph(Net(NOT_MADE["layers"]), images()), computation) == "library"


@pytest.mark.parametrize("backend", ["plain", "library", "openvino", "auto"])
@pytest.mark.parametrize("name", ["log", "masked", "inverse", "set"])
def test_it_stays_visible(backend: str, name: str) -> None:
    """In a batch that is finite, after others that were fine."""
    if not (backend == "auto" or is_here(backend)):
        pytest.skip(f"{backend} is not installed")
    torch.manual_seed(0)
    net = Net(MADE[name])
    model = fxfreeze.compile(copy.deepcopy(net), Milestones({"conv": 0}), backend=backend)
    bad = images()
    bad[0, 0, 0] = {"log": -1.0, "masked": 10.0, "set": 10.0, "inverse": 0.0}[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert model(images()).isfinite().all()
        values: list[Any] = [model(bad), net(bad)]
    assert values[0].isnan().any()
    assert torch.equal(values[0].isnan(), values[1].isnan())
    told = [str(w.message) for w in caught if "might make a number of a NaN, which " in str(w.message)]
    assert len(told) == (backend in ("library", "openvino"))


def test_one_in_a_complex_input() -> None:
    net = Net(lambda net, x: net.relu(net.conv(x.real + x.imag)))
    model = fxfreeze.compile(copy.deepcopy(net), Milestones({"conv": 0}), backend="library")
    x = torch.complex(images(), images())
    for _ in range(3):
        assert model(x).isfinite().all()
    (segment,) = model.prefix.segments
    assert segment.reason is None
    x[0, 0, 0, 0] = complex(0, math.nan)
    assert torch.equal(model(x).isnan(), net(x).isnan())
    assert model(x).isnan().any()


def test_what_makes_none_is_still_fused() -> None:
    for backend in filter(is_here, ("library", "openvino")):
        model = fxfreeze.compile(Net(NOT_MADE["layers"]), Milestones({"conv": 0}), backend=backend)
        model(images())
        (segment,) = model.prefix.segments
        assert (segment.runs_by, segment.reason) == (backend, None)
