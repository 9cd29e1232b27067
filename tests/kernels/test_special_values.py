"""NaN, infinities, signed zeros and large values: what PyTorch makes of them, and only where it does."""

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import each_dtype
from samples import images
from torch import Tensor

from fxfreeze.kernels import ACTIVATIONS, conv1x1, conv3x3, depthwise, layernorm, linear, pack, pointwise

# numpy, in the interpreter, speaks of what a GPU does in silence.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp|multiply):RuntimeWarning"),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered in (add|divide|matmul|multiply|reduce|subtract):RuntimeWarning"
    ),
]

_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4, 100.0, -100.0, 6.0, -6.0, 3.0, -3.0, 1e-6, -1e-6)
_UNBOUNDED = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def _assert_same(y: Tensor, expected: Tensor) -> None:
    """NaN and infinite at the same places, and close elsewhere."""
    tolerance = _TOLERANCES[y.dtype]
    torch.testing.assert_close(y.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
@each_dtype
def test_activations(device: torch.device, dtype: torch.dtype, name: str) -> None:
    """Alone, and before and after a product with 1."""
    values = torch.tensor(_SPECIAL, device=device, dtype=dtype)
    as_images = values[:, None, None, None]
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for y in (
        pointwise(as_images, activation=name),
        conv1x1(as_images, one, prologue=name),
        conv1x1(as_images, one, activation=name),
        linear(values[:, None], one, activation=name),
        conv3x3(as_images, one[:, :, None, None], activation=name, padding=0),
        depthwise(as_images, one[:, :, None, None], activation=name, padding=0),
    ):
        _assert_same(y.flatten(), ACTIVATIONS[name](values.float()))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_to_the_last_digits(device: torch.device, name: str) -> None:
    """Closer than a sum of products lets see: a constant of a formula, or where it begins to saturate."""
    values = torch.linspace(-8, 8, 2049, device=device)
    y = pointwise(values[:, None, None, None], activation=name).flatten()
    torch.testing.assert_close(y.double(), ACTIVATIONS[name](values.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "hardswish"])
def test_large_values_stay_finite(device: torch.device, name: str) -> None:
    values = torch.tensor([1e4, -1e4, 3e4, -3e4, 1e12, -1e12], device=device)
    y = pointwise(values[:, None, None, None], activation=name).flatten()
    torch.testing.assert_close(y, values.clamp(min=0), rtol=1e-6, atol=0)


@_UNBOUNDED
@pytest.mark.parametrize("outputs", [5, 40])
@each_dtype
def test_a_convolution_hands_it_to_the_windows_that_see_it(
    device: torch.device, dtype: torch.dtype, outputs: int, value: float
) -> None:
    x = images(2, 6, 5, 6, device=device, dtype=dtype)
    x[0, 3, 1, 2] = value
    weight = torch.randn(outputs, 6, 3, 3, device=device, dtype=dtype)
    one, vector = weight[:, :, :1, :1], torch.ones(6, device=device)
    for y, expected in (
        (conv3x3(x, pack(weight)), F.conv2d(x.double(), weight.double(), padding=1)),
        (conv3x3(x, pack(weight), scale=vector), F.conv2d(x.double(), weight.double(), padding=1)),
        (conv1x1(x, one), F.conv2d(x.double(), one.double())),
        (conv1x1(x, one, shift=0 * vector), F.conv2d(x.double(), one.double())),
    ):
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isposinf(), expected.isposinf())
        assert torch.equal(y.isneginf(), expected.isneginf())


@_UNBOUNDED
@each_dtype
def test_depthwise_hands_it_on_within_its_channel(device: torch.device, dtype: torch.dtype, value: float) -> None:
    x = images(2, 6, 5, 6, device=device, dtype=dtype)
    x[0, 3, 1, 2] = value
    weight = torch.randn(6, 1, 3, 3, device=device, dtype=dtype)
    _assert_same(depthwise(x, pack(weight)), F.conv2d(x.double(), weight.double(), padding=1, groups=6))


@_UNBOUNDED
@pytest.mark.parametrize("pool", ["avg", "max", "global"])
@each_dtype
def test_pooling(device: torch.device, dtype: torch.dtype, pool: str, value: float) -> None:
    x = images(2, 6, 5, 6, device=device, dtype=dtype)
    x[0, 3, 1, 2] = value
    x[1, 2] = value
    expected = {
        "avg": F.avg_pool2d(x.double(), 3, 2, 1),
        "max": F.max_pool2d(x.double(), 3, 2, 1),
        "global": x.double().mean((2, 3), keepdim=True),
    }[pool]
    window = {} if pool == "global" else {"kernel": 3, "stride": 2, "padding": 1}
    _assert_same(pointwise(x, pool=pool, **window), expected)


def test_sums_of_both_infinities_are_nan(device: torch.device) -> None:
    x = torch.full((1, 1, 2, 2), math.inf, device=device)
    x[0, 0, 1, 1] = -math.inf
    for y in (
        pointwise(x, pool="avg", kernel=2),
        pointwise(x, pool="global"),
        conv3x3(x, x.new_ones(1, 1, 2, 2), padding=0),
        depthwise(x, x.new_ones(1, 1, 2, 2), padding=0),
    ):
        assert y.isnan().all()


@pytest.mark.parametrize("outputs", [5, 40])
def test_padding_stays_zero_whatever_the_prologue_makes_of_it(device: torch.device, outputs: int) -> None:
    """An infinite shift makes sixes of the image; of the padding it must make nothing."""
    x = images(1, 6, 4, 4, device=device)
    weight = torch.randn(outputs, 6, 3, 3, device=device)
    y = conv3x3(x, pack(weight), shift=torch.full((6,), math.inf, device=device), prologue="relu6")
    _assert_same(y, F.conv2d(torch.full_like(x, 6).double(), weight.double(), padding=1))


@_UNBOUNDED
@each_dtype
def test_rows_keep_it_to_themselves(device: torch.device, dtype: torch.dtype, value: float) -> None:
    x = torch.randn(7, 20, device=device, dtype=dtype)
    x[2, 5] = value
    weight = torch.randn(9, 20, device=device, dtype=dtype) / 20**0.5
    _assert_same(layernorm(x), F.layer_norm(x.double(), (20,)))
    assert torch.equal(linear(x, weight).isfinite(), F.linear(x.double(), weight.double()).isfinite())
