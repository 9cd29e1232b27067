"""A small network of each kind in the zoo, for images of 3 channels and 8 pixels and more."""

from collections.abc import Callable

import torchvision
from torch import nn

from fxfreeze import zoo

__all__ = ["CLASSES", "NETWORKS"]

CLASSES = 5


def built_in(name: str) -> nn.Module:
    return zoo.load(name, num_classes=CLASSES, in_channels=3, image_size=8)


def vgg() -> nn.Module:
    features = torchvision.models.vgg.make_layers([8, 8, "M", 16, 16, "M"], batch_norm=True)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def mobilenet() -> nn.Module:
    stages = [[1, 8, 2, 1], [3, 16, 2, 2]]
    return torchvision.models.MobileNetV2(CLASSES, inverted_residual_setting=stages, width_mult=0.5, dropout=0.0)


def densenet_of_lists() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 2), 16, bn_size=2, num_classes=CLASSES)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "densenet-bc": lambda: built_in("densenet-bc-4-16"),
    "densenet of lists": densenet_of_lists,
    "wrn": lambda: built_in("wrn-16-1"),
    "resnet": lambda: built_in("resnet-14"),
    "vgg": vgg,
    "mobilenet": mobilenet,
}
