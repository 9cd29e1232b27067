"""``layernorm`` beside the reference in fp64."""

import math

import pytest
import torch
from agreement import DTYPES, assert_agrees, each_dtype, wide
from drawing import CHANNELS, ROW_LAYOUTS, examples
from hypothesis import given
from hypothesis import strategies as st
from placing import ALONE, Layout, bystanders, place_rows, place_vector

from fxfreeze.kernels import layernorm, reference

_LEADING = st.lists(st.integers(1, 5), max_size=3).map(tuple)
_WIDTHS = st.one_of(CHANNELS, st.integers(1, 3000), st.sampled_from((768, 1024, 4096)))


def _check(
    device: torch.device,
    dtype: torch.dtype,
    leading: tuple[int, ...] = (3, 5),
    c: int = 20,
    weight: bool = True,
    bias: bool = True,
    eps: float = 1e-5,
    x_at: Layout = ALONE,
    out_at: Layout | None = None,
    mean: float = 0.0,
) -> None:
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    x = place_rows(mean + torch.randn(*leading, c, **new), x_at)
    weight_, bias_ = (place_vector(torch.randn(c, device=device)) if given else None for given in (weight, bias))
    expected = reference.layernorm(x.double(), wide(weight_), wide(bias_), eps)
    out = None
    if out_at is not None:
        out = place_rows(torch.full(x.shape, math.nan, **new), out_at)
        others = bystanders(out)
    y = layernorm(x, weight=weight_, bias=bias_, eps=eps, out=out)
    assert_agrees(y, expected)
    if out is None:
        assert y.dtype == dtype
        assert y.is_contiguous()
    else:
        assert y is out
        assert torch.equal(bystanders(out), others)


@each_dtype
@examples(25)
@given(
    leading=_LEADING,
    c=_WIDTHS,
    vectors=st.tuples(st.booleans(), st.booleans()),
    eps=st.sampled_from((1e-6, 1e-5, 1e-3, 0.1)),
    x_at=ROW_LAYOUTS,
    out_at=st.one_of(st.none(), ROW_LAYOUTS),
)
def test_agrees_with_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    leading: tuple[int, ...],
    c: int,
    vectors: tuple[bool, bool],
    eps: float,
    x_at: Layout,
    out_at: Layout | None,
) -> None:
    _check(device, dtype, leading, c, *vectors, eps, x_at, out_at)


@pytest.mark.parametrize("c", [4097, 16384])
def test_wide_rows(device: torch.device, c: int) -> None:
    for dtype in DTYPES:
        _check(device, dtype, (5,), c)


def test_variance_is_taken_about_the_mean(device: torch.device) -> None:
    """Mean of squares less square of mean would lose every digit here."""
    _check(device, torch.float32, (7,), 512, mean=30.0)


def test_a_constant_row_is_its_bias(device: torch.device) -> None:
    x, bias = torch.full((3, 24), 2.0, device=device), torch.randn(24, device=device)
    assert torch.equal(layernorm(x, bias=bias), bias.expand(3, 24))


def test_no_rows(device: torch.device) -> None:
    assert layernorm(torch.randn(0, 3, 5, device=device)).shape == (0, 3, 5)
    assert layernorm(torch.randn(3, 0, device=device)).shape == (3, 0)
