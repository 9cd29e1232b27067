"""``depthwise`` beside the reference in fp64."""

import math
from dataclasses import dataclass

import pytest
import torch
from agreement import assert_agrees, each_dtype, wide
from drawing import ACTIVATION, CHANNELS, EXTENT, IMAGES, LAYOUTS, examples, pairs
from hypothesis import given
from hypothesis import strategies as st
from placing import ALONE, Layout, bystanders, place, place_vector

from fxfreeze.kernels import ACTIVATIONS, depthwise, pack, reference
from fxfreeze.kernels.layouts import window_size


@dataclass(frozen=True)
class Depthwise:
    """One call; out: None where the op is to make it."""

    n: int
    c: int
    h: int
    w: int
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    activation: str | None = None
    packed: bool = True
    x_at: Layout = ALONE
    out_at: Layout | None = ALONE


@st.composite
def _cases(draw: st.DrawFn) -> Depthwise:
    window = draw(st.one_of(st.sampled_from(((3, 3), (5, 5))), pairs(st.integers(1, 5))))
    padding, dilation = draw(pairs(st.integers(0, 3))), draw(pairs(st.integers(1, 2)))
    h, w = (max(d * (k - 1) + 1 - 2 * p, 1) + draw(EXTENT) for k, p, d in zip(window, padding, dilation, strict=True))
    return Depthwise(
        *(draw(IMAGES), draw(CHANNELS), h, w),
        *(window, draw(pairs(st.integers(1, 3))), padding, dilation),
        *(draw(st.booleans()), draw(ACTIVATION), draw(st.booleans())),
        *(draw(LAYOUTS), draw(st.one_of(st.none(), LAYOUTS))),
    )


def _check(case: Depthwise, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    x = place(torch.randn(case.n, case.c, case.h, case.w, **new), case.x_at)
    weight = torch.randn(case.c, 1, *case.window, **new) / math.sqrt(math.prod(case.window))
    weight = pack(weight) if case.packed else weight
    bias = place_vector(torch.randn(case.c, device=device)) if case.bias else None
    windows = (case.stride, case.padding, case.dilation)
    expected = reference.depthwise(x.double(), weight.double(), wide(bias), case.activation or "none", *windows)
    out = None
    if case.out_at is not None:
        shape = (case.n, case.c, *window_size(x, case.window, *windows))
        out = place(torch.full(shape, math.nan, **new), case.out_at)
        others = bystanders(out)
    options = dict(zip(("stride", "padding", "dilation"), windows, strict=True))
    y = depthwise(x, weight, bias=bias, activation=case.activation, out=out, **options)
    assert_agrees(y, expected)
    if out is None:
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y is out
        assert torch.equal(bystanders(out), others)


@each_dtype
@examples(22)
@given(case=_cases())
def test_agrees_with_the_reference(device: torch.device, dtype: torch.dtype, case: Depthwise) -> None:
    _check(case, device, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(device: torch.device, name: str) -> None:
    _check(Depthwise(2, 20, 6, 7, activation=name), device, torch.float32)


@pytest.mark.parametrize("window", [(1, 7), (7, 1), (2, 2), (4, 3), (7, 7)])
def test_odd_shaped_windows(device: torch.device, window: tuple[int, int]) -> None:
    _check(Depthwise(2, 12, 9, 13, window, (2, 1), (3, 2), (1, 2)), device, torch.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
@each_dtype
def test_more_channels_than_a_block(device: torch.device, dtype: torch.dtype, size: int, stride: int) -> None:
    case = Depthwise(
        *(2, 72, 9, 8, (size, size), (stride, stride), (size // 2, size // 2)),
        x_at=Layout(before=8),
        out_at=Layout(after=8),
    )
    _check(case, device, dtype)
