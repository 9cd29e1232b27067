"""``pointwise``, with and without pooling, beside the reference in fp64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from agreement import assert_agrees, each_dtype, wide
from drawing import ACTIVATION, CHANNELS, EXTENT, IMAGES, LAYOUTS, examples, pairs
from hypothesis import given
from hypothesis import strategies as st
from placing import ALONE, Layout, bystanders, place, place_vector

from fxfreeze.kernels import ACTIVATIONS, pointwise, reference


@dataclass(frozen=True)
class Pointwise:
    """One call; stride None: that of the window; out: None where the op is to make it."""

    n: int
    c: int
    h: int
    w: int
    pool: str | None = None
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] | None = None
    padding: tuple[int, int] = (0, 0)
    count_include_pad: bool = True
    scale: bool = True
    shift: bool = True
    activation: str | None = None
    x_at: Layout = ALONE
    out_at: Layout | None = ALONE


@st.composite
def _cases(draw: st.DrawFn, pools: tuple[str | None, ...]) -> Pointwise:
    pool = draw(st.sampled_from(pools))
    window, stride, padding = (1, 1), None, (0, 0)
    if pool in ("avg", "max"):
        window = draw(pairs(st.integers(1, 5)))
        stride = draw(st.one_of(st.none(), pairs(st.integers(1, 3))))
        padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    h, w = (max(k - 2 * p, 1) + draw(EXTENT) for k, p in zip(window, padding, strict=True))
    return Pointwise(
        *(draw(IMAGES), draw(CHANNELS), h, w, pool, window, stride, padding),
        *(draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), draw(ACTIVATION)),
        *(draw(LAYOUTS), draw(st.one_of(st.none(), LAYOUTS))),
    )


def _check(case: Pointwise, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    x = place(torch.randn(case.n, case.c, case.h, case.w, **new), case.x_at)
    scale, shift = (
        place_vector(torch.randn(case.c, device=device)) if given else None for given in (case.scale, case.shift)
    )
    pooling = (case.pool or "none", case.window, case.stride or case.window, case.padding, case.count_include_pad)
    expected = reference.pointwise(x.double(), wide(scale), wide(shift), case.activation or "none", *pooling)
    out = None
    if case.out_at is not None:
        out = place(torch.full(expected.shape, math.nan, **new), case.out_at)
        others = bystanders(out)
    window = {"kernel": case.window, "stride": case.stride, "padding": case.padding}
    window |= {"pool": case.pool, "count_include_pad": case.count_include_pad}
    y = pointwise(x, scale=scale, shift=shift, activation=case.activation, out=out, **window)
    assert_agrees(y, expected)
    if out is None:
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y is out
        assert torch.equal(bystanders(out), others)


@each_dtype
@examples(30)
@given(case=_cases(pools=("avg", "max")))
def test_pooling_agrees_with_the_reference(device: torch.device, dtype: torch.dtype, case: Pointwise) -> None:
    _check(case, device, dtype)


@each_dtype
@examples(20)
@given(case=_cases(pools=(None, "global")))
def test_agrees_with_the_reference(device: torch.device, dtype: torch.dtype, case: Pointwise) -> None:
    _check(case, device, dtype)


@pytest.mark.parametrize("pool", [None, "avg", "max", "global"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(device: torch.device, name: str, pool: str | None) -> None:
    case = Pointwise(2, 20, 6, 7, pool, activation=name)
    if pool in ("avg", "max"):
        case = replace(case, window=(3, 3), stride=(2, 2), padding=(1, 1), count_include_pad=False)
    _check(case, device, torch.float32)


@each_dtype
def test_global_mean_of_more_pixels_and_channels_than_a_block(device: torch.device, dtype: torch.dtype) -> None:
    case = Pointwise(2, 72, 13, 11, "global", activation="relu", x_at=Layout(before=8, crop=(1, 2)))
    _check(case, device, dtype)


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_padding_of_an_average_is_zero_after_the_activation(device: torch.device, count_include_pad: bool) -> None:
    """Zeros that the shift makes ones: counted or not, the padding adds nothing to the sum."""
    x = torch.zeros(1, 4, 4, 4, device=device).to(memory_format=torch.channels_last)
    options = {"pool": "avg", "kernel": 3, "stride": 1, "padding": 1, "count_include_pad": count_include_pad}
    y = pointwise(x, shift=torch.ones(4, device=device), **options)
    seen = torch.tensor([2.0, 3, 3, 2], device=device)
    expected = (seen[:, None] * seen / 9).expand(1, 4, 4, 4) if count_include_pad else torch.ones_like(x)
    torch.testing.assert_close(y, expected.contiguous(memory_format=torch.channels_last), rtol=1e-6, atol=0)


def test_padding_of_a_maximum_never_wins(device: torch.device) -> None:
    x = torch.full((1, 4, 3, 3), -5.0, device=device).to(memory_format=torch.channels_last)
    assert torch.equal(pointwise(x, pool="max", kernel=3, stride=1, padding=1), x)
