"""Which calls of a segment are timed, on a fake clock and by fake events."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from fxfreeze import call_times
from fxfreeze.call_times import CallTimes


def seconds(times: CallTimes) -> float | None:
    return None if times.median is None else times.median[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is moved."""
    now = [0.0]
    monkeypatch.setattr(call_times.time, "perf_counter", lambda: now[0])
    return now


def test_few_calls_are_timed(clock: list[float]) -> None:
    """Call number i takes i seconds: of 3, 5, 9, 17, 33 and 65 the last five are kept."""
    times = CallTimes("cpu")

    def takes(inputs: Sequence[int]) -> int:
        clock[0] += inputs[0]
        return -inputs[0]

    medians = {}
    for i in range(1, 71):
        assert times.call(takes, [i]) == -i
        medians[i] = seconds(times)
    expected = {1: None, 2: None, 3: 3, 4: 3, 5: 4, 8: 4, 9: 5, 17: 7, 33: 9, 64: 9, 65: 17, 70: 17}
    assert {i: medians[i] for i in expected} == expected


def test_calls_of_as_many_samples_as_the_last(clock: list[float]) -> None:
    """Timed are numbers 3, 5, 9 and 17: an evaluation's batches are not mixed with training's."""
    times = CallTimes("cpu")

    def takes(inputs: Sequence[torch.Tensor]) -> None:
        clock[0] += len(inputs[0])

    for _ in range(5):
        times.call(takes, [torch.zeros(8, 2)])
    assert times.median == (8, 8)
    for _ in range(4):
        times.call(takes, [torch.zeros(2, 2), torch.zeros(2, 5)])
    assert times.median == (2, 2)
    for _ in range(8):
        times.call(takes, [torch.zeros(8, 2)])
    assert times.median == (8, 8)


def test_a_call_that_ends_while_the_times_are_read(clock: list[float]) -> None:
    """As one of another thread may."""
    times = CallTimes("cpu")
    for _ in range(5):
        times.call(len, [0])
    size, read = times._timed[0]

    def reads() -> float | None:
        times._timed.append((1, lambda: 1.0))
        return read()

    times._timed[0] = size, reads
    assert times.median == (0, None)


def test_a_call_that_fails_is_not_timed(clock: list[float]) -> None:
    def fails(inputs: Sequence[int]) -> None:
        raise RuntimeError("not this time")

    times = CallTimes("cpu")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="not this time"):
            times.call(fails, [])
    assert times.median is None


def test_another_device_is_not_timed() -> None:
    """Its calls return before the work is done."""
    times = CallTimes("mps")
    assert [times.call(len, [0]) for _ in range(5)] == [1] * 5
    assert times.median is None


class Event:
    """One of CUDA's. It has happened once ``done`` says so."""

    done = False
    recorded = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.at = 12.0 * Event.recorded  # milliseconds

    def query(self) -> bool:
        return Event.done

    def elapsed_time(self, other: "Event") -> float:
        return other.at - self.at


@contextlib.contextmanager
def _device(place: torch.device | None) -> Iterator[None]:
    yield


@pytest.mark.parametrize("capturing", [False, True])
def test_on_cuda_nobody_waits_and_a_capture_is_left_alone(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    monkeypatch.setattr(Event, "done", False)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", _device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    times = CallTimes("cuda")
    for _ in range(3):
        assert times.call(len, [0, 0]) == 2
    assert times.median is None
    Event.done = True
    assert seconds(times) == (None if capturing else 0.012)
    assert Event.recorded == (0 if capturing else 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    """The time is that of the work, not of its launch."""
    x = torch.randn(8192, 8192, device="cuda")
    times = CallTimes("cuda")
    for _ in range(3):
        times.call(lambda inputs: [inputs[0] @ inputs[0] for _ in range(10)], [x])
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        x @ x
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert times.median is not None
    assert took / 3 < times.median[0] < took * 3
    assert times.median[1] == 8192
