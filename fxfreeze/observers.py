"""Whether something follows the operators of a call, and not its values alone: it must see those of the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["has_tangents", "observed", "unobserved"]

_forward_ad: Any = forward_ad


def observed() -> bool:
    """Whether Dynamo, ``torch.jit.trace``, forward-mode differentiation or a dispatch mode, such as that of ``make_fx``
    or of a counter of FLOPs, looks on."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return has_tangents() or torch._C._len_torch_dispatch_stack() > 0


def has_tangents() -> bool:
    """Whether forward-mode differentiation is on, which ``no_grad`` does not turn off."""
    return bool(_forward_ad._current_level >= 0)


@contextmanager
def unobserved() -> Iterator[None]:
    """Within, neither a dispatch mode nor ``torch.jit.trace`` follows operators: they are a build's own."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
