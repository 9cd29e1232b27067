"""Measured times as rows of pytest-benchmark.

Every contender of a group runs once per round (``clock.interleave``); each then gets its row from a virtual clock that
replays its own times, so pytest-benchmark's statistics, ``--benchmark-json`` and ``--benchmark-compare`` all apply.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from bench.budget import spent
from bench.clock import VirtualClock
from bench.results import check_facts
from bench.rows import Subject, facts
from bench.scale import DEVICE, THREADS
from fxfreeze.machine import environment
from tests.conftest import _TORCHVISION  # noqa: F401 - lets torchvision import beside a CPU-only torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, tells of each start and stop

CLOCK = VirtualClock()


@pytest.fixture(scope="session", autouse=True)
def _surroundings() -> Iterator[None]:
    """Two threads, cuDNN's own choice by measurement, and no memory of earlier runs: what is built is built here."""
    torch.set_num_threads(THREADS)
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
        yield


@pytest.fixture
def row(benchmark):
    """``row(times, name, baseline, subject, **more)``: one row from times measured by ``interleave``."""

    def report(
        times: Mapping[str, Sequence[float]], name: str, baseline: str, subject: Subject, **more: object
    ) -> None:
        benchmark.extra_info |= facts(subject, times, name, baseline) | more
        check_facts(benchmark.extra_info)
        CLOCK.load(times[name])
        benchmark.pedantic(CLOCK.replay, rounds=len(times[name]), iterations=1)

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """The machine's kind is worth keeping with the figures; its name is nobody's business."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """The environment beside the rows."""
    output_json["environment"] = environment(DEVICE)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """The ratios, which are what these machines can tell."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    for bench in sorted(rows, key=lambda bench: bench.group):
        terminalreporter.write_line(
            f"{bench.group} | {bench.name}: {bench.stats.median * 1e3:.1f} ms "
            f"(IQR {bench.stats.iqr * 1e3:.1f}, n {bench.stats.rounds}), "
            f"{bench.extra_info['ratio']:.3f} x {bench.extra_info['baseline']}"
        )
    terminalreporter.write_line(f"benchmarks took {spent():.0f} s in all")
