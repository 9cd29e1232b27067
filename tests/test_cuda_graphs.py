"""Recordings of a frozen part: which calls they stand for, and that none is replayed over what is still read.

On a CPU a call is recorded by its outputs, and replayed by computing them again, into the same memory.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from frozen import dispatched, images, network, settle
from small_networks import NETWORKS
from torch import Tensor, nn
from torch.autograd import forward_ad

import fxfreeze
from fxfreeze import FreezableModel, FreezeOut
from fxfreeze.cuda_graphs import AFTER, CudaGraphs, Recorded

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ),
]


class Recorder:
    """Records as CUDA does: a replay computes from the inputs kept, into the outputs kept."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]) -> Recorded:
        self.recorded += 1
        kept = tuple(x.clone() for x in inputs)
        outputs = tuple(function(*kept))
        again = tuple(function(*kept))
        lasting = frozenset(t.untyped_storage().data_ptr() for t in again)

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(outputs, function(*kept), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        return Recorded(kept, outputs, replay, lasting)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> CudaGraphs:
    return CudaGraphs(recorder)


def double(x: Tensor) -> list[Tensor]:
    return [x * 2]


def warm(graphs: CudaGraphs, function: Callable[..., Sequence[Any]], *inputs: Tensor) -> None:
    """As many calls as run unrecorded."""
    for _ in range(AFTER):
        graphs(function, inputs)


# ---- one function


def test_only_frequent_calls_are_recorded(graphs: CudaGraphs, recorder: Recorder) -> None:
    for call in range(AFTER + 3):
        x = torch.randn(3)
        assert torch.equal(graphs(double, [x])[0], x * 2)
        assert recorder.replayed == max(0, call - AFTER + 1)
    assert recorder.recorded == 1
    assert str(graphs) == "CUDA graphs recorded for 3"


@pytest.mark.parametrize("forwards", [1, 2, 3, 5])
def test_what_is_still_read_stays(graphs: CudaGraphs, recorder: Recorder, forwards: int) -> None:
    warm(graphs, double, torch.randn(4))
    for _ in range(3):
        given = [torch.randn(4) for _ in range(forwards)]
        made = [graphs(double, [x])[0] for x in given]
        assert all(torch.equal(y, x * 2) for x, y in zip(given, made, strict=True))
        assert len({y.data_ptr() for y in made}) == forwards
        del made
    assert recorder.recorded == min(forwards, 3)
    assert recorder.replayed == 3 * min(forwards, 3)


KEEPERS: dict[str, Callable[[Tensor], Any]] = {
    "a view": lambda y: y[1:],
    "a detached tensor": lambda y: y.detach(),
    "a storage": lambda y: y.untyped_storage(),
    "an array": lambda y: y.numpy(),
    "a tape": lambda y: (y * nn.Parameter(torch.ones(4))).sum(),
    "data": lambda y: y.data,
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_whatever_keeps_it(graphs: CudaGraphs, recorder: Recorder, keeper: str) -> None:
    warm(graphs, double, torch.randn(4))
    kept = KEEPERS[keeper](graphs(double, [torch.ones(4)])[0])
    graphs(double, [torch.zeros(4)])
    assert recorder.recorded == 2
    del kept
    graphs(double, [torch.zeros(4)])
    assert recorder.recorded == 2
    (first,) = graphs(double, [torch.ones(4)])
    (second,) = graphs(double, [torch.ones(4)])
    assert recorder.recorded == 2, "both were free again"
    assert torch.equal(first, second)


def test_outputs_that_share_memory(graphs: CudaGraphs, recorder: Recorder) -> None:
    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, x + 1])
        return both[:4], both[4:]

    warm(graphs, halves, torch.randn(4))
    _, kept = graphs(halves, [torch.ones(4)])
    graphs(halves, [torch.zeros(4)])
    assert torch.equal(kept, torch.full([4], 2.0))
    assert recorder.recorded == 2


def test_what_no_replay_writes_may_be_kept(graphs: CudaGraphs, recorder: Recorder) -> None:
    """A weight that is handed over as it is belongs to the network, and others hold it."""
    weight = torch.randn(4)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + weight, weight

    warm(graphs, function, torch.randn(4))
    graphs(function, [torch.ones(4)])
    held = weight.view(2, 2)
    for _ in range(3):
        assert graphs(function, [torch.ones(4)])[1].data_ptr() == held.data_ptr()
    assert recorder.recorded == 1


def test_another_kind_of_inputs(graphs: CudaGraphs, recorder: Recorder) -> None:
    warm(graphs, double, torch.randn(4))
    for other in (torch.randn(5), torch.randn(4).double(), torch.randn(2, 2), torch.randn(8)[::2]):
        assert torch.equal(graphs(double, [other])[0], other * 2)
    assert recorder.recorded == 0
    graphs(double, [torch.randn(4)])
    assert recorder.recorded == 1


def test_only_some_kinds_are_recorded(graphs: CudaGraphs, recorder: Recorder) -> None:
    for n in range(1, 10):
        warm(graphs, double, torch.randn(n))
        x = torch.randn(n)
        assert torch.equal(graphs(double, [x])[0], x * 2)
    assert recorder.recorded == 4


def test_kinds_without_end_are_forgotten(graphs: CudaGraphs) -> None:
    for n in range(1000):
        graphs(double, [torch.randn(n)])
    assert len(graphs._calls) <= 65


def test_what_is_not_recorded(graphs: CudaGraphs, recorder: Recorder) -> None:
    calls: list[Sequence[Any]] = [[], [3], [torch.randn(3).to_sparse()]]
    for inputs in calls:
        for _ in range(AFTER + 1):
            graphs(lambda *given: given, inputs)
    assert recorder.recorded == 0


def test_memory_that_was_resized_is_not_written_again(graphs: CudaGraphs, recorder: Recorder) -> None:
    warm(graphs, double, torch.randn(4))
    (y,) = graphs(double, [torch.ones(4)])
    y.resize_(100)
    del y
    assert graphs(double, [torch.full([4], 5.0)])[0].tolist() == [10.0] * 4
    assert recorder.recorded == 2


def test_switches_of_the_process(graphs: CudaGraphs, recorder: Recorder) -> None:
    """What was recorded under one is not replayed under another."""
    warm(graphs, double, torch.randn(4))
    graphs(double, [torch.randn(4)])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before)
    try:
        graphs(double, [torch.randn(4)])
    finally:
        torch.use_deterministic_algorithms(before)
    assert recorder.replayed == 1


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.:DeprecationWarning"
)  # of torch.jit.trace, and of what forward AD imports
def test_whoever_looks_on_sees_the_operators(graphs: CudaGraphs, recorder: Recorder) -> None:
    x = torch.randn(4)
    warm(graphs, double, x)
    graphs(double, [x])
    assert dispatched(lambda: graphs(double, [x]))["mul"] == 1
    traced = torch.jit.trace(lambda x: graphs(double, [x])[0], x, check_trace=False)  # type: ignore[no-untyped-call]
    assert traced(torch.ones(4)).tolist() == [2.0] * 4
    with forward_ad.dual_level():
        y = graphs(double, [forward_ad.make_dual(x, torch.ones(4))])[0]
        assert forward_ad.unpack_dual(y).tangent.tolist() == [2.0] * 4
    assert recorder.replayed == 1


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_one_that_can_not_be_recorded_runs(error: type[Exception]) -> None:
    tried = []

    def refuse(*_: Any) -> Recorded:
        tried.append(1)
        raise error("operation not permitted when stream is capturing")

    graphs = CudaGraphs(refuse)
    for _ in range(AFTER + 3):
        x = torch.randn(3)
        assert torch.equal(graphs(double, [x])[0], x * 2)
    assert str(graphs) == f"no CUDA graph: {error.__name__}: operation not permitted when stream is capturing"
    assert len(tried) == 1


def test_no_memory_for_another(recorder: Recorder) -> None:
    def record(*given: Any) -> Recorded:
        if recorder.recorded:
            raise torch.OutOfMemoryError("out of memory")
        return recorder(*given)

    graphs = CudaGraphs(record)
    warm(graphs, double, torch.randn(4))
    first, second = graphs(double, [torch.ones(4)])[0], graphs(double, [torch.zeros(4)])[0]
    assert (first.sum(), second.sum()) == (8, 0)
    del first
    graphs(double, [torch.ones(4)])
    assert recorder.replayed == 2


def test_an_error_in_a_call_is_the_callers(graphs: CudaGraphs) -> None:
    def broken(x: Tensor) -> list[Tensor]:
        raise ZeroDivisionError

    for _ in range(AFTER + 2):
        with pytest.raises(ZeroDivisionError):
            graphs(broken, [torch.randn(3)])


def test_threads(graphs: CudaGraphs, recorder: Recorder) -> None:
    warm(graphs, double, torch.randn(4))
    wrong = []

    def run() -> None:
        for i in range(200):
            (y,) = graphs(double, [torch.full([4], float(i))])
            if y.tolist() != [2.0 * i] * 4:
                wrong.append(i)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recorder.replayed


# ---- behind a model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> Iterator[Recorder]:
    """On a CPU too, frozen parts are recorded."""
    monkeypatch.setattr("fxfreeze.building.graphs_on", lambda device: CudaGraphs(recorder if device == "cpu" else None))
    return recorder


def twins(net: nn.Module, device: str) -> tuple[FreezableModel, nn.Module]:
    """A model with most of its units frozen, whose boundary is not copied, and what it must equal; both in eval mode."""
    net = settle(net).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    model = fxfreeze.compile(copy.deepcopy(net), FreezeOut(10**6), backend="plain")
    model.freeze(round(0.6 * (len(model.units) - 1)))
    for unit in model.units[: model.depth]:
        for name in unit.parameters:
            net.get_parameter(name).requires_grad_(False)
    return model, net


def batch(size: int, device: str) -> Tensor:
    return images(size).to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("forwards", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["densenet-bc", "resnet"])
def test_forwards_before_a_backward(name: str, forwards: int, device: str, recorded: Recorder) -> None:
    model, net = twins(NETWORKS[name](), device)
    for _ in range(AFTER + 2):
        batches = [batch(4, device) for _ in range(forwards)]
        for module in (model, net):
            module.zero_grad()
            sum(module(x).square().sum() for x in batches).backward()  # type: ignore[union-attr]
        for ours, theirs in zip(model.parameters(), net.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None and theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    assert f"CUDA graphs recorded for 4x3x{images().shape[2]}" in str(model.prefix)
    if device == "cpu":
        assert recorded.recorded == min(forwards, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_other_shapes_and_evaluation(device: str, recorded: Recorder) -> None:
    model, net = twins(network(), device)
    for size in (4, 4, 4, 4, 4, 2, 4, 6):
        x = batch(size, device)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), net(x), rtol=1e-3, atol=1e-3)
        y = model(x)
        torch.testing.assert_close(y, net(x), rtol=1e-3, atol=1e-3)
        y.sum().backward()
    assert recorded.recorded or device == "cuda"


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_change_are_recorded_anew(device: str, recorded: Recorder) -> None:
    model, net = twins(network(), device)
    x = batch(4, device)
    for scale in (1.0, 2.0):
        with torch.no_grad():
            for module in (model, net):
                next(module.parameters()).mul_(scale)
        for _ in range(AFTER + 2):
            torch.testing.assert_close(model(x), net(x), rtol=1e-3, atol=1e-3)


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


def test_random_numbers_are_not_recorded(recorded: Recorder) -> None:
    net = nn.Sequential(Noisy(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    model = fxfreeze.compile(net, FreezeOut(10**6), backend="plain")
    model.freeze(1)
    x = images(4)
    assert not any(torch.equal(model(x), model(x)) for _ in range(AFTER + 1))
    assert not recorded.recorded


def test_nothing_is_recorded_on_a_cpu() -> None:
    model, _ = twins(network(), "cpu")
    model(images())
    assert model.prefix.segments[0].graphs is None
    assert "CUDA" not in str(model.prefix)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnADevice:
    def test_what_synchronizes_is_left_alone(self) -> None:
        """The random numbers of what follows are drawn as ever."""
        graphs = CudaGraphs()

        def function(x: Tensor) -> list[Tensor]:
            return [x * x.sum().item()]

        x = torch.ones(3, device="cuda")
        for _ in range(AFTER + 3):
            assert graphs(function, [x])[0].tolist() == [3.0] * 3
        assert "no CUDA graph" in str(graphs)
        assert torch.rand(3, device="cuda").isfinite().all()
        assert graphs(double, [x])[0].tolist() == [2.0] * 3

    def test_within_a_capture_of_the_users(self) -> None:
        graphs = CudaGraphs()
        x = torch.ones(3, device="cuda")
        warm(graphs, double, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (y,) = graphs(double, [x])
        x.fill_(5)
        graph.replay()
        assert y.tolist() == [10.0] * 3

    def test_beside_a_thread_that_pins_memory(self) -> None:
        stop, graphs = threading.Event(), CudaGraphs()

        def pin() -> None:
            while not stop.is_set():
                torch.randn(1 << 16).pin_memory()

        thread = threading.Thread(target=pin)
        thread.start()
        try:
            for n in range(1, 5):
                for _ in range(AFTER + 2):
                    x = torch.randn(n, device="cuda")
                    assert torch.equal(graphs(double, [x])[0], x * 2)
        finally:
            stop.set()
            thread.join()
        assert not graphs.failed

    def test_each_stream_has_its_own(self) -> None:
        graphs = CudaGraphs()
        x = torch.ones(3, device="cuda")
        warm(graphs, double, x)
        first = graphs(double, [x])[0].data_ptr()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert graphs(double, [x])[0].data_ptr() != first
            assert len(graphs._recordings) == 1

    def test_its_input_handed_over(self) -> None:
        graphs = CudaGraphs()
        x = torch.ones(3, device="cuda")
        for _ in range(AFTER + 2):
            assert graphs(lambda x: [x[1:]], [x])[0].data_ptr() == x[1:].data_ptr()
        assert "it hands over memory of its input" not in str(graphs)
