"""Contenders timed in turn, so that what disturbs one disturbs all, and reported through pytest-benchmark.

``interleaved`` runs every contender of a group once per round; each then gets its row from a virtual clock that replays
its own measured times, so pytest-benchmark's statistics, ``--benchmark-json`` and ``--benchmark-compare`` all apply.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.conftest import _TORCHVISION  # noqa: F401 - lets torchvision import beside a CPU-only torch

Contender = Callable[[], object]


class VirtualClock:
    """A clock that only moves when a recorded time is replayed."""

    def __init__(self) -> None:
        self.now = 0.0
        self._pending: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: list[float]) -> None:
        self._pending = iter(seconds)

    def replay(self) -> None:
        self.now += next(self._pending)


CLOCK = VirtualClock()


def interleave(contenders: dict[str, Contender], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds per round of each contender, run in turn; a contender may return its own figure in seconds."""
    for contender in contenders.values():
        for _ in range(warmup):
            contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders) if i % 2 else list(reversed(contenders))
        for name in names:
            began = time.perf_counter()
            own = contenders[name]()
            times[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return times


_FLUSHED = 256 << 20  # bytes, more than any L2 cache holds


def on_gpu(run: Callable[[], object]) -> Contender:
    """A contender that takes its own time on a CUDA device, by events, with nothing of its operands in the L2 cache."""
    room = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")

    def timed() -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        room.zero_()
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    return timed


def ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """Median of the round-by-round ratios of two contenders."""
    return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def row(benchmark):
    """``row(times, name, baseline)``: one pytest-benchmark row from times measured by ``interleave``."""

    def report(times: dict[str, list[float]], name: str, baseline: str) -> None:
        CLOCK.load(times[name])
        benchmark.extra_info["ratio"] = ratio(times, name, baseline)
        benchmark.extra_info["baseline"] = baseline
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(CLOCK.replay, rounds=len(times[name]), iterations=1)

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """The machine's kind is worth keeping with the figures; its name is nobody's business."""
    machine_info.pop("node", None)


def pytest_terminal_summary(terminalreporter) -> None:
    """The ratios, which are what these machines can tell."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    for bench in sorted(rows, key=lambda bench: bench.group):
        terminalreporter.write_line(
            f"{bench.group} | {bench.name}: {bench.stats.median * 1e3:.1f} ms, "
            f"{bench.extra_info['ratio']:.3f} x {bench.extra_info['baseline']}"
        )
