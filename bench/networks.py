"""The networks that are measured: the FreezeOut paper's four, and three of torchvision."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from bench.scale import DEVICE, SMALL
from fxfreeze import zoo

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """make: a new one; size: of its images; batch: of a measurement, on a CPU and on CUDA."""

    make: Callable[[], nn.Module]
    size: int
    batch: int

    def drawn(self) -> tuple[nn.Module, Tensor, Tensor]:
        """(the network, a batch of images, labels), the same each time; channels_last."""
        torch.manual_seed(0)
        net = self.make().to(DEVICE, memory_format=torch.channels_last)
        x = torch.randn(self.batch, 3, self.size, self.size, device=DEVICE)
        y = torch.randint(0, CLASSES, (self.batch,), device=DEVICE)
        return net, x.contiguous(memory_format=torch.channels_last), y

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, self.size, self.size


def _built_in(name: str, size: int = 32, batch: int = 32) -> Network:
    make = partial(zoo.load, name, num_classes=CLASSES, in_channels=3, image_size=size)
    return Network(make, *_scale(size, batch))


def _torchvision(name: str, size: int, batch: int, **options: float) -> Network:
    make = partial(getattr(torchvision.models, name), num_classes=CLASSES, **options)
    return Network(make, *_scale(size, batch))


def _scale(size: int, batch: int) -> tuple[int, int]:
    """A GPU gets larger images, but those of the networks that are made for 32 pixels, and larger batches."""
    if DEVICE.type != "cuda":
        return size, batch
    return (size, 128) if size == 32 else (224, 64)


NETWORKS: dict[str, Network] = (
    {"resnet-8": _built_in("resnet-8", 16, 4)}
    if SMALL
    else {
        "densenet-bc-12-100": _built_in("densenet-bc-12-100"),
        "wrn-40-4": _built_in("wrn-40-4"),
        "vgg-16-bn": _built_in("vgg-16-bn"),
        "resnet18": _torchvision("resnet18", 64, 32),
        "mobilenet_v2": _torchvision("mobilenet_v2", 96, 32, dropout=0.0),
        "resnet50": _torchvision("resnet50", 64, 16),
        "densenet121": _torchvision("densenet121", 64, 16),
    }
)
