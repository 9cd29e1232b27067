"""Which units a network has: counts of the published networks, and every rule on a small network of its own."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import freezable
from torch import Tensor, nn
from torchvision import models

from fxfreeze import zoo
from fxfreeze.units import Unit


def units_of(net: nn.Module, **options: Any) -> tuple[Unit, ...]:
    """The units, after a check of what holds for any network."""
    units = freezable(net, **options).units
    parameters = [name for unit in units for name in unit.parameters]
    assert sorted(parameters) == sorted(name for name, _ in net.named_parameters())  # each in exactly one
    modules = [name for unit in units for name in unit.modules]
    assert len(set(modules)) == len(modules)
    for unit in units:
        for module in unit.modules:  # what lies in a module of the unit goes with it, or froze before
            inside = {name for name, _ in net.get_submodule(module).named_modules(prefix=module)}
            earlier = {name for u in units[: units.index(unit) + 1] for name in u.modules}
            assert inside & set(modules) <= earlier
        owners = {name.rpartition(".")[0] for name in unit.parameters} - {""}
        assert all(net.get_submodule(owner) for owner in owners)
    return units


def names(units: Sequence[Unit]) -> list[str]:
    return [unit.name for unit in units]


def conv(channels: int = 4, out: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, 1, 1), nn.BatchNorm2d(out), nn.ReLU())


class Net(nn.Module):
    """A network whose forward is `function(self, x)`."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# ---- the published networks

COUNTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (models.resnet18, 10),  # stem, 8 blocks, head
    "resnet50": (models.resnet50, 18),  # stem, 16 blocks, head
    "densenet121": (models.densenet121, 63),  # stem, 58 layers, 3 transitions, head
    "densenet169": (models.densenet169, 87),
    "mobilenet_v2": (models.mobilenet_v2, 20),  # stem, 17 blocks, last layer, head
    "vgg16_bn": (models.vgg16_bn, 16),  # 13 convolutions, 3 linear layers
    "vit_b_16": (models.vit_b_16, 14),  # patches, 12 blocks, head
    "swin_t": (models.swin_t, 17),  # patches, 12 blocks, 3 merges, head
    "convnext_tiny": (models.convnext_tiny, 23),  # patches, 18 blocks, 3 reductions, head
    "googlenet": (lambda: models.googlenet(init_weights=False), 13),  # 3 convolutions, 9 inceptions, heads
    "zoo resnet-20": (lambda: zoo.load("resnet-20", num_classes=10, in_channels=3, image_size=32), 11),
    "zoo wrn-16-2": (lambda: zoo.load("wrn-16-2", num_classes=10, in_channels=3, image_size=32), 8),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_networks(name: str) -> None:
    make, count = COUNTS[name]
    with torch.device("meta"):
        net = make()
    assert len(units_of(net)) == count


def test_resnet18_in_full() -> None:
    with torch.device("meta"):
        net = models.resnet18()
    units = units_of(net)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert names(units) == ["conv1", *blocks, "fc"]
    assert units[0] == Unit("conv1", ("conv1", "bn1", "relu", "maxpool"), ("conv1.weight", "bn1.weight", "bn1.bias"))
    assert set(units[2].modules) == {"layer1", *(n for n, _ in net.layer1[1].named_modules(prefix="layer1.1"))}
    assert units[9].modules == ("fc",)


def test_a_densenet_s_norms_and_containers() -> None:
    net = zoo.load("densenet-bc-4-16", num_classes=10, in_channels=3, image_size=32)
    units = units_of(net)
    by_name = {unit.name: unit for unit in units}
    assert len(units) == 1 + 3 * 2 + 2 + 1
    norms = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms <= {name for unit in units for name in unit.modules}
    assert len(by_name) == len(units)


def test_auxiliary_heads_are_head() -> None:
    net = models.googlenet(init_weights=False)
    head = units_of(net)[-1]
    assert {name.split(".")[0] for name in head.parameters} == {"aux1", "aux2", "fc"}
    assert {"aux1", "aux2", "fc"} <= set(head.modules)


# ---- the hierarchy


def test_a_wrapped_network_keeps_its_blocks() -> None:
    inner = models.resnet18(num_classes=3)
    for net, prefix in (
        (Net(lambda self, x: self.net(x), net=inner), "net."),
        (nn.Sequential(nn.Sequential(inner)), "0.0."),
        (Net(lambda self, x: self.head(self.net(x)), net=inner, head=nn.Linear(3, 2)), "net."),
    ):
        found = names(units_of(net))
        assert [f"{prefix}layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)] == found[1:9]
        assert f"{prefix}conv1" == found[0]


class Tree(nn.Module):
    """Nests its own class, as aggregation networks do."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.left = Tree(depth - 1) if depth else conv()
        self.right = Tree(depth - 1) if depth else conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


def test_a_class_that_nests_itself_is_no_block() -> None:
    net = Net(
        lambda self, x: self.head(self.tree(self.stem(x)).mean((2, 3))),
        stem=conv(3),
        tree=Tree(2),
        head=nn.Linear(4, 2),
    )
    units = units_of(net)
    assert names(units) == ["stem.0", *(f"tree.{a}.{b}" for a in ("left", "right") for b in ("left", "right")), "head"]


def test_loose_layers_open_a_unit_each_and_take_their_norms_along() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    net = Net(
        lambda self, x: self.fc(self.norm(self.layers(x).mean((2, 3)))),
        layers=layers,
        norm=nn.LayerNorm(4),
        fc=nn.Linear(4, 2),
    )
    first, second, head = units_of(net)
    assert first == Unit(
        "layers.0",
        ("layers.0", "layers.1", "layers.2"),
        tuple(f"layers.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")),
    )
    assert set(second.modules) == {"layers", "layers.3", "layers.4", "norm"}  # the container, with its last part
    assert {"layers.4.weight", "norm.weight"} <= set(second.parameters)
    assert head == Unit("fc", ("fc",), ("fc.weight", "fc.bias"))


def test_a_norm_before_any_layer_joins_the_first() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    first, head = units_of(net)
    assert {"0", "1"} <= set(first.modules)
    assert head.name == "3"


def test_running_statistics_without_a_gain_freeze_too() -> None:
    """Such a norm has no parameters, but it must stop with the layer before it."""
    net = Net(
        lambda self, x: self.fc(self.norm(self.a(x)).mean((2, 3)) + self.b(self.a(x)).mean((2, 3))),
        a=conv(3), b=conv(), norm=nn.BatchNorm2d(4, affine=False), fc=nn.Linear(4, 2),
    )  # fmt: skip
    owner = next(unit for unit in units_of(net) if "norm" in unit.modules)
    assert owner.name == "a.0"


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout2d, Noise])
def test_loose_dropout_joins_its_consumer(layer: Callable[[], nn.Module]) -> None:
    net = Net(
        lambda self, x: self.fc(self.drop2(self.b(self.drop1(self.a(x)))).mean((2, 3))),
        a=conv(3), drop1=layer(), b=conv(), drop2=layer(), fc=nn.Linear(4, 2),
    )  # fmt: skip
    units = units_of(net)
    owner = {name: unit.name for unit in units for name in unit.modules}
    assert (owner["drop1"], owner["drop2"]) == ("b.0", "fc")


def test_a_parameter_at_the_root_belongs_to_what_reads_it() -> None:
    """A position embedding joins the patches, a token that is concatenated later what it is concatenated to."""
    net = Net(
        lambda self, x: self.fc(self.b(self.a(x).flatten(2).transpose(1, 2) + self.position).mean(1) * self.scale),
        a=nn.Conv2d(3, 4, 2, 2), position=nn.Parameter(torch.zeros(1, 9, 4)),
        b=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), scale=nn.Parameter(torch.ones(4)), fc=nn.Linear(4, 2),
    )  # fmt: skip
    owner = {name: unit.name for unit in units_of(net) for name in unit.parameters}
    assert owner["position"] == "a"
    assert owner["scale"] == "b.1"


def test_parameters_and_modules_that_nothing_uses_are_head() -> None:
    net = Net(
        lambda self, x: self.fc(self.b(self.a(x)).mean((2, 3))),
        a=conv(3), unused=conv(), spare=nn.Parameter(torch.zeros(3, 3)), b=conv(), fc=nn.Linear(4, 2),
    )  # fmt: skip
    units = units_of(net)
    assert names(units)[:2] == ["a.0", "b.0"]
    assert {"unused.0.weight", "spare", "fc.weight"} <= set(units[-1].parameters)
    assert "unused" in units[-1].modules


def test_a_branch_that_only_feeds_an_output_is_head() -> None:
    net = Net(
        lambda self, x: (self.fc(self.b(self.a(x)).mean((2, 3))), self.side(self.a(x))),
        a=conv(3), side=conv(), b=conv(), fc=nn.Linear(4, 2),
    )  # fmt: skip
    units = units_of(net)
    assert len(units) == 3
    assert {name.split(".")[0] for name in units[-1].parameters} == {"side", "fc"}


# ---- order and merging


def test_units_are_in_the_order_of_the_flow_not_of_the_names() -> None:
    net = Net(
        lambda self, x: self.a(self.b(self.c(self.d(x))).mean((2, 3))),
        a=nn.Linear(4, 2), b=conv(), c=conv(), d=conv(3),
    )  # fmt: skip
    assert names(units_of(net)) == ["d.0", "c.0", "b.0", "a"]


def test_parallel_branches_come_in_the_order_in_which_they_run() -> None:
    net = Net(
        lambda self, x: self.fc((self.second(x) + self.first(x)).mean((2, 3))),
        first=conv(3), second=conv(3), fc=nn.Linear(4, 2),
    )  # fmt: skip
    assert names(units_of(net)) == ["second.0", "first.0", "fc"]


def shared(self: Any, x: Tensor) -> Tensor:
    x = self.b(self.a(x))
    x = self.d(self.b(self.c(x)))
    return self.fc(x.mean((2, 3)))


def test_a_module_called_twice_merges_all_between_its_calls() -> None:
    net = Net(shared, a=conv(3), b=conv(), c=conv(), d=conv(), fc=nn.Linear(4, 2))
    with pytest.warns(
        UserWarning, match=r"unit 'b.0' holds 5\d% of the parameters: its parts share parameters or modules"
    ):
        units = units_of(net)
    assert names(units) == ["a.0", "b.0", "d.0", "fc"]
    assert {name.split(".")[0] for name in units[1].parameters} == {"b", "c"}


def test_a_module_under_two_names_is_one() -> None:
    net = Net(
        lambda self, x: self.fc(self.c(self.again(self.a(self.b(x)))).mean((2, 3))),
        b=conv(3),
        a=conv(),
        c=conv(),
        fc=nn.Linear(4, 2),
    )
    net.again = net.a
    assert names(units_of(net)) == ["b.0", "a.0", "c.0", "fc"]


def test_tied_weights_merge_what_lies_between() -> None:
    net = Net(
        lambda self, x: self.fc(self.d(self.c(self.b(self.a(x)))).mean((2, 3))),
        a=conv(3),
        b=conv(),
        c=conv(),
        d=conv(),
        fc=nn.Linear(4, 2),
    )
    net.d[0].weight = net.b[0].weight
    with pytest.warns(UserWarning, match="can only freeze together"):
        units = units_of(net)
    assert names(units) == ["a.0", "b.0", "fc"]
    assert {name.split(".")[0] for name in units[1].parameters} == {"b", "c", "d"}


def test_a_tied_head_that_merges_everything_freezes_nothing() -> None:
    net = Net(
        lambda self, x: F.linear(self.b(self.embed(x.long()).mean(1)), self.embed.weight),
        embed=nn.Embedding(7, 4),
        b=nn.Linear(4, 4),
    )
    with pytest.warns(UserWarning, match="the network is a single unit, and the last unit never freezes"):
        assert len(units_of(net)) == 1


def test_no_warning_where_no_unit_holds_most() -> None:
    net = Net(shared, a=conv(3), b=conv(), c=conv(), d=conv(), fc=nn.Linear(4, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(units_of(net)) == 4


def feeds_back_in_training(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    first, second = (self.b, self.c) if self.training else (self.c, self.b)
    return self.fc(second(first(h)).mean((2, 3)))


def test_the_two_modes_together_decide() -> None:
    """In training b feeds c, in eval c feeds b: neither may freeze first."""
    net = Net(feeds_back_in_training, a=conv(3), b=conv(), c=conv(), fc=nn.Linear(4, 200))
    units = units_of(net)
    assert names(units) == ["a.0", "b.0", "fc"]
    assert {"b", "c"} <= set(units[1].modules)


def writes_back(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    z = self.c(self.b(h + 1))
    h.mul_(z.detach().mean())
    return self.fc(self.d(h).mean((2, 3)))


def test_what_reads_memory_comes_after_what_decides_its_content() -> None:
    """d reads h after a write that depends on c: the dataflow of values alone would let d freeze before it."""
    net = Net(writes_back, d=conv(), a=conv(3), b=conv(), c=conv(), fc=nn.Linear(4, 200))
    assert names(units_of(net)) == ["a.0", "b.0", "c.0", "d.0", "fc"]


def test_every_unit_depends_on_earlier_ones_only() -> None:
    """Freezing d units leaves exactly the parameters of the others with a gradient, at every d."""
    net = models.resnet18(num_classes=3)
    model = freezable(net)
    x = torch.randn(2, 3, 32, 32)
    for depth in range(1, len(model.units)):
        model.freeze(depth)
        model(x).sum().backward()
        live = {name for unit in model.units[depth:] for name in unit.parameters}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == live
        model.zero_grad(set_to_none=True)


class Kept(nn.Module):
    """Can't be traced, so it is kept whole with the blocks inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*conv(), *conv()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if float(x.detach().sum()) < 1e9 else x
        return x


def test_a_grouping_module_kept_whole_is_one_unit() -> None:
    net = Net(lambda self, x: self.fc(self.kept(self.a(x)).mean((2, 3))), a=conv(3), kept=Kept(), fc=nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="can only freeze together"):
        units = units_of(net)
    assert len(units) == 3
    assert {"kept", "kept.blocks", "kept.blocks.2.4"} <= set(units[1].modules)


# ---- what goes to eval


def test_a_container_goes_to_eval_with_its_last_part() -> None:
    net = Net(
        lambda self, x: self.fc(self.stages(x).mean((2, 3))),
        stages=nn.Sequential(nn.Sequential(conv(3), conv()), nn.Sequential(conv(), conv())),
        fc=nn.Linear(4, 2),
    )
    units = units_of(net)
    owner = {name: i for i, unit in enumerate(units) for name in unit.modules}
    assert len(units) == 5
    assert (owner["stages.0"], owner["stages.1"], owner["stages"]) == (1, 3, 3)
    model = freezable(net)
    model.freeze(1)
    model.train()
    assert not net.stages[0][0].training
    assert net.stages[0].training
    assert net.stages.training
    model.freeze(2)
    assert not net.stages[0].training
    assert net.stages.training
    model.freeze(4)
    assert not net.stages.training
    assert net.fc.training
    assert net.training


# ---- units by hand


def plain() -> nn.Module:
    return Net(
        lambda self, x: self.fc(self.c(self.b(self.a(x))).mean((2, 3))),
        a=conv(3),
        b=conv(),
        c=conv(),
        fc=nn.Linear(4, 2),
    )


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        (["a", "b", "c", "fc"], ["a", "b", "c", "fc"]),
        ([["a", "b"], "c", "fc"], ["a", "c", "fc"]),
        ([("b", "a"), ["c"], "fc"], ["b", "c", "fc"]),
        (["fc", "c", "b", "a"], ["a", "b", "c", "fc"]),  # the flow orders them
        (["a.0", "b", "c", "fc"], ["a.0", "b", "c", "fc"]),  # a.1 is loose, and joins a.0
        (["b", "c", "fc"], ["b", "c", "fc"]),  # a is loose: it feeds b
    ],
)
def test_units_named_by_hand(seeds: Any, expected: list[str]) -> None:
    units = units_of(plain(), units=seeds)
    assert len(units) == len(expected)
    for unit, name in zip(units, expected, strict=True):
        assert name in unit.modules


def test_groups_that_feed_each_other_merge() -> None:
    with pytest.warns(UserWarning, match="unit 'a' holds 98% of the parameters"):
        units = units_of(plain(), units=[["a", "c"], "b", "fc"])
    assert len(units) == 2
    assert {"a", "b", "c"} <= set(units[0].modules)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (["a", "nothing"], "units: 'nothing' is no module of the network; its modules are a, a.0, "),
        (["a", "b", "a"], "units: 'a' is in two units"),
        (["a", "a.0"], "units: 'a.0' is in two units"),
        ([["a", "b"], "b"], "units: 'b' is in two units"),
        ([""], "units: '' is no module of the network"),
        (["a.0", "a"], "units: 'a.0' is in two units"),
    ],
)
def test_impossible_units(seeds: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        units_of(plain(), units=seeds)
    assert str(error.value).startswith(message)


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="Net has no weighted layer that its forward calls: nothing can be frozen"):
        units_of(Net(lambda self, x: x.relu()))
