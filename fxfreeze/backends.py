"""Backends by name: which there are, which to try for a segment, and what a user must know of one."""

from collections.abc import Container

from fxfreeze.kernels import engine

__all__ = ["BACKENDS", "candidates", "check_backend", "remark"]

BACKENDS = ("auto", "plain", "library", "inductor", "triton", "openvino")
_PRESENT = ("auto", "plain", "triton")


def check_backend(name: str) -> None:
    """Raises ValueError for a backend that is unknown, or not in this version."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: expected one of {', '.join(BACKENDS)}")
    if name not in _PRESENT:
        raise ValueError(f"backend {name!r} is not in this version: use {', '.join(map(repr, _PRESENT))}")


def candidates(wanted: str, earlier: str | None, available: Container[str]) -> list[str]:
    """What to try, in order, for a segment that an earlier build decided to run by ``earlier``."""
    first = earlier if earlier in available else wanted
    named = "plain" if first == "auto" else first
    return list(dict.fromkeys((str(named), "plain")))


def remark(backend: str, device: str) -> str | None:
    """What the user should hear of a backend on a device."""
    if backend == "triton" and engine(device) == "reference":
        return (
            f"backend 'triton' has no kernels for {device} here, so it runs their reference in plain PyTorch, slower than "
            f"backend 'plain'; on an NVIDIA GPU it runs Triton"
        )
    return None
