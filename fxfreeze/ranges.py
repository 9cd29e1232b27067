"""Named ranges of what runs: timed by a stopwatch, or shown by name in torch.profiler's and NVIDIA's traces."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

__all__ = ["Named", "Stopwatch", "Watch", "stopwatch_for"]


class Watch(Protocol):
    """Follows what runs, range by range."""

    def range(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Around what is to be known by ``name``."""
        ...


class Stopwatch:
    """Seconds that ranges take, by the clock."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks.append((name, begin, self._mark()))

    def seconds(self) -> dict[str, float]:
        """By name, since the last time that it was asked for; ranges of one name are added up."""
        taken: dict[str, float] = {}
        for name, begin, end in self._marks:
            taken[name] = taken.get(name, 0.0) + self._between(begin, end)
        self._marks.clear()
        return taken

    def _mark(self) -> Any:
        return time.perf_counter()

    def _between(self, begin: Any, end: Any) -> float:
        return float(end - begin)


class CudaStopwatch(Stopwatch):
    """By CUDA's events: the host launches what comes next meanwhile, and waits only when asked for the seconds."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def seconds(self) -> dict[str, float]:
        torch.cuda.synchronize(self.device)
        return super().seconds()

    def _mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    """What times ``device``, a CPU or CUDA."""
    return CudaStopwatch(device) if device.type == "cuda" else Stopwatch()


class Named:
    """Ranges that profilers show: ``record_function``'s, and on CUDA NVTX's too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        nvtx = torch.cuda.nvtx.range(name) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.profiler.record_function(name), nvtx:
            yield
