"""Whether storing pays: measured times of computing and of storing, against how often the rows will be read."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fxfreeze.cache.columns import Column
from fxfreeze.cache.encoding import Encoding
from fxfreeze.cache.errors import CacheError
from fxfreeze.cache.files import translated
from fxfreeze.cache.served import Called, Served, Yielded
from fxfreeze.cache.shelf import Shelf
from fxfreeze.cache.store import Store
from fxfreeze.cache.writer import StoreWriter
from fxfreeze.randomness import random_state_kept
from fxfreeze.rows import batch_size, resized
from fxfreeze.schedule import until_next_freeze
from fxfreeze.sizes import bytes_text, seconds_text

if TYPE_CHECKING:
    from fxfreeze.chain import Chain
    from fxfreeze.model import FreezableModel

__all__ = ["Worth", "computed", "stored"]

LEAST_FREE = 0.05  # of a disk: a cache never takes it
_ROUNDS = 3
_MORE = 4  # times a batch's rows in the larger of two trial stores


class Worth:
    """shelf: where; when: "auto" or "always"; max_bytes: of a store."""

    def __init__(
        self,
        model: FreezableModel,
        shelf: Shelf,
        *,
        when: Literal["auto", "always"],
        max_bytes: int | None,
        store_dtype: torch.dtype | None,
        say: Callable[[str], None],
    ) -> None:
        self.model = model
        self.shelf = shelf
        self.when = when
        self.max_bytes = max_bytes
        self.store_dtype = store_dtype
        self.say = say

    def pays(self, call: Called, batch: Yielded | Served, *, first: bool) -> bool:
        """Whether to fill a store at the chain's depth, said to the user in one line.

        first: there is none to go on from, so that all later ones are made from this one.
        """
        chain = call.chain
        start, values, inputs = _known(call, batch)
        seconds, rows = computed(chain, start, values, inputs)
        size = self.shelf.length * sum(column.width for column in Encoding.of(rows, self.store_dtype).columns)
        try:
            reason = self._no_room(size)
            text, pays = (reason, False) if reason else self._weighed(seconds / len(rows[0]), rows, first, batch.keys)
        except CacheError as error:
            text, pays = str(error), False
        what = f"storing depth {chain.depth} ({bytes_text(size)})" if pays else f"depth {chain.depth} is not stored"
        self.say(f"{what}: {text}")
        return pays

    def _weighed(self, compute: float, rows: list[Tensor], first: bool, keys: Tensor) -> tuple[str, bool]:
        if self.when == "always":
            return 'when="always"', True
        write, read = stored(self.shelf.directory, rows, self.store_dtype)
        reads = self._reads(len(keys), first)
        until = "to the end of training" if first else "until the next freeze"
        times = "as often as training goes on" if math.isinf(reads) else f"{_times(reads)} {until}"
        saved = compute if not first else compute - read  # a shallower store is read as it is
        text = (
            f"a sample takes {seconds_text(compute)} to compute, {seconds_text(read)} to read, {seconds_text(write)} to write, "
            f"and will be read {times}"
        )
        return text, saved > 0 and saved * reads > write

    def _reads(self, batch: int, first: bool) -> float:
        """How often each sample will be read once the store is complete."""
        step = self.model.step
        if step is None:
            return math.inf
        schedule, units = self.model.schedule, self.model.units
        end = getattr(schedule, "total_steps", None)
        if first:
            steps = math.inf if end is None else end - step
        else:
            steps = until_next_freeze(schedule, units, step)
            # Its rows are what the next store is made from, whenever that is.
            return max(1.0, steps * batch / self.shelf.length)
        return steps * batch / self.shelf.length - 1

    def _no_room(self, size: int) -> str | None:
        if self.max_bytes is not None and size > self.max_bytes:
            return f"it takes {bytes_text(size)}, and max_bytes is {bytes_text(self.max_bytes)}"
        folder = next(
            path for path in (self.shelf.directory, *self.shelf.directory.absolute().parents) if path.exists()
        )
        disk = shutil.disk_usage(folder)
        if size > disk.free - LEAST_FREE * disk.total:
            return (
                f"it takes {bytes_text(size)}, and the disk has {bytes_text(disk.free)} free, of which {LEAST_FREE:.0%} of its "
                f"{bytes_text(disk.total)} stay so"
            )
        return None


def _times(reads: float) -> str:
    return f"about {reads:.0f} times" if reads >= 2.95 else f"{reads:.1f} times"


def _known(call: Called, batch: Yielded | Served) -> tuple[int, Sequence[Any], Sequence[Tensor]]:
    """(depth, values there, inputs of as many samples) of the largest part of a batch that is at one depth."""
    if isinstance(batch, Yielded):
        return 0, call.tensors, call.tensors
    part = max(batch.parts(*call), key=lambda part: len(part.rows[0]))
    inputs = resized(call.tensors, len(part.rows[0]))
    if part.depth == 0:
        return 0, part.rows, inputs
    return part.depth, call.chain.frontier(part.depth).completed(part.rows, inputs), inputs


def computed(chain: Chain, start: int, values: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Seconds from there to the chain's depth, and the rows there. Random state is left as found."""
    seconds = []
    depth, found = start, values
    with random_state_kept():
        for _ in range(1 + _ROUNDS):  # the first one builds, and warms up
            began = _now(inputs)
            if start < chain.depth:
                *_, (depth, found) = chain.advance(start, values, inputs)
            seconds.append(_now(inputs) - began)
    return min(seconds[1:]), chain.frontier(depth).chosen(found, inputs)


def stored(directory: Path, rows: list[Tensor], store_dtype: torch.dtype | None) -> tuple[float, float]:
    """Seconds a row to write and to read, on the disk that the store will be on. CacheError."""
    encoding = Encoding.of(rows, store_dtype)
    encoded = {name: value.cpu() for name, value in encoding.encode(rows).items()}
    few, read = _trial(directory, encoding.columns, encoded)
    more, _ = _trial(directory, encoding.columns, {k: torch.cat([v] * _MORE) for k, v in encoded.items()})
    count = batch_size(list(encoded.values()))
    assert count is not None
    return max(more - few, 0.0) / ((_MORE - 1) * count), read / count


def _trial(directory: Path, columns: Sequence[Column], values: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds to write a store of these rows and to read it."""
    count = len(next(iter(values.values())))
    with translated(directory, "trying out"):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=directory) as folder:
            began = time.perf_counter()
            with StoreWriter(folder, identity={}, length=count, columns=columns) as writer:
                writer.append(range(count), values)
            seconds, store = time.perf_counter() - began, Store(folder)
            reads = []
            for _ in range(1 + _ROUNDS):
                began = time.perf_counter()
                store.read(torch.randperm(count, generator=torch.Generator().manual_seed(0)))
                reads.append(time.perf_counter() - began)
    return seconds, min(reads[1:])


def _now(tensors: Sequence[Tensor]) -> float:
    if tensors and tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    return time.perf_counter()
