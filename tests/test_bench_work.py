"""What the benchmarks count: FLOPs, bytes, the share of the roofline, and memory."""

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from bench import roofline
from bench.fp8_error import e4m3, fp8_error
from bench.memory import Growth, growth, height
from bench.roofline import Ceilings, Work, ceilings, flops_of, held, inference, share, training

CPU = torch.device("cpu")
MEBI = 1 << 20


def test_the_roofline_is_the_slower_of_both_ceilings() -> None:
    limits = Ceilings(bytes_per_second=100.0, flops_per_second=1000.0)
    assert share(Work(flops=1000, bytes=10), limits, seconds=2.0) == 0.5  # computes for a second
    assert share(Work(flops=10, bytes=100), limits, seconds=4.0) == 0.25  # moves bytes for a second


def test_work_by_hand() -> None:
    """Of two layers out of three: parameters, the input and the output, once each; two FLOPs a product."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 9))
    graph = symbolic_trace(net)
    x = torch.randn(2, 3)
    first = symbolic_trace(net[:2])
    assert len(held(graph)) == 6
    read = 4 * (3 * 5 + 5 + 5 * 7 + 7)
    work = inference(first, [x], [first(x)], flops_of(lambda: first(x)))
    assert work == Work(flops=2 * 2 * (3 * 5 + 5 * 7), bytes=read + x.nbytes + 4 * 2 * 7)


def test_a_module_that_is_called_twice_is_read_once() -> None:
    layer = nn.Linear(3, 3)
    assert len(held(symbolic_trace(nn.Sequential(layer, layer)))) == 2


def test_training_writes_what_it_trains() -> None:
    weight, x = torch.randn(4, 4), torch.randn(2, 4)
    assert training([weight, x], [weight], flops=8) == Work(8, weight.nbytes + x.nbytes + 3 * weight.nbytes)


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SMALL", True)
    limits = ceilings.__wrapped__(CPU, torch.float32)
    assert limits.bytes_per_second > 0
    assert limits.flops_per_second > 0
    assert ceilings.__wrapped__(CPU, torch.uint8).flops_per_second > 0  # which no product is of


def test_the_height_of_allocations() -> None:
    assert height([(3, -20), (1, 10), (2, 20), (4, 5)]) == Growth(peak=30, kept=15)
    assert height([]) == Growth(0, 0)


def test_what_a_call_keeps_and_what_it_takes_for_a_while() -> None:
    assert growth(lambda: torch.ones(MEBI), CPU) == Growth(4 * MEBI, 4 * MEBI)
    assert growth(lambda: torch.ones(MEBI).neg(), CPU) == Growth(8 * MEBI, 4 * MEBI)
    assert growth(lambda: bool(torch.ones(MEBI).neg_().isnan().any()), CPU).kept == 0


def test_a_forward_keeps_what_its_backward_needs() -> None:
    x, net = torch.randn(MEBI), nn.Sequential(nn.Tanh(), nn.Tanh())
    taped = growth(lambda: net(x.requires_grad_()), CPU)
    with torch.no_grad():
        untaped = growth(lambda: net(x), CPU)
    assert (taped.kept, untaped.kept) == (8 * MEBI, 4 * MEBI)


def test_a_call_on_cuda_is_counted_by_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    held_bytes = iter([100, 130])
    for name, value in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: next(held_bytes),
        "max_memory_allocated": lambda device: 170,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert growth(lambda: None, torch.device("cuda")) == Growth(peak=70, kept=30)


def test_fp8_has_three_bits_after_the_first() -> None:
    """With the largest at 448, what is around 1 lies on a grid of 1/8; and what is below half a step of the least is 0."""
    value = torch.tensor([448.0, 1.0, 1.06, 1.07, 1.1875, -1.3, 2.0**-11])
    assert e4m3(value).tolist() == [448.0, 1.0, 1.0, 1.125, 1.25, -1.25, 0.0]
    rows = torch.tensor([[448.0, 1.07], [448e4, 1.07e4]])
    torch.testing.assert_close(e4m3(rows, dims=[1])[1], 1e4 * e4m3(rows[0]))


def test_the_error_of_fp8_is_that_of_its_layers_inputs_and_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    conv, linear = net[0], net[3]
    graph, x = symbolic_trace(net), torch.randn(2, 3, 8, 8)
    graph.graph.output_node().args = ((graph.graph.output_node().args[0],),)
    with torch.no_grad():
        hidden = torch.conv2d(e4m3(x), e4m3(conv.weight, dims=[1, 2, 3]), conv.bias).relu().flatten(1)
        rounded = nn.functional.linear(e4m3(hidden), e4m3(linear.weight, dims=[1]), linear.bias)
        assert fp8_error(graph, x, rounded) == 0
        assert 0.01 < fp8_error(graph, x, net(x)) < 0.1
