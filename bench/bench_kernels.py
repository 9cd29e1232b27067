"""Each kernel against what stands there without it, on the same operands: ATen and cuDNN, Inductor, and its reference.

A row whose result is not the reference's in fp64 fails. On a CPU there are no kernels to time; with ``TRITON_INTERPRET=1``
the same rows run small, to see that they are right.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.budget import begin
from bench.clock import Contender, interleave, rotated, timer_of
from bench.kernel_cases import CASES
from bench.roofline import Work, flops_of, nbytes
from bench.rows import Subject
from bench.scale import DEVICE, INTERPRETING
from fxfreeze.fidelity import BOUNDS, relative_error

ROUNDS, WARMUP = (1, 0) if INTERPRETING else (30, 3)

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETING,
    reason="a CPU has no kernels to time; TRITON_INTERPRET=1 runs the rows small",
)

CONTENDERS = ("kernel", "reference", "aten") if INTERPRETING else ("kernel", "reference", "aten", "inductor")


@functools.cache
@torch.no_grad()
def measured(name: str, dtype: torch.dtype) -> tuple[dict[str, list[float]], dict[str, Subject]]:
    """Times by contender, and what they are of, with relative errors against fp64."""
    begin()
    torch.manual_seed(0)
    case = CASES[name]
    operands = case.make(dtype)
    functions = {"kernel": case.kernel, "reference": case.exact, "aten": case.aten}
    if "inductor" in CONTENDERS:
        functions["inductor"] = torch.compile(case.aten, fullgraph=True)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in operands.items()}
    expected = case.exact(**wide)
    tensors = {k: v for k, v in operands.items() if isinstance(v, Tensor)}
    written = expected.numel() * dtype.itemsize
    work = Work(flops_of(lambda: case.aten(**operands)), nbytes(tensors.values()) + written)

    def subject(run: Callable[..., Tensor]) -> Subject:
        error = relative_error(run(**operands).double(), expected)
        return Subject(dtype, operands["x"].shape, error, BOUNDS[dtype], work)

    def contender(run: Callable[..., Tensor]) -> Contender:
        return rotated(lambda *given: run(**operands | dict(zip(tensors, given, strict=True))), [*tensors.values()])

    subjects = {who: subject(run) for who, run in functions.items()}
    contenders = {who: contender(run) for who, run in functions.items()}
    return interleave(contenders, ROUNDS, WARMUP, timer_of(DEVICE)), subjects


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def bench_kernel(row, benchmark, name: str, dtype: torch.dtype, who: str) -> None:
    benchmark.group = f"{name}, {str(dtype).removeprefix('torch.')}"
    times, subjects = measured(name, dtype)
    row(times, who, "aten", subjects[who])
