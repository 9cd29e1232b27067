"""Training iterations measured side by side: seconds, bytes, and the error of their logits."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bench.clock import interleave, timer_of
from bench.memory import Growth, growth
from bench.roofline import Work
from bench.rows import Subject
from bench.scale import DEVICE
from bench.steps import DTYPE, Step
from fxfreeze.fidelity import BOUNDS, relative_error


@dataclass(frozen=True)
class Entry:
    """step: a way to run an iteration; expected: its first logits in float64; work: what it has to do."""

    step: Step
    expected: Tensor
    work: Work
    compiled: bool = False


@dataclass(frozen=True)
class Measured:
    """By contender. errors: relative, of the first logits; peak and kept: bytes that an iteration takes at its height,
    and that its forward leaves for the backward, above what stands between iterations."""

    times: dict[str, list[float]]
    errors: dict[str, float]
    work: dict[str, Work]
    peak: dict[str, Growth]
    kept: dict[str, Growth]

    def subject(self, name: str, shape: tuple[int, ...]) -> Subject:
        return Subject(DTYPE, shape, self.errors[name], BOUNDS[DTYPE], self.work[name])

    def memory(self, name: str) -> dict[str, int]:
        return {"peak_bytes": self.peak[name].peak, "saved_bytes": self.kept[name].kept}


def measure(entries: Mapping[str, Entry], rounds: int) -> Measured:
    """Each is checked before its first step, which changes its weights; then all take turns."""
    errors = {}
    for name, entry in entries.items():
        step = entry.step.compiled() if entry.compiled else entry.step
        logits = step.logits().detach()
        errors[name] = relative_error(logits.double(), entry.expected)
    steps = {name: entry.step for name, entry in entries.items()}
    times = interleave({name: step.contender() for name, step in steps.items()}, rounds, 2, timer_of(DEVICE))
    return Measured(
        times,
        errors,
        {name: entry.work for name, entry in entries.items()},
        {name: growth(step, DEVICE) for name, step in steps.items()},
        {name: growth(functools.partial(Step.logits, step), DEVICE) for name, step in steps.items()},
    )
