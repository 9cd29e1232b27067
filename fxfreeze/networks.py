"""The FreezeOut paper's networks and a CIFAR ResNet: images [B, in_channels, H, W] -> logits [B, num_classes].

Each is a stem convolution, stages of blocks (every block a module), and a linear layer after global average pooling.
Convolutions have no bias and start from He's normal distribution with the fan out, as in the published DenseNet, WRN
and FreezeOut code; norms start at 1 and 0, residual branches included; the linear layer's bias starts at 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _conv1x1(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False)


def _initialise(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class DenseLayer(nn.Module):
    """[B, C, H, W] -> [B, C + growth, H, W]: the input's channels, then `growth` new ones."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv1x1(channels, 4 * growth)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        new = self.conv2(F.relu(self.norm2(new)))
        return torch.cat((x, new), 1)


class Transition(nn.Module):
    """[B, C, H, W] -> [B, C // 2, H // 2, W // 2]: the compression by half that the C of DenseNet-BC stands for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = _conv1x1(channels, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC-k-L (Huang, Liu, van der Maaten, Weinberger 2017, arXiv 1608.06993): three dense blocks."""

    def __init__(self, growth: int, layers: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = _conv3x3(in_channels, channels)
        self.block1 = self._block(channels, growth, layers)
        channels += layers * growth
        self.transition1 = Transition(channels)
        channels //= 2
        self.block2 = self._block(channels, growth, layers)
        channels += layers * growth
        self.transition2 = Transition(channels)
        channels //= 2
        self.block3 = self._block(channels, growth, layers)
        channels += layers * growth
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    @staticmethod
    def _block(channels: int, growth: int, layers: int) -> nn.Sequential:
        return nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.stem(x)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))  # type: ignore[no-any-return]


class WideBlock(nn.Module):
    """[B, C, H, W] -> [B, out, H / stride, W / stride]: a pre-activation residual block.

    Where the shape changes, the 1x1 shortcut reads the activated input, as in the authors' code.
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv3x3(channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        same = channels == out_channels and stride == 1
        self.shortcut = None if same else _conv1x1(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        branch = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return (x if self.shortcut is None else self.shortcut(active)) + branch  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN-d-k (Zagoruyko, Komodakis 2016, arXiv 1605.07146): three groups of blocks, 16k, 32k and 64k channels."""

    def __init__(self, width: int, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = _conv3x3(in_channels, 16)
        self.group1 = self._group(16, 16 * width, blocks, 1)
        self.group2 = self._group(16 * width, 32 * width, blocks, 2)
        self.group3 = self._group(32 * width, 64 * width, blocks, 2)
        self.norm = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        _initialise(self)

    @staticmethod
    def _group(channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(WideBlock(channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group3(self.group2(self.group1(self.stem(x))))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """[B, C, H, W] -> [B, out, H / stride, W / stride]: a post-activation residual block.

    Where the shape changes, the shortcut has no parameters: every second pixel, and zeros for the new channels (the
    paper's option A, which its CIFAR networks use).
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - channels

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + branch)


class ResNet(nn.Module):
    """CIFAR ResNet (He, Zhang, Ren, Sun 2016, arXiv 1512.03385, section 4.2): three groups, 16, 32 and 64 channels."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = _conv3x3(in_channels, 16)
        self.norm = nn.BatchNorm2d(16)
        self.group1 = self._group(16, 16, blocks, 1)
        self.group2 = self._group(16, 32, blocks, 2)
        self.group3 = self._group(32, 64, blocks, 2)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _group(channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.group3(self.group2(self.group1(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class ConvLayer(nn.Module):
    """[B, C, H, W] -> [B, out, H, W]: 3x3 convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, out_channels)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class VGG(nn.Module):
    """VGG-16 (Simonyan, Zisserman 2015, arXiv 1409.1556, D) with batch norm, in the form used for CIFAR.

    The classifier is one linear layer, since a 32 x 32 image leaves 512 x 1 x 1. A pool that would leave no pixel of a
    smaller image is left out: 28 x 28 images meet four of the five, 8 x 8 images three.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = in_channels, image_size
        for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
            for out_channels in stage:
                layers.append(ConvLayer(channels, out_channels))
                channels = out_channels
            if size > 1:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]
