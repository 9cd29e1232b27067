"""What happens around a frozen model: threads, functional calls, wrappers, and modules and values that it passes on."""

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from frozen import frozen_to, images, network
from parity import compare, freezable, freeze_by_hand, settle
from split_cases import D, Net, conv, image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fxfreeze.backends import is_here
from fxfreeze.building import TRANSFORMED
from fxfreeze.observers import observed, unobserved


def chain() -> Net:
    return settle(Net(lambda self, x: self.head(self.c(self.b(self.a(x))))))  # type: ignore[return-value]


# ---- threads


def test_modules_run_in_other_threads_while_one_is_traced() -> None:
    """A prefetching thread that applies transforms, and readers of the same weights."""
    net = nn.Sequential(*(conv(3, 3) for _ in range(12)), nn.Flatten(), nn.Linear(108, 2, dtype=D))
    transform = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=D), nn.BatchNorm2d(3, dtype=D)).eval()
    model = freezable(settle(net))
    x = image()
    expected, own = transform(x), net[0](x).shape
    errors: list[BaseException] = []
    done = threading.Event()

    def others() -> None:
        try:
            while not done.is_set():
                assert torch.equal(transform(x), expected)
                assert copy.deepcopy(net[0]).eval()(x).shape == own
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for depth in range(1, 12):
            model.freeze(depth)
            model(x)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors


# ---- functional calls and wrappers


def test_a_functional_call_leaves_the_caller_s_tensors_alone() -> None:
    model = freezable(chain())
    model.freeze(2)
    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    value = torch.func.functional_call(model, tensors, (image(),))
    assert all(t.requires_grad for t in tensors.values())
    value.sum().backward()
    assert [t.grad is None for t in tensors.values()] == [not p.requires_grad for p in model.parameters()]


def test_functional_gradients() -> None:
    model = freezable(chain()).eval()
    model.freeze(2)
    model.eval()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(lambda t: torch.func.functional_call(model, t, (image(),)).sum())(tensors)
    model(image()).sum().backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected)


@pytest.mark.parametrize("transform_first", [True, False])
def test_vmap_runs_the_traced_graph_and_decides_nothing_for_other_calls(transform_first: bool) -> None:
    net = chain().eval()
    model = freezable(copy.deepcopy(net)).eval()
    model.freeze(2)
    groups = torch.stack([image(), 2 * image()])
    if transform_first:
        torch.testing.assert_close(torch.vmap(model)(groups), torch.vmap(net)(groups))
    model(image())
    assert [s.reason for s in model.prefix.segments] == [None]
    torch.testing.assert_close(torch.vmap(model)(groups), torch.vmap(net)(groups))
    assert [s.reason for s in model.prefix.segments] == [TRANSFORMED]


def _followed(how: str, model: nn.Module, x: Tensor) -> Tensor:
    """What the model makes of x, once something else has followed its operators on another batch."""
    if how == "make_fx":
        return make_fx(model)(x + 1)(x)
    if how == "fake":
        return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x + 1)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, x + 1, check_trace=False)(x)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("backend", ["plain", "library", "openvino"])
@pytest.mark.parametrize("how", ["make_fx", "fake", "jit"])
def test_what_follows_operators_gets_them_and_decides_nothing(how: str, backend: str, calls: int) -> None:
    if not is_here(backend):
        pytest.skip(f"{backend} is not installed")
    net = network().eval()
    model = frozen_to("blocks.1", copy.deepcopy(net), backend=backend).eval()
    x = images(6)
    for _ in range(calls):
        model(x)
    torch.testing.assert_close(_followed(how, model, x), net(x))
    torch.testing.assert_close(model(x), net(x))
    (segment,) = model.prefix.segments
    assert (segment.reason, segment.runs_by) == (None, backend)


def test_fake_tensors() -> None:
    net = network().eval()
    model = frozen_to("blocks.1", net, backend="library").eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(images(6))).shape == net(images(6)).shape
    model(images(6))
    assert [s.reason for s in model.prefix.segments] == [None]


def test_a_build_is_not_counted() -> None:
    """FLOPs of a call are those of the network, its first call's too."""
    net = network().eval()
    model = frozen_to("blocks.1", copy.deepcopy(net), backend="library").eval()
    counts = []
    for module in (net, model, model):
        with FlopCounterMode(display=False) as counter:
            module(images(6))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


class Recorder(TorchFunctionMode):
    """Counts ReLUs, and may put another function in their place."""

    def __init__(self, instead: Any = None) -> None:
        super().__init__()
        self.count, self.instead = 0, instead

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        relu = function is F.relu
        self.count += relu
        kwargs = kwargs or {}
        return self.instead(args[0]) if relu and self.instead is not None else function(*args, **kwargs)


@pytest.mark.parametrize("backend", ["plain", "library", "openvino"])
def test_a_function_mode_follows_calls_and_no_build(backend: str) -> None:
    if not is_here(backend):
        pytest.skip(f"{backend} is not installed")
    net = network().eval()
    model = frozen_to("blocks.1", copy.deepcopy(net), backend=backend).eval()
    x, device = images(6), torch.device("cpu")
    for _ in range(2):
        with Recorder() as own, device:
            net(x)
        with Recorder() as seen, device:
            model(x)
        assert seen.count == own.count > 0
    with Recorder(F.gelu):
        torch.testing.assert_close(model(x), net(x))
    torch.testing.assert_close(model(x), net(x))
    (segment,) = model.prefix.segments
    assert (segment.reason, segment.runs_by) == (None, backend)


def test_a_function_mode_at_the_first_call_spoils_nothing() -> None:
    net = network().eval()
    model = frozen_to("blocks.1", copy.deepcopy(net), backend="library").eval()
    with Recorder(F.gelu):
        model(images(6))
    x = images(6)
    torch.testing.assert_close(model(x), net(x))


def test_a_build_is_followed_by_no_mode_and_keeps_the_default_device() -> None:
    with torch.device("cpu"), Recorder() as seen, torch.device("meta"):
        with unobserved():
            assert torch.zeros(1).device.type == "meta"
            F.relu(torch.ones(1))
            assert not observed()
        assert seen.count == 0
        assert observed()
        F.relu(torch.ones(1))
        assert seen.count == 1
        assert torch.zeros(1).device.type == "meta"
    assert torch.zeros(1).device.type == "cpu"
    assert not observed()


def test_vmap_over_two_inputs() -> None:
    net = settle(Net(lambda self, x: self.head(self.b(self.a(x[0]) * self.a(x[1]))))).eval()
    model = freezable(copy.deepcopy(net)).eval()
    model.freeze(1)
    pair = torch.stack([image(), 2 * image()]), torch.stack([image() + 1, image()])
    torch.testing.assert_close(torch.vmap(model)(pair), torch.vmap(net)(pair))


def test_data_parallel_is_refused() -> None:
    model = freezable(chain())
    model.freeze(1)
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model._replicate_for_data_parallel()


# ---- modules and values of the forward's own making


def test_a_loss_made_by_forward_is_traced_through() -> None:
    class Labelled(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            logits = self.head(self.c(self.b(self.a(x))))
            return nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels), logits

    net = settle(Labelled(None))  # type: ignore[arg-type]
    model, reference = freezable(copy.deepcopy(net)), copy.deepcopy(net)
    model.freeze(2)
    freeze_by_hand(reference, model.units[:2])
    compare(model, reference, (image(), torch.tensor([0, 2, 1])), 0, "with labels")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Giver(nn.Module):
    """Kept whole, and gives a tuple, list or dict."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.kind = conv(), kind

    def forward(self, x: Tensor) -> Any:
        y = Doubled.apply(self.conv(x))
        return {"y": y, "x": x} if self.kind is dict else self.kind([y, x])


class Taker(nn.Module):
    """Kept whole, and writes into what it is given."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.kind = conv(), kind

    def forward(self, values: Any) -> Tensor:
        y, x = (values["y"], values["x"]) if self.kind is dict else values
        with torch.no_grad():
            y = y.mul_(0.5)
        return Doubled.apply(self.conv(y + x))


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.filterwarnings("ignore:frozen module .* runs as it is")
def test_collections_that_cross_between_modules_kept_whole(kind: type) -> None:
    net = settle(Net(lambda self, x: self.head(self.t(self.g(self.a(x)))), g=Giver(kind), t=Taker(kind)))
    model, reference = freezable(copy.deepcopy(net)), copy.deepcopy(net)
    model.freeze(2)
    assert [unit.name for unit in model.units[:3]] == ["a.0", "g", "t"]
    freeze_by_hand(reference, model.units[:2])
    for number in range(2):
        compare(model, reference, (image(),), number, kind.__name__)
