"""How the frozen part computes: on which device type, and in which dtype."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from fxfreeze.sizes import dtype_text

__all__ = ["Computation"]


@dataclass(frozen=True)
class Computation:
    """How a segment computes: on which device type, and under which autocast.

    autocast: the dtype, or None for off; overrides: this is not what the caller's own autocast says; quantized: in int8,
    with autocast off, as far as it can be.
    """

    device: str
    autocast: torch.dtype | None
    overrides: bool = False
    quantized: bool = False

    @classmethod
    def current(cls, device: str, precision: torch.dtype | None) -> "Computation":
        """What a forward on ``device`` uses now; ``precision`` overrides autocast for the frozen part."""
        active = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if precision is None:
            return cls(device, active)
        quantized = precision is torch.int8
        wanted = None if quantized or precision is torch.float32 else precision
        return cls(device, wanted, wanted != active, quantized)

    @property
    def dtype_name(self) -> str:
        """ "model" for what the model itself computes in."""
        return "int8" if self.quantized else dtype_text(self.autocast) if self.autocast else "model"

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What to run the rewritten segment under."""
        if not self.overrides:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
