"""``linear`` beside the reference in fp64."""

import math

import pytest
import torch
from agreement import assert_agrees, each_dtype, matmul_precision, wide
from drawing import ACTIVATION, CHANNELS, ROW_LAYOUTS, examples
from hypothesis import given
from hypothesis import strategies as st
from placing import ALONE, Layout, bystanders, place_rows, place_vector

from fxfreeze.kernels import ACTIVATIONS, linear, reference

_LEADING = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def _check(
    device: torch.device,
    dtype: torch.dtype,
    leading: tuple[int, ...] = (3, 5),
    c: int = 20,
    o: int = 24,
    bias: bool = True,
    activation: str | None = None,
    x_at: Layout = ALONE,
    weight_at: Layout = ALONE,
    out_at: Layout | None = None,
    tolerance: float | None = None,
) -> None:
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    x = place_rows(torch.randn(*leading, c, **new), x_at)
    weight = place_rows(torch.randn(o, c, **new) / math.sqrt(c), weight_at)
    bias_ = place_vector(torch.randn(o, device=device)) if bias else None
    expected = reference.linear(x.double(), weight.double(), wide(bias_), activation or "none")
    out = None
    if out_at is not None:
        out = place_rows(torch.full((*leading, o), math.nan, **new), out_at)
        others = bystanders(out)
    y = linear(x, weight, bias=bias_, activation=activation, out=out)
    assert_agrees(y, expected, tolerance)
    if out is None:
        assert y.dtype == dtype
        assert y.is_contiguous()
    else:
        assert y is out
        assert torch.equal(bystanders(out), others)


@each_dtype
@examples(40)
@given(
    leading=_LEADING,
    sizes=st.tuples(CHANNELS, CHANNELS),
    bias=st.booleans(),
    activation=ACTIVATION,
    x_at=ROW_LAYOUTS,
    weight_at=ROW_LAYOUTS,
    out_at=st.one_of(st.none(), ROW_LAYOUTS),
)
def test_agrees_with_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    leading: tuple[int, ...],
    sizes: tuple[int, int],
    bias: bool,
    activation: str | None,
    x_at: Layout,
    weight_at: Layout,
    out_at: Layout | None,
) -> None:
    _check(device, dtype, leading, *sizes, bias, activation, x_at, weight_at, out_at)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(device: torch.device, name: str) -> None:
    _check(device, torch.float32, activation=name)


@each_dtype
def test_more_rows_channels_and_outputs_than_a_block(device: torch.device, dtype: torch.dtype) -> None:
    _check(device, dtype, (3, 50), 150, 140, activation="gelu", out_at=Layout(before=8, after=4))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_follows_torchs_precision(device: torch.device, precision: str) -> None:
    with matmul_precision(precision) as tolerance:
        _check(device, torch.float32, tolerance=tolerance)


def test_no_rows(device: torch.device) -> None:
    assert linear(torch.randn(0, 3, 5, device=device), torch.randn(4, 5, device=device)).shape == (0, 3, 4)
