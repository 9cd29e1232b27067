"""The machine code of the kernels, from `fxfreeze kernels report --json`."""

from collections.abc import Sequence
from typing import Any

from bench.markdown import table

DTYPE = "bf16"
LEGEND = """A tile's pixels x output channels x input channels (of a kernel without a sum, x channels), its warps, the
registers of a thread, the shared memory of a block. FLOPs / byte: of DRAM, each tensor read or written once."""

Record = dict[str, Any]


def kernels(records: Sequence[Record]) -> str:
    """A row for each kernel and shape class, a column for each architecture, and what the cells mean."""
    shown = [record for record in records if record["choice"] and record["dtype"] == DTYPE]
    archs = list(dict.fromkeys(record["arch"] for record in shown))
    classes: dict[tuple[str, int | None], dict[str, Record]] = {}
    for record in shown:
        classes.setdefault((record["kernel"], record["outputs"]), {})[record["arch"]] = record
    heads = ["kernel", "outputs", "FLOPs / byte", *(_head(arch, shown) for arch in archs)]
    rows = [
        [f"`{kernel}`", f"up to {most}" if most else "any", f"{by_arch[archs[0]]['intensity']:.3g}"]
        + [_cell(by_arch[arch]) for arch in archs]
        for (kernel, most), by_arch in classes.items()
    ]
    return "\n".join([table(heads, rows), "", LEGEND])


def _head(arch: str, records: Sequence[Record]) -> str:
    cores = {record["tensor_core"] for record in records if record["arch"] == arch} - {None}
    return f"{arch} ({', '.join(sorted(cores))})"


def _cell(record: Record) -> str:
    tile, warps, *_ = record["config"].split(", ")
    return f"{tile} w{warps.split()[0]}, {record['registers']}, {record['shared'] / 1024:.0f} KiB"
