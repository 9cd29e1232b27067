"""Networks by name: what each form builds, and the one line that refuses the rest."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfreeze import zoo
from fxfreeze.networks import VGG, DenseNet, ResNet, WideResNet


def build(name: str, num_classes: int = 7, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    return zoo.load(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def refusal(name: str, **sizes: int) -> str:
    with pytest.raises(zoo.ZooError) as caught:
        build(name, **sizes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def conv_of(net: nn.Module) -> nn.Conv2d:
    return next(module for module in net.modules() if isinstance(module, nn.Conv2d))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own, importable as `own.nets`."""
    package = tmp_path / "own"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own", "own.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return package / "nets.py"


# The built-in names


@pytest.mark.parametrize(
    ("name", "kind", "blocks"),
    [
        ("densenet-bc-8-16", DenseNet, 2),
        ("DenseNet-BC-12-40", DenseNet, 6),
        ("wrn-16-4", WideResNet, 2),
        ("WRN-10-1", WideResNet, 1),
        ("resnet-20", ResNet, 3),
    ],
)
def test_depth_sets_the_modules_a_stage(name: str, kind: type[nn.Module], blocks: int) -> None:
    net = build(name)
    assert type(net) is kind
    assert [len(stage) for stage in net.children() if isinstance(stage, nn.Sequential)] == [blocks] * 3


def test_growth_and_width() -> None:
    assert build("densenet-bc-8-16").get_submodule("block1.1.conv2").weight.shape == (8, 32, 3, 3)
    assert build("wrn-10-2").get_submodule("group2.0.conv2").weight.shape == (64, 64, 3, 3)
    assert isinstance(build("VGG-16-BN"), VGG)


@pytest.mark.parametrize(
    ("name", "rest", "nearest"),
    [
        ("resnet-21", 2, "20 and 26"),
        ("resnet-7", 2, "8"),
        ("resnet-0", 2, "8"),
        ("wrn-41-4", 4, "40 and 46"),
        ("densenet-bc-12-99", 4, "94 and 100"),
        ("densenet-bc-12-4", 4, "10"),
    ],
)
def test_impossible_depth_is_refused_with_the_nearest(name: str, rest: int, nearest: str) -> None:
    depth = name.split("-")[1 if name[0] != "d" else 3]
    assert refusal(name) == f"{name}: depth {depth} is not 6n + {rest} with n >= 1; the nearest: {nearest}"
    for near in nearest.split(" and "):
        build(re.sub(rf"(?<=-){depth}(?=-|$)", near, name))


@pytest.mark.parametrize("name", ["", "resnet", "resnet-", "resnet20", "wrn-16-0", "densenet-bc-0-16", "vgg-11-bn"])
def test_unknown_name_lists_the_forms(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"no network is named {name!r}; expected one of densenet-bc-K-L, wrn-D-K, vgg-16-bn")
    assert all(form in message for form in zoo.FORMS)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels", "image_size"])
def test_sizes_below_one_are_refused(argument: str) -> None:
    assert refusal("resnet-8", **{argument: 0}) == f"{argument}=0 for resnet-8; expected at least 1"


def test_images_too_small_for_the_pools_are_refused() -> None:
    message = refusal("densenet-bc-8-16", image_size=3)
    assert message.startswith("densenet-bc-8-16 can't take images of 3 x 3 x 3 (RuntimeError: ")
    assert message.endswith("use larger images, or a network made for small ones, such as densenet-bc-12-40")
    build("densenet-bc-8-16", image_size=4)


# torchvision and timm


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("torchvision:resnet18", 28),
        ("torchvision:mobilenet_v2", 28),
        ("torchvision:densenet121", 32),
        ("torchvision:googlenet", 28),
        ("torchvision:vit_b_16", 32),
        ("torchvision:swin_t", 28),
        ("timm:resnet18", 28),
        ("timm:mobilenetv3_small_050", 28),
        ("timm:vit_tiny_patch16_224", 32),
    ],
)
def test_library_networks_take_small_images_of_one_channel(name: str, image_size: int) -> None:
    for in_channels in (1, 3):
        net = build(name, in_channels=in_channels, image_size=image_size)
        logits = net(torch.randn(2, in_channels, image_size, image_size))
        assert logits.shape == (2, 7), "auxiliary classifiers are left off, in training too"
        assert conv_of(net).in_channels == in_channels


def test_a_rebuilt_stem_keeps_all_but_its_channels_and_the_scale_of_its_output() -> None:
    for name in ("torchvision:resnet18", "torchvision:squeezenet1_1"):
        original, rebuilt = (conv_of(build(name, in_channels=channels, image_size=64)) for channels in (3, 1))
        for attribute in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            assert getattr(rebuilt, attribute) == getattr(original, attribute)
        biases = [None if conv.bias is None else conv.bias.tolist() for conv in (original, rebuilt)]
        assert biases[1] == biases[0]
        powers = [conv.weight.square().sum((1, 2, 3)).mean().item() for conv in (original, rebuilt)]
        assert powers[1] == pytest.approx(powers[0], rel=0.25)  # three deviations for 64 x 9 normal values


def test_three_channels_leave_the_library_network_alone() -> None:
    import torchvision

    torch.manual_seed(1)
    ours = build("torchvision:resnet18").state_dict()
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(weights=None, num_classes=7).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_maxvit_is_built_for_the_image_size() -> None:
    message = refusal("torchvision:maxvit_t", image_size=32)
    assert "Input size (8, 8) of block 0 is not divisible by partition size 7" in message


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("torchvision:vgg11_bn", 28), ("torchvision:vit_b_32", 28), ("timm:convnext_atto", 28)],
)
def test_images_that_a_library_network_cannot_take_are_refused(name: str, image_size: int) -> None:
    message = refusal(name, in_channels=1, image_size=image_size)
    assert message.startswith(f"{name} can't take images of 1 x {image_size} x {image_size} (")


def test_unknown_library_network_names_the_near_ones() -> None:
    expected = "torchvision has no classifier named 'resnet19'; near it: resnet18, "
    assert refusal("torchvision:resnet19").startswith(expected)
    assert refusal("timm:resnet19").startswith("timm has no classifier named 'resnet19'; near it: resnet18, ")
    assert refusal("timm:").endswith("has no classifier named ''; see timm's list_models()")
    assert "no classifier named 'fcn_resnet50'" in refusal("torchvision:fcn_resnet50"), "a segmenter returns no logits"


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # what Python keeps for a module that it must not find
    message = refusal(f"{library}:resnet18")
    assert message.startswith(f"{library} is not installed; pip install {library}")
    assert message.endswith("or choose a built-in network: densenet-bc-K-L, wrn-D-K, vgg-16-bn, resnet-D")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise RuntimeError('operator x::nms\\ndoes not exist')", "RuntimeError: operator x::nms does not exist"),
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("raise KeyError('abi')", "KeyError: 'abi'"),
        ("import a_module_that_is_missing", "ModuleNotFoundError: No module named 'a_module_that_is_missing'"),
        ("class Odd(Exception): pass\nraise Odd('odd')", "Odd: odd"),
    ],
)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_broken_library_says_why_and_what_to_do(
    library: str, line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(line)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(f"{library}:resnet18")
    assert message.startswith(f"{library} is installed but can't be imported ({said}); pip install {library}")
    assert f"(built for torch {torch.__version__})" in message


# The user's own


BUILDER = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, features, outputs):
        super().__init__(nn.Flatten(), nn.LazyLinear(features), nn.BatchNorm1d(features), nn.Linear(features, outputs))

    @classmethod
    def wide(cls, num_classes):
        return cls(99, num_classes)

def all_three(image_size, *, in_channels, num_classes):
    return Net(in_channels * image_size * image_size, num_classes)

def with_defaults(num_classes=3, depth=5):
    return Net(depth, num_classes)

def anything(**options):
    assert list(options) == ["num_classes"]
    return Net(4, **{"outputs": options["num_classes"]})

def nothing():
    return Net(4, 7)

def needs_more(num_classes, depth):
    return Net(depth, num_classes)

def wrong_outputs():
    return Net(4, 6)

def a_list(num_classes):
    return [num_classes]

def a_pair(num_classes):
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x
    return Pair(4, num_classes)

def partly_frozen(num_classes):
    net = Net(4, num_classes)
    net[2].eval()
    return net

def broken(num_classes):
    raise KeyError("of the user's own")

value = 3
"""


@pytest.mark.parametrize(
    ("name", "width"),
    [("all_three", 2 * 5 * 5), ("with_defaults", 5), ("anything", 4), ("nothing", 4), ("Net.wide", 99)],
)
def test_callable_gets_what_its_signature_names(name: str, width: int, module: Path) -> None:
    module.write_text(BUILDER)
    net = build(f"own.nets:{name}", in_channels=2, image_size=5)
    assert net.get_submodule("3").in_features == width
    assert net(torch.randn(4, 2, 5, 5)).shape == (4, 7)


def test_library_builders_are_callables_too() -> None:
    assert conv_of(build("torchvision.models:resnet18")).in_channels == 3


def test_training_flags_survive_the_check(module: Path) -> None:
    module.write_text(BUILDER)
    net = build("own.nets:partly_frozen")
    assert [part.training for part in net.children()] == [True, True, False, True]
    assert net.training
    assert net.get_submodule("2").num_batches_tracked == 0
    assert all(module.training for module in build("densenet-bc-8-16").modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.nets:absent", "own.nets:absent: own.nets has no 'absent'; name one of the functions or classes"),
        ("own.nets:Net.absent", "own.nets:Net.absent: own.nets has no 'Net.absent'; name one of the functions"),
        ("own.nets:value", "own.nets:value is of type int; expected a function or a class to call"),
        (
            "own.absent:build",
            "own.absent:build: no module named 'own.absent'; install it, or put its folder on PYTHONPATH",
        ),
        ("absent.nets:build", "absent.nets:build: no module named 'absent'; install it"),
        ("own nets:build", "'own nets:build' names nothing; expected package.module:callable"),
        ("own.nets:", "'own.nets:' names nothing; expected package.module:callable"),
        (":build", "':build' names nothing; expected package.module:callable"),
        ("builtins:dict", "builtins:dict tells no signature; wrap it in a function of your own"),
        (
            "own.nets:needs_more",
            "own.nets:needs_more requires an argument 'depth', but can only get num_classes, in_channels, image_size; ",
        ),
        ("own.nets:a_list", "own.nets:a_list returned a list; expected an nn.Module"),
        ("own.nets:a_pair", "own.nets:a_pair returned tuple for one image; expected logits of shape (1, 7)"),
        (
            "own.nets:wrong_outputs",
            "own.nets:wrong_outputs returned (1, 6) for one image; expected logits of shape (1, 7)",
        ),
    ],
)
def test_callables_that_cannot_serve_are_refused(name: str, message: str, module: Path) -> None:
    module.write_text(BUILDER)
    assert refusal(name).startswith(message)


def test_errors_of_the_users_own_code_pass_through(module: Path) -> None:
    module.write_text(BUILDER)
    with pytest.raises(KeyError, match="of the user's own"):
        build("own.nets:broken")
    module.with_name("imports.py").write_text("import a_module_that_is_missing")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        build("own.imports:build")
