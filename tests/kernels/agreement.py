"""Whether what a kernel computed agrees with the reference in fp64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])

# Relative error by norm. bf16 has room for the interpreter, which truncates where a GPU rounds.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
TF32_TOLERANCE = 2e-3

# The operands are of unit size: where outputs are few and cancel, or are means, errors are judged beside this.
_LEAST_SIZE = 0.5
_WORST = 3  # how many times the tolerance the worst element may be off, or one wrong pixel would hide in the norm


def wide(t: Tensor | None) -> Tensor | None:
    """The very values, in fp64."""
    return None if t is None else t.double()


def assert_agrees(y: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """By norm, and element by element; ``tolerance`` None: that of y's dtype."""
    tolerance = tolerance or TOLERANCES[y.dtype]
    assert expected.dtype is torch.float64
    assert y.shape == expected.shape
    deviation = (y.double() - expected).abs()
    size = max(_root_mean_square(expected), _LEAST_SIZE)
    assert _root_mean_square(deviation) <= tolerance * size
    worst = (deviation / (expected.abs() + size)).max().item()
    assert worst <= _WORST * tolerance


@contextmanager
def matmul_precision(name: str) -> Iterator[float]:
    """``torch.set_float32_matmul_precision`` for a while; gives what fp32's tolerance is on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield TOLERANCES[torch.float32] if name == "highest" else TF32_TOLERANCE
    finally:
        torch.set_float32_matmul_precision(before)


def _root_mean_square(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
