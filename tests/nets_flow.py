"""Awkward networks, by what flows between their units: skips, lists and dictionaries, tuples, loose parameters.

As in `nets.py`, all have at least four units.
"""

from typing import Any

import torch
import torch.nn.functional as F
from nets import IMAGES, Call, ConvNorm, Head
from torch import Generator, Tensor, nn


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + self.out(y.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class PositionEmbedding(nn.Module):
    """Parameters that the root reads: a class token and positions; dropout between them and the first block."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.layers = nn.ModuleList(Encoder(width) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down1, self.down2 = ConvNorm(3, 6), ConvNorm(6, 8, 2), ConvNorm(8, 12, 2)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.merge1 = ConvNorm(16, 8)
        self.up2 = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU())
        self.merge2, self.out = ConvNorm(12, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.stem(x)
        half = self.down1(full)
        x = self.merge1(torch.cat([self.up1(self.down2(half)), half], 1))
        return self.out(self.merge2(torch.cat([self.up2(x), full], 1)))


class ListLoop(nn.Module):
    """Modules in lists and dictionaries, features gathered in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8)
        self.parts = nn.ModuleDict(
            {
                "convs": nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(4)),
                "norms": nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4)),
            }
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.full((8, 1, 1), 0.5)) for _ in range(4))
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        x = self.stem(x)
        for conv, norm, scale in zip(self.parts["convs"], self.parts["norms"], self.scales, strict=True):
            x = F.relu(norm(conv(x))) * scale + x
            features.append(x)
        return self.head(torch.cat(features, 1))


class Recurrent(nn.Module):
    """Integer tokens, recurrent layers with their dropout, attention: modules that return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.a, self.b = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2), nn.GRU(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, (h, _) = self.a(self.embed(tokens))
        x, _ = self.b(x + h[-1][:, None])
        y, _ = self.attend(x, x, x, need_weights=False)
        return self.fc(self.norm(x + y).mean(1))


def tokens(generator: Generator, step: int) -> Call:
    return Call((torch.randint(0, 11, (IMAGES, 7), generator=generator),), {})


class Volumes(nn.Module):
    """1-d and 3-d convolutions, and batch norm on (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv3d(3, 6, 3, 1, 1), nn.BatchNorm3d(6), nn.ReLU())
        self.b = nn.Sequential(nn.Conv1d(6, 8, 3, 2, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.c = nn.Sequential(nn.ConvTranspose1d(8, 4, 2, 2, groups=2), nn.BatchNorm1d(4), nn.ReLU())
        self.d = nn.Sequential(nn.Linear(128, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.d(self.c(self.b(self.a(x.view(*x.shape[:2], 2, 4, 8)).mean(2).flatten(2))).flatten(1)))


class Pyramid(nn.Module):
    """Several features in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(8, 8), ConvNorm(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"deep": self.b(x), "others": [self.a(x), x]}


class ManyOutputs(nn.Module):
    """Containers between units; the network returns its input, None and a number among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = ConvNorm(3, 8), Pyramid(), Pyramid(), ConvNorm(8, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.a(self.stem(x))
        second = self.b(first["others"][0])
        logits = self.head(self.c(first["deep"] + second["deep"] + first["others"][1] + second["others"][0]))
        return {"image": x, "nothing": None, "features": (second["others"][1], [logits]), "scale": 3}
