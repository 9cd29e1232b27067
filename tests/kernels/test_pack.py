"""``pack``: the same weight, its channels together, each tap on 16 bytes."""

import pytest
import torch
from agreement import DTYPES

from fxfreeze.kernels import pack


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (16, 8, 1, 1), (1, 1, 3, 3), (4, 12, 1, 5), (3, 33, 2, 2)])
def test_values_stay_and_taps_are_aligned(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = pack(weight)
    assert torch.equal(packed, weight)
    assert packed.dtype is dtype
    assert packed.stride(1) == 1
    assert all(packed.stride(d) * packed.element_size() % 16 == 0 for d in (0, 2, 3))


def test_depthwise_channels_lie_together() -> None:
    weight = torch.randn(6, 1, 3, 5)
    assert torch.equal(pack(weight), weight)
    assert pack(weight).stride(0) == 1


def test_packing_again_changes_nothing() -> None:
    packed = pack(torch.randn(7, 5, 3, 3))
    assert torch.equal(pack(packed), packed)
    assert pack(packed).stride() == packed.stride()


def test_a_parameter_gives_a_plain_tensor_that_is_not_its_memory() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8, 1, 1))
    packed = pack(weight)
    assert not packed.requires_grad
    with torch.no_grad():
        weight.zero_()
    assert packed.any()


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pack: weight has shape \(3, 4, 5\), expected \(O, C, R, S\)"):
        pack(torch.randn(3, 4, 5))
