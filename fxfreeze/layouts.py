"""How tensors lie in memory: random numbers are drawn, and rows flattened, in that order.

A rewritten prefix may compute in another layout than the original, and hands its outputs over in the original's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

__all__ = ["Kind", "Layouts", "has_storage", "is_transformed", "kind_of", "order_of"]

_Format = tuple[torch.dtype, tuple[int, ...] | None]


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the largest stride to the smallest; None where that is 0, 1, 2, ... or where there are no strides."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (-strides[d], d)))
    return None if order == tuple(range(tensor.dim())) else order


def has_storage(tensor: Tensor) -> bool:
    """Whether its memory can be looked at."""
    return tensor.layout == torch.strided and not is_transformed(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of torch.func (grad, vmap) made it, to stand for one of another shape or with a tape; or fake."""
    if torch.compiler.is_compiling():
        return False  # Dynamo can't trace this, and traces plain tensors
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor)) or is_fake(tensor)


class Kind(NamedTuple):
    """What of a tensor decides a graph that it is given to."""

    dtype: torch.dtype
    device: torch.device
    dim: int
    layout: torch.layout
    order: tuple[int, ...] | None
    transformed: bool


def kind_of(tensor: Tensor) -> Kind:
    return Kind(tensor.dtype, tensor.device, tensor.dim(), tensor.layout, order_of(tensor), is_transformed(tensor))


class Layouts:
    """The dtypes and layouts in which the original hands over a boundary.

    original: makes the boundary from a segment's inputs. It is asked again where other dimensions have size 1 than
    before, for a layout says nothing about these.
    """

    def __init__(self, original: Callable[[Sequence[Any]], Sequence[Any]]):
        self._original = original
        self._known: dict[tuple[Any, ...], tuple[_Format | None, ...]] = {}

    def learn(self, outputs: Sequence[Any]) -> None:
        """Take note of what the original made."""
        self._known[_ones(outputs)] = tuple((v.dtype, order_of(v)) if isinstance(v, Tensor) else None for v in outputs)

    def imposed(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """``outputs``, made from ``inputs``, as the original would hand them over."""
        ones = _ones(outputs)
        if ones not in self._known:
            self.learn(self._original(inputs))
        formats = self._known.get(ones)  # none where the original's shapes differ: then nothing is comparable
        laid_out = outputs if formats is None else map(_as, outputs, formats)
        return tuple([value if any(value is given for given in inputs) else _own(value) for value in laid_out])


def _ones(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([tuple([size == 1 for size in v.shape]) if isinstance(v, Tensor) else None for v in values])


def _own(value: Any) -> Any:
    """The value as memory of its own: not a slice of a buffer that others are slices of."""
    if not isinstance(value, Tensor) or not has_storage(value):
        return value
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


def _as(value: Any, wanted: _Format | None) -> Any:
    if wanted is None or not isinstance(value, Tensor):
        return value
    dtype, order = wanted
    value = value if value.dtype == dtype else value.to(dtype)
    if value.layout != torch.strided:
        return value
    if order is None:
        return value.contiguous()
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(order).contiguous().permute(inverse)
