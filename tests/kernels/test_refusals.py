"""What the ops refuse: the message names op, value and way out, fake tensors say the same, nothing is written."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from placing import bits
from samples import NAMES, Call, images, sample
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfreeze.kernels import conv1x1, conv3x3, pack, pointwise

_CONVOLUTIONS = ("conv1x1", "conv3x3", "rolling3x3")
_OF_IMAGES = (*_CONVOLUTIONS, "depthwise", "pointwise", "maximum")
_OF_ROWS = ("linear", "layernorm")

Change = dict[str, Any]  # what is passed instead, or a function of what would have been


def _halved(name: str) -> tuple[Change, type[Exception], str]:
    return (
        {name: Tensor.half},
        TypeError,
        f"{name} is torch.float16 on cpu, x is torch.float32 on cpu; they must be alike",
    )


def _refusals(name: str) -> list[tuple[Change, type[Exception], str]]:
    """For one sample: what to change, and what is then said."""
    cases: list[tuple[Change, type[Exception], str]] = [_halved("out")]
    floats = "torch.float16, torch.bfloat16, torch.float32, torch.float64"
    if name in _OF_IMAGES:
        cases += [
            ({"x": lambda x: x[0]}, ValueError, "x has shape (8, 5, 4), expected (N, C, H, W)"),
            ({"x": Tensor.int}, TypeError, f"x is torch.int32, expected one of {floats}"),
            ({"x": lambda x: x[:, :0]}, ValueError, "x has shape (2, 0, 5, 4), and so no channels"),
            ({"x": Tensor.contiguous}, ValueError, "the channels of x are 20 elements apart; pass x.to(memory_format="),
            ({"out": Tensor.contiguous}, ValueError, "pass out.to(memory_format=torch.channels_last)"),
            ({"out": lambda out: out[:, :, :-1]}, ValueError, "out has shape (2, "),
            ({"out": lambda out: out[:1].expand(out.shape)}, ValueError, "elements of out share memory (strides (0, "),
            (
                {"activation": "tanh"},
                ValueError,
                "no activation 'tanh'; expected None or one of none, relu, relu6, silu",
            ),
        ]
    if name in _CONVOLUTIONS:
        cases += [
            _halved("residual"),
            ({"prologue": "tanh"}, ValueError, "no activation 'tanh'; expected None or one of none, relu, relu6, silu"),
            ({"weight": lambda w: w[:, :5]}, ValueError, ", expected (any, 8, any, any)"),
            ({"weight": lambda w: w.flatten()[:8]}, ValueError, "weight has shape (8,), expected (any, 8, any, any)"),
            ({"residual": lambda r: r[..., :2]}, ValueError, "residual has shape (2, "),
            ({"residual": Tensor.contiguous}, ValueError, "pass residual.to(memory_format=torch.channels_last)"),
            ({"bias": lambda b: b[:-1]}, ValueError, "bias has shape ("),
        ]
    if name in (*_CONVOLUTIONS, "pointwise", "maximum"):
        cases += [
            ({"scale": lambda s: s[:5]}, ValueError, "scale has shape (5,), expected (8,), one element a channel"),
            (
                {"shift": lambda s: s[:, None]},
                ValueError,
                "shift has shape (8, 1), expected (8,), one element a channel",
            ),
            ({"shift": Tensor.int}, TypeError, "shift is torch.int32 on cpu, expected floating point on cpu"),
            (
                {"scale": lambda s: s.repeat(2)[::2]},
                ValueError,
                "elements of scale are 2 apart; pass scale.contiguous()",
            ),
        ]
    if name in (*_CONVOLUTIONS, "depthwise", "linear"):
        expected = "weight is torch.float16 on cpu, x is torch.float32 on cpu; they must be alike"
        cases += [({"weight": Tensor.half}, TypeError, expected)]
    if name in (*_CONVOLUTIONS, "depthwise", "maximum"):
        least = ", expected an integer of at least 1 or a pair of them"
        cases += [({"stride": given}, ValueError, f"stride is {given}{least}") for given in (0, 1.5, (1, 1, 1), (1, 0))]
    return cases + _OWN.get(name, [])


_OWN: dict[str, list[tuple[Change, type[Exception], str]]] = {
    "conv1x1": [
        (
            {"weight": lambda w: w[:, :, None, None].expand(-1, -1, 3, 3)},
            ValueError,
            "weight has shape (12, 8, 3, 3), expected (O, C, 1, 1); use conv3x3",
        ),
    ],
    "conv3x3": [
        (
            {"padding": 0, "dilation": 3, "out": None},
            ValueError,
            "a window of (3, 3) with dilation (3, 3) does not fit into x, (5, 4) with padding (0, 0); pass more padding",
        ),
        ({"padding": -1}, ValueError, "padding is -1, expected an integer of at least 0 or a pair of them"),
        ({"dilation": 0}, ValueError, "dilation is 0, expected an integer of at least 1 or a pair of them"),
    ],
    "depthwise": [
        ({"weight": lambda w: w[:5]}, ValueError, "weight has shape (5, 1, 5, 5), expected (8, 1, any, any)"),
        ({"bias": lambda b: b[:5]}, ValueError, "bias has shape (5,), expected (8,), one element a channel"),
        ({"padding": 0, "dilation": 2, "out": None}, ValueError, "does not fit into x, (5, 4) with padding (0, 0)"),
    ],
    "pointwise": [
        ({"pool": "sum"}, ValueError, "no pooling 'sum'; expected None or one of avg, max, global"),
        ({"kernel": 2}, ValueError, "a kernel, stride or padding is for pool='avg' or 'max', not for pool='none'"),
    ],
    "maximum": [
        ({"padding": 2}, ValueError, "padding (2, 2) is more than half of the kernel (3, 3)"),
        ({"kernel": 7, "padding": 0, "out": None}, ValueError, "a window of (7, 7) with dilation (1, 1) does not fit"),
    ],
    "linear": [
        ({"weight": lambda w: w[:, :5]}, ValueError, "weight has shape (12, 5), expected (any, 8)"),
        ({"weight": lambda w: w[0]}, ValueError, "weight has shape (8,), expected (rows, channels)"),
        (
            {"x": lambda x: x[..., :0], "weight": lambda w: w[:, :0]},
            ValueError,
            "weight has shape (12, 0), and so no elements",
        ),
        (
            {"weight": lambda w: w.t().contiguous().t()},
            ValueError,
            "the channels of weight are 12 elements apart; pass",
        ),
        ({"bias": lambda b: b[:5]}, ValueError, "bias has shape (5,), expected (12,), one element a channel"),
        ({"activation": "tanh"}, ValueError, "no activation 'tanh'; expected None or one of"),
    ],
    "layernorm": [
        ({"weight": lambda w: w[:5]}, ValueError, "weight has shape (5,), expected (8,), one element a channel"),
        (
            {"x": lambda x: x.new_empty(1, 16385), "out": None, "weight": None, "bias": None},
            ValueError,
            "x has 16385 channels, expected at most 16384",
        ),
    ],
}
for _name in _OF_ROWS:
    _OWN[_name] += [
        ({"x": lambda x: x[0, 0, 0]}, ValueError, "x has no dimensions, expected (..., channels)"),
        ({"x": lambda x: x.transpose(0, 1)}, ValueError, "can't be seen as rows of channels; pass x.contiguous()"),
        (
            {"out": lambda out: out.transpose(0, 1)},
            ValueError,
            "can't be seen as rows of channels; pass out.contiguous()",
        ),
        ({"out": lambda out: out[:1]}, ValueError, "out has shape (3, "),
        ({"x": Tensor.int}, TypeError, "x is torch.int32, expected one of torch.float16"),
    ]
_CASES = [
    pytest.param(name, *case, id=f"{name}-{'-'.join(case[0])}-{i}")
    for name in NAMES
    for i, case in enumerate(_refusals(name))
]


def _changed(call: Call, changes: Change) -> dict[str, Any]:
    given = dict(call.keywords)
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    return given


@pytest.mark.parametrize(("name", "changes", "error", "message"), _CASES)
def test_says_what_is_wrong_and_writes_nothing(
    name: str, changes: Change, error: type[Exception], message: str
) -> None:
    call = sample(name)
    given = _changed(call, changes)
    before = bits(call.keywords["out"])
    expected = f"{call.func.__name__}: .*{re.escape(message)}"
    with pytest.raises(error, match=expected):
        call.func(**given)
    assert torch.equal(bits(call.keywords["out"]), before)
    with FakeTensorMode():
        fake = sample(name)
        with pytest.raises(error, match=expected):
            fake.func(**_changed(fake, changes))


_READ = [
    (name, which)
    for name in NAMES
    for which, v in sample(name).keywords.items()
    if isinstance(v, Tensor) and which != "out"
]


@pytest.mark.parametrize(("name", "which"), _READ)
def test_a_gradient_is_refused_where_it_would_be_lost(name: str, which: str) -> None:
    call = sample(name)
    before = bits(call.keywords["out"])
    given = call.keywords | {which: nn.Parameter(call.keywords[which])}
    with pytest.raises(RuntimeError, match=rf"{call.func.__name__} has no backward.*call it under torch\.no_grad\(\)"):
        call.func(**given)
    assert torch.equal(bits(call.keywords["out"]), before)
    with torch.no_grad():
        assert not call.func(**given).requires_grad


@pytest.mark.parametrize("name", _CONVOLUTIONS)
def test_another_device_is_refused(name: str) -> None:
    call = sample(name)
    for which in ("weight", "out", "residual", "bias"):
        given = call.keywords | {which: call.keywords[which].to("meta")}
        with pytest.raises(TypeError, match=f"{call.func.__name__}: {which} is torch.float32 on meta, .*cpu"):
            call.func(**given)


def _overlapping(buffer: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of slices of a buffer of 20 channels that share elements."""
    return {
        "the same": (buffer[:, :8], buffer[:, :8]),
        "one channel": (buffer[:, :8], buffer[:, 7:15]),
        "other rows": (buffer[:, :8, :-1], buffer[:, 4:12, 1:]),
        "within": (buffer[:, 2:10], buffer[:, :8]),
    }


@pytest.mark.parametrize("slices", _overlapping(torch.empty(1, 20, 2, 2)))
def test_reading_what_is_written_is_refused(slices: str) -> None:
    x, out = _overlapping(images(2, 20, 5, 4))[slices]
    before, weight = bits(out), torch.randn(8, 8)
    with pytest.raises(ValueError, match="conv1x1: out overlaps x in memory; pass another out"):
        conv1x1(x, weight, out=out)
    if slices != "the same":
        with pytest.raises(ValueError, match="conv1x1: out overlaps residual in memory; pass another out"):
            conv1x1(images(*x.shape), weight, residual=x, out=out)
    assert torch.equal(bits(out), before)


def _apart(buffer: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of slices that share none."""
    return {
        "channels": (buffer[:, :8], buffer[:, 8:16]),
        "channels, the other way": (buffer[:, 12:], buffer[:, 4:12]),
        "images": (buffer[:1, :8], buffer[1:, :8]),
        "every other column": (buffer[:, :8, :, ::2], buffer[:, :8, :, 1::2]),
        "channels of cropped images": (buffer[:, :8, 1:, 1:], buffer[:, 8:16, :-1, :-1]),
    }


@pytest.mark.parametrize("slices", _apart(torch.empty(2, 20, 2, 2)))
def test_neighbours_are_allowed(slices: str) -> None:
    x, out = _apart(images(2, 20, 5, 4))[slices]
    weight = torch.randn(8, 8)
    expected = conv1x1(x.contiguous(memory_format=torch.channels_last), weight)
    torch.testing.assert_close(conv1x1(x, weight, out=out), expected)


def test_a_view_anew_of_the_output_may_be_the_residual() -> None:
    buffer, x, weight = images(2, 20, 5, 4), images(2, 8, 5, 4), pack(torch.randn(8, 8, 1, 1))
    expected = conv1x1(x, weight, residual=buffer[:, 4:12].clone())
    torch.testing.assert_close(conv1x1(x, weight, residual=buffer[:, 4:12], out=buffer[:, 4:12]), expected)


@pytest.mark.parametrize("op", [conv1x1, lambda x, w, **rest: conv3x3(x, w, padding=0, **rest)])
def test_a_residual_is_broadcast(op: Callable[..., Tensor]) -> None:
    x, weight = images(3, 8, 4, 4), pack(torch.randn(12, 8, 1, 1))
    residual = images(1, 12, 1, 4)
    torch.testing.assert_close(op(x, weight, residual=residual), op(x, weight) + residual)


def test_memory_that_no_other_element_may_share() -> None:
    """A scale or a bias that out is written over, and rows of out that overlap though no stride is 0."""
    buffer = torch.randn(64)
    x, out = images(1, 8, 2, 2), buffer[:32].view(1, 2, 2, 8).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="pointwise: out overlaps scale in memory"):
        pointwise(x, scale=buffer[8:16], out=out)
    with pytest.raises(ValueError, match="pointwise: elements of out share memory"):
        pointwise(images(2, 8, 2, 2), out=buffer.as_strided((2, 8, 2, 2), (16, 1, 8, 4)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by what torch.func.jvp imports of torch
def test_no_derivative_of_any_kind() -> None:
    x = images(2, 8, 3, 3)
    with pytest.raises(RuntimeError, match="pointwise has no forward-mode derivative"):
        torch.func.jvp(lambda t: pointwise(t, activation="relu"), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="pointwise has no backward, and an input or out requires a gradient"):
        pointwise(x, out=torch.empty_like(x).requires_grad_())


@pytest.mark.parametrize("shape", [(4, 8, 0, 3), (0, 8, 3, 3), (4, 0, 3, 3)])
def test_a_weight_without_elements(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"conv3x3: weight has shape .*, (and so no elements|expected)"):
        conv3x3(images(2, 8, 5, 5), torch.empty(shape))


def test_autocast_does_not_reach_the_reference() -> None:
    x, weight = images(2, 8, 5, 5), pack(torch.randn(4, 8, 3, 3))
    expected = conv3x3(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv3x3(x, weight), expected)
