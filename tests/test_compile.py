"""compile(): what it refuses, what it needs, what it leaves alone."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import images, network
from nets import ConvNorm, Head, settle
from torch import Tensor, nn

import fxfreeze.surgery
from fxfreeze import FreezeOut, Milestones, TraceRefusal
from fxfreeze.fidelity import BOUNDS, relative_error

NEVER = Milestones({"stem": 10**6})


def assert_same(values: Tensor, expected: Tensor) -> None:
    assert relative_error(values.detach(), expected.detach()) <= BOUNDS[torch.float32]


def quietly(make: Callable[[nn.Module], Any]) -> Any:
    """``make`` of a network, without its warning of TorchScript's end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make(network())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: torch.relu, "net is a builtin_function_or_method: expected a torch.nn.Module"),
    "a frozen model": (lambda: fxfreeze.compile(network(), NEVER), "net is a FreezableModel already: compile its .orig"),
    "data parallel": (lambda: nn.DataParallel(network()), "net is a DataParallel: compile the network with fxfreeze first"),
    "compiled by torch": (lambda: quietly(torch.compile), "net is a OptimizedModule: compile the network with fxfreeze"),
    "TorchScript": (lambda: quietly(torch.jit.script), "net is a TorchScript module, which has no Python forward to trace"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        fxfreeze.compile(make(), NEVER)


def test_a_distributed_network_is_refused() -> None:
    net = object.__new__(nn.parallel.DistributedDataParallel)  # made without a process group
    nn.Module.__init__(net)
    with pytest.raises(TypeError, match="net is a DistributedDataParallel: compile the network with fxfreeze first"):
        fxfreeze.compile(net, NEVER)


@pytest.mark.parametrize("schedule", [None, 0.8, "cubic", object()])
def test_bad_schedules(schedule: Any) -> None:
    with pytest.raises(TypeError, match=f"schedule is a {type(schedule).__qualname__}: expected FreezeOut"):
        fxfreeze.compile(network(), schedule)


def test_a_milestone_that_names_nothing() -> None:
    with pytest.raises((ValueError, KeyError), match="nowhere"):
        fxfreeze.compile(network(), Milestones({"nowhere": 3}))


def test_unknown_backends_and_precisions() -> None:
    with pytest.raises(ValueError, match="backend 'cuda' is unknown: expected one of auto, plain"):
        fxfreeze.compile(network(), NEVER, backend="cuda")
    for precision in ("fp8", torch.float64, torch.int16, 16):
        with pytest.raises(ValueError, match=r"precision .* is unknown: expected None, fp32, fp16, bf16"):
            fxfreeze.compile(network(), NEVER, precision=precision)  # type: ignore[arg-type]
    for backend in ("auto", "plain"):
        assert fxfreeze.compile(network(), NEVER, backend=backend).depth == 0


class LooksAtShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = ConvNorm(3, 8), ConvNorm(8, 8), Head(8)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        y = self.a(self.stem(x))
        return self.head(y if scale is None else y * scale)


@pytest.mark.parametrize("examples", [(images(),), images(), {"x": images()}, {"x": images(), "scale": torch.ones(1)}])
def test_example_inputs(examples: Any) -> None:
    """A tuple, one tensor, or a dict of keyword inputs; they are needed only to follow shapes."""
    with pytest.raises(TraceRefusal, match="Passing example_inputs lets control flow look at shapes"):
        fxfreeze.compile(LooksAtShapes(), Milestones({"stem": 0}))
    net = settle(LooksAtShapes())
    model = fxfreeze.compile(net, Milestones({"stem": 0}), example_inputs=examples)
    assert [unit.name for unit in model.units] == ["stem", "a", "head"]
    for width in (8, 7, 5, 8):
        x = torch.randn(6, 3, 8, width)
        assert_same(model.eval()(x), net(x))
        assert_same(model(x, scale=torch.full((1,), 2.0)), net(x, torch.full((1,), 2.0)))


def test_what_compile_leaves_alone() -> None:
    """Modes, module by module; parameters; random state; and no attribute is added to any module."""
    net = network().train()
    net.get_submodule("blocks.1").eval()
    modes = {name: m.training for name, m in net.named_modules()}
    keys = {name: set(vars(m)) for name, m in net.named_modules()}
    state = copy.deepcopy(net.state_dict())
    before = torch.get_rng_state()
    model = fxfreeze.compile(net, NEVER)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert {name: set(vars(m)) for name, m in net.named_modules()} == keys
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert model.original is net
    assert model.training


def test_a_network_in_eval_stays_in_eval() -> None:
    model = fxfreeze.compile(network().eval(), Milestones({"blocks.0": 0}))
    x = images()
    assert torch.equal(model(x), model(x))
    assert not any(m.training for m in model.modules())
    model.train()
    assert {m.training for m in model.original.blocks[1].modules()} == {True}


def test_one_unit_never_freezes() -> None:
    with pytest.warns(UserWarning, match="the network is a single unit, and the last unit never freezes"):
        model = fxfreeze.compile(nn.Sequential(nn.Linear(3, 3)), FreezeOut(10))
    with pytest.raises(ValueError, match="depth 1 would freeze the head"):
        model.freeze(1)


def test_a_tie_that_leaves_one_unit_is_named() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    with pytest.warns(UserWarning, match=r"nothing will be frozen \(0\.weight and 2\.weight are one parameter"):
        fxfreeze.compile(net, FreezeOut(10))


def test_units_by_hand() -> None:
    net = network()
    model = fxfreeze.compile(net, Milestones({"blocks": 0}), units=["stem", ("blocks.0", "blocks.1"), "head"])
    assert model.depth == 2
    assert [unit.name for unit in model.units[:2]] == ["stem", "blocks.0"]
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        name for name, _ in net.named_parameters() if not name.startswith("head")
    }  # what no unit names goes with what feeds it
    x = images()
    assert_same(model.eval()(x), net(x))
    with pytest.raises(ValueError, match="'block' is no module of the network"):
        fxfreeze.compile(network(), NEVER, units=["block"])


def test_two_models_of_one_class() -> None:
    first, second = (fxfreeze.compile(network(), NEVER) for _ in range(2))
    first.freeze(3)
    assert second.depth == 0
    assert all(p.requires_grad for p in second.parameters())
    second.freeze(1)
    x = images()
    for model in (first, second):
        assert_same(model.eval()(x), model.original(x))
