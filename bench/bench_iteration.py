"""One training iteration with the first 0, 25, 50 and 75% of the units frozen, against plain training.

freezeout: frozen units in eval mode without gradients, no surgery; fxfreeze: by its backend "library"; by hand: what an
expert would write for one network at half depth, a folded prefix under no_grad and the rest trained. ``by hand, again`` is
the same code a second time: a difference inside its ratio is a tie.
"""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import fxfreeze
from bench.conftest import Contender, interleave

NETWORKS = {"resnet18": 32, "densenet121": 16}  # batch sizes
SHARES = (0.0, 0.25, 0.5, 0.75)
ROUNDS = 15


def _step(forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> Contender:
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _frozen(net: nn.Module, depth: int) -> fxfreeze.FreezableModel:
    model = fxfreeze.compile(copy.deepcopy(net).train(), fxfreeze.FreezeOut(10**9), backend="library")
    model.freeze(depth)
    return model


def _live(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _resnet_by_hand(net: torchvision.models.ResNet) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
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

    return forward, _live(nn.ModuleList([net.layer3, net.layer4, net.fc]))


def _densenet_by_hand(net: torchvision.models.DenseNet) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
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
    return forward, _live(nn.ModuleList(live))


BY_HAND = {"resnet18": _resnet_by_hand, "densenet121": _densenet_by_hand}


@functools.cache
def measured(name: str, share: float) -> dict[str, list[float]]:
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)()
    x, y = torch.randn(NETWORKS[name], 3, 64, 64), torch.randint(0, 1000, (NETWORKS[name],))
    depth = int(share * len(_frozen(net, 0).units))
    marked, model, plain = _frozen(net, depth), _frozen(net, depth), copy.deepcopy(net).train()
    contenders = {
        "plain": _step(plain, _live(plain), x, y),
        "freezeout": _step(marked.original, _live(marked), x, y),
        "fxfreeze": _step(model, _live(model), x, y),
    }
    if share == 0.5:
        for label in ("by hand", "by hand, again"):
            contenders[label] = _step(*BY_HAND[name](copy.deepcopy(net).train()), x, y)
    return interleave(contenders, ROUNDS)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("contender", ["plain", "freezeout", "fxfreeze", "by hand", "by hand, again"])
def bench_iteration(row, benchmark, name: str, share: float, contender: str) -> None:
    times = measured(name, share)
    if contender not in times:
        pytest.skip("written by hand for half depth only")
    benchmark.group = f"iteration, {name} at 64 px, batch {NETWORKS[name]}, {share:.0%} frozen"
    row(times, contender, "by hand" if share == 0.5 else "plain")
