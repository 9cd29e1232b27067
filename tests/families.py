"""The published networks that training is followed on, at sizes that a test can afford."""

from collections.abc import Callable

import torch
import torchvision
from nets import Call, Case
from torch import Generator, nn

from fxfreeze import zoo

__all__ = ["FAMILIES"]


def pictures(size: int, batch: int = 4) -> Callable[[Generator, int], Call]:
    """Calls with images of ``size`` pixels."""

    def calls(generator: Generator, step: int) -> Call:
        return Call((torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64),), {})

    return calls


def built_in(name: str, size: int) -> Case:
    return Case(lambda: zoo.load(name, num_classes=10, in_channels=3, image_size=size), pictures(size))


def vgg16_bn() -> nn.Module:
    """With a classifier of 64 channels: torchvision's holds 120 million of its 138 million parameters."""
    with torch.device("meta"):
        net = torchvision.models.vgg16_bn(num_classes=10)
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    for name, sizes in (("0", (512, 64)), ("3", (64, 64)), ("6", (64, 10))):
        setattr(net.classifier, name, nn.Linear(*sizes, device="meta"))
    net.to_empty(device="cpu")
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return net


FAMILIES = {
    "densenet-bc": built_in("densenet-bc-4-10", 16),
    "wrn": built_in("wrn-10-1", 16),
    "vgg": built_in("vgg-16-bn", 16),
    "resnet": built_in("resnet-8", 16),
    "resnet18": Case(lambda: torchvision.models.resnet18(num_classes=10), pictures(32)),
    "densenet121": Case(lambda: torchvision.models.densenet121(num_classes=10), pictures(32)),
    "densenet121_drop": Case(lambda: torchvision.models.densenet121(num_classes=10, drop_rate=0.2), pictures(32)),
    "mobilenet_v2": Case(lambda: torchvision.models.mobilenet_v2(num_classes=10), pictures(64)),
    "vgg16_bn": Case(vgg16_bn, pictures(32)),
    "googlenet": Case(lambda: torchvision.models.googlenet(num_classes=10, init_weights=False), pictures(48)),
}
