"""A later look at code that was made for the values of one batch: those of others may lie outside of what it can hold."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxfreeze.fidelity import largest_error

__all__ = ["Audit"]


class Audit:
    """Of calls number 2, 4, 8, ... what the code computes is compared with what it should be.

    bound: what the relative error may be.
    """

    def __init__(self, bound: float):
        self.bound = bound
        self._calls = 0

    def due(self) -> bool:
        """Whether this call is one of those. Counts it."""
        self._calls += 1
        return self._calls > 1 and self._calls & (self._calls - 1) == 0

    def finds(self, outputs: Sequence[Any], expected: Sequence[Any]) -> str | None:
        """What is wrong with ``outputs``, or None."""
        alike = [a.to(b.dtype) if isinstance(b, Tensor) else a for a, b in zip(outputs, expected, strict=True)]
        error = largest_error(alike, expected)
        if error <= self.bound:
            return None
        return (
            f"on a later batch its relative error {error:.2e} is past the bound {self.bound:.0e}: the batch that it was "
            f"calibrated on was not like this one"
        )
