"""Where a complete store is kept while it serves: on the disk, in memory, or on the device that trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.gather import copy_rows
from fxfreeze.cache.memory import tensor_bytes
from fxfreeze.cache.store import Store
from fxfreeze.sizes import bytes_text

__all__ = ["DEVICE_SHARE", "RAM_SHARE", "Placement", "Resident"]

DEVICE_SHARE = 0.25  # of a GPU's memory that a store may take, if twice as much is free
RAM_SHARE = 0.25  # of the memory that is available
_ROWS = 4096  # read at once

Wanted = Literal["auto", "device", "ram", "disk"]


class Resident:
    """All rows of a complete store in memory, each verified once. tier: "device" or "ram"."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.tier = "ram" if device.type == "cpu" else "device"
        self._values: dict[str, Any] = {column.name: _empty(column, store.length, device) for column in store.columns}
        here = {name: value for name, value in self._values.items() if isinstance(value, Tensor) and value.is_cpu}
        for start in range(0, store.length, _ROWS):
            rows = range(start, min(start + _ROWS, store.length))
            read = store.read(rows, out={name: value[rows.start : rows.stop] for name, value in here.items()})
            for name in read.keys() - here.keys():
                held, value = self._values[name], read[name]
                if isinstance(held, Tensor):
                    held[rows.start : rows.stop] = value
                else:
                    held.extend(value)

    def read(self, keys: Tensor, out: dict[str, Tensor]) -> dict[str, Any]:
        """As Store.read; of ``out`` only what is in RAM is filled."""
        read: dict[str, Any] = {}
        for name, value in self._values.items():
            if not isinstance(value, Tensor):
                read[name] = [value[key] for key in keys.tolist()]
            elif value.is_cuda:
                read[name] = value.index_select(0, keys.to(value.device, non_blocking=True))
            else:
                read[name] = target = out.get(name, value.new_empty((len(keys), *value.shape[1:])))
                width = value[:1].nbytes
                # Not by torch: the threads that it would start beside those of training are worse than one.
                copy_rows([key * width for key in keys.tolist()], width, tensor_bytes(value), tensor_bytes(target))
        return read


def _empty(column: Column | Blob, length: int, device: torch.device) -> Tensor | list[bytes]:
    if isinstance(column, Blob):
        return []
    where = device if column.name.startswith("boundary.") else torch.device("cpu")
    return torch.empty((length, *column.shape), dtype=column.dtype, device=where)


class Placement:
    """wanted: "auto" for the fastest that has room; say: tells the user."""

    def __init__(self, wanted: Wanted, say: Callable[[str], None]) -> None:
        self.wanted = wanted
        self.say = say

    def resident(self, store: Store, device: torch.device) -> Resident | None:
        """The store in memory; None if it stays on the disk. CacheError."""
        size = sum(column.width for column in store.columns if isinstance(column, Column)) * store.length
        tier, why = self._choose(size, device)
        self.say(f"depth {store.identity['depth']} ({bytes_text(size)}) is read from {_NAMES[tier]}{why}")
        if tier == "disk":
            return None
        return Resident(store, device if tier == "device" else torch.device("cpu"))

    def _choose(self, size: int, device: torch.device) -> tuple[str, str]:
        if self.wanted == "disk":
            return "disk", ""
        if device.type == "cuda" and self.wanted in ("auto", "device"):
            free, total = torch.cuda.mem_get_info(device)
            if size <= DEVICE_SHARE * total and 2 * size <= free:
                return "device", ""
        available = _available()
        if size <= RAM_SHARE * available:
            return "ram", ""
        return "disk", f": it is more than {RAM_SHARE:.0%} of the {bytes_text(available)} of memory that are available"


_NAMES = {"disk": "the disk", "ram": "RAM", "device": "the device's memory"}


def _available() -> int:
    """Bytes of memory that could be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
