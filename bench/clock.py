"""Contenders timed in turn, so that what disturbs one disturbs all, and a clock that replays their times to pytest-benchmark.

On a CPU a round is timed by the wall clock; on CUDA by events on the stream, after the L2 cache was flushed, with operands
that take turns.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Contender = Callable[[], object]

FLUSHED = 256 << 20  # bytes, more than any L2 cache holds
COPIES = 3  # of the operands on CUDA, one after the other


class VirtualClock:
    """A clock that only moves when a recorded time is replayed."""

    def __init__(self) -> None:
        self.now = 0.0
        self._pending: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return "virtual clock, replaying measured times"

    def load(self, seconds: Sequence[float]) -> None:
        self._pending = iter(seconds)

    def replay(self) -> None:
        self.now += next(self._pending)


class Timer(Protocol):
    def setup(self) -> None:
        """What goes before a round, untimed."""

    def __call__(self, run: Contender) -> float:
        """Seconds of one round."""


class WallTimer:
    """Seconds on the wall; of a contender that returns a figure of its own, that one."""

    def setup(self) -> None:
        pass

    def __call__(self, run: Contender) -> float:
        began = time.perf_counter()
        own = run()
        seconds = time.perf_counter() - began
        return own if isinstance(own, float) else seconds


class EventTimer:
    """Seconds between two events on the stream of a CUDA device; nothing is left in its L2 cache from the round before."""

    def __init__(self, device: torch.device) -> None:
        self._room = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def setup(self) -> None:
        self._room.zero_()

    def __call__(self, run: Contender) -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


def timer_of(device: torch.device) -> Timer:
    return EventTimer(device) if device.type == "cuda" else WallTimer()


def interleave(
    contenders: Mapping[str, Contender], rounds: int, warmup: int = 3, timer: Timer | None = None
) -> dict[str, list[float]]:
    """Seconds per round of each contender, run in turn, in one order and in the other; by the wall clock unless told."""
    timer = WallTimer() if timer is None else timer
    for contender in contenders.values():
        for _ in range(warmup):
            contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in contenders if i % 2 else reversed(contenders):
            timer.setup()
            times[name].append(timer(contenders[name]))
    return times


def rotated(run: Callable[..., object], operands: Sequence[Tensor]) -> Contender:
    """``run`` on ``operands``; on CUDA, on one copy of them after another, so that none is where the call before left it."""
    if not any(t.is_cuda for t in operands):
        return lambda: run(*operands)
    turns = itertools.cycle([operands, *(tuple(t.clone() for t in operands) for _ in range(COPIES - 1))])
    return lambda: run(*next(turns))


def ratio(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> float:
    """Median of the round-by-round ratios of two contenders."""
    return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))
