"""``conv1x1`` beside the reference in fp64."""

import dataclasses

import pytest
import torch
from agreement import assert_agrees, each_dtype, matmul_precision
from convolutions import Convolution, check, convolutions
from drawing import examples, pairs
from hypothesis import given
from hypothesis import strategies as st
from placing import Layout, bits

from fxfreeze.kernels import ACTIVATIONS, conv1x1, reference

_CASES = convolutions(
    windows=st.just((1, 1)), strides=pairs(st.integers(1, 2)), paddings=st.just((0, 0)), dilations=st.just((1, 1))
)
_WHOLE = Convolution(
    *(2, 20, 5, 7, 24),
    bias=True,
    scale=True,
    shift=True,
    prologue="relu",
    residual="apart",
    activation="silu",
    x_at=Layout(before=4, after=8),
    residual_at=Layout(after=4),
    out_at=Layout(before=12, after=4),
)


@each_dtype
@examples(50)
@given(case=_CASES)
def test_agrees_with_the_reference(device: torch.device, dtype: torch.dtype, case: Convolution) -> None:
    check(conv1x1, case, device, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_before_and_after(device: torch.device, name: str) -> None:
    check(conv1x1, dataclasses.replace(_WHOLE, prologue=name), device, torch.float32)
    check(conv1x1, dataclasses.replace(_WHOLE, activation=name), device, torch.float32)


@pytest.mark.parametrize("which", ["x_at", "residual_at", "out_at"])
@pytest.mark.parametrize("layout", [Layout(crop=(1, 1)), Layout(order="nwh"), Layout(order="hnw", after=4)])
def test_one_image_among_others_whose_pixels_are_evenly_apart(device: torch.device, layout: Layout, which: str) -> None:
    check(conv1x1, dataclasses.replace(_WHOLE, **{which: layout}), device, torch.float32)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_follows_torchs_precision(device: torch.device, precision: str) -> None:
    with matmul_precision(precision) as tolerance:
        check(conv1x1, _WHOLE, device, torch.float32, tolerance)


@each_dtype
def test_weight_without_window_dimensions(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 3, 5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(9, 6, device=device, dtype=dtype)
    assert torch.equal(bits(conv1x1(x, weight)), bits(conv1x1(x, weight[:, :, None, None])))


@pytest.mark.parametrize("vectors", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_any_floating_dtype(device: torch.device, vectors: torch.dtype) -> None:
    x = torch.randn(2, 6, 3, 5, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(9, 6, 1, 1, device=device) / 3
    bias, scale, shift = (torch.randn(n, device=device, dtype=vectors) for n in (9, 6, 6))
    none, one = (0, 0), (1, 1)
    expected = reference.conv(
        x.double(), weight.double(), bias.double(), scale.double(), shift.double(), "none", None, "none", one, none, one
    )
    assert_agrees(conv1x1(x, weight, bias=bias, scale=scale, shift=shift), expected)


@each_dtype
def test_dense_block_in_one_buffer(device: torch.device, dtype: torch.dtype) -> None:
    """Each layer reads all channels before its own and writes its own beside them."""
    width, growth, layers = 10, 6, 3
    channels = width + growth * layers
    buffer = torch.randn(2, channels, 4, 5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    expected = buffer.double()
    none, one = (0, 0), (1, 1)
    for i in range(layers):
        c = width + growth * i
        weight = torch.randn(growth, c, 1, 1, device=device, dtype=dtype) / c**0.5
        scale, shift = torch.randn(2, c, device=device)
        out = buffer[:, c : c + growth]
        read = buffer[:, :c].double()
        given = scale.double(), shift.double(), "relu", None, "none", one, none, one
        expected = torch.cat((read, reference.conv(read, weight.double(), None, *given)), 1)
        kept = bits(buffer[:, :c])
        assert conv1x1(buffer[:, :c], weight, scale=scale, shift=shift, prologue="relu", out=out) is out
        assert torch.equal(bits(buffer[:, :c]), kept)
        assert_agrees(buffer[:, : c + growth], expected)


def test_no_images(device: torch.device) -> None:
    x = torch.randn(0, 6, 3, 5, device=device).to(memory_format=torch.channels_last)
    assert conv1x1(x, torch.randn(9, 6, device=device)).shape == (0, 9, 3, 5)
