"""What the machine code of each shipped tile is like: a list of plain records, one for each kernel, tile and dtype.

A record tells the worse of a kernel's barest and fullest forms, where channels and strides are multiples of 16 bytes;
``load_bits`` is of the barest, which loads nothing but its operands. Other forms, and units, are left to the tests.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from fxfreeze.kernels import configs
from fxfreeze.kernels.aot import FORMS, Variant, look
from fxfreeze.kernels.architectures import ARCHITECTURES
from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.criteria import dtypes, faults
from fxfreeze.kernels.machine_code import MachineCode
from fxfreeze.kernels.measured import triton_version
from fxfreeze.kernels.traffic import traffic

__all__ = ["Entry", "Record", "report", "shipped", "variants"]

Record = dict[str, Any]
_JOBS = 2  # beyond it, memory is dearer than the minute saved


@dataclass(frozen=True)
class Entry:
    """A tile of the tables. most: output channels that it serves; choice: not only for ``tune`` to choose."""

    kernel: str
    config: Config
    arch: int
    dtype: str
    most: int
    choice: bool


def shipped(arch: int) -> list[Entry]:
    """All tiles of an architecture, under the triton that is here."""
    entries: dict[tuple[str, Config, str], Entry] = {}
    for kernel in FORMS:
        for dtype in dtypes(kernel):
            for most, tiles in configs.candidates(kernel, arch, dtype).items():
                for place, config in enumerate(tiles):
                    entry = Entry(kernel, config, arch, dtype, most, choice=not place)
                    entries.setdefault((kernel, config, dtype), entry)
    return list(entries.values())


def variants(entry: Entry, forms: Sequence[str], unit: int | None = None) -> list[Variant]:
    """What is compiled of a tile; unit: None for the widest."""
    widest = 8 if entry.dtype in ("fp16", "bf16") else 4
    config = dataclasses.replace(entry.config, rows=1)  # of which the machine code knows nothing
    return [Variant(entry.kernel, config, entry.arch, entry.dtype, form, unit or widest) for form in forms]


def report(archs: Sequence[int], progress: Callable[[int, int], None] = lambda done, of: None) -> list[Record]:
    """The records of all tiles; ``progress`` is told how many of how many compilations are done."""
    entries = [entry for arch in archs for entry in shipped(arch)]
    wanted = {variant: None for entry in entries for variant in variants(entry, _ends(entry))}
    codes = _look_at_all(list(wanted), progress)
    return [_record(entry, {variant: codes[variant] for variant in variants(entry, _ends(entry))}) for entry in entries]


def _ends(entry: Entry) -> tuple[str, str]:
    first, *_, last = FORMS[entry.kernel]
    return first, last


def _look_at_all(wanted: Sequence[Variant], progress: Callable[[int, int], None]) -> dict[Variant, MachineCode]:
    # Fresh processes: those of a fork would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    codes = {}
    with ProcessPoolExecutor(min(_JOBS, os.cpu_count() or 1), mp_context=context) as pool:
        running = {pool.submit(look, variant): variant for variant in wanted}
        for done, future in enumerate(as_completed(running), 1):
            codes[running[future]] = future.result()
            progress(done, len(wanted))
    return codes


def _record(entry: Entry, codes: dict[Variant, MachineCode]) -> Record:
    bare = next(iter(codes.values()))
    moved, gpu = traffic(entry.kernel, entry.config, entry.dtype, entry.most), ARCHITECTURES[entry.arch]
    ridge = gpu.ridge(entry.dtype)
    return {
        "kernel": entry.kernel,
        "config": str(entry.config),
        "arch": f"sm_{entry.arch}",
        "dtype": entry.dtype,
        "outputs": entry.most if entry.most < configs.ALL else None,
        "choice": entry.choice,
        "registers": max(code.registers for code in codes.values()),
        "spills": max(code.spills for code in codes.values()),
        "shared": max(code.shared for code in codes.values()),
        "tensor_core": bare.tensor_core,
        "serialised": any(code.serialised for code in codes.values()),
        "load_bits": bare.load_bits,
        "asynchronous": all(code.asynchronous for code in codes.values()),
        "faults": sorted({fault for variant, code in codes.items() for fault in faults(variant, code)}),
        **{f"{name}_per_output": round(value, 2) for name, value in dataclasses.asdict(moved).items()},
        "intensity": round(moved.intensity, 2),
        "ridge": round(ridge, 1),
        "of_peak": round(min(1.0, moved.intensity / ridge), 3),
        "triton": triton_version(),
    }
