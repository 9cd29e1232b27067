"""The library pass: what one call of oneDNN takes in, what it leaves alone and why, and that the numbers hold."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passing import done, passed, reasons
from torch import nn
from torch.fx import GraphModule

from fxfreeze.operators import op_of
from fxfreeze.passes import PASSES
from fxfreeze.passes.fused_conv import Steps, cudnn_conv, onednn_conv, reordered, unfused_conv

LIBRARY = PASSES["library"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **options})


def calls(module: GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.target in (onednn_conv, cudnn_conv, unfused_conv)]


def convolutions_left(module: GraphModule) -> int:
    return sum((op := op_of(n, module)) is not None and op.kind == "conv" for n in module.graph.nodes)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_taken_in(name: str, groups: int) -> None:
    segment = passed(
        LIBRARY,
        lambda net, x: net.after(net.norm(net.conv(x))),
        conv=conv(groups=groups, bias=False),
        norm=nn.BatchNorm2d(8),
        after=ACTIVATIONS[name](),
    )
    assert segment.rewritten is not None
    assert calls(segment.rewritten) == [onednn_conv]
    assert [n.op for n in segment.rewritten.graph.nodes if n.op.startswith("call")] == ["call_function"]


@pytest.mark.parametrize("name", ["none", *ACTIVATIONS])
def test_a_residual_is_taken_in(name: str) -> None:
    after = nn.Identity() if name == "none" else ACTIVATIONS[name]()
    segment = passed(LIBRARY, lambda net, x: net.after(net.conv(x) + x), conv=conv(), after=after)
    assert segment.rewritten is not None
    assert calls(segment.rewritten) == [onednn_conv]
    assert not any((op := op_of(n, segment.rewritten)) and op.kind == "add" for n in segment.rewritten.graph.nodes)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"padding": (0, 2)}, {"bias": False}]
)
def test_steps(options: dict[str, Any]) -> None:
    segment = passed(LIBRARY, lambda net, x: F.relu(net.conv(x)), conv=conv(**options))
    assert segment.rewritten is not None
    assert calls(segment.rewritten) == [onednn_conv]


def test_a_segment_serves_other_sizes() -> None:
    segment = passed(LIBRARY, lambda net, x: F.relu(net.conv(x)), conv=conv())
    for shape in ((1, 8, 6, 6), (7, 8, 9, 5), (0, 8, 6, 6), (3, 8, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(segment(x), tuple(segment.plain.forward(x)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 6, 6), (3, 8, 1, 6), (3, 1, 6, 6), (1, 1, 1, 1)])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_a_sum_that_is_broadcast_at_another_size(activation: Any, shape: tuple[int, ...]) -> None:
    """Built where both have one shape; then one, or the other, is smaller."""
    run = lambda net, x, y: activation(net.conv(x) + y)  # noqa: E731
    whole = torch.randn(3, 8, 6, 6)
    segment = passed(LIBRARY, run, whole, whole + 1, conv=conv())
    assert segment.rewritten is not None
    assert calls(segment.rewritten) == [onednn_conv]
    small = torch.randn(shape)
    torch.testing.assert_close(segment(whole, small), tuple(segment.plain.forward(whole, small)), atol=1e-5, rtol=1e-4)
    if shape[1] == 8:
        torch.testing.assert_close(
            segment(small, whole), tuple(segment.plain.forward(small, whole)), atol=1e-5, rtol=1e-4
        )
    for other in ((2, 8, 6, 6), (3, 4, 6, 6), (3, 8, 12, 12)):
        with pytest.raises(RuntimeError, match="must match the size"):
            segment(whole, torch.randn(other))


@pytest.mark.parametrize("where", ["input", "conv"])
def test_a_nan_stays_one(where: str) -> None:
    """oneDNN's ReLU makes a number of it."""
    segment = passed(LIBRARY, lambda net, x: F.relu(net.conv(x) + x), conv=conv())
    x = torch.randn(3, 8, 6, 6)
    x[1, 2, 3, 4] = float("nan") if where == "input" else float("inf")
    expected = segment.plain.forward(x)
    torch.testing.assert_close(segment(x), tuple(expected), equal_nan=True)
    assert bool(segment(x)[0][1].isnan().any())
    assert not bool(segment(x)[0][0].isnan().any())


def test_the_input_is_left_alone() -> None:
    segment = passed(LIBRARY, lambda net, x: F.relu(net.conv(x) + x), conv=conv())
    x = torch.randn(3, 8, 6, 6)
    before = x.clone()
    segment(x)
    assert torch.equal(x, before)


def test_what_another_reads_is_kept() -> None:
    """The convolution's output is read before its activation, so that is no part of the call."""
    segment = passed(LIBRARY, lambda net, x: (F.relu(y := net.conv(x)), y * 2), conv=conv())
    assert segment.rewritten is not None
    assert calls(segment.rewritten) == [onednn_conv]
    assert any((op := op_of(n, segment.rewritten)) and op.kind == "activation" for n in segment.rewritten.graph.nodes)


def test_another_writer_of_the_input() -> None:
    """The activation would read what was written after the convolution read it."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        z = net.conv(y)
        y.add_(1)
        return F.relu(z) + y

    segment = passed(LIBRARY, run, conv=conv())
    assert any("writes into its input" in why for why in reasons(segment, "library"))


def test_float64_is_left_alone() -> None:
    segment = passed(LIBRARY, lambda net, x: F.relu(net.conv(x)), dtype=torch.float64, conv=conv())
    assert segment.rewritten is not None
    assert not calls(segment.rewritten)
    assert reasons(segment, "library") == ["conv is float64"]


def test_a_dtype_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual is attached all the same, so the operators are called one after the other in the dtype."""
    monkeypatch.setattr(sys.modules["fxfreeze.passes.library"], "onednn_supports", lambda dtype: "there is none")
    segment = passed(
        LIBRARY,
        lambda net, x: F.relu(net.second(F.relu(net.first(x))) + x),
        dtype=torch.bfloat16,
        first=conv(),
        second=conv(),
    )
    assert segment.rewritten is not None
    assert calls(segment.rewritten) == [unfused_conv]
    assert convolutions_left(segment.rewritten) == 1
    assert reasons(segment, "library") == ["there is none", "there is none"]


def test_a_layout_that_is_looked_at() -> None:
    segment = passed(LIBRARY, lambda net, x: net.conv(x).as_strided((3, 8), (8, 1)), conv=conv())
    assert reasons(segment, "library") == ["random numbers or views follow the layout in memory"]


def test_weights_are_reordered_once() -> None:
    segment = passed(LIBRARY, lambda net, x: F.relu(net.conv(x)), conv=conv())
    assert segment.rewritten is not None
    assert [b.layout for b in segment.rewritten.buffers()] == [torch._mkldnn, torch.strided]
    assert len(done(segment, "library")) == 1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_the_calls_agree(activation: str, residual: bool) -> None:
    """cuDNN's falls back where there is none, and says so by computing the same."""
    x, weight, bias = torch.randn(2, 8, 6, 6), torch.randn(8, 4, 3, 3), torch.randn(8)
    steps = Steps((1, 1), (1, 1), (1, 1), 2)
    add = torch.randn(2, 8, 6, 6) if residual else None
    kept = None if add is None else add.clone()
    expected = unfused_conv(x, weight, bias, add, activation, steps)
    packed = reordered(weight, steps, x.shape)
    torch.testing.assert_close(onednn_conv(x, packed, bias, add, activation, steps), expected, atol=1e-5, rtol=1e-4)
    assert add is None or torch.equal(add, kept)  # type: ignore[arg-type]


def test_cudnn_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has no kernel, two operators compute it, and it is not asked again; other errors are not hidden."""
    asked = []

    def refusing(*_: Any) -> torch.Tensor:
        asked.append(None)
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refusing)
    monkeypatch.setattr("fxfreeze.passes.fused_conv._refused", set())
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    steps = Steps((1, 1), (1, 1), (1, 1), 1)
    for _ in range(2):
        torch.testing.assert_close(
            cudnn_conv(x, weight, None, None, "relu", steps), F.relu(F.conv2d(x, weight, padding=1))
        )
    assert len(asked) == 1

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cudnn_conv(x, weight, None, x, "relu", steps)
