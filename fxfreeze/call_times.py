"""How long calls take, for whoever asks later: a few of them are timed, ever fewer, so that timing costs nothing.

On CUDA by events, which nobody waits for until they are read.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["CallTimes"]

_KEPT = 5

T = TypeVar("T")
_Function = Callable[[Sequence[Any]], T]


class CallTimes:
    """Of calls number 3, 5, 9, 17, ... on a type of device, the last few. Calls 2, 4, 8, ... may do more (``Audit``)."""

    def __init__(self, device: str):
        self._device = device
        self._calls = 0
        self._timed: deque[Callable[[], float | None]] = deque(maxlen=_KEPT)  # seconds, once they are known

    def call(self, function: _Function[T], inputs: Sequence[Any]) -> T:
        """What ``function`` makes of ``inputs``."""
        if torch.compiler.is_compiling() or not self._due():
            return function(inputs)
        if self._device == "cpu":
            return self._by_clock(function, inputs)
        places = (t.device for t in inputs if isinstance(t, Tensor) and t.is_cuda)
        with torch.cuda.device(next(places, None)):
            capturing = torch.cuda.is_current_stream_capturing()
            return function(inputs) if capturing else self._by_events(function, inputs)

    @property
    def seconds(self) -> float | None:
        """The median of the calls that were timed and have ended; None where none has."""
        known = [seconds for read in self._timed if (seconds := read()) is not None]
        return statistics.median(known) if known else None

    def _due(self) -> bool:
        """Whether this call is one of those. Counts it."""
        self._calls += 1
        before = self._calls - 1
        return self._device in ("cpu", "cuda") and before > 1 and before & (before - 1) == 0

    def _by_clock(self, function: _Function[T], inputs: Sequence[Any]) -> T:
        began = time.perf_counter()
        result = function(inputs)
        took = time.perf_counter() - began
        self._timed.append(lambda: took)
        return result

    def _by_events(self, function: _Function[T], inputs: Sequence[Any]) -> T:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        result = function(inputs)
        ended.record()

        def read() -> float | None:
            return began.elapsed_time(ended) / 1e3 if ended.query() else None  # type: ignore[no-untyped-call]

        self._timed.append(read)
        return result
