"""The FreezableModel as it freezes and runs: what stands still, what it says, when it falls back."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from frozen import images, network
from nets import Chain, ConvNorm, Head, Keywords, TwoInputs, settle
from torch import Tensor, nn

import fxfreeze.builder
from fxfreeze import FreezableModel, Milestones, TraceRefusal
from fxfreeze.building import build
from fxfreeze.fidelity import BOUNDS, relative_error

NEVER = Milestones({"stem": 10**6})


def assert_same(values: Tensor, expected: Tensor) -> None:
    assert relative_error(values.detach(), expected.detach()) <= BOUNDS[torch.float32]


def test_freezing_marks() -> None:
    """requires_grad False, grad None and eval for what is frozen, nothing else touched, and no forward needed."""
    net = network().train()
    model = fxfreeze.compile(net, NEVER)
    model(images()).sum().backward()
    model.freeze(2)
    frozen = {name for unit in model.units[:2] for name in unit.parameters}
    modules = {name for unit in model.units[:2] for name in unit.modules}
    assert frozen == {name for name, _ in net.named_parameters() if name.startswith(("stem", "blocks.0"))}
    for name, p in net.named_parameters():
        assert p.requires_grad is (name not in frozen)
        assert (p.grad is None) is (name in frozen)
    for name, module in net.named_modules():
        assert module.training is (name not in modules)
    assert model.depth == 2
    model.freeze(2)
    model.freeze(3)
    assert model.depth == 3


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        (1, ValueError, "depth 1 is below the current depth 2: frozen units stay frozen; FreezeScheduler.load_state_dict"),
        (-1, ValueError, "depth -1 is below the current depth 2"),
        (5, ValueError, "depth 5 would freeze the head 'head.fc': at most 4 of 5 units"),
        (99, ValueError, "depth 99 would freeze the head"),
        (True, TypeError, "depth is True: expected an int"),
        (3.0, TypeError, "depth is 3.0: expected an int"),
        ("3", TypeError, "depth is '3': expected an int"),
        (None, TypeError, "depth is None: expected an int"),
    ],
)  # fmt: skip
def test_impossible_depths(depth: Any, error: type[Exception], message: str) -> None:
    model = fxfreeze.compile(network(), NEVER)
    model.freeze(2)
    with pytest.raises(error, match=message.replace("head.fc", model.units[-1].name)):
        model.freeze(depth)
    assert model.depth == 2


@pytest.mark.parametrize("unit", ["stem", "blocks", "last"])
def test_a_backbone_frozen_from_the_start(unit: str) -> None:
    """Neither a scheduler nor an optimizer is needed."""
    net = network()
    model = fxfreeze.compile(net, Milestones({unit: 0}))
    assert model.depth == {"stem": 1, "blocks": 3, "last": 4}[unit]
    model.train()(images()).sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) is any(name in u.parameters for u in model.units[: model.depth])


class Statistics(nn.Module):
    """One norm of each kind, in a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4))
        self.image = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None))
        self.signal = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4))
        self.sync = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4))
        self.flat = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(F.relu(self.volume(x)).mean(2))
        x = self.signal(F.relu(x).flatten(2)).unflatten(2, (4, 4))
        return self.fc(self.flat(self.sync(x).mean((2, 3))))


def test_frozen_statistics_stand_still() -> None:
    """Running statistics and their counters, whatever calls ``train()``; the live norms' go on."""
    net = settle(Statistics())
    model = fxfreeze.compile(net, Milestones({"sync": 0}))
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        model.train()
        net.train()
        model(torch.randn(6, 3, 2, 4, 4)).sum().backward()
    for name, value in net.state_dict().items():
        if name.startswith(("fc", "flat.0")) or name.endswith(("weight", "bias")):
            continue
        assert torch.equal(value, before[name]) is not name.startswith("flat.1.")
    assert int(net.get_buffer("flat.1.num_batches_tracked")) == int(before["flat.1.num_batches_tracked"]) + 3


def test_dropout_is_off_where_frozen() -> None:
    net = settle(Chain(nn.Sequential(ConvNorm(8, 8), nn.Dropout(0.5)), ConvNorm(8, 8)))
    model = fxfreeze.compile(net, Milestones({"last": 0})).train()
    x = images()
    values = model(x)
    assert torch.equal(values, model(x))
    assert_same(values, net.eval()(x))


# ---- running


def test_one_segment_for_training_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a trainer that calls ``train()`` at every step, and with gradients or without."""
    builds = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        builds.append(args[0])
        return build(*args, **kwargs)

    monkeypatch.setattr(fxfreeze.builder, "build", counting)
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0}))
    for _ in range(3):
        model.train()(images()).sum().backward()
    model.eval()(images())
    with torch.no_grad():
        model(images(3))
    assert builds == [(0, 2)]
    model.freeze(3)
    model.train()(images())
    assert builds == [(0, 2), (0, 3)]


def test_an_input_that_requires_grad() -> None:
    """It gets no gradient from a frozen prefix: said at once, with the ways out, which work."""
    net = network().eval()
    model = fxfreeze.compile(net, NEVER).eval()
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    model.freeze(2)
    message = "an input requires grad, but the first 2 units are frozen and run without a tape: detach the input"
    with pytest.raises(RuntimeError, match=message):
        model(x)
    with torch.no_grad():
        assert_same(model(x), net(x))
    assert_same(model(x.detach()), net(x))
    x.grad = None
    model.original(x).sum().backward()
    assert x.grad is not None


class TakesAnything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = ConvNorm(3, 8), ConvNorm(8, 8), Head(8)

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        y = self.a(self.stem(x))
        return self.head(y if extra is None else y * float(getattr(extra, "gain", 2.0)))


class Gain:
    gain = 3.0


UNTRACEABLE: dict[str, Callable[[], Any]] = {
    "an object": Gain,
    "an array": lambda: numpy.ones(3),
    "a set": lambda: {1, 2},
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_call_that_cannot_be_traced_runs_the_original(name: str) -> None:
    """With one warning in all: at later steps, in eval, and after further freezes there is none."""
    net = settle(TakesAnything())
    model = fxfreeze.compile(net, Milestones({"stem": 0}))
    message = "this call runs the original, frozen units included: input 'extra' is a .*, whose contents"
    x = images()
    with pytest.warns(UserWarning, match=message) as caught:
        model(x, extra=UNTRACEABLE[name]())
    assert len(caught) == 1
    before = copy.deepcopy(net.stem.state_dict())
    for mode in (True, False):
        model.train(mode)
        for _ in range(2):
            net.zero_grad()
            values = model(x, extra=UNTRACEABLE[name]())
            values.sum().backward()
            assert net.get_parameter("stem.0.weight").grad is None
            assert net.get_parameter("a.0.weight").grad is not None
    assert_same(values, net(x, UNTRACEABLE[name]()))
    model.freeze(2)
    model(x, UNTRACEABLE[name]())
    assert_same(model(x), net(x))
    assert all(torch.equal(value, before[key]) for key, value in net.stem.state_dict().items())


class LooksAtData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = ConvNorm(3, 8), ConvNorm(8, 8), Head(8)

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        y = self.a(self.stem(x))
        if flip:
            return self.head(-y) if y.mean() > 0 else self.head(y)
        return self.head(y)


def test_a_flag_that_makes_it_untraceable() -> None:
    net = settle(LooksAtData()).eval()
    model = fxfreeze.compile(net, Milestones({"stem": 0})).eval()
    x = images()
    with pytest.warns(UserWarning, match="this call runs the original, frozen units included: LooksAtData.forward"):
        assert_same(model(x, flip=True), net(x, flip=True))
    assert_same(model(x), net(x))
    assert_same(model(x, flip=True), net(x, flip=True))
    with pytest.raises(TraceRefusal, match=r"LooksAtData\.forward can't be traced at .*test_model\.py:"):
        fxfreeze.compile(settle(LooksAtData()), NEVER, example_inputs=(x, True))


def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def test_frozen_modules_with_hooks_warn_once() -> None:
    """And run as they are: hooks fire at every forward, at every depth."""
    net = network().eval()
    net.get_submodule("blocks.0").register_forward_hook(halve)
    model = fxfreeze.compile(net, NEVER).eval()
    x = images()
    model.freeze(1)
    assert_same(model(x), net(x))
    model.freeze(2)
    with pytest.warns(UserWarning, match=r"frozen module 'blocks\.0' runs as it is, not rewritten: it has hooks"):
        assert_same(model(x), net(x))
    model.train()(x)
    model.eval()
    model.freeze(3)
    assert_same(model(x), net(x))
    model.refresh()
    assert_same(model(x), net(x))


def test_hooks_that_come_and_go() -> None:
    """A plan made before is not used for a block that has a hook now, or whose hook is gone, forward or backward."""
    net = network().eval()
    model = fxfreeze.compile(net, Milestones({"stem": 0})).eval()
    x = images()
    model(x)
    fired: list[str] = []
    first, second = net.get_submodule("blocks.0"), net.get_submodule("blocks.1")
    handle = first.register_forward_hook(halve)
    assert_same(model(x), net(x))
    handle.remove()
    handle = second.register_forward_hook(lambda *args: fired.append("second"))  # as many hooks, elsewhere
    assert_same(model(x), net(x))
    assert fired == ["second"] * 2
    handle.remove()
    for register in (second.register_full_backward_hook, second.register_full_backward_pre_hook):
        fired.clear()
        handle = register(lambda *args: fired.append("backward"))
        model(x).sum().backward()
        assert fired == ["backward"]
        handle.remove()


def test_keyword_inputs_and_structures() -> None:
    """Constants, None and tensors by keyword; dictionaries out."""
    net = settle(Keywords()).eval()
    model = fxfreeze.compile(net, Milestones({"a": 0})).eval()
    x, mask = images(), (torch.rand(6, 1, 8, 8) > 0.3).float()
    for kwargs in ({}, {"mask": None}, {"mask": mask}, {"mask": mask, "scale": 0.5}, {"scale": 2}):
        values, expected = model(x, **kwargs), net(x, **kwargs)
        assert values.keys() == expected.keys()
        for key in values:
            assert_same(values[key], expected[key])
    for scale in (0.5, 0.25, 1, True):
        assert_same(model(x, scale=scale)["logits"], net(x, scale=scale)["logits"])


def test_two_inputs() -> None:
    net = settle(TwoInputs()).eval()
    model = fxfreeze.compile(net, Milestones({"image": 0})).eval()
    for size in (6, 2):
        x, v = images(size), torch.randn(size, 4)
        assert_same(model(x, v), net(x, v))
        assert_same(model(vector=v, image=x), net(x, v))


def test_errors_of_the_network_are_its_own() -> None:
    """A wrong input fails as it would have, also once a plan exists."""
    model = fxfreeze.compile(network(), Milestones({"stem": 0}))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels instead"):
        model(torch.randn(6, 4, 8, 8))
    model(images())
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels instead"):
        model(torch.randn(6, 4, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the original's running instead, which fails as it should
        with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
            model(images(), mask=None)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            model()


def test_the_caller_writes_into_what_it_gave_and_got() -> None:
    """Neither the next forward nor the frozen weights notice."""
    net = network().eval()
    model = fxfreeze.compile(net, Milestones({"last": 0})).eval()
    x = images()
    kept = x.clone()
    with torch.no_grad():
        values = model(x)
        assert torch.equal(x, kept)
        expected = values.clone()
        values.zero_()
        x.zero_()
        assert torch.equal(model(kept), expected)


def test_restoring_a_depth() -> None:
    """What load_state_dict of the scheduler needs: thawed units train again, only those that did before."""
    net = network().train()
    net.get_parameter("stem.0.bias").requires_grad_(False)
    model: FreezableModel = fxfreeze.compile(net, NEVER)
    model.freeze(3)
    model(images())
    model._restore_depth(1)
    assert model.depth == 1
    assert {m.training for m in net.get_submodule("blocks").modules()} == {True}
    assert {m.training for m in net.get_submodule("stem").modules()} == {False}
    model(images()).sum().backward()
    assert net.get_parameter("blocks.0.0.weight").grad is not None
    assert net.get_parameter("stem.0.weight").grad is None
    model._restore_depth(0)
    assert net.get_parameter("stem.0.weight").requires_grad
    assert not net.get_parameter("stem.0.bias").requires_grad
    model._restore_depth(4)
    assert model.depth == 4
    x = images()
    assert_same(model.eval()(x), net.eval()(x))


@pytest.mark.parametrize("name", ["depth", "units", "prefix"])
def test_what_the_model_says_of_itself_is_not_assigned(name: str) -> None:
    model = fxfreeze.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), fxfreeze.FreezeOut(10))
    with pytest.raises(AttributeError, match="can't be assigned"):
        setattr(model, name, 1)
    assert name not in vars(model.original)


def test_a_schedule_class_is_refused() -> None:
    with pytest.raises(TypeError, match="schedule is a"):
        fxfreeze.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), fxfreeze.FreezeOut)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": "0"}, "units is '0': expected a list of module names"),
        ({"units": 3}, "units is 3: expected a list of module names"),
        ({"example_inputs": [torch.zeros(1, 2)]}, "example_inputs is a list: expected the arguments of one call"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=message):
        fxfreeze.compile(net, fxfreeze.FreezeOut(10), **arguments)


def test_one_tensor_is_an_example() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = fxfreeze.compile(net, fxfreeze.FreezeOut(10), example_inputs=torch.zeros(1, 2))
    assert [unit.name for unit in model.units] == ["0", "1"]
