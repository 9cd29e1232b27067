"""Measures the tiles of the tables on the user's GPU, and keeps the fastest of each shape class.

Interleaved, so that a change of the GPU's clock meets all alike; the L2 cache is flushed before each run, as the layers
between two uses would flush it; medians decide. The table's choice stays unless another is faster by more than noise.
"""

import dataclasses
import importlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fxfreeze.kernels import configs, measured
from fxfreeze.kernels.aot import FORMS
from fxfreeze.kernels.architectures import nearest
from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.criteria import dtypes
from fxfreeze.kernels.problems import multiplying, problem
from fxfreeze.kernels.traffic import typical

__all__ = ["Clock", "GpuClock", "Trial", "best", "trials", "tune"]

ROUNDS = 15
MARGIN = 0.02  # identical code against itself differs by as much

Clock = Callable[[Callable[[], None]], float]  # of one run, in milliseconds


@dataclass(frozen=True)
class Trial:
    """The tiles of a shape class; ``prepare`` makes operands and gives what runs a tile on them."""

    kernel: str
    dtype: str
    most: int
    tiles: tuple[Config, ...]

    @property
    def key(self) -> str:
        return measured.key(self.kernel, self.dtype, self.most)

    def prepare(self, device: torch.device) -> Callable[[Config], None]:
        arguments = problem(self.kernel, self.dtype, typical(self.most), device)
        launch = importlib.import_module(f"fxfreeze.kernels.gpu.{self.kernel}").launch
        return lambda tile: launch(*arguments, tile)


class GpuClock:
    """Times a run by CUDA events, from a cold L2 cache. Call with the run; milliseconds."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device=device)
        self._begin, self._end = _event(), _event()

    def __call__(self, run: Callable[[], None]) -> float:
        self._flush.zero_()
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def tune(device: torch.device, progress: Callable[[str, Mapping[Config, float]], None]) -> dict[str, measured.Tile]:
    """The fastest tile by shape class; ``progress`` is told each class and its tiles' milliseconds."""
    arch = nearest(*torch.cuda.get_device_capability(device))
    clock, found = GpuClock(device), {}
    for trial in trials(arch):
        with torch.cuda.device(device), torch.no_grad(), multiplying(trial.dtype):
            run = trial.prepare(device)
            times = _measure(trial.tiles, run, clock)
        found[trial.key] = dataclasses.asdict(best(times))
        progress(trial.key, times)
    return found


def trials(arch: int) -> Iterator[Trial]:
    """Every shape class that leaves a choice."""
    for kernel in FORMS:
        for dtype in dtypes(kernel):
            for most, tiles in configs.candidates(kernel, arch, dtype).items():
                if len(tiles) > 1:
                    yield Trial(kernel, dtype, most, tiles)


def best(times: Mapping[Config, float]) -> Config:
    """The first, which is the table's choice, or the fastest if that beats it clearly."""
    choice = next(iter(times))
    fastest = min(times, key=lambda tile: times[tile])
    return fastest if times[fastest] < times[choice] * (1 - MARGIN) else choice


def _measure(tiles: tuple[Config, ...], run: Callable[[Config], None], clock: Clock) -> dict[Config, float]:
    """Median milliseconds of each tile, in order."""
    for tile in tiles:
        run(tile)  # compiles
    taken: dict[Config, list[float]] = {tile: [] for tile in tiles}
    for _ in range(ROUNDS):
        for tile in tiles:
            taken[tile].append(clock(lambda tile=tile: run(tile)))  # type: ignore[misc]
    return {tile: statistics.median(times) for tile, times in taken.items()}
