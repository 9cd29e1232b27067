"""What every row of every suite says of itself, beside its times."""

import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.clock import ratio
from bench.roofline import Work, ceilings, share
from bench.scale import DEVICE
from fxfreeze.machine import chip
from fxfreeze.sizes import dtype_text


@dataclass(frozen=True)
class Subject:
    """What a row is of, and how right it was.

    shape: of the main input; error: relative, by norm, and the bound that it must keep; work: None where no roofline
    applies, such as to the building of a graph.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    error: float
    bound: float
    work: Work | None = None
    device: torch.device = DEVICE


def facts(subject: Subject, times: Mapping[str, Sequence[float]], name: str, baseline: str) -> dict[str, Any]:
    """A row's ``extra_info``. AssertionError for a contender whose result is wrong: its time says nothing."""
    if not subject.error <= subject.bound:
        raise AssertionError(f"{name} is wrong: relative error {subject.error:.1e}, bound {subject.bound:.0e}")
    work = subject.work
    reached = None
    if work is not None:
        limits = ceilings(subject.device, subject.dtype)
        reached = share(work, limits, statistics.median(times[name]))
    return {
        "device": chip(subject.device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "dtype": dtype_text(subject.dtype),
        "shape": list(subject.shape),
        "bytes": None if work is None else work.bytes,
        "flops": None if work is None else work.flops,
        "roofline": reached,
        "relative_error": subject.error,
        "baseline": baseline,
        "ratio": ratio(times, name, baseline),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
