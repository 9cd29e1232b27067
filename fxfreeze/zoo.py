"""Networks by name: those of networks.py, those of torchvision and timm, and the user's own."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze.imports import ChoiceError, call, one_line, optional, resolve
from fxfreeze.networks import VGG, DenseNet, ResNet, WideResNet

FORMS: dict[str, str] = {
    "densenet-bc-K-L": "DenseNet-BC of growth K and depth L = 6n + 4, n layers in each block (densenet-bc-12-100)",
    "wrn-D-K": "wide ResNet of depth D = 6n + 4 and width K (wrn-40-4)",
    "vgg-16-bn": "VGG-16 with batch norm, in its CIFAR form",
    "resnet-D": "CIFAR ResNet of depth D = 6n + 2 (resnet-20)",
    "torchvision:NAME": "a classification network of torchvision, untrained",
    "timm:NAME": "a network of timm, untrained",
    "package.module:callable": "your own: called with those of num_classes, in_channels, image_size that it names",
}


class ZooError(ChoiceError):
    """A network name that can't be turned into a network; the message is one line with the remedy."""


def load(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network that `name` names, untrained: [B, in_channels, image_size, image_size] -> logits [B, num_classes].

    `FORMS` lists the names. Weights are drawn from torch's random state.

    torchvision and timm networks are the library's own, whole: stem and pooling stay as they are for large images, so
    some refuse small ones. A transformer of a fixed size is built for image_size; auxiliary classifiers are left off.
    torchvision has no in_channels: unless it is 3, the first convolution is replaced by one of that many channels,
    drawn anew at the scale that keeps the variance of its output.

    A callable gets those of num_classes, in_channels and image_size that its signature names, and num_classes if it
    takes **kwargs; it returns an nn.Module. So `torchvision.models:resnet18` works, and a function of the user's own
    can load pretrained weights.

    One all-zero image goes through the network in eval mode, so that images it can't take are refused here.
    Raises ZooError for an unknown name or impossible depth, a missing or broken package, or images that don't fit.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for key, value in sizes.items():
        if value < 1:
            raise ZooError(f"{key}={value} for {name}; expected at least 1")
    library, colon, rest = name.partition(":")
    if not colon:
        net = _built_in(name, **sizes)
    elif library == "torchvision":
        net = _from_torchvision(rest, **sizes)
    elif library == "timm":
        net = _from_timm(rest, **sizes)
    else:
        net = call(resolve(name, ZooError), name, sizes, ZooError, always=("num_classes",))
        if not isinstance(net, nn.Module):
            raise ZooError(f"{name} returned a {type(net).__name__}; expected an nn.Module")
    _check(name, net, **sizes)
    return net


def _built_in(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    lower = name.lower()
    if match := re.fullmatch(r"densenet-bc-([1-9]\d*)-(\d+)", lower):
        growth, layers = int(match[1]), _repeats(name, int(match[2]), 4)
        return DenseNet(growth, layers, num_classes, in_channels)
    if match := re.fullmatch(r"wrn-(\d+)-([1-9]\d*)", lower):
        blocks, width = _repeats(name, int(match[1]), 4), int(match[2])
        return WideResNet(width, blocks, num_classes, in_channels)
    if lower == "vgg-16-bn":
        return VGG(num_classes, in_channels, image_size)
    if match := re.fullmatch(r"resnet-(\d+)", lower):
        return ResNet(_repeats(name, int(match[1]), 2), num_classes, in_channels)
    raise ZooError(f"no network is named {name!r}; expected one of {', '.join(FORMS)}")


def _repeats(name: str, depth: int, rest: int) -> int:
    """n of a depth of 6n + rest: three stages of n modules of two convolutions, and `rest` layers around them."""
    n, odd = divmod(depth - rest, 6)
    if odd or n < 1:
        below, above = (6 * max(1, i) + rest for i in (n, n + 1))
        near = f"{below} and {above}" if below < above else f"{above}"
        raise ZooError(f"{name}: depth {depth} is not 6n + {rest} with n >= 1; the nearest: {near}")
    return n


def _from_torchvision(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    models = optional("torchvision", _remedy("torchvision"), ZooError).models
    known = models.list_models(module=models)  # the classifiers; segmenters and detectors have modules of their own
    if name not in known:
        raise ZooError(_unknown("torchvision", name, known))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Unset, init_weights warns that its default will change; this is the default.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    with _refusals(f"torchvision:{name}", in_channels, image_size):
        net: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _rebuild_stem(net, in_channels)
    return net


def _rebuild_stem(net: nn.Module, in_channels: int) -> None:
    name, old = next((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # a pair, which the stub gives as a tuple of any length
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=False,
    )
    new.bias = old.bias
    nn.init.normal_(new.weight, std=old.weight.std().item() * (old.in_channels / in_channels) ** 0.5)
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)


def _from_timm(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    timm = optional("timm", _remedy("timm torchvision"), ZooError)
    if not timm.is_model(name):
        raise ZooError(_unknown("timm", name, timm.list_models()))
    config = timm.models.get_pretrained_cfg(name)
    options = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    with _refusals(f"timm:{name}", in_channels, image_size):
        net: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
        )
    return net


def _remedy(packages: str) -> str:
    built_in = ", ".join(form for form in FORMS if ":" not in form)
    return f"pip install {packages} (built for torch {torch.__version__}), or choose a built-in network: {built_in}"


def _unknown(library: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f"{library} has no classifier named {name!r}; " + (
        f"near it: {', '.join(near)}" if near else f"see {library}'s list_models()"
    )


@contextmanager
def _refusals(name: str, in_channels: int, image_size: int) -> Iterator[None]:
    """What a network raises about the geometry of its images, as a ZooError."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as cause:
        raise ZooError(
            f"{name} can't take images of {in_channels} x {image_size} x {image_size} ({one_line(cause)}); "
            "use larger images, or a network made for small ones, such as densenet-bc-12-40"
        ) from cause


def _check(name: str, net: nn.Module, num_classes: int, in_channels: int, image_size: int) -> None:
    """One image through the network as if it were in eval mode, to see its geometry and its logits."""
    modes = {module: module.training for module in net.modules()}
    parameter = next(net.parameters(), None)
    image = torch.zeros(1, in_channels, image_size, image_size, device=None if parameter is None else parameter.device)
    net.eval()
    with torch.no_grad(), _refusals(name, in_channels, image_size):
        logits = net(image)
    for module, training in modes.items():
        module.training = training
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise ZooError(f"{name} returned {shape} for one image; expected logits of shape {(1, num_classes)}")
