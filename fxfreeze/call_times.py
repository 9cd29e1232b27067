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

from fxfreeze.rows import batch_size

__all__ = ["CallTimes"]

_KEPT = 5

T = TypeVar("T")
_Function = Callable[[Sequence[Any]], T]


class CallTimes:
    """Of calls number 3, 5, 9, 17, ... on a type of device, the last few."""

    def __init__(self, device: str):
        self._device = device
        self._calls = 0
        # Of each how many samples it had, and its seconds, once they are known.
        self._timed: deque[tuple[int | None, Callable[[], float | None]]] = deque(maxlen=_KEPT)

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
    def median(self) -> tuple[float, int | None] | None:
        """Seconds, and of how many samples: of the calls with as many as the last of those that were timed and have ended;
        None where none has."""
        ended = [(seconds, size) for size, read in self._timed.copy() if (seconds := read()) is not None]
        if not ended:
            return None
        last = ended[-1][1]
        return statistics.median(seconds for seconds, size in ended if size == last), last

    def _due(self) -> bool:
        """Whether this call is one of those. Counts it."""
        self._calls += 1
        before = self._calls - 1
        return self._device in ("cpu", "cuda") and before > 1 and before & (before - 1) == 0

    def _by_clock(self, function: _Function[T], inputs: Sequence[Any]) -> T:
        began = time.perf_counter()
        result = function(inputs)
        took = time.perf_counter() - began
        self._timed.append((batch_size(inputs), lambda: took))
        return result

    def _by_events(self, function: _Function[T], inputs: Sequence[Any]) -> T:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        result = function(inputs)
        ended.record()

        def read() -> float | None:
            return began.elapsed_time(ended) / 1e3 if ended.query() else None  # type: ignore[no-untyped-call]

        self._timed.append((batch_size(inputs), read))
        return result
