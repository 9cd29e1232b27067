"""Derived state that is out of date is noticed: every way of changing, swapping or replacing a frozen weight."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import Chain, ConvNorm, settle
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fxfreeze
from fxfreeze import FreezableModel, Milestones
from fxfreeze.fidelity import BOUNDS, relative_error


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settle(Chain(ConvNorm(8, 8), ConvNorm(8, 8)), seed).eval()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def assert_same(model: FreezableModel, *, changed_from: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    """The model computes what its original does now, which is not what it did before."""
    x = images() if x is None else x
    with torch.no_grad():
        expected = model.original(x)
        assert relative_error(model(x), expected) <= BOUNDS[torch.float32]
    if changed_from is not None:
        assert relative_error(expected, changed_from) > 100 * BOUNDS[torch.float32]
    return expected


def tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from (b for b in net.buffers() if b.is_floating_point())


def load(net: nn.Module, other: nn.Module) -> None:
    net.load_state_dict(other.state_dict())


def load_assigned(net: nn.Module, other: nn.Module) -> None:
    net.load_state_dict(other.state_dict(), assign=True)


def load_a_part(net: nn.Module, other: nn.Module) -> None:
    net.get_submodule("stem").load_state_dict(other.get_submodule("stem").state_dict())


def copy_into(net: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(tensors(net), tensors(other), strict=True):
            mine.copy_(theirs)


def average_into(net: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(tensors(net)), [t.detach() for t in tensors(other)], 0.7)


def copy_one_statistic(net: nn.Module, other: nn.Module) -> None:
    net.get_buffer("stem.1.running_var").copy_(other.get_buffer("stem.1.running_var") * 9)


def swap_storages(net: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(tensors(net), tensors(other), strict=True):
        mine.data, theirs.data = theirs.data, mine.data


def replace_parameters(net: nn.Module, other: nn.Module) -> None:
    for name, _ in list(net.named_parameters()):
        owner, _, key = name.rpartition(".")
        setattr(net.get_submodule(owner), key, nn.Parameter(other.get_parameter(name).detach().clone()))


def transpose_a_parameter(net: nn.Module, other: nn.Module) -> None:
    """Another parameter on the same memory."""
    net.get_submodule("blocks.0.0").weight = nn.Parameter(
        net.get_parameter("blocks.0.0.weight").detach().transpose(0, 1)
    )


def replace_a_buffer(net: nn.Module, other: nn.Module) -> None:
    net.get_submodule("blocks.0.1").running_mean = other.get_buffer("blocks.0.1.running_mean") + 3


CHANGES: dict[str, Callable[[nn.Module, nn.Module], None]] = {
    "load_state_dict": load,
    "load_state_dict by assignment": load_assigned,
    "load_state_dict of a part": load_a_part,
    "copy_": copy_into,
    "foreach": average_into,
    "one statistic": copy_one_statistic,
    "swapped .data": swap_storages,
    "other parameters": replace_parameters,
    "a parameter on the same memory": transpose_a_parameter,
    "another buffer": replace_a_buffer,
}


IN_PLACE = ("load_state_dict", "load_state_dict of a part", "copy_", "foreach", "one statistic")


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, torch.no_grad) for name in CHANGES] + [(name, torch.inference_mode) for name in IN_PLACE],
)
def test_changes_are_noticed(name: str, mode: Callable[[], Any]) -> None:
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).eval()
    x = images()
    before = assert_same(model, x=x)
    with mode():
        CHANGES[name](model.original, network(1))
    after = assert_same(model, changed_from=before, x=x)
    model.train()(images()).sum().backward()
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_put_in_place_is_frozen_too(name: str) -> None:
    """A parameter that requires grad, in a frozen parameter's place, does not train."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0}))
    model(images())
    CHANGES[name](model.original, network(1))
    model.train()(images()).sum().backward()
    for unit in model.units[:2]:
        for key in unit.parameters:
            parameter = model.original.get_parameter(key)
            assert not parameter.requires_grad
            assert parameter.grad is None


def test_an_average_swapped_in_and_out() -> None:
    """As trainers evaluate an exponential moving average: copies in, evaluates, copies back."""
    net = network()
    model = fxfreeze.compile(net, Milestones({"blocks.0": 0})).eval()
    x = images()
    trained = assert_same(model, x=x)
    backup = copy.deepcopy(net.state_dict())
    copy_into(net, network(1))
    assert_same(model, changed_from=trained, x=x)
    net.load_state_dict(backup)
    assert torch.equal(assert_same(model, x=x), trained)


def test_a_write_through_data_needs_a_refresh() -> None:
    """It leaves no trace in the tensor; ``refresh`` is what makes it count."""
    net = network()
    model = fxfreeze.compile(net, Milestones({"blocks.0": 0})).eval()
    x = images()
    before = assert_same(model, x=x)
    for mine, theirs in zip(tensors(net), tensors(network(1)), strict=True):
        mine.data.copy_(theirs)
    model.refresh()
    assert_same(model, changed_from=before, x=x)


SETTINGS: dict[str, Callable[[nn.Module], None]] = {
    "padding": lambda net: setattr(net.get_submodule("stem.0"), "padding", (0, 0)),
    "dilation": lambda net: setattr(net.get_submodule("blocks.0.0"), "dilation", (3, 3)),
    "eps": lambda net: setattr(net.get_submodule("stem.1"), "eps", 50.0),
    "forward": lambda net: setattr(net.get_submodule("stem.0"), "forward", lambda x: torch.zeros(len(x), 8, 8, 8)),
    "pruned": lambda net: prune.l1_unstructured(net.get_submodule("stem.0"), "weight", 0.5),
    "parametrized": lambda net: parametrize.register_parametrization(
        net.get_submodule("stem.0"), "weight", nn.Softplus()
    ),
}


@pytest.mark.filterwarnings("ignore:frozen module")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_frozen_layer_s_settings(name: str) -> None:
    """The rewriting reads them, and the trace does not."""
    net = network()
    model = fxfreeze.compile(net, Milestones({"blocks.0": 0})).eval()
    x = images()
    before = assert_same(model, x=x)
    SETTINGS[name](net)
    assert_same(model, changed_from=before, x=x)


@pytest.mark.filterwarnings("ignore:frozen module")
def test_what_took_a_frozen_parameter_s_place() -> None:
    """A pruned layer's own weight, and a parametrized one's, are frozen and watched as the one before."""
    net = network()
    model = fxfreeze.compile(net, Milestones({"blocks.0": 0})).eval()
    x = images()
    assert_same(model, x=x)
    prune.l1_unstructured(net.get_submodule("stem.0"), "weight", 0.5)
    parametrize.register_parametrization(net.get_submodule("blocks.0.0"), "weight", nn.Softplus())
    for name in ("stem.0.weight_orig", "blocks.0.0.parametrizations.weight.original"):
        before = assert_same(model, x=x)
        with torch.no_grad():
            net.get_parameter(name).mul_(-1.5)
        assert_same(model, changed_from=before, x=x)
        assert not net.get_parameter(name).requires_grad


def test_settings_that_stay_cost_no_rebuild() -> None:
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).eval()
    model(images())
    made = model.prefix.build_seconds
    model.original.get_submodule("stem.0").padding = (1, 1)
    model(images())
    assert model.prefix.build_seconds == made


@pytest.mark.parametrize("part", ["stem", "blocks"])
def test_a_frozen_module_replaced(part: str) -> None:
    """By an attribute of the model."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).eval()
    x = images()
    before = assert_same(model, x=x)
    setattr(model, part, network(1).get_submodule(part))
    assert_same(model, changed_from=before, x=x)
    model.train()
    assert not model.original.get_submodule("blocks.0").training


@pytest.mark.parametrize("thaw", ["model", "original", "parameters", "module"])
def test_requires_grad_after_a_freeze(thaw: str) -> None:
    """Whoever turns it on again, frozen parameters get no gradient and have it off by the next backward."""
    net = network()
    model = fxfreeze.compile(net, Milestones({"blocks.0": 0})).train()
    model(images())
    if thaw == "model":
        assert model.requires_grad_(True) is model
    elif thaw == "original":
        net.requires_grad_(True)
    elif thaw == "module":
        net.get_submodule("stem").requires_grad_(True)
    else:
        for p in model.parameters():
            p.requires_grad = True
    model(images()).sum().backward()
    frozen = {name for unit in model.units[:2] for name in unit.parameters}
    for name, p in net.named_parameters():
        assert p.requires_grad is (name not in frozen)
        assert (p.grad is None) is (name in frozen)


def test_live_weights_need_no_rebuild() -> None:
    """A step of the optimizer changes live parameters and statistics: nothing is built anew."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = images()
    model(x)
    prefix = model.prefix
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        assert_same(model.eval(), x=x)
        model.train()(x)
        assert model.prefix.segments[0] is prefix.segments[0]


def test_moves_let_the_old_weights_go_at_once() -> None:
    """Where a module is moved, memory is short; and a move that moves nothing costs nothing."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).eval()
    x = images()
    model(x)
    prefix = model.prefix
    assert model.to("cpu").to(torch.float32).prefix is prefix
    assert str(model.to(torch.float64).prefix) == "prefix: 2 frozen units, built at the next forward"
    model.to(torch.float32)
    assert_same(model, x=x)
    assert model.prefix is not prefix


def test_weights_may_be_loaded_any_number_of_times() -> None:
    """Each time the frozen part is rewritten: an average, say, is swapped in for every evaluation."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).eval()
    for seed in range(6):
        load(model.original, network(seed))
        assert_same(model)
        assert model.prefix.segments[0].reason is None


def test_no_rebuild_without_a_change() -> None:
    """Nor when what is frozen is merely read, saved or copied."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0})).eval()
    model(images())
    segment = model.prefix.segments[0]
    model.state_dict()
    copy.deepcopy(model)
    model.train().eval()
    model.zero_grad()
    model(images(3))
    assert model.prefix.segments[0] is segment
