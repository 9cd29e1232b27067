"""The benchmarks' clocks: against a clock that is scripted, against sleeps, and on CUDA against scripted events."""

import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import clock
from bench.clock import COPIES, EventTimer, VirtualClock, WallTimer, interleave, ratio, rotated

SLEPT = 0.01


def scripted(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    """The wall clock reads these, one after the other."""
    readings = iter(seconds)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(readings))


def test_the_virtual_clock_moves_by_what_it_was_given() -> None:
    virtual = VirtualClock()
    virtual.load([0.5, 0.25])
    assert virtual() == virtual() == 0.0
    virtual.replay()
    assert virtual() == 0.5
    virtual.replay()
    assert virtual() == 0.75
    with pytest.raises(StopIteration):
        virtual.replay()


def test_a_round_is_what_the_wall_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [10.0, 10.5])
    assert WallTimer()(lambda: None) == 0.5


def test_a_contender_may_say_itself_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [10.0, 10.5])
    assert WallTimer()(lambda: 0.125) == 0.125


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is warmed up, then all run in one order and in the other; every reading goes to the one that ran."""
    called: list[str] = []
    durations = {"a": iter([1.0, 2.0, 3.0]), "b": iter([10.0, 20.0, 30.0])}
    now = itertools.accumulate(itertools.count())
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))

    def contender(name: str) -> Any:
        def run() -> float | None:
            called.append(name)
            return next(durations[name]) if len(called) > 4 else None

        return run

    times = interleave({"a": contender("a"), "b": contender("b")}, rounds=3, warmup=2)
    assert called == ["a", "a", "b", "b", "b", "a", "a", "b", "b", "a"]
    assert times == {"a": [1.0, 2.0, 3.0], "b": [10.0, 20.0, 30.0]}


def test_every_round_is_set_up_before_it_is_timed() -> None:
    log: list[str] = []

    class Timer:
        def setup(self) -> None:
            log.append("setup")

        def __call__(self, run: Any) -> float:
            log.append("timed")
            run()
            return 1.0

    interleave({"a": lambda: log.append("a")}, rounds=2, warmup=0, timer=Timer())
    assert log == ["setup", "timed", "a"] * 2


def test_a_sleep_takes_as_long_as_it_is_at_the_least() -> None:
    times = interleave({"once": lambda: time.sleep(SLEPT), "twice": lambda: time.sleep(2 * SLEPT)}, 3, warmup=0)
    assert min(times["once"]) >= SLEPT * 0.99  # clocks differ
    assert min(times["twice"]) >= 2 * SLEPT * 0.99


class Event:
    """What torch.cuda.Event does, on a scripted stream: each record is at the next of `stamps`, in milliseconds."""

    log: list[Any]
    stamps: Any

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = next(self.stamps)
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, ended: "Event") -> float:
        assert self.log[-1] == "synchronize"  # before it, an event is not there yet
        assert self.at is not None
        assert ended.at is not None
        return ended.at - self.at


def test_a_round_on_cuda_is_between_two_events_and_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr(Event, "log", log, raising=False)
    monkeypatch.setattr(Event, "stamps", iter([5.0, 7.5]), raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(clock, "FLUSHED", 64)
    timer = EventTimer(torch.device("cpu"))
    timer._room.fill_(1)
    monkeypatch.setattr(WallTimer, "setup", lambda self: pytest.fail("the wall clock has no part in it"))

    def run() -> None:
        log.append("run")
        log.append(bool(timer._room.any()))

    times = interleave({"a": run}, rounds=1, warmup=0, timer=timer)
    assert times == {"a": [pytest.approx(2.5e-3)]}
    assert log == ["record", "run", False, "record", "synchronize"]


class OnCuda:
    """Stands for a tensor on CUDA."""

    is_cuda = True

    def __init__(self, copies: list["OnCuda"]) -> None:
        self.copies = copies
        copies.append(self)

    def clone(self) -> "OnCuda":
        return OnCuda(self.copies)


def test_operands_on_cuda_take_turns() -> None:
    copies: list[OnCuda] = []
    given: list[Any] = []
    run = rotated(lambda x, y: given.append((x, y)), [OnCuda(copies), OnCuda(copies)])  # type: ignore[list-item]
    for _ in range(2 * COPIES):
        run()
    assert len(copies) == 2 * COPIES
    assert len({id(x) for x, _ in given}) == len({id(y) for _, y in given}) == COPIES
    assert given[:COPIES] == given[COPIES:]


def test_operands_on_a_cpu_stay() -> None:
    given: list[Tensor] = []
    x = torch.randn(2)
    run = rotated(given.append, [x])
    run()
    run()
    assert given[0] is given[1] is x


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    assert ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 1.0, 3.0]}, "a", "b") == 3.0
