"""What the ops ask of their tensors; an error says what was given, what was expected and what to do."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxfreeze.kernels.layouts import window_size
from fxfreeze.kernels.reference import ACTIVATIONS

_dual: Any = forward_ad.unpack_dual
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def convolution(
    op: str,
    x: Tensor,
    weight_: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    residual: Tensor | None,
    activation_: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Tensor,
) -> None:
    """What ``conv1x1`` and ``conv3x3`` ask."""
    images(op, 4, x=x, residual=residual, out=out)
    weight(op, weight_, x, (None, x.shape[1], None, None))
    outputs = weight_.shape[0]
    vectors(op, x, bias=(bias, outputs), scale=(scale, x.shape[1]), shift=(shift, x.shape[1]))
    for name in (prologue, activation_):
        activation(op, name)
    given = windows(op, stride, padding, dilation)
    expected = (x.shape[0], outputs, *size(op, x, weight_.shape[2:], *given))
    read = {"x": x, "residual": residual, "weight": weight_, "bias": bias, "scale": scale, "shift": shift}
    output(op, out, expected, **read)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected that of out, {tuple(out.shape)}")


def inference(op: str, *tensors: Tensor | None) -> None:
    """There is no backward. For the functions: within an op gradients are off, and are lost in silence."""
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError(
            f"{op} has no backward, and an input or out requires a gradient: call it under torch.no_grad()"
        )
    if forward_ad._current_level >= 0 and any(_dual(t).tangent is not None for t in given):
        raise RuntimeError(
            f"{op} has no forward-mode derivative, and an input has a tangent: use the PyTorch operators"
        )


def images(op: str, dim: int, **tensors: Tensor | None) -> None:
    """Floating point of one dtype on one device, of ``dim`` dimensions, with the channels, dimension 1, contiguous."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, like = next(iter(given.items()))
    for name, t in given.items():
        if t.dim() != dim:
            layout = "(rows, channels)" if dim == 2 else "(N, C, H, W)"
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {layout}")
        if dim == 4 and t.shape[1] == 0:  # rows without channels are what PyTorch makes of them
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, and so no channels")
        if t.dtype not in _FLOATS:
            raise TypeError(f"{op}: {name} is {t.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
        if t.dtype != like.dtype or t.device != like.device:
            both = f"{name} is {t.dtype} on {t.device}, {first} is {like.dtype} on {like.device}"
            raise TypeError(f"{op}: {both}; they must be alike")
        if t.shape[1] > 1 and t.stride(1) != 1 and t.numel():
            remedy = ".contiguous()" if dim == 2 else ".to(memory_format=torch.channels_last)"
            raise ValueError(f"{op}: the channels of {name} are {t.stride(1)} elements apart; pass {name}{remedy}")


def weight(op: str, given: Tensor, x: Tensor, shape: Sequence[int | None]) -> None:
    """Of x's dtype, on its device, of ``shape``; None: any size."""
    if given.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, given.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: weight has shape {tuple(given.shape)}, expected ({expected})")
    if not given.numel():
        raise ValueError(
            f"{op}: weight has shape {tuple(given.shape)}, and so no elements; expected at least one in each dimension"
        )
    if given.dtype != x.dtype or given.device != x.device:
        raise TypeError(
            f"{op}: weight is {given.dtype} on {given.device}, x is {x.dtype} on {x.device}; they must be alike"
        )


def vectors(op: str, x: Tensor, **vectors_: tuple[Tensor | None, int]) -> None:
    """Each a contiguous floating-point tensor of so many elements, on x's device."""
    for name, (t, n) in vectors_.items():
        if t is None:
            continue
        if tuple(t.shape) != (n,):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected ({n},), one element a channel")
        if t.dtype not in _FLOATS or t.device != x.device:
            raise TypeError(f"{op}: {name} is {t.dtype} on {t.device}, expected floating point on {x.device}")
        if n > 1 and t.stride(0) != 1:
            raise ValueError(f"{op}: the elements of {name} are {t.stride(0)} apart; pass {name}.contiguous()")


def activation(op: str, name: str) -> None:
    """One that the kernels have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: no activation {name!r}; expected None or one of {', '.join(ACTIVATIONS)}")


def windows(
    op: str, stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The three as pairs (height, width)."""
    return pair(op, "stride", stride), pair(op, "padding", padding, least=0), pair(op, "dilation", dilation)


def pair(op: str, name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """One number for both dimensions, or two."""
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"{op}: {name} is {value}, expected an integer of at least {least} or a pair of them")
    return both


def size(
    op: str, x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of what a convolution or a pooling makes of x: at least one pixel."""
    h, w = window_size(x, window, stride, padding, dilation)
    if h < 1 or w < 1:
        given = f"a window of {tuple(window)} with dilation {tuple(dilation)}"
        raise ValueError(
            f"{op}: {given} does not fit into x, {tuple(x.shape[2:])} with padding {tuple(padding)}; pass more padding"
        )
    return h, w


def rows(op: str, **tensors: Tensor) -> dict[str, Tensor]:
    """Each as (rows, channels), a view."""
    result = {}
    for name, t in tensors.items():
        if not t.dim():
            raise ValueError(f"{op}: {name} has no dimensions, expected (..., channels)")
        try:
            result[name] = t.view(math.prod(t.shape[:-1]), t.shape[-1])
        except (RuntimeError, ValueError) as error:  # a fake tensor's
            raise ValueError(
                f"{op}: {name}, shape {tuple(t.shape)} and strides {t.stride()}, can't be seen as rows of channels; "
                f"pass {name}.contiguous()"
            ) from error
    return result


def output(op: str, out: Tensor, shape: Sequence[int], **read: Tensor | None) -> None:
    """Of that shape, each element a place of its own, and apart from what other programs of the kernel may still read.

    Channel slices of one buffer are apart. ``residual`` may be ``out``: who reads an element also writes it.
    """
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{op}: out has shape {tuple(out.shape)}, expected {tuple(shape)}")
    if _folded(out):
        raise ValueError(f"{op}: elements of out share memory (strides {out.stride()}); pass out.clone()")
    for name, t in read.items():
        if t is not None and not (name == "residual" and _same(t, out)) and not _apart(t, out):
            raise ValueError(f"{op}: out overlaps {name} in memory; pass another out")


def broadcast(residual: Tensor | None, out: Tensor) -> Tensor | None:
    """``residual`` as if it were as large as ``out``, where it is 1 in the dimensions that differ."""
    if residual is None or residual.shape == out.shape or residual.dim() != out.dim():
        return residual
    fits = all(n in (1, m) for n, m in zip(residual.shape, out.shape, strict=True))
    return residual.expand(out.shape) if fits else residual


def _folded(t: Tensor) -> bool:
    """Whether elements may share a place: a step no longer than all the smaller ones together."""
    reach = 0
    for step, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if step <= reach:
            return t.numel() > 0
        reach += (n - 1) * step
    return False


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether each element of one is at the place of the other's. Fake tensors have no ``is_set_to``."""
    strides = all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)
    return _one_storage(a, b) and a.shape == b.shape and a.storage_offset() == b.storage_offset() and strides


def _one_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors plainly share no element: other memory, one before the other, or slices of channels."""
    if not a.numel() or not b.numel() or not _one_storage(a, b):
        return True
    (a_first, a_last), (b_first, b_last) = _extent(a), _extent(b)
    if a_last < b_first or b_last < a_first:
        return True
    if a.dim() != b.dim():
        return False
    pitch = math.gcd(*(t.stride(d) for t in (a, b) for d in range(t.dim()) if d != 1 and t.shape[d] > 1))
    if not pitch:
        return False
    a_low, b_low = a_first % pitch, b_first % pitch
    a_high, b_high = a_low + a.shape[1], b_low + b.shape[1]
    return max(a_high, b_high) <= pitch and (a_high <= b_low or b_high <= a_low)


def _extent(t: Tensor) -> tuple[int, int]:
    """Places of the first and the last element in the storage."""
    first = t.storage_offset()
    return int(first), int(first + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
