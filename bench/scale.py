"""What the benchmarks run on, and how large they are.

``BENCH_DEVICE`` is cpu or cuda (unset: cuda where there is one). ``BENCH_SMALL=1`` makes everything tiny and compiles
nothing, to see on a CPU that the rows come out.
"""

import os
from typing import TypeVar

import torch

SMALL = os.environ.get("BENCH_SMALL") == "1"
HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cpu" if SMALL else os.environ.get("BENCH_DEVICE") or ("cuda" if HAS_CUDA else "cpu"))
if DEVICE.type == "cuda" and not HAS_CUDA:
    raise RuntimeError(
        "BENCH_DEVICE is cuda, but torch finds no CUDA device; expected cpu, or a torch built for your GPU"
    )
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and DEVICE.type == "cpu"  # kernels, on tiny operands
THREADS = 1 if SMALL else 2

T = TypeVar("T")


def scaled(full: T, small: T) -> T:
    return small if SMALL else full
