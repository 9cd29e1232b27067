"""Regions of a forward where gradients or autocast are switched, which operators in a graph would not show."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Region", "without_grad"]


class Region:
    """The gradient and autocast modes at one moment."""

    def __init__(self) -> None:
        self.gradients = torch.is_grad_enabled()
        self.autocast = [
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            for device in ("cpu", "cuda")
        ]


def without_grad(value: Any) -> Any:
    """``value``, its tensors detached: what an operator under ``torch.no_grad()`` gives."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)
