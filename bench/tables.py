"""README's table of kernels, from the committed report of their machine code.

    fxfreeze kernels report --json > bench/results/kernels.json
    python -m bench.tables

The table shows the tile that each shape class of bf16 gets, of all that the report holds.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "bench" / "results" / "kernels.json"
BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"
DTYPE = "bf16"
LEGEND = """A tile's pixels x output channels x input channels (of a kernel without a sum, x channels), its warps, the
registers of a thread, the shared memory of a block. FLOPs / byte: of DRAM, each tensor read or written once."""

Record = dict[str, Any]


def main() -> None:
    """Writes the table into README.md, in place of the one between the markers."""
    readme = ROOT / "README.md"
    readme.write_text(renewed(readme.read_text(), json.loads(REPORT.read_text())))


def renewed(text: str, records: Sequence[Record]) -> str:
    """The text with the table between its markers; ValueError without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md has no place for the table, or several; mark one with {BEGIN} and {END}")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{table(records)}\n{END}", text)


def table(records: Sequence[Record]) -> str:
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
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([*lines, "", LEGEND])


def _head(arch: str, records: Sequence[Record]) -> str:
    cores = {record["tensor_core"] for record in records if record["arch"] == arch} - {None}
    return f"{arch} ({', '.join(sorted(cores))})"


def _cell(record: Record) -> str:
    tile, warps, *_ = record["config"].split(", ")
    return f"{tile} w{warps.split()[0]}, {record['registers']}, {record['shared'] / 1024:.0f} KiB"


if __name__ == "__main__":
    main()
