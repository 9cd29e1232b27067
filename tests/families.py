"""The published networks that training is followed on, at sizes that a test can afford."""

from collections.abc import Callable
from functools import partial

import torch
from nets import Call, Case
from torch import Generator, nn
from torchvision import models

from fxfreeze import zoo

__all__ = ["FAMILIES", "families"]


def pictures(size: int, batch: int) -> Callable[[Generator, int], Call]:
    """Calls with ``batch`` images of ``size`` pixels."""

    def calls(generator: Generator, step: int) -> Call:
        return Call((torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64),), {})

    return calls


def vgg16_bn() -> nn.Module:
    """With a classifier of 64 channels: torchvision's holds 120 million of its 138 million parameters."""
    with torch.device("meta"):
        net = models.vgg16_bn(num_classes=10)
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    for name, sizes in (("0", (512, 64)), ("3", (64, 64)), ("6", (64, 10))):
        setattr(net.classifier, name, nn.Linear(*sizes, device="meta"))
    net.to_empty(device="cpu")
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return net


def families(batch: int) -> dict[str, Case]:
    """Case by name, ``batch`` images a call."""
    built_in = {"densenet-bc": "densenet-bc-4-10", "wrn": "wrn-10-1", "vgg": "vgg-16-bn", "resnet": "resnet-8"}
    options = {"num_classes": 10, "in_channels": 3, "image_size": 16}
    return {
        **{key: Case(partial(zoo.load, name, **options), pictures(16, batch)) for key, name in built_in.items()},
        "resnet18": Case(partial(models.resnet18, num_classes=10), pictures(32, batch)),
        "densenet121": Case(partial(models.densenet121, num_classes=10), pictures(32, batch)),
        "densenet121_drop": Case(partial(models.densenet121, num_classes=10, drop_rate=0.2), pictures(32, batch)),
        "mobilenet_v2": Case(partial(models.mobilenet_v2, num_classes=10), pictures(64, batch)),
        "vgg16_bn": Case(vgg16_bn, pictures(32, batch)),
        "googlenet": Case(partial(models.googlenet, num_classes=10, init_weights=False), pictures(48, batch)),
    }


FAMILIES = families(batch=4)
