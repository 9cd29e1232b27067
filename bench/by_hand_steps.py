"""What an expert would write for one network, half of it frozen: a folded prefix under no_grad, and the rest trained."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from bench.steps import Step, parameters


def _resnet18(net: torchvision.models.ResNet) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """Frozen up to and including layer2: half of the units."""
    prefix = (
        nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2).requires_grad_(False).eval()
    )
    prefix[0], prefix[1] = fuse_conv_bn_eval(net.conv1, net.bn1), nn.Identity()
    for block in (*net.layer1, *net.layer2):
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
        if block.downsample is not None:
            block.downsample = fuse_conv_bn_eval(*block.downsample)

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = prefix(x)
        return net.fc(torch.flatten(net.avgpool(net.layer4(net.layer3(x))), 1))

    return forward, parameters(nn.ModuleList([net.layer3, net.layer4, net.fc]))


def _densenet121(net: torchvision.models.DenseNet) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """Frozen up to and including the tenth layer of the third block: half of the units."""
    f = net.features
    layers = list(f.denseblock3.values())
    head = nn.Sequential(f.conv0, f.norm0, f.relu0, f.pool0, f.denseblock1, f.transition1, f.denseblock2, f.transition2)
    frozen = nn.ModuleList([head, *layers[:10]]).requires_grad_(False).eval()
    head[0], head[1] = fuse_conv_bn_eval(f.conv0, f.norm0), nn.Identity()
    for layer in (m for m in frozen.modules() if hasattr(m, "norm2")):
        layer.conv1, layer.norm2 = fuse_conv_bn_eval(layer.conv1, layer.norm2), nn.Identity()

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            features = [head(x)]
            for layer in layers[:10]:
                features.append(layer(features))
        for layer in layers[10:]:
            features.append(layer(features))
        x = f.norm5(f.denseblock4(f.transition3(torch.cat(features, 1))))
        return net.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), 1), 1))

    live = [*layers[10:], f.transition3, f.denseblock4, f.norm5, net.classifier]
    return forward, parameters(nn.ModuleList(live))


NETWORKS = {"resnet18": _resnet18, "densenet121": _densenet121}


def by_hand(name: str, net: nn.Module, x: Tensor, y: Tensor) -> Step:
    forward, live = NETWORKS[name](copy.deepcopy(net).train())
    return Step(forward, live, x, y, read=[x, *net.parameters()])
