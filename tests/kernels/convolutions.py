"""Cases of ``conv1x1`` and ``conv3x3``, and how one is run beside the reference."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from agreement import assert_agrees, wide
from drawing import ACTIVATION, CHANNELS, EXTENT, IMAGES, LAYOUTS
from hypothesis import strategies as st
from placing import ALONE, Layout, bystanders, place, place_vector
from torch import Tensor

from fxfreeze.kernels import pack, reference
from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.layouts import window_size

Op = Callable[..., Tensor]

# How the weight is laid out: as `pack` does, as PyTorch does, channels_last, or as a slice of more input channels.
WEIGHTS = ("packed", "contiguous", "channels_last", "slice")


@dataclass(frozen=True)
class Convolution:
    """One call. residual: None, "apart", or "out", which is written over it; out: None where the op is to make it."""

    n: int
    c: int
    h: int
    w: int
    o: int
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    scale: bool = False
    shift: bool = False
    prologue: str | None = None
    residual: str | None = None
    activation: str | None = None
    weight: str = "packed"
    x_at: Layout = ALONE
    residual_at: Layout = ALONE
    out_at: Layout | None = ALONE


@st.composite
def convolutions(
    draw: st.DrawFn,
    windows: st.SearchStrategy[tuple[int, int]],
    strides: st.SearchStrategy[tuple[int, int]],
    paddings: st.SearchStrategy[tuple[int, int]],
    dilations: st.SearchStrategy[tuple[int, int]],
    outputs: st.SearchStrategy[int] = CHANNELS,
) -> Convolution:
    """A window that fits into its image, and anything else."""
    window, padding, dilation = draw(windows), draw(paddings), draw(dilations)
    h, w = (max(d * (k - 1) + 1 - 2 * p, 1) + draw(EXTENT) for k, p, d in zip(window, padding, dilation, strict=True))
    residual = draw(st.sampled_from((None, "apart", "out")))
    return Convolution(
        *(draw(IMAGES), draw(CHANNELS), h, w, draw(outputs)),
        *(window, draw(strides), padding, dilation),
        **{name: draw(st.booleans()) for name in ("bias", "scale", "shift")},
        prologue=draw(ACTIVATION),
        residual=residual,
        activation=draw(ACTIVATION),
        weight=draw(st.sampled_from(WEIGHTS)),
        x_at=draw(LAYOUTS),
        residual_at=draw(LAYOUTS),
        out_at=draw(LAYOUTS if residual == "out" else st.one_of(st.none(), LAYOUTS)),
    )


def check(op: Op, case: Convolution, device: torch.device, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Run ``op`` and the reference on the same values; nothing beside ``out`` may change."""
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    x = place(torch.randn(case.n, case.c, case.h, case.w, **new), case.x_at)
    weight = lay_out(
        torch.randn(case.o, case.c, *case.window, **new) / math.sqrt(case.c * math.prod(case.window)), case
    )
    bias, scale, shift = (
        place_vector(torch.randn(n, device=device)) if given else None
        for given, n in ((case.bias, case.o), (case.scale, case.c), (case.shift, case.c))
    )
    windows = (case.stride, case.padding, case.dilation)
    shape = (case.n, case.o, *window_size(x, case.window, *windows))
    residual = None if case.residual is None else torch.randn(shape, **new)
    expected = reference.conv(
        *(x.double(), weight.double(), wide(bias), wide(scale), wide(shift), case.prologue or "none"),
        *(wide(residual), case.activation or "none", *windows),
    )
    out = None
    if case.out_at is not None:
        before = residual if case.residual == "out" else torch.full(shape, math.nan, **new)
        out = place(before, case.out_at)
        others = bystanders(out)
    if residual is not None:
        residual = out if case.residual == "out" else place(residual, case.residual_at)
    around = {"bias": bias, "scale": scale, "shift": shift, "prologue": case.prologue, "residual": residual}
    options = {"stride": case.stride}
    if op.__name__ != "conv1x1":
        options |= {"padding": case.padding, "dilation": case.dilation}
    y = op(x, weight, **around, activation=case.activation, out=out, **options)
    assert_agrees(y, expected, tolerance)
    if out is None:
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y is out
        assert torch.equal(bystanders(out), others)


def lay_out(weight: Tensor, case: Convolution) -> Tensor:
    """``weight`` as ``case`` wants it."""
    match case.weight:
        case "packed":
            return pack(weight)
        case "channels_last":
            return weight.contiguous(memory_format=torch.channels_last)
        case "slice":
            return place(weight, Layout(before=3, after=2))
    return weight


def launching(kernel: str, config: Config) -> Op:
    """An op that runs a kernel in a configuration of the caller's."""
    launch = importlib.import_module(f"fxfreeze.kernels.gpu.{kernel}").launch

    def op(x: Tensor, weight: Tensor, *, out: Tensor, **given: object) -> Tensor:
        names = {name: given[name] or "none" for name in ("prologue", "activation")}
        given |= {"padding": (0, 0), "dilation": (1, 1)} | given | names
        launch(x, weight, **given, out=out, config=config)
        return out

    return op
