"""``conv3x3`` and its rolling form beside the reference in fp64."""

import dataclasses

import pytest
import torch
from agreement import assert_agrees, each_dtype, matmul_precision
from convolutions import Convolution, check, convolutions
from drawing import examples, pairs
from hypothesis import given
from hypothesis import strategies as st
from placing import Layout, bits

from fxfreeze.kernels import ACTIVATIONS, conv3x3, pack, reference
from fxfreeze.kernels.conv3x3 import ROLLING_OUTPUTS

_THREE, _ONE = st.just((3, 3)), st.just((1, 1))
_ANY = convolutions(
    windows=st.one_of(_THREE, pairs(st.integers(1, 5))),
    strides=pairs(st.integers(1, 3)),
    paddings=pairs(st.integers(0, 3)),
    dilations=pairs(st.integers(1, 3)),
)
_LARGE = convolutions(_THREE, pairs(st.integers(1, 2)), _ONE, _ONE, outputs=st.integers(ROLLING_OUTPUTS + 1, 70))
_ROLLING = convolutions(_THREE, _ONE, _ONE, _ONE, outputs=st.integers(1, ROLLING_OUTPUTS))

_FULL = Convolution(
    *(2, 20, 6, 7, 36),
    window=(3, 3),
    padding=(1, 1),
    bias=True,
    scale=True,
    shift=True,
    prologue="relu",
    residual="apart",
    activation="hardswish",
    x_at=Layout(before=4, after=8),
    residual_at=Layout(after=4),
    out_at=Layout(before=12, after=4),
)
_FEW = dataclasses.replace(_FULL, o=12)
_FORMS = pytest.mark.parametrize("case", [_FULL, _FEW], ids=["full", "rolling"])


@each_dtype
@examples(20)
@given(case=_ANY)
def test_any_window_agrees_with_the_reference(device: torch.device, dtype: torch.dtype, case: Convolution) -> None:
    check(conv3x3, case, device, dtype)


@each_dtype
@examples(8)
@given(case=_LARGE)
def test_many_outputs_agree_with_the_reference(device: torch.device, dtype: torch.dtype, case: Convolution) -> None:
    check(conv3x3, case, device, dtype)


@each_dtype
@examples(18)
@given(case=_ROLLING)
def test_rolling_form_agrees_with_the_reference(device: torch.device, dtype: torch.dtype, case: Convolution) -> None:
    check(conv3x3, case, device, dtype)


@_FORMS
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_before_and_after(device: torch.device, name: str, case: Convolution) -> None:
    check(conv3x3, dataclasses.replace(case, prologue=name), device, torch.float32)
    check(conv3x3, dataclasses.replace(case, activation=name), device, torch.float32)


@_FORMS
@pytest.mark.parametrize("parts", ["scale", "shift", "prologue", "bias", "residual", ""])
def test_each_part_alone(device: torch.device, parts: str, case: Convolution) -> None:
    without = dict.fromkeys(("bias", "scale", "shift"), False) | {"prologue": None, "residual": None}
    alone = without | ({parts: getattr(case, parts)} if parts else {})
    check(conv3x3, dataclasses.replace(case, **alone, activation=None), device, torch.float32)


@_FORMS
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_follows_torchs_precision(device: torch.device, precision: str, case: Convolution) -> None:
    with matmul_precision(precision) as tolerance:
        check(conv3x3, case, device, torch.float32, tolerance)


@pytest.mark.parametrize("window", [(1, 7), (7, 1), (2, 2), (4, 3), (7, 7)])
def test_odd_shaped_windows(device: torch.device, window: tuple[int, int]) -> None:
    case = dataclasses.replace(_FULL, window=window, stride=(2, 1), padding=(3, 2), dilation=(1, 2), h=9, w=13)
    check(conv3x3, case, device, torch.float32)


@pytest.mark.parametrize("outputs", [12, 40])
@each_dtype
def test_padding_is_zero_after_the_prologue(device: torch.device, dtype: torch.dtype, outputs: int) -> None:
    """A constant image of zeros, which the prologue makes ones: corners see four of them, edges six, the rest nine."""
    x = torch.zeros(2, 8, 5, 5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = pack(torch.full((outputs, 8, 3, 3), 1 / 8, device=device, dtype=dtype))
    y = conv3x3(x, weight, shift=torch.ones(8, device=device), prologue="relu")
    seen = torch.tensor([2.0, 3, 3, 3, 2], device=device)
    assert torch.equal(y.float(), (seen[:, None] * seen).expand(2, outputs, 5, 5))


@each_dtype
def test_reads_the_slice_beside_the_one_it_writes(device: torch.device, dtype: torch.dtype) -> None:
    buffer = torch.randn(2, 30, 4, 5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = pack(torch.randn(6, 20, 3, 3, device=device, dtype=dtype) / 180**0.5)
    x, out, others = buffer[:, :20], buffer[:, 20:26], buffer[:, 26:]
    before = bits(x), bits(others)
    one = (1, 1)
    expected = reference.conv(x.double(), weight.double(), None, None, None, "none", None, "none", one, one, one)
    assert conv3x3(x, weight, out=out) is out
    assert_agrees(out, expected)
    assert torch.equal(bits(x), before[0])
    assert torch.equal(bits(others), before[1])


def test_no_images(device: torch.device) -> None:
    x = torch.randn(0, 6, 3, 5, device=device).to(memory_format=torch.channels_last)
    assert conv3x3(x, torch.randn(9, 6, 3, 3, device=device), stride=2).shape == (0, 9, 2, 3)
