"""Whether something follows the operators of a call, and not its values alone: it must see those of the graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["has_tangents", "observed", "unobserved"]

_forward_ad: Any = forward_ad


def observed() -> bool:
    """Whether Dynamo, ``torch.jit.trace``, forward-mode differentiation or a mode looks on: a ``TorchFunctionMode``, or a
    dispatch mode, such as that of ``make_fx`` or of a counter of FLOPs."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if has_tangents() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def has_tangents() -> bool:
    """Whether forward-mode differentiation is on, which ``no_grad`` does not turn off."""
    return bool(_forward_ad._current_level >= 0)


@contextmanager
def unobserved() -> Iterator[None]:
    """Within, neither a mode nor ``torch.jit.trace`` follows operators: they are a build's own. A default device stays."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._pop_torch_function_stack() for _ in range(count)]  # the last that was entered first
    kept = [mode for mode in reversed(modes) if isinstance(mode, DeviceContext)]
    try:
        with _disable_current_modes(), _entered(kept):
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


@contextmanager
def _entered(modes: Sequence[Any]) -> Iterator[None]:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        for _ in modes:
            torch._C._pop_torch_function_stack()
