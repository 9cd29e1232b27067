"""What the activation store costs.

Gathering: one epoch of random batches, 64 of 128 rows of 32 KiB, from files that the system holds in memory, into one
tensor, as a loader would. Ratios are to the faster of torch's index_select with one and two threads, on the same rows in
memory. The bars: a store that verifies every row reaches at least 70% of that speed (a ratio of at most 1.43), one that
has verified each row once since it was opened at least 95% (at most 1.05).
"""

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.budget import begin
from bench.clock import interleave
from bench.roofline import Work
from bench.rows import Subject
from bench.scale import THREADS, scaled
from fxfreeze.cache import Column, Store, StoreWriter
from fxfreeze.cache.memory import tensor_bytes

ROWS, WIDTH, BATCH = scaled((8192, 32 * 1024, 128), (256, 1024, 32))
ROUNDS = scaled(15, 2)
BASELINES = ("index_select, 1 thread", "index_select, 2 threads")
CONTENDERS = (
    *BASELINES,
    "store, verified",
    "store, once",
    "store, once, 1 thread",
    "store, never",
    "np.memmap",
    "np.memmap, take",
    "lmdb",
    "safetensors",
)

Gather = Callable[[Tensor, Tensor], object]  # of samples (BATCH,) int64 into out (BATCH, WIDTH) uint8


class Epoch:
    """All batches by one gather, timed; `wrong` once a batch was not the rows that it should be."""

    def __init__(self, gather: Gather, threads: int, source: Tensor, batches: tuple[Tensor, ...], out: Tensor) -> None:
        self.threads = threads
        self.wrong = False
        self._gather = gather
        self._source, self._batches, self._out = source, batches, out
        for samples in batches:
            self._check(samples)

    def __call__(self) -> float:
        # The threads of before end and new ones begin in the first parallel call after this: the check, untimed.
        torch.set_num_threads(self.threads)
        self._check(self._batches[0])
        began = time.perf_counter()
        for samples in self._batches:
            self._gather(samples, self._out)
        seconds = time.perf_counter() - began
        self.wrong |= not torch.equal(self._out, self._source[self._batches[-1]])
        return seconds

    def _check(self, samples: Tensor) -> None:
        self._out.zero_()  # what another contender left there would be right
        self._gather(samples, self._out)
        self.wrong |= not torch.equal(self._out, self._source[samples])


def _select(source: Tensor) -> Gather:
    return lambda samples, out: torch.index_select(source, 0, samples, out=out)


def _store(folder: Path, verify: str) -> Gather:
    store = Store(folder, verify=verify)
    for samples in torch.arange(ROWS).split(BATCH):
        store.read(samples)  # for "once": the rows' first time is over
    return lambda samples, out: store.read(samples, out={"x": out})


def _memmap_index(path: Path) -> Gather:
    rows = np.memmap(path, np.uint8, "r", shape=(ROWS, WIDTH))

    def gather(samples: Tensor, out: Tensor) -> None:
        out.numpy()[:] = rows[samples.numpy()]

    return gather


def _memmap_take(path: Path) -> Gather:
    """Without the copy in between: take writes to `out` itself where it need not check the indices first."""
    rows = np.memmap(path, np.uint8, "r", shape=(ROWS, WIDTH))
    return lambda samples, out: np.take(rows, samples.numpy(), axis=0, out=out.numpy(), mode="clip")


def _lmdb(environment: lmdb.Environment) -> Gather:
    def gather(samples: Tensor, out: Tensor) -> None:
        target = tensor_bytes(out)
        with environment.begin(buffers=True) as transaction:
            for row, sample in enumerate(samples.tolist()):
                target[row * WIDTH : (row + 1) * WIDTH] = transaction.get(sample.to_bytes(8, "big"))

    return gather


def _safetensors(path: Path, stack: contextlib.ExitStack) -> Gather:
    rows = stack.enter_context(safe_open(path, framework="pt")).get_slice("x")

    def gather(samples: Tensor, out: Tensor) -> None:
        for row, sample in zip(out, samples.tolist(), strict=True):
            row.copy_(rows[sample])

    return gather


def _write(source: Tensor, folder: Path) -> None:
    with StoreWriter(folder / "store", identity={}, length=ROWS, columns=[Column("x", torch.uint8, (WIDTH,))]) as store:
        for samples in torch.arange(ROWS).split(BATCH):
            store.append(samples, {"x": source[samples]})
    source.numpy().tofile(folder / "rows")
    save_file({"x": source}, folder / "x.safetensors")
    with (
        lmdb.open(str(folder / "lmdb"), map_size=4 * source.nbytes) as environment,
        environment.begin(write=True) as put,
    ):
        for sample, row in enumerate(source):
            put.put(sample.to_bytes(8, "big"), tensor_bytes(row))


@pytest.fixture(scope="module")
def gathered() -> Iterator[tuple[dict[str, Epoch], dict[str, list[float]]]]:
    """The contenders and their times. Half a minute, 1.5 GB of memory, 1.1 GB of disk."""
    begin()
    torch.manual_seed(0)
    source = torch.randint(0, 256, (ROWS, WIDTH), dtype=torch.uint8)
    batches, out = torch.randperm(ROWS).split(BATCH), torch.empty(BATCH, WIDTH, dtype=torch.uint8)
    contender = functools.partial(Epoch, source=source, batches=batches, out=out)
    with contextlib.ExitStack() as stack:
        # /tmp may be memory, /var/tmp is on a disk.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        _write(source, folder)
        environment = stack.enter_context(lmdb.open(str(folder / "lmdb"), readonly=True, lock=False))
        contenders = {
            "index_select, 1 thread": contender(_select(source), 1),
            "index_select, 2 threads": contender(_select(source), 2),
            "store, verified": contender(_store(folder / "store", "always"), THREADS),
            "store, once": contender(_store(folder / "store", "once"), THREADS),
            "store, once, 1 thread": contender(_store(folder / "store", "once"), 1),
            "store, never": contender(_store(folder / "store", "never"), THREADS),
            "np.memmap": contender(_memmap_index(folder / "rows"), THREADS),
            "np.memmap, take": contender(_memmap_take(folder / "rows"), THREADS),
            "lmdb": contender(_lmdb(environment), THREADS),
            "safetensors": contender(_safetensors(folder / "x.safetensors", stack), THREADS),
        }
        yield contenders, interleave(contenders, ROUNDS)
        torch.set_num_threads(THREADS)


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_gather(row, benchmark, gathered, contender: str) -> None:
    contenders, times = gathered
    # Rows are right or wrong, to the bit.
    error = float("inf") if contenders[contender].wrong else 0.0
    subject = Subject(torch.uint8, (BATCH, WIDTH), error, 0.0, Work(0, 2 * ROWS * WIDTH), torch.device("cpu"))
    benchmark.group = f"gather, {ROWS // BATCH} random batches of {BATCH} rows x {WIDTH // 1024} KiB"
    best = min(BASELINES, key=lambda name: statistics.median(times[name]))
    row(times, contender, best, subject, threads=contenders[contender].threads)
