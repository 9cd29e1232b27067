"""The cost of units, the predicted saving, and how both are shown."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfreeze
from fxfreeze import zoo
from fxfreeze.cost import BACKWARD_RATIO

X = torch.randn(2, 3, 32, 32)


def _net() -> nn.Module:
    return zoo.load("resnet-8", num_classes=10, in_channels=3, image_size=32)


def test_flops_are_torchs_own_by_unit() -> None:
    net = _net()
    plan = fxfreeze.plan(net, fxfreeze.FreezeOut(100), (X,))
    with FlopCounterMode(display=False) as counter:
        net(X)
    assert sum(plan.unit_flops) == counter.get_total_flops() // 2
    stem = 2 * 32 * 32 * 16 * 3 * 9  # two FLOPs a multiply-add: 32x32 pixels, 16 channels from 3, 3x3 taps
    assert plan.unit_flops[0] == stem


def test_parameters_and_their_bytes() -> None:
    net = _net()
    plan = fxfreeze.plan(net, fxfreeze.FreezeOut(100), (X,))
    assert sum(plan.unit_parameters) == sum(p.numel() for p in net.parameters())
    assert sum(plan.parameter_bytes) == 4 * sum(plan.unit_parameters)


def test_boundary_is_what_crosses() -> None:
    plan = fxfreeze.plan(_net(), fxfreeze.FreezeOut(100), (X,))
    assert plan.boundary_bytes[0] == 16 * 32 * 32 * 4  # the stem's output, float32
    assert plan.boundary_bytes[-1] == 0


def test_boundary_of_a_dense_block_grows_and_shrinks() -> None:
    net = zoo.load("densenet-bc-8-16", num_classes=10, in_channels=1, image_size=28)
    plan = fxfreeze.plan(net, fxfreeze.FreezeOut(100), (torch.randn(2, 1, 28, 28),))
    channels = [16, 24, 32]  # the stem, then 8 more from each layer
    assert list(plan.boundary_bytes[:3]) == [c * 28 * 28 * 4 for c in channels]
    assert plan.boundary_bytes[3] == 16 * 14 * 14 * 4  # the transition halves channels and sides


def test_saving_by_hand() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    plan = fxfreeze.plan(net, fxfreeze.Milestones({"1": 0}), (torch.randn(4, 8),))
    # two thirds of three equal units are frozen from the start: of 9 parts, 2 x 2 backward parts go, and 2 x 1 forward ones
    assert plan.saving(cached=False) == pytest.approx(4 / 9)
    assert plan.saving(cached=True) == pytest.approx(6 / 9)
    assert BACKWARD_RATIO == 2


def test_saving_follows_the_freeze_times() -> None:
    early = fxfreeze.plan(_net(), fxfreeze.FreezeOut(1000, 0.3, "cubic", False), (X,))
    late = fxfreeze.plan(_net(), fxfreeze.FreezeOut(1000, 0.8, "cubic", False), (X,))
    assert 0 < late.saving(cached=False) < early.saving(cached=False) < early.saving(cached=True) < 1
    assert early.freeze_times()[0] == pytest.approx(0.027, abs=1e-3)
    assert early.freeze_times()[-1] == 1


def test_memory_falls_with_depth() -> None:
    plan = fxfreeze.plan(_net(), fxfreeze.FreezeOut(100), (X,))
    held = [plan.memory(depth) for depth in range(len(plan.units))]
    assert held[0] > held[-1]
    assert held[0] >= 3 * sum(plan.parameter_bytes) + 2 * sum(plan.unit_saved)


def test_what_the_forward_saves_is_counted_once() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8))
    plan = fxfreeze.plan(net, fxfreeze.FreezeOut(100), (torch.randn(4, 8),))
    # The input of the first layer (8 floats), and the sigmoid's output, which the sigmoid and the last layer both keep.
    assert sum(plan.unit_saved) == 2 * 8 * 4


def test_the_network_is_left_as_it_was() -> None:
    net = _net().eval()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    fxfreeze.plan(net, fxfreeze.FreezeOut(100), (X,))
    assert not net.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_table_and_plot(tmp_path) -> None:
    plan = fxfreeze.plan(_net(), fxfreeze.FreezeOut(1000, 0.3, "cubic", False), (X,))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan.table())
    text = console.export_text()
    assert all(unit.name in text for unit in plan.units)
    assert f"{plan.saving(cached=False):.1%}" in text
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_tensor_and_a_compiled_model_are_taken() -> None:
    net = _net()
    model = fxfreeze.compile(net, fxfreeze.FreezeOut(100))
    assert fxfreeze.plan(model, fxfreeze.FreezeOut(100), X) == fxfreeze.plan(net, fxfreeze.FreezeOut(100), (X,))


def test_keyword_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, *, features: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(features).relu())

    plan = fxfreeze.plan(Net(), fxfreeze.FreezeOut(10), {"features": torch.randn(3, 4)})
    assert plan.unit_flops == (2 * 4 * 4, 2 * 4 * 2)
    assert plan.batch == 3
