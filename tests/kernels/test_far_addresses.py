"""Elements more than 2**31 apart: in a tensor whose memory is claimed but, all but a few pages of it, never touched."""

from collections.abc import Callable

import pytest
import torch
from agreement import assert_agrees
from torch import Tensor

from fxfreeze.kernels import conv1x1, conv3x3, depthwise, layernorm, linear, pack, pointwise, reference

_PITCH = 8  # elements from pixel to pixel: three of x, one, three of out, one; nothing but 1 divides all of that
_C = 3
_FAR = 2**30 + _PITCH  # three such steps pass 2**31, one of them does not
_ONE, _NONE = (1, 1), (0, 0)


def _neighbours(device: torch.device, far: int) -> tuple[Tensor, Tensor]:
    """x and out, (4, 3, 4, 4), whose dimension ``far`` takes the long steps."""
    strides = [16 * _PITCH, 1, 4 * _PITCH, _PITCH]
    strides[far] = _FAR
    storage = torch.empty(3 * _FAR + 64 * _PITCH, dtype=torch.float16, device=device)
    x, out = (storage.as_strided((4, _C, 4, 4), strides, first) for first in (0, _C + 1))
    return x.copy_(torch.randn(x.shape, device=device)), out.fill_(torch.nan)


def _weight(outputs: int, inputs: int, size: int, device: torch.device) -> Tensor:
    return pack(torch.randn(outputs, inputs, size, size, device=device, dtype=torch.float16) / 3)


def _one_by_one(x: Tensor, out: Tensor) -> Tensor:
    weight = _weight(_C, _C, 1, x.device)
    conv1x1(x, weight, out=out)
    return reference.conv(x.double(), weight.double(), None, None, None, "none", None, "none", _ONE, _NONE, _ONE)


def _rolling(x: Tensor, out: Tensor) -> Tensor:
    weight, before = _weight(_C, _C, 3, x.device), torch.randn(x.shape, device=x.device).half()
    out.copy_(before)
    conv3x3(x, weight, residual=out, out=out)
    given = None, None, None, "none", before.double(), "none", _ONE, _ONE, _ONE
    return reference.conv(x.double(), weight.double(), *given)


def _full(x: Tensor, out: Tensor) -> Tensor:
    """A window of 5, which has no rolling form."""
    weight, two = _weight(_C, _C, 5, x.device), (2, 2)
    conv3x3(x, weight, padding=2, out=out)
    return reference.conv(x.double(), weight.double(), None, None, None, "none", None, "none", _ONE, two, _ONE)


def _channelwise(x: Tensor, out: Tensor) -> Tensor:
    weight = _weight(_C, 1, 3, x.device)
    depthwise(x, weight, out=out)
    return reference.depthwise(x.double(), weight.double(), None, "none", _ONE, _ONE, _ONE)


def _pooled(x: Tensor, out: Tensor) -> Tensor:
    pointwise(x, pool="max", kernel=3, stride=1, padding=1, out=out)
    return reference.pointwise(x.double(), None, None, "none", "max", (3, 3), _ONE, _ONE, True)


def _averaged(x: Tensor, out: Tensor) -> Tensor:
    """Into the corner pixels."""
    pointwise(x, pool="global", out=out[:, :, 3:, 3:])
    mean = reference.pointwise(x.double(), None, None, "none", "global", _ONE, _ONE, _NONE, True)
    out[:, :, :3], out[:, :, :, :3] = mean, mean
    return mean.expand(x.shape)


@pytest.mark.parametrize("far", [0, 2, 3], ids=["batch", "rows", "columns"])
@pytest.mark.parametrize("op", [_one_by_one, _rolling, _full, _channelwise, _pooled, _averaged])
def test_images(device: torch.device, op: Callable[[Tensor, Tensor], Tensor], far: int) -> None:
    x, out = _neighbours(device, far)
    expected = op(x, out)
    assert_agrees(out, expected)


def test_rows(device: torch.device) -> None:
    x, out = (t[:, :, 0, 0] for t in _neighbours(device, 0))
    weight = torch.randn(_C, _C, device=device, dtype=torch.float16)
    assert_agrees(linear(x, weight, out=out), reference.linear(x.double(), weight.double(), None, "none"))
    assert_agrees(layernorm(x, out=out), reference.layernorm(x.double(), None, None, 1e-5))
