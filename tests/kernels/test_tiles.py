"""Every tile shape beside the reference: what the tables hold, and shapes beyond."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from agreement import DTYPES, assert_agrees
from convolutions import Convolution, check, launching
from placing import Layout, bystanders, place, place_rows
from torch import Tensor

from fxfreeze.kernels import configs, reference
from fxfreeze.kernels.configs import Config

# Blocks larger and smaller than the tensors below in each dimension, 1 to 8 warps, strips of any number of rows.
_BEYOND = {
    "conv1x1": [Config(16, 32, 16, 1, 1), Config(128, 32, 16), Config(32, 128, 64, 8, 4), Config(256, 64, 32, 8, 2)],
    "conv3x3": [Config(16, 32, 32, 1, 1), Config(128, 32, 16, 8), Config(32, 128, 64, 8, 4), Config(128, 128, 64, 8)],
    "rolling3x3": [Config(16, 32, 16, 1, 1, rows=r) for r in (3, 8)] + [Config(64, 32, 64, 8, rows=1)],
    "depthwise": [Config(16, 1, 16, 1), Config(8, 1, 128, 8), Config(256, 1, 8)],
    "pointwise": [Config(16, 1, 16, 1), Config(8, 1, 128, 8), Config(256, 1, 8)],
    "layernorm": [Config(1, warps=8), Config(2), Config(16, warps=1)],
    "linear": [Config(16, 16, 16, 1, 1), Config(128, 128, 64, 8)],
}
_ONE, _NONE = (1, 1), (0, 0)

_CONVOLUTION = Convolution(
    *(2, 40, 7, 6, 72),
    bias=True,
    scale=True,
    shift=True,
    prologue="relu",
    residual="out",
    activation="relu6",
    x_at=Layout(before=8, after=4),
    out_at=Layout(before=4, after=12),
)


def _shipped(kernel: str, bits: int) -> set[Config]:
    """What the tables hold for elements of so many bits."""
    rows = configs.TABLES[kernel, bits].values()
    exceptions = {e.config for e in configs.EXCEPTIONS if (e.kernel, e.bits) == (kernel, bits)}
    return exceptions.union(*(tiles for by_outputs in rows for tiles in by_outputs.values()))


def _tiles(kernel: str) -> pytest.MarkDecorator:
    """Each shape of the tables and of ``_BEYOND`` once, with the dtypes it is for."""
    cases = []
    for dtype in DTYPES:
        tiles = _shipped(kernel, dtype.itemsize * 8) | set(_BEYOND[kernel])
        cases += [pytest.param(dtype, tile, id=_id(dtype, tile)) for tile in sorted(tiles)]
    return pytest.mark.parametrize(("dtype", "config"), cases)


def _id(dtype: torch.dtype, tile: Config) -> str:
    sizes = f"{tile.pixels}x{tile.outputs}x{tile.channels}"
    return f"{str(dtype).removeprefix('torch.')}-{sizes}-rows{tile.rows}-w{tile.warps}-s{tile.stages}"


def _launch(kernel: str, operands: tuple[object, ...], expected: Tensor, out: Tensor, config: Config) -> None:
    others = bystanders(out)
    importlib.import_module(f"fxfreeze.kernels.gpu.{kernel}").launch(*operands, out, config)
    assert_agrees(out, expected)
    assert torch.equal(bystanders(out), others)


def _poisoned(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """An output for it, of an odd number of channels' distance."""
    nothing = torch.full(expected.shape, math.nan, device=expected.device, dtype=dtype)
    at = Layout(before=8, after=3)
    return place(nothing, at) if expected.dim() == 4 else place_rows(nothing, at)


@_tiles("conv1x1")
def test_conv1x1(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    check(launching("conv1x1", config), _CONVOLUTION, device, dtype)
    check(launching("conv1x1", config), replace(_CONVOLUTION, stride=(2, 1)), device, dtype)


@_tiles("conv3x3")
def test_conv3x3(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    case = replace(_CONVOLUTION, window=(3, 3), padding=(1, 1), stride=(1, 2))
    check(launching("conv3x3", config), case, device, dtype)


@_tiles("rolling3x3")
def test_rolling3x3(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    case = replace(_CONVOLUTION, window=(3, 3), padding=(1, 1), o=config.outputs - 4)
    check(launching("rolling3x3", config), case, device, dtype)


@_tiles("depthwise")
def test_depthwise(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    new = {"device": device, "dtype": dtype}
    x, weight = torch.randn(2, 40, 9, 7, **new), torch.randn(40, 1, 3, 3, **new) / 3
    bias = torch.randn(40, device=device)
    windows = ((2, 1), _ONE, _ONE)
    expected = reference.depthwise(x.double(), weight.double(), bias.double(), "silu", *windows)
    operands = place(x, Layout(after=8)), weight, bias, "silu", *windows
    _launch("depthwise", operands, expected, _poisoned(expected, dtype), config)


@_tiles("pointwise")
@pytest.mark.parametrize("pool", ["none", "avg", "max", "global"])
def test_pointwise(device: torch.device, dtype: torch.dtype, config: Config, pool: str) -> None:
    x = torch.randn(2, 40, 9, 7, device=device, dtype=dtype)
    scale, shift = torch.randn(2, 40, device=device)
    pooling = (pool, (3, 3), (2, 2), _ONE, False) if pool in ("avg", "max") else (pool, _ONE, _ONE, _NONE, True)
    expected = reference.pointwise(x.double(), scale.double(), shift.double(), "relu", *pooling)
    operands = place(x, Layout(after=8)), scale, shift, "relu", *pooling
    _launch("pointwise", operands, expected, _poisoned(expected, dtype), config)


@_tiles("linear")
def test_linear(device: torch.device, dtype: torch.dtype, config: Config) -> None:
    new = {"device": device, "dtype": dtype}
    x, weight = torch.randn(90, 72, **new), torch.randn(40, 72, **new) / math.sqrt(72)
    bias = torch.randn(40, device=device)
    expected = reference.linear(x.double(), weight.double(), bias.double(), "gelu")
    _launch("linear", (x, weight, bias, "gelu"), expected, _poisoned(expected, dtype), config)


@_tiles("layernorm")
@pytest.mark.parametrize("c", [40, 768])
def test_layernorm(device: torch.device, dtype: torch.dtype, config: Config, c: int) -> None:
    x = torch.randn(37, c, device=device, dtype=dtype)
    weight, bias = torch.randn(2, c, device=device)
    expected = reference.layernorm(x.double(), weight.double(), bias.double(), 1e-5)
    _launch("layernorm", (x, weight, bias, 1e-5), expected, _poisoned(expected, dtype), config)
