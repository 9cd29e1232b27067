"""How images are handed to kernels: the unit that their sizes are counted in, where a base is aligned, what is flat."""

from dataclasses import replace

import pytest
import torch
from agreement import matmul_precision
from placing import Layout, place

pytest.importorskip("triton")

from fxfreeze.kernels.gpu.operands import flat, image, precision, unit


def _image(channels: int, layout: Layout, dtype: torch.dtype = torch.float16, n: int = 2) -> torch.Tensor:
    return place(torch.randn(n, channels, 3, 5).to(dtype), layout)


@pytest.mark.parametrize(
    ("channels", "layout", "expected"),
    [
        (16, Layout(), 8),
        (8, Layout(before=8, after=16), 8),
        (12, Layout(after=4), 4),
        (16, Layout(before=12, after=4), 4),
        (16, Layout(after=2), 2),
        (6, Layout(), 2),
        (8, Layout(before=1, after=7), 1),
        (5, Layout(after=3), 1),
        (8, Layout(lead=4), 4),
        (8, Layout(lead=1), 1),
        (1, Layout(), 1),
    ],
)
def test_unit_divides_channels_pitch_and_start(channels: int, layout: Layout, expected: int) -> None:
    x = _image(channels, layout)
    assert unit(x) == expected
    assert unit(_image(channels, layout, torch.float32)) == min(expected, 4)
    assert unit(_image(32, Layout()), x) == expected
    assert unit(_image(32, Layout()), None) == 8


def test_unit_of_a_single_pixel_is_that_of_its_channels() -> None:
    x = place(torch.randn(1, 16, 1, 1).half(), Layout())
    assert unit(x.as_strided(x.shape, (3, 1, 5, 7))) == 8


@pytest.mark.parametrize("pitch", [8, 12, 9])
def test_unit_divides_a_weights_pitch(pitch: int) -> None:
    assert unit(_image(16, Layout()), pitch=pitch) == {8: 8, 12: 4, 9: 1}[pitch]


@pytest.mark.parametrize("lead", [0, 1, 8, 11])
@pytest.mark.parametrize("before", [0, 3, 8])
def test_base_is_aligned_and_start_leads_to_the_image(lead: int, before: int) -> None:
    x = _image(5, Layout(lead=lead, before=before))
    given = image(x, 1)
    assert given.base.data_ptr() % 16 == 0
    assert given.base.data_ptr() + given.start * x.element_size() == x.data_ptr()
    assert (given.n, given.h, given.w) == (x.stride(0), x.stride(2), x.stride(3))


def test_a_storage_that_begins_unaligned_is_its_own_base() -> None:
    memory = torch.zeros(64 + 3, dtype=torch.float16)
    first = (-memory.data_ptr() // 2) % 8 + 3  # three elements past a multiple of 16 bytes
    x = torch.frombuffer(memory.numpy()[first:].data, dtype=torch.float16).view(-1)[:32].view(2, 4, 2, 2)
    x = x.as_strided((2, 4, 2, 2), (16, 1, 8, 4))
    assert image(x, 1).base.data_ptr() == x.data_ptr()
    assert image(x, 1).start == 0


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(), True),
        (Layout(before=3, after=2), True),
        (Layout(step=2), True),
        (Layout(crop=(1, 0)), False),
        (Layout(crop=(0, 1)), False),
        (Layout(order="nwh"), False),
        (Layout(order="hnw"), False),
    ],
)
def test_flat_is_one_distance_between_pixels(layout: Layout, expected: bool) -> None:
    x = _image(8, layout)
    assert flat(x) is expected
    assert flat(_image(8, Layout()), None, x) is expected


def test_one_cropped_image_is_flat() -> None:
    assert flat(_image(8, replace(Layout(), crop=(1, 0)), n=1))


@pytest.mark.parametrize(("asked", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_precision_is_torchs_and_for_fp32_alone(asked: str, expected: str) -> None:
    """The interpreter multiplies exactly, whatever it is told."""
    with matmul_precision(asked):
        assert precision(torch.float32) == expected
        assert precision(torch.float16) == precision(torch.bfloat16) == "ieee"
