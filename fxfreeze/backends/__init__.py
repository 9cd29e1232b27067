"""Backends by name: which there are, how each makes a frozen graph fast, and why one can't here.

A backend is a list of passes, and for some a compiler of what the passes leave.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from fxfreeze.backends import inductor, int8, openvino
from fxfreeze.backends.compiled import Compiler
from fxfreeze.fidelity import INT8_BOUND
from fxfreeze.kernels import engine
from fxfreeze.passes import PASSES
from fxfreeze.rewrite import Pass

__all__ = ["BACKENDS", "Backend", "candidates", "check_backend", "check_int8", "is_here", "quantizing", "remark"]


class Backend(NamedTuple):
    """passes: run on the traced graph; compiler: of what they leave, or None for a graph that runs as it is.

    bound: what the error of compiled code may be, None for the bound of the dtype that it computes in.
    """

    passes: tuple[Pass, ...]
    compiler: Compiler | None = None
    bound: float | None = None


BACKENDS: dict[str, Backend] = {
    "plain": Backend(PASSES["plain"]),
    "library": Backend(PASSES["library"]),
    "inductor": Backend(PASSES["plain"], inductor.compile),
    "triton": Backend(PASSES["triton"]),
    "openvino": Backend(PASSES["plain"], openvino.compile),
}


def check_backend(name: str) -> None:
    """Raises ValueError for a backend that is unknown, ChoiceError, which is one, for one whose package is missing."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: expected one of auto, {', '.join(BACKENDS)}")
    if name == "openvino":
        openvino.package()


def check_int8(backend: str) -> None:
    """Raises ValueError for a backend that has no int8, ChoiceError, which is one, where a package is missing."""
    if backend not in ("auto", "openvino"):
        raise ValueError(
            f"precision 'int8' runs by OpenVINO alone, not by {backend!r}: backend must be auto or openvino"
        )
    int8.package()


def quantizing(ranges: Sequence[float] | None) -> Backend:
    """The backend of int8, calibrated on the batch that it is built with, or with ``ranges`` that were kept.

    Those are checked on a batch that they are not of, which may be a little further off: else a run that is resumed could
    drop what it had run by.
    """
    bound = INT8_BOUND if ranges is None else 2 * INT8_BOUND
    return Backend(BACKENDS["openvino"].passes, partial(int8.compile, ranges=ranges), bound)


def is_here(name: str) -> bool:
    """Whether this version has the backend, and its package is installed."""
    return name in BACKENDS and (name != "openvino" or openvino.here())


def candidates(wanted: str, earlier: str | None) -> list[str]:
    """What to try, in order, for a segment that an earlier build decided to run by ``earlier``."""
    return list(dict.fromkeys((earlier if earlier is not None and is_here(earlier) else wanted, "plain")))


def remark(backend: str, device: str) -> str | None:
    """What the user should hear of a backend on a device."""
    if backend == "triton" and engine(device) == "reference":
        return (
            f"backend 'triton' has no kernels for {device} here, so it runs their reference in plain PyTorch, slower than "
            f"backend 'plain'; on an NVIDIA GPU it runs Triton"
        )
    return None
