"""The built-in networks: the published sizes, the published arithmetic, and a start that hides nothing."""

import math

import pytest
import torch
import torchvision
from torch import nn

from fxfreeze import networks, zoo

SMALL = ("densenet-bc-8-16", "wrn-10-2", "vgg-16-bn", "resnet-8")


def build(name: str, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    return zoo.load(name, num_classes=10, in_channels=in_channels, image_size=image_size)


# Millions of parameters for CIFAR-10, as printed: arXiv 1608.06993 table 2, 1605.07146 tables 4 and 5, 1512.03385
# table 6. VGG-16's CIFAR form has no table of its own; 14.72 is what arXiv 1810.05270 gives.
PUBLISHED = {
    "densenet-bc-12-100": "0.8",
    "densenet-bc-24-250": "15.3",
    "densenet-bc-40-190": "25.6",
    "wrn-40-1": "0.6",
    "wrn-40-2": "2.2",
    "wrn-40-4": "8.9",
    "wrn-40-8": "35.7",
    "wrn-28-10": "36.5",
    "wrn-28-12": "52.5",
    "wrn-22-8": "17.2",
    "wrn-22-10": "26.8",
    "wrn-16-8": "11.0",
    "wrn-16-10": "17.1",
    "resnet-20": "0.27",
    "resnet-32": "0.46",
    "resnet-44": "0.66",
    "resnet-56": "0.85",
    "resnet-110": "1.7",
    "vgg-16-bn": "14.72",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        net = build(name)
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    decimals = len(PUBLISHED[name].partition(".")[2])
    assert f"{millions:.{decimals}f}" == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("densenet-bc-12-100", 99),  # and the linear layer
        ("densenet-bc-8-16", 15),
        ("wrn-40-4", 37 + 3),  # three 1x1 shortcuts, which the paper counts into the depth
        ("vgg-16-bn", 13),  # the other two linear layers of the ImageNet form are left out
        ("resnet-56", 55),
    ],
)
def test_depth_is_what_the_name_says(name: str, convolutions: int) -> None:
    with torch.device("meta"):
        net = build(name)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == convolutions
    assert sum(isinstance(module, nn.Linear) for module in net.modules()) == 1


@pytest.mark.parametrize("image_size", [8, 28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_small_images_of_any_channels_train(name: str, in_channels: int, image_size: int) -> None:
    net = build(name, in_channels, image_size)
    logits = net(torch.randn(3, in_channels, image_size, image_size))
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("densenet-bc-12-40", {"stem": (24, 32), "block1": (96, 32), "block2": (120, 16), "block3": (132, 8)}),
        ("wrn-16-4", {"stem": (16, 32), "group1": (64, 32), "group2": (128, 16), "group3": (256, 8)}),
        ("resnet-20", {"stem": (16, 32), "group1": (16, 32), "group2": (32, 16), "group3": (64, 8)}),
        ("vgg-16-bn", {"features.1": (64, 32), "features.5": (128, 8), "features.12": (512, 4), "features": (512, 1)}),
    ],
)
def test_stages_have_the_papers_channels_and_resolution(name: str, shapes: dict[str, tuple[int, int]]) -> None:
    net = build(name)
    seen = {}
    for stage in shapes:
        net.get_submodule(stage).register_forward_hook(
            lambda _module, _inputs, output, stage=stage: seen.update({stage: (output.shape[1], output.shape[2])})
        )
    net.eval()(torch.randn(1, 3, 32, 32))
    assert seen == shapes


@pytest.mark.parametrize(("image_size", "pools"), [(8, 3), (28, 4), (32, 5), (64, 5)])
def test_vgg_leaves_out_the_pools_that_would_leave_no_pixel(image_size: int, pools: int) -> None:
    net = build("vgg-16-bn", image_size=image_size)
    assert sum(isinstance(module, nn.MaxPool2d) for module in net.modules()) == pools


@pytest.mark.parametrize("name", SMALL)
def test_start(name: str) -> None:
    net = build(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), "a zero gamma would hide errors in a residual branch"
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * math.prod(module.kernel_size)
            count = module.weight.numel()
            # Six standard errors of the deviation of `count` normal values.
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=6 / math.sqrt(2 * count))
        elif isinstance(module, nn.Linear):
            assert (module.bias == 0).all()


@pytest.mark.parametrize("name", SMALL)
def test_the_random_state_determines_the_start(name: str) -> None:
    torch.manual_seed(1)
    first = build(name).state_dict()
    torch.manual_seed(1)
    second = build(name).state_dict()
    third = build(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


def shake(module: nn.Module) -> nn.Module:
    """Away from a fresh norm's 0 and 1, so that no norm is the identity; in eval mode."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values, low in (
                (norm.weight, 0.5),
                (norm.bias, -0.5),
                (norm.running_mean, -0.5),
                (norm.running_var, 0.5),
            ):
                assert values is not None
                nn.init.uniform_(values, low, low + 1)
    return module.eval().double()


def copied(source: nn.Module, target: nn.Module) -> nn.Module:
    """`target` with the tensors of `source` in the order of their names, which both must have alike."""
    target.load_state_dict(source.state_dict())
    return target.eval().double()


def test_dense_layer_is_torchvisions() -> None:
    ours = shake(networks.DenseLayer(6, 4))
    theirs = copied(ours, torchvision.models.densenet._DenseLayer(6, 4, bn_size=4, drop_rate=0.0))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torch.cat((x, theirs(x)), 1), rtol=1e-12, atol=1e-12)


def test_transition_is_torchvisions() -> None:
    ours = shake(networks.Transition(6))
    theirs = copied(ours, torchvision.models.densenet._Transition(6, 3))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_basic_block_is_torchvisions_with_a_shortcut_of_zeros_for_new_channels() -> None:
    ours = shake(networks.BasicBlock(4, 8, 2))
    theirs = torchvision.models.resnet.BasicBlock(4, 8, 2)
    theirs.load_state_dict({key.replace("norm", "bn"): value for key, value in ours.state_dict().items()})
    # The 1x1 convolution of stride 2 that copies channel i to channel i does what the parameter-free shortcut does.
    theirs.downsample = nn.Conv2d(4, 8, 1, stride=2, bias=False)
    with torch.no_grad():
        theirs.downsample.weight.copy_(torch.eye(8, 4)[:, :, None, None])
    theirs.eval().double()
    for size in (8, 7):
        x = torch.randn(2, 4, size, size, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_wide_block_without_its_branch_is_the_identity_or_the_shortcut_of_the_activated_input() -> None:
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for block in (networks.WideBlock(4, 4, 1), networks.WideBlock(4, 8, 2)):
        shake(block)
        nn.init.zeros_(block.conv2.weight)
        active = block.norm1(x).relu()
        expected = x if block.shortcut is None else nn.functional.conv2d(active, block.shortcut.weight, stride=2)
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_wide_block_branch_is_norm_relu_conv_twice() -> None:
    block = networks.WideBlock(4, 4, 1)
    shake(block)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    branch = nn.Sequential(block.norm1, nn.ReLU(), block.conv1, block.norm2, nn.ReLU(), block.conv2)
    torch.testing.assert_close(block(x) - x, branch(x), rtol=1e-12, atol=1e-12)


def test_vgg_is_torchvisions_but_for_the_classifier() -> None:
    ours = shake(networks.VGG(10, in_channels=3, image_size=32)).get_submodule("features")
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    weighted = (nn.Conv2d, nn.BatchNorm2d)
    sources, targets = ([m for m in net.modules() if isinstance(m, weighted)] for net in (ours, theirs))
    for source, target in zip(sources, targets, strict=True):
        target.load_state_dict(source.state_dict(), strict=False)
        if isinstance(target, nn.Conv2d):
            assert target.bias is not None
            nn.init.zeros_(target.bias)  # a constant before a batch norm, which ours leave out
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.eval().double()(x), rtol=1e-12, atol=1e-12)


def test_blocks_are_modules_with_the_papers_names() -> None:
    names = {type(module).__name__: name for name, module in build("densenet-bc-8-16").named_modules()}
    assert names["Transition"] == "transition2"
    assert names["DenseLayer"] == "block3.1"
    layer = networks.DenseLayer(6, 4)
    assert [name for name, _ in layer.named_children()] == ["norm1", "conv1", "norm2", "conv2"]
