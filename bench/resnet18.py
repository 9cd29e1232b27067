"""ResNet-18 as it is trained on CIFAR: torchvision's, with a 3x3 stem of stride 1 and no pooling before the blocks."""

from torch import nn
from torchvision.models import resnet18


def build(num_classes: int, in_channels: int) -> nn.Module:
    """[B, in_channels, H, W] -> [B, num_classes], untrained."""
    net = resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net
