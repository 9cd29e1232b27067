"""Every backend on whole networks, and what happens when one can't build, fails later, or computes something else."""

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from frozen import assert_as_original, frozen_to, images, network, settle
from small_networks import NETWORKS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import GraphModule

import fxfreeze
from fxfreeze import FreezableModel, FreezeOut, Milestones
from fxfreeze.backends import BACKENDS, Backend, check_backend, openvino
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.imports import ChoiceError

OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
NAMED = [
    "plain",
    "library",
    pytest.param("openvino", marks=OPENVINO),
    pytest.param("inductor", marks=pytest.mark.slow),
]


def depths(model: FreezableModel) -> list[int]:
    most = len(model.units) - 1
    return sorted({1, most // 3, 2 * most // 3, most} - {0})


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("name", NETWORKS)
def test_prefixes_equal_eval_mode(name: str, backend: str) -> None:
    """At four depths, and at another size than they were built for."""
    net = settle(NETWORKS[name]())
    model = fxfreeze.compile(net, FreezeOut(100), backend=backend).eval()
    for depth in depths(model):
        model.freeze(depth)
        for x in (images(5), images(3), torch.randn(2, 3, 16, 16)):
            with torch.no_grad():
                assert relative_error(model(x), net(x)) <= BOUNDS[torch.float32]
        (segment,) = model.prefix.segments
        assert (segment.runs_by, segment.reason, segment.uncompiled) == (backend, None, None)
        assert bool(segment.compiled) == (backend in ("openvino", "inductor"))


@pytest.mark.parametrize("backend", NAMED)
def test_bfloat16_under_autocast(backend: str) -> None:
    net = settle(NETWORKS["resnet"]())
    model = fxfreeze.compile(net, FreezeOut(100), backend=backend).eval()
    model.freeze(len(model.units) - 1)
    x = images(5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(x), net(x)) <= BOUNDS[torch.bfloat16]
        assert model.prefix.segments[0].reason is None
        assert model.prefix.segments[0].uncompiled is None


@pytest.mark.parametrize("backend", NAMED)
def test_three_forwards_before_one_backward(backend: str) -> None:
    """No output is reused while anything alive reads it."""
    net = settle(NETWORKS["vgg"]())
    model = fxfreeze.compile(copy.deepcopy(net), FreezeOut(100), backend=backend)
    model.freeze(3)
    for unit in model.units[:3]:
        for name in unit.modules:
            net.get_submodule(name).requires_grad_(False)
    batches = [images(4) for _ in range(3)]
    sum(model.eval()(x).square().sum() for x in batches).backward()  # type: ignore[union-attr]
    sum(net.eval()(x).square().sum() for x in batches).backward()  # type: ignore[union-attr]
    for ours, theirs in zip(model.parameters(), net.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


# ---- compilers that fail


def as_it_is(module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Callable[..., Any]:
    return module.forward


def unable(module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Callable[..., Any]:
    raise NotImplementedError("no such operator")


def wrong(module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Callable[..., Any]:
    return lambda *given: [1.01 * y for y in module.forward(*given)]


def missing_one(module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Callable[..., Any]:
    return lambda *given: module.forward(*given)[1:]


FAILING = {
    "unable": (unable, "NotImplementedError: no such operator"),
    "wrong": (wrong, r"its relative error \d\.\d\de-0\d is past the bound 1e-04"),
    "missing one": (missing_one, "the passes left 0 outputs of 1"),
}


def with_compiler(monkeypatch: pytest.MonkeyPatch, compiler: Any) -> None:
    monkeypatch.setitem(BACKENDS, "inductor", Backend(BACKENDS["plain"].passes, compiler))


@pytest.mark.parametrize("name", FAILING)
def test_a_compiler_that_fails_is_reported_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training goes on as with the graph that it was given."""
    compiler, message = FAILING[name]
    with_compiler(monkeypatch, compiler)
    net = network()
    model = frozen_to("blocks.0", net, backend="inductor")
    with pytest.warns(UserWarning, match=f"backend 'inductor' did not compile the frozen part: {message}") as told:
        model(images())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_as_original(model.eval(), images())
        model.freeze(3)
        assert_as_original(model, images())
    assert re.search(f"not compiled: {message}", str(model.prefix))
    assert {d["backend"] for d in model._decisions()["segments"]} == {"plain"}


class Later:
    """Runs a graph until it is told to fail."""

    def __init__(self) -> None:
        self.fails = False

    def __call__(self, module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Any:
        def run(*given: Tensor) -> Any:
            if self.fails:
                raise RuntimeError("the device is gone")
            return module.forward(*given)

        return run


def test_compiled_code_that_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Later()
    with_compiler(monkeypatch, later)
    model = frozen_to("blocks.0", network(), backend="inductor").eval()
    x = images()
    assert_as_original(model, x)
    assert model._decisions()["segments"][0]["backend"] == "inductor"
    later.fails = True
    with pytest.warns(UserWarning, match="the compiled frozen part is not used any more: .* the device is gone"):
        assert_as_original(model, x)
    later.fails = False
    assert_as_original(model, x)
    assert not model.prefix.segments[0].compiled
    assert model._decisions()["segments"][0]["backend"] == "plain"


def test_a_rewritten_graph_that_fails_later() -> None:
    """The plain graph takes over; what the original would raise too is the caller's."""
    model = frozen_to("blocks.0", network(), backend="plain").eval()
    x = images()
    assert_as_original(model, x)
    (segment,) = model.prefix.segments
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 5, 8, 8))
    assert segment.reason is None
    assert segment.rewritten is not None
    segment.rewritten.forward = unable  # type: ignore[method-assign,assignment]
    with pytest.warns(UserWarning, match="the rewritten frozen part is not used any more: running it failed"):
        assert_as_original(model, x)
    assert_as_original(model, x)
    assert "unrewritten: running it failed" in str(model.prefix)
    assert not model._decisions()["segments"][0]["rewritten"]


# ---- what a compiler is given


class Asked:
    """Notes the shapes that it was asked to compile for, and how often its code ran."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.ran = 0

    def __call__(self, module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Any:
        self.shapes += [x.shape for x in inputs]

        def run(*given: Tensor) -> Any:
            self.ran += 1
            return module.forward(*given)

        return run


def test_other_shapes_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    with_compiler(monkeypatch, asked)
    model = frozen_to("blocks.0", network(), backend="inductor").eval()
    model(images(6))
    before = asked.ran
    for count in (3, 6, 1):
        assert_as_original(model, images(count))
    assert asked.shapes == [(6, 3, 8, 8)]
    assert asked.ran - before == 1


def test_an_evaluation_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's first batch gets code of its own, and no later one."""
    asked = Asked()
    with_compiler(monkeypatch, asked)
    model = frozen_to("blocks.0", network(), backend="inductor")
    with torch.no_grad():
        model.eval()(images(2))
    for count in (6, 5):
        model.train()(images(count))
    assert asked.shapes == [(2, 3, 8, 8), (6, 3, 8, 8)]
    assert "compiled for 2x3x8x8 and for 6x3x8x8" in str(model.prefix)
    before = asked.ran
    model(images(6))
    with torch.no_grad():
        model.eval()(images(2))
    assert asked.ran - before == 2


def test_the_original_s_weights_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may convert the module that it is given."""

    def converting(module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Any:
        module.double()
        return lambda *given: [y.float() for y in module.forward(*(x.double() for x in given))]

    with_compiler(monkeypatch, converting)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([6, 6]), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    model = fxfreeze.compile(net, FreezeOut(100), backend="inductor")
    model.freeze(1)
    before = {name: (t.data_ptr(), t.dtype) for name, t in net.state_dict().items()}
    model(images())
    assert model.prefix.segments[0].compiled
    assert {name: (t.data_ptr(), t.dtype) for name, t in net.state_dict().items()} == before


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


class Writing(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize(("first", "why"), [(Writing, "writes into input"), (Noisy, "draws random numbers")])
def test_what_no_compiler_is_given(first: type[nn.Conv2d], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    with_compiler(monkeypatch, asked)
    model = fxfreeze.compile(
        nn.Sequential(first(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
        FreezeOut(100),
        backend="inductor",
    )
    model.freeze(1)
    with pytest.warns(UserWarning, match=f"did not compile the frozen part: .*{why}"):
        model(images())
    assert not asked.shapes


# ---- what the compiled code is for


def compiled_for(model: FreezableModel) -> list[str]:
    return [str(compiled) for compiled in model.prefix.segments[0].compiled]


def test_a_short_batch_right_after_a_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an epoch's last may be: it is computed with as many samples as the others, and so is the code made for these."""
    with_compiler(monkeypatch, as_it_is)
    model = fxfreeze.compile(network(), FreezeOut(100), backend="inductor").train()
    model(images(6))
    model.freeze(2)
    model(images(4))
    assert compiled_for(model) == ["6x3x8x8"]


def test_batches_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    with_compiler(monkeypatch, as_it_is)
    model = frozen_to("blocks.0", network(), backend="inductor").train()
    for size, made_for in ((4, "4x3x8x8"), (6, "6x3x8x8"), (5, "6x3x8x8")):
        model(images(size))
        assert compiled_for(model) == [made_for]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by what forward-mode differentiation imports
@pytest.mark.parametrize("backend", NAMED)
def test_tangents(backend: str) -> None:
    """Forward-mode differentiation goes through the frozen part, which compiled code would end."""
    net = network().eval()
    model = fxfreeze.compile(net, FreezeOut(100), backend=backend).eval()
    model.freeze(2)
    x, tangent = images(4), images(4)
    model(x)

    def derivative(function: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent  # type: ignore[no-untyped-call, no-any-return]

    assert relative_error(derivative(model), derivative(model.original)) <= BOUNDS[torch.float32]
    assert not model.prefix.segments[0].reason


def test_an_empty_batch() -> None:
    net = network()
    model = fxfreeze.compile(copy.deepcopy(net), FreezeOut(100), backend="plain").eval()
    model.freeze(2)
    for _ in range(2):
        assert model(images(0)).shape == net.eval()(images(0)).shape
        model.train()(images(4))
    assert model.train()(images(0)).shape == net.eval()(images(0)).shape


# Two models by OpenVINO, gone in the order they came.
INTERRUPTED = """
import signal
import torch
from fxfreeze.backends import openvino
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this may ignore it
from torch import fx, nn
kept = []
for _ in range(2):
    kept.append(openvino.compile(fx.symbolic_trace(nn.Sequential(nn.ReLU())), [torch.randn(2, 3)], None))
kept.pop(0)
kept.pop(0)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@OPENVINO
def test_ctrl_c_after_openvino_went() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("interrupted\n", 0)


@OPENVINO
def test_openvino_reads_what_it_was_given() -> None:
    """Copies that it makes of its inputs live until it has read them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.other = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.last((self.first(x) * self.other(y)).mean((2, 3)))

    net = Two().eval()
    model = fxfreeze.compile(net, Milestones({"other": 0}), backend="openvino").eval()
    assert model.depth == 2
    for _ in range(40):
        pair = [torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last) for _ in range(2)]
        with torch.no_grad():
            torch.testing.assert_close(model(*pair), net(*pair), atol=1e-4, rtol=1e-3)
    assert model.prefix.segments[0].compiled


def test_integers_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index out of range would end the process, or read anything."""
    asked = Asked()
    with_compiler(monkeypatch, asked)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 2)).eval()
    model = fxfreeze.compile(net, Milestones({"0": 0}), backend="inductor").eval()
    with pytest.warns(UserWarning, match="did not compile the frozen part: .* computes integers"):
        model(torch.tensor([[1, 2]]))
    assert not asked.shapes
    with pytest.raises(IndexError):
        model(torch.tensor([[1, 10]]))


def test_other_strides_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    with_compiler(monkeypatch, asked)
    model = frozen_to("blocks.0", network(), backend="inductor").eval()
    model(images(6))
    before = asked.ran
    for x in (images(12)[::2], torch.randn(6, 3, 8, 16)[..., ::2], torch.randn(6, 3, 8, 1).expand(6, 3, 8, 8)):
        assert_as_original(model, x)
    assert asked.ran == before
    model(images(6))
    assert asked.ran == before + 1


# ---- names


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend 'tensorrt' is unknown: expected one of auto, plain, library"):
        check_backend("tensorrt")


def test_a_resumed_run_whose_backend_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen_to("blocks.0", network())
    model(images())
    decisions = model._decisions()
    decisions["segments"][0]["backend"] = "openvino"
    model._load_decisions(decisions)
    monkeypatch.setattr(openvino, "here", lambda: False)
    with pytest.warns(UserWarning, match="used backend 'openvino', which is not available here: 'plain' runs instead"):
        model(images())


def test_a_resumed_run_goes_on_as_it_ran() -> None:
    model = frozen_to("blocks.0", network(), backend="library")
    model(images())
    resumed = frozen_to("blocks.0", network(), backend="plain")
    resumed._load_decisions(model._decisions())
    with pytest.warns(
        UserWarning, match="used backend 'library', and goes on so, not by 'plain': to choose anew, empty"
    ):
        resumed(images())
    assert resumed.prefix.segments[0].backend == "library"


def test_openvino_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ChoiceError, match=r"openvino .*; pip install 'fxfreeze\[openvino\]'"):
        fxfreeze.compile(network(), FreezeOut(100), backend="openvino")
