"""One ordinary call of every kernel, by name, for tests of what surrounds the numbers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fxfreeze.kernels import conv1x1, conv3x3, depthwise, layernorm, linear, pack, pointwise

Call = partial  # of a public function: `func` and `keywords`, all of them tensors or options, and `out`


def images(n: int, c: int, h: int, w: int, **new: object) -> Tensor:
    """Random, channels_last."""
    return torch.randn(n, c, h, w, **new).to(memory_format=torch.channels_last)


def _conv1x1(n: int, **new: object) -> Call:
    around = {"bias": torch.randn(12, **new), "residual": images(n, 12, 5, 4, **new), "activation": "silu"}
    before = {"scale": torch.randn(8, **new), "shift": torch.randn(8, **new), "prologue": "relu"}
    tensors = {"x": images(n, 8, 5, 4, **new), "weight": torch.randn(12, 8, **new), "out": images(n, 12, 5, 4, **new)}
    return partial(conv1x1, **tensors, **around, **before)


def _conv3x3(n: int, outputs: int, **new: object) -> Call:
    around = {"bias": torch.randn(outputs, **new), "residual": images(n, outputs, 5, 4, **new), "activation": "gelu"}
    before = {"scale": torch.randn(8, **new), "shift": torch.randn(8, **new), "prologue": "relu"}
    tensors = {"x": images(n, 8, 5, 4, **new), "weight": pack(torch.randn(outputs, 8, 3, 3, **new))}
    return partial(conv3x3, **tensors, out=images(n, outputs, 5, 4, **new), **around, **before)


def _depthwise(n: int, **new: object) -> Call:
    weight, bias = pack(torch.randn(8, 1, 5, 5, **new)), torch.randn(8, **new)
    x, out = images(n, 8, 5, 4, **new), images(n, 8, 3, 2, **new)
    return partial(depthwise, x=x, weight=weight, bias=bias, activation="relu6", stride=2, padding=2, out=out)


def _pointwise(n: int, pool: str | None, h: int, w: int, **new: object) -> Call:
    window = {"pool": pool, "kernel": 3, "stride": 2, "padding": 1} if pool in ("avg", "max") else {"pool": pool}
    vectors = {"scale": torch.randn(8, **new), "shift": torch.randn(8, **new)}
    x, out = images(n, 8, 5, 4, **new), images(n, 8, h, w, **new)
    return partial(pointwise, x=x, **vectors, activation="hardswish", **window, out=out)


def _linear(n: int, **new: object) -> Call:
    tensors = {"x": torch.randn(n, 3, 8, **new), "weight": torch.randn(12, 8, **new), "bias": torch.randn(12, **new)}
    return partial(linear, **tensors, activation="gelu_tanh", out=torch.randn(n, 3, 12, **new))


def _layernorm(n: int, **new: object) -> Call:
    vectors = {"weight": torch.randn(8, **new), "bias": torch.randn(8, **new)}
    return partial(layernorm, x=torch.randn(n, 3, 8, **new), **vectors, eps=1e-3, out=torch.randn(n, 3, 8, **new))


_SAMPLES: dict[str, Callable[..., Call]] = {
    "conv1x1": _conv1x1,
    "conv3x3": partial(_conv3x3, outputs=36),
    "rolling3x3": partial(_conv3x3, outputs=12),
    "depthwise": _depthwise,
    "pointwise": partial(_pointwise, pool=None, h=5, w=4),
    "average": partial(_pointwise, pool="avg", h=3, w=2),
    "maximum": partial(_pointwise, pool="max", h=3, w=2),
    "global_mean": partial(_pointwise, pool="global", h=1, w=1),
    "linear": _linear,
    "layernorm": _layernorm,
}
NAMES = tuple(_SAMPLES)


def sample(name: str, n: int = 2, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """A call of ``n`` samples, the same whenever it is made."""
    torch.manual_seed(0)
    return _SAMPLES[name](n, device=device, dtype=dtype)


def without_out(call: Call) -> Call:
    """The same call that has its output made for it."""
    return partial(call.func, **{name: value for name, value in call.keywords.items() if name != "out"})


def in_fp64(call: Call) -> Call:
    """The same call on the same values in fp64, with an output of its own."""
    given = {name: v.double() if isinstance(v, Tensor) else v for name, v in call.keywords.items()}
    return partial(call.func, **given)
